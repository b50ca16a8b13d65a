"""Tiny models of many architectures, and what Hugging Face's own forward scores when their weights are perturbed in numpy."""

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from es_lite.algorithm.formats import Storage
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.noise.place import Place
from es_lite.data.batch import Batch
from es_lite.model.layout import Factors, Layout, Tensor, skeleton
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import Perturbation
from es_lite.weights import working_copy
from es_lite.weights.parts import Part
from es_lite.weights.working_copy import WorkingCopy

SIGMA = 0.0123
PLUS = Perturbation(seed=2**64 - 3, step=7, pair=2, sigma=SIGMA, signs=(1,))
BOTH = Perturbation(seed=2**64 - 3, step=7, pair=2, sigma=SIGMA, signs=(1, -1))
LENGTHS = [20, 20, 17, 9, 4, 2]

COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_hidden_layers": 3,
}
ARCHITECTURES = {
    "qwen3": ("qwen3", {}),
    "qwen3-sliding": ("qwen3", SLIDING | {"use_sliding_window": True}),
    "qwen2": ("qwen2", {}),  # with biases
    "llama": ("llama", {}),
    "llama-biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 5}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", SLIDING | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", SLIDING),
    "gpt2": ("gpt2", {}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "phi": ("phi", {}),  # its head has a bias
    "gpt_neox": ("gpt_neox", {}),  # one matrix for queries, keys and values
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),  # positions are biases of attention
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),  # a convolution
    "mixtral": ("mixtral", EXPERTS),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
    "gpt_oss": (  # vectors beside linear maps, biases of experts
        "gpt_oss",
        {
            **EXPERTS,
            **{"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "deepseek_v3": (  # latent attention; the second block has experts
        "deepseek_v3",
        {
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
            **{"moe_intermediate_size": 48, "first_k_dense_replace": 1, "num_key_value_heads": 4},
            **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "head_dim": 8, "qk_nope_head_dim": 16},
            "v_head_dim": 16,
        },
    ),
    "jamba": (  # a state-space block, and one with attention and experts
        "jamba",
        {
            **{"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
        },
    ),
}


def config_of(name: str, tied: bool = True, attention: str | None = None, **changes) -> PretrainedConfig:
    """attention: an implementation; None is the model's own choice."""
    kind, keys = ARCHITECTURES[name]
    keys = (GPT2 if kind == "gpt2" else COMMON) | keys | changes
    config = AutoConfig.for_model(kind, **{"pad_token_id": None, **keys}, tie_word_embeddings=tied)
    config._attn_implementation = attention
    return config


def of_kind(perturbation: Perturbation, noise: NoiseKind) -> Perturbation:
    """The same perturbation with this kind of noise."""
    return replace(perturbation, kind=noise.NAME, rank=noise.RANK)


def batch_of(lengths: Sequence[int] = LENGTHS, vocabulary: int = 300) -> Batch:
    """Random samples of these lengths, longest first."""
    random = np.random.default_rng(len(lengths))
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = random.integers(0, vocabulary, length)
    return Batch(tokens, np.array(lengths, np.int32))


def part_of(shape: tuple[int, ...], storage: Storage, number: int = 3, sigma_factor: float = 1.0) -> Part:
    """A whole tensor of random values."""
    tensor = Tensor(f"tensor {number}", shape, number, sigma_factor, 1.0, 1.0)
    part = Part.empty(tensor, 0, tensor.size, storage)
    part.put(0.05 * np.random.default_rng(number).standard_normal(tensor.size, np.float32), Threads(1))
    return part


def bits(values: torch.Tensor) -> bytes:
    """The bytes of float32 or bfloat16 values, wherever they are."""
    values = values.cpu().contiguous()
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy().tobytes()


class Tiny:
    """A model with random weights: bfloat16 in a working copy and, with the same values, in float32 by name."""

    def __init__(self, config: PretrainedConfig, groups: Sequence[Factors] = (), nes: bool = False, shared: bool = False) -> None:
        self.config = config
        self._reference: PreTrainedModel | None = None
        self.layout = Layout.of(skeleton(config), groups, nes, shared)
        descriptor = working_copy.allocate(self.layout, "bf16")
        self.working = WorkingCopy(self.layout, "bf16", descriptor)
        self.weights: dict[str, np.ndarray] = {}
        random = np.random.default_rng(1)
        for tensor in self.layout.tensors:
            values = random.standard_normal(tensor.size, np.float32)
            values = 0.15 * values if len(tensor.shape) > 1 or tensor.name.endswith("bias") else 1 + 0.1 * values
            self.working.write(Part(tensor, 0, values), Threads(1))
            self.weights[tensor.name] = (self.working.part(tensor).data.astype(np.uint32) << 16).view(np.float32)
        os.close(descriptor)  # the map stays

    def perturbed(self, perturbation: Perturbation, sign: int) -> dict[str, torch.Tensor]:
        """weights ± float32(σ)·ε, in numpy, by name."""
        found = {}
        for tensor in self.layout.tensors:
            place = Place(perturbation.seed, perturbation.step, perturbation.pair, tensor.number)
            epsilon = perturbation.noise.epsilon(place, tensor.shape, 0, tensor.size)
            sigma = np.float32(sign * perturbation.sigma * tensor.sigma_factor)
            found[tensor.name] = torch.from_numpy(self.weights[tensor.name] + sigma * epsilon).view(tensor.shape)
        return found

    def hugging_face_model(self, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model that holds `weights`."""
        if self._reference is None:
            self._reference = AutoModelForCausalLM.from_config(self.config).eval()
        model = self._reference
        parameters = dict(model.named_parameters())
        assert parameters.keys() == weights.keys()
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(dtype)  # buffers stay float32, as in a model that was loaded
        return model

    @torch.no_grad()
    def hugging_face(self, weights: dict[str, torch.Tensor], batch: Batch, dtype: torch.dtype = torch.float32) -> np.ndarray:
        """Mean log-probability of each sample, computed alone and unpadded by the model that holds `weights`."""
        model, means = self.hugging_face_model(weights, dtype), []
        for row, length in zip(batch.tokens, batch.lengths, strict=True):
            ids = torch.from_numpy(row[:length].astype(np.int64))
            log_probabilities = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            means.append(log_probabilities.gather(1, ids[1:, None]).mean().item())
        return np.array(means)

    def expected(self, perturbation: Perturbation, batch: Batch, dtype: torch.dtype = torch.float32) -> np.ndarray:
        """Hugging Face's scores of the members, [members, B]."""
        return np.stack([self.hugging_face(self.perturbed(perturbation, sign), batch, dtype) for sign in perturbation.signs])

    def model(self, compute: torch.dtype = torch.float32, threads: int = 1, micro_batch: int = 3, **options) -> PerturbedModel:
        """options: `tile_members`, `device` and `progress`, as PerturbedModel takes them."""
        lanes = Lanes(1, threads)
        return PerturbedModel(skeleton(self.config), self.layout, self.working, compute, lanes, micro_batch, **options)

    def score(
        self,
        perturbation: Perturbation,
        batch: Batch,
        compute: torch.dtype = torch.float32,
        threads: int = 1,
        micro_batch: int = 3,
        pass_samples: int = 0,
        tile_members: int = 1,
    ) -> np.ndarray:
        """The scores of a fresh PerturbedModel; pass_samples: 0 is the whole batch."""
        model = self.model(compute, threads, micro_batch, tile_members=tile_members)
        return model.log_probabilities([perturbation], batch, pass_samples or len(batch))


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return found.shape == expected.shape and found.dtype == np.float64 and float(np.abs(found - expected).max()) < tolerance
