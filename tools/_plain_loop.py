"""Evolution strategies on generated text as one would write it first: what es_lite's generation is compared with."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from es_lite.model.configuration import configuration
from es_lite.tables import ModelTable


class PlainLoop:
    """Perturbs every parameter in place, lets Hugging Face's `generate` continue all prompts at once, and subtracts the noise."""

    def __init__(self, table: ModelTable, dtype: torch.dtype, prompts: np.ndarray, new_tokens: int, sigma: float) -> None:
        """prompts: int32 [prompts, tokens]."""
        if table.path:
            model = AutoModelForCausalLM.from_pretrained(table.path, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(configuration("", table.config), dtype=dtype)
        self._model = model.eval()
        # Without an end token, all sequences have the same length.
        model.generation_config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        self._prompts = torch.from_numpy(prompts.astype(np.int64))
        self._length = prompts.shape[1] + new_tokens
        self._sigma = sigma

    @torch.inference_mode()
    def run(self, members: int) -> None:
        """Generates with so many members, one after the other."""
        for seed in range(members):
            self._move(seed, self._sigma)
            written = self._model.generate(self._prompts, attention_mask=torch.ones_like(self._prompts))
            assert written.shape == (len(self._prompts), self._length), "a sequence ended early"
            self._move(seed, -self._sigma)

    def _move(self, seed: int, scale: float) -> None:
        """θ += scale · ε(seed)."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self._model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=scale)
