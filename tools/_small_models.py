"""Small configurations of every causal model type that the installed transformers has, and variants of some."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "n_group", "num_memory_heads"), 2),
    **dict.fromkeys(("topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_dt_rank", "rotary_dim", "attention_window"), 8),
    **{"vocab_size": 300, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 5, "mamba_n_heads": 4, "mamba_d_head": 32},
    **{"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0},
}
"""By the names that configurations have for them; those that a type has are set."""

LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "q_lora_rank": 24, "kv_lora_rank": 16}
"""Sizes of latent attention."""

OF_TYPE: dict[str, dict[str, Any]] = {}
"""What a type needs beside SMALL."""

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "granite", "gemma", "cohere", "starcoder2", "phi3")


def types() -> list[str]:
    """The causal model types of the installed transformers."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small(kind: str, **changes: Any) -> PretrainedConfig:
    """A small configuration of a type. Raises what transformers does if there is none."""
    keys = _small(AutoConfig.for_model(kind)) | OF_TYPE.get(kind, {}) | changes
    return AutoConfig.for_model(kind, **keys)


def _small(config: PretrainedConfig) -> dict[str, Any]:
    own = config.to_dict()
    found: dict[str, Any] = {}
    for key, value in SMALL.items():
        now = own.get(key)
        if key not in own and key not in config.attribute_map:
            continue
        if isinstance(value, int) and now is not None and not isinstance(now, int):
            continue  # one for each layer
        found[key] = value
    if "qk_rope_head_dim" in own:
        found.pop("head_dim", None)
        found |= {key: value for key, value in LATENT.items() if own.get(key) is not None}
    if own.get("pad_token_id") is not None:
        found["pad_token_id"] = 1
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            found[name] = _small(part)
    return found
