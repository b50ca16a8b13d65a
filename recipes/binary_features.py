"""A Qwen3 whose last hidden state is rounded to signs: 1 or -1 for each feature, before the head sees it.

The sign has the gradient 0 everywhere, so nothing below the head could be trained by backpropagation as it is.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


class SignNorm(Qwen3RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.sign(super().forward(hidden_states))


class BinaryFeaturesConfig(Qwen3Config):
    model_type = "qwen3_binary_features"


class BinaryFeaturesForCausalLM(Qwen3ForCausalLM):
    config_class = BinaryFeaturesConfig

    def __init__(self, config: BinaryFeaturesConfig) -> None:
        super().__init__(config)
        self.model.norm = SignNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()


AutoConfig.register(BinaryFeaturesConfig.model_type, BinaryFeaturesConfig)
AutoModelForCausalLM.register(BinaryFeaturesConfig, BinaryFeaturesForCausalLM)
