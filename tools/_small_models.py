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
    **{"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8, "encoder_hash_byte_group_vocab": 100},
    **{"hidden_size_global": 64, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0},
}
"""By the names that configurations have for them; those that a type has are set."""

LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "q_lora_rank": 24, "kv_lora_rank": 16}
"""Sizes of latent attention."""

TWO = ["sliding_attention", "full_attention"]
NOT_SHARED = {"layer_types": TWO, "num_kv_shared_layers": 0}
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": 2 * TWO,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.0] * 4,
}
SPARSE = {"num_key_value_heads": 4, "head_dim": 8, "index_head_dim": 16, "index_n_heads": 16, "index_topk": 4}
"""Sizes of latent attention that an index chooses the tokens of."""


OF_TYPE: dict[str, dict[str, Any]] = {
    "axk2": SPARSE,
    "cohere_compass_text": {
        "layer_types": TWO,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 50.0} for kind in TWO},
    },
    "cpmant": {"dim_ff": 96, "dim_head": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 50.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": SPARSE,
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": NOT_SHARED | {"intermediate_size": [96, 96], "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": NOT_SHARED | {"global_head_dim": 16},
    "glm_moe_dsa": SPARSE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "inkling2_loop_text": {"unpadded_vocab_size": 300},
    "inkling2_text": {"unpadded_vocab_size": 300},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "qk_rope_head_dim": 8, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 16},
    "roc_bert": {"shape_vocab_size": 300, "pronunciation_vocab_size": 300, "shape_embed_dim": 16, "pronunciation_embed_dim": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type needs beside SMALL."""

LLAMA_LIKE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "olmo2",
    "smollm3",
    "granite",
    "gemma",
    "gemma3_text",
    "cohere",
    "starcoder2",
    "phi3",
)

BERT_LIKE = ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert")
BERT_LIKE += ("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod")

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {**FACTORS, "original_max_position_embeddings": 16},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}


def _variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: a type, and what is changed of its small configuration."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for kind in LLAMA_LIKE:
        found[f"{kind}, tied"] = kind, {"tie_word_embeddings": True}
        found[f"{kind}, untied"] = kind, {"tie_word_embeddings": False}
    for rope, keys in ROPES.items():
        for kind in ("llama", "qwen3", "phi3") if rope == "longrope" else ("llama", "qwen3"):
            found[f"{kind}, {rope}"] = kind, {"rope_parameters": {"rope_type": rope, "rope_theta": 50.0, **keys}}
    for kind in BERT_LIKE:
        found[f"{kind}, a decoder"] = kind, {"is_decoder": True}
    sliding = {"layer_types": TWO, "use_sliding_window": True}
    for kind in ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "cohere2", "olmo3", "gpt_oss", "ministral"):
        found[f"{kind}, sliding windows"] = kind, sliding
    for kind, keys in {
        "llama": {"attention_bias": True, "mlp_bias": True},
        "qwen3": {"attention_bias": True},
        "olmo2": {"attention_bias": True},
        "granite": {"attention_bias": True, "mlp_bias": True},
        "smollm3": {"attention_bias": True, "mlp_bias": True},
        "starcoder2": {"use_bias": False},
        "gpt_bigcode": {"multi_query": False},
        "mixtral": {"sliding_window": None},
    }.items():
        found[f"{kind}, {', '.join(keys)}"] = kind, keys
    more: dict[str, tuple[str, dict[str, Any]]] = {
        "gpt_neox, blocks in sequence": ("gpt_neox", {"use_parallel_residual": False}),
        "gpt_neox, no biases": ("gpt_neox", {"attention_bias": False}),
        "stablelm, parallel blocks": ("stablelm", {"use_parallel_residual": True}),
        "stablelm, biases and norms": ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
        "falcon, alibi": ("falcon", {"alibi": True}),
        "falcon, new blocks": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        "falcon, blocks in sequence": ("falcon", {"parallel_attn": False, "bias": True}),
        "cohere, norms of queries": ("cohere", {"use_qk_norm": True}),
        "cohere, scaled logits": ("cohere", {"logit_scale": 0.25}),
        "gemma2, caps": ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
        "gemma3_text, both directions": ("gemma3_text", {"use_bidirectional_attention": True}),
        "gemma3n_text, shared keys": ("gemma3n_text", SHARED_KEYS | {"intermediate_size": [96] * 4}),
        "gemma4_text, shared keys": ("gemma4_text", SHARED_KEYS),
        "granite, multipliers": ("granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
        "mpt, no alibi": ("mpt", {"attn_config": {"alibi": False}}),
        "opt, norms behind": ("opt", {"do_layer_norm_before": False}),
        "opt, projected embedding": ("opt", {"word_embed_proj_dim": 32}),
        "llama, one key head": ("llama", {"num_key_value_heads": 1}),
        "llama, wide heads": ("llama", {"head_dim": 32}),
        "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        "qwen3_moe, one dense block": ("qwen3_moe", {"mlp_only_layers": [0]}),
        "qwen2_moe, one dense block": ("qwen2_moe", {"mlp_only_layers": [0]}),
        "deepseek_v3, whole queries": ("deepseek_v3", {"q_lora_rank": None}),
        "deepseek_v3, one dense block": ("deepseek_v3", {"first_k_dense_replace": 1}),
        "lfm2, a convolution": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        "olmoe, clipped": ("olmoe", {"clip_qkv": 1.0}),
        "phi, norms of queries": ("phi", {"qk_layernorm": True}),
    }
    return found | more


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


VARIANTS = _variants()
