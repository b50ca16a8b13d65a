"""Architectures with buffers, experts, vectors drawn at random, or positions that depend on the length: the real command."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support import TEXT, assert_same_bits, replayed, start, train_here, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from es_lite.data.corpus import split, tokenize
from es_lite.data.tokenizer import beginning

COMMON = {
    **{"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 0},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONG = {
    **{"rope_type": "longrope", "rope_theta": 50.0, "original_max_position_embeddings": 16},
    **{"short_factor": [1.0] * 8, "long_factor": [1.0 + 3 * i for i in range(8)]},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "buffers": {"model_type": "apertus", **COMMON},
    "experts": {"model_type": "qwen3_moe", **COMMON, **EXPERTS},
    "random vectors": {"model_type": "diffllama", **COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "long positions": {"model_type": "llama", **COMMON, "rope_parameters": LONG},
    "linear attention": {
        **{"model_type": "qwen3_next", **COMMON, **EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
        **{"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    },
}
GEMMA = {
    **{"vocab_size_per_layer_input": 257, "hidden_size_per_layer_input": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
    **{"layer_types": 2 * ["sliding_attention", "full_attention"], "sliding_window": 5},
    **{"intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4},
}
CONFIGS["states and keys of Gemma 3n"] = {"model_type": "gemma3n_text", **COMMON, **GEMMA}
FROM_FOLDERS = ["buffers", "experts", "long positions"]
TABLES: dict[str, dict[str, Any]] = {
    "run": {"iterations": 3, "checkpoint_every": 3, "checkpoint_dtype": "fp32"},
    "eval": {"every": 3, "samples": 8},
    "workers": {"compute": "fp32"},
    "data": {"samples": "lines"},
    "noise": {"kind": "lowrank"},
}


SOON = ["experts, from a folder"]
"""The others are long."""

ALL = [*CONFIGS, *(f"{name}, from a folder" for name in FROM_FOLDERS)]


@pytest.fixture(params=[name if name in SOON else pytest.param(name, marks=pytest.mark.long) for name in ALL])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name, _, folder = request.param.partition(", ")
    if not folder:
        return write_recipe(tmp_path, **TABLES, model={"config": CONFIGS[name]})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[name]))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1.25)  # no other model has these
    model.save_pretrained(tmp_path / "model")
    return write_recipe(tmp_path, **TABLES, model={"config": "", "path": str(tmp_path / "model")})


@torch.no_grad()
def score_of(folder: Path) -> float:
    """Mean log-probability of the held-out samples by transformers, each alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [TEXT.splitlines(keepends=True)]
    _, held_out = split(tokenize(lines, tokenizer, "lines", 32, beginning(tokenizer, "auto")), 0.05)
    means = []
    for sample in map(held_out.sample, range(len(held_out))):
        ids = torch.from_numpy(sample.astype(np.int64))
        values = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        means.append(values.gather(1, ids[1:, None]).mean().item())
    return float(np.mean(means))


@pytest.mark.slow
def test_it_is_trained_resumed_streamed_replayed_and_exported(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished = train_here(recipe, run)
    assert finished.code == 0, finished.err
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The working copy is bf16, the checkpoint fp32.
    assert math.isclose(score_of(run / "checkpoint"), metrics[-1]["eval_score"], abs_tol=5e-3)
    expected = load_file(run / "checkpoint/model.safetensors")
    assert_same_bits(replayed(run, tmp_path / "replayed"), expected)

    streamed = tmp_path / "streamed"
    assert train_here(recipe, streamed, "memory.residency=streamed").code == 0
    assert_same_bits(load_file(streamed / "checkpoint/model.safetensors"), expected)

    killed = tmp_path / "killed"
    with start(recipe, killed) as live:
        live.wait_for_records(1)
    assert train_here(recipe, killed, resume=True).code == 0  # θ₀ is the same in another process
    assert_same_bits(load_file(killed / "checkpoint/model.safetensors"), expected)
    assert (killed / "journal.jsonl").read_bytes() == (run / "journal.jsonl").read_bytes()
