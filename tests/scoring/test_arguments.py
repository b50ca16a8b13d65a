"""Several states of each token between blocks, and keys that later blocks use again: Gemma 3n and 4."""

from dataclasses import replace

import pytest
from architectures import BOTH, COMMON, Tiny, batch_of, close
from plain import KINDS
from transformers import AutoConfig, PretrainedConfig

from es_lite.scoring.arguments import state_copies, state_width

SHARING = {
    **{"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
    **{"layer_types": 2 * ["sliding_attention", "full_attention"], "sliding_window": 5, "pad_token_id": 0},
}
COPIES = 4


def gemma3n() -> PretrainedConfig:
    own = {"intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": COPIES}
    return AutoConfig.for_model("gemma3n_text", **COMMON | SHARING | own)


def gemma4() -> PretrainedConfig:
    return AutoConfig.for_model("gemma4_text", **COMMON | SHARING, global_head_dim=32)


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("lengths", [[9, 4], [20, 17, 9, 4, 2], [4, 4]], ids=["rows = copies", "many", "also tokens"])
@pytest.mark.parametrize("config", [gemma3n, gemma4])
def test_samples_score_as_with_transformers(config, lengths, micro_batch):
    """Of two samples, the two members make as many rows as Gemma 3n has states."""
    tiny, batch = Tiny(config()), batch_of(lengths)
    for kind in (KINDS["gaussian"], KINDS["lowrank 1"]):
        both = replace(BOTH, kind=kind.NAME, rank=kind.RANK)
        assert close(tiny.score(both, batch, micro_batch=micro_batch), tiny.expected(both, batch)), kind


def test_what_a_token_has_between_blocks():
    """Two kinds of layers leave keys and values of two heads."""
    llama = AutoConfig.for_model("llama", **COMMON)
    assert (state_copies(llama), state_width(llama)) == (1, 64)
    assert (state_copies(gemma3n()), state_width(gemma3n())) == (COPIES, COPIES * 64 + 2 * 2 * 2 * 16)
    assert (state_copies(gemma4()), state_width(gemma4())) == (1, 64 + 2 * 2 * 2 * 32)
