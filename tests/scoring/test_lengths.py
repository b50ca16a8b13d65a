"""What depends on the longest text of a forward: each sample sees what it would see alone."""

import itertools

import numpy as np
import pytest
import torch
from architectures import BOTH, COMMON, Tiny, batch_of, close
from transformers import AutoConfig

from es_lite.scoring.lengths import LengthDependence, longest_unchanged

HALF = 8
LONG = {
    "rope_type": "longrope",
    "rope_theta": 50.0,
    "short_factor": [1.0] * HALF,
    "long_factor": [1.0 + 3 * i for i in range(HALF)],
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 4.0}
LENGTHS = [31, 23, 17, 16, 9, 4]


def config(rope: dict, positions: int = 64):
    kind = {"pad_token_id": 0} | COMMON | {"head_dim": 2 * HALF}
    return (
        AutoConfig.for_model("llama", **kind, rope_parameters=rope)
        if positions == 64
        else AutoConfig.for_model("llama", **kind | {"max_position_embeddings": positions}, rope_parameters=rope)
    )


@pytest.mark.parametrize("micro_batch", [1, 3, 6])
@pytest.mark.parametrize("rope", [LONG, DYNAMIC], ids=["longrope", "dynamic"])
def test_a_sample_scores_what_it_scores_alone(rope, micro_batch):
    tiny = Tiny(config(rope, 64 if rope is LONG else 12))
    batch = batch_of(LENGTHS)
    alone = []
    for sample in range(len(batch)):  # each by a new model of transformers: some remember the longest text that they met
        tiny._reference = None
        alone.append(tiny.expected(BOTH, batch.part(sample, sample + 1))[:, 0])
    expected = np.stack(alone, axis=1)
    assert close(tiny.score(BOTH, batch, micro_batch=micro_batch), expected)
    again = tiny.model(micro_batch=micro_batch)
    for _ in range(2):  # what a pass leaves behind
        assert close(again.log_probabilities([BOTH], batch, len(batch)), expected)


def test_it_matters():
    tiny, batch = Tiny(config(LONG)), batch_of([31, 9])
    short = batch.part(1, 2)
    with_long = tiny.hugging_face_model(tiny.perturbed(BOTH, 1))
    ids = torch.from_numpy(batch.tokens.astype(np.int64))
    together = with_long(input_ids=ids, use_cache=False).logits[1, :9]
    alone = with_long(input_ids=torch.from_numpy(short.tokens.astype(np.int64)), use_cache=False).logits[0]
    assert (together - alone).abs().max() > 0.01


@pytest.mark.parametrize(("rope", "limit"), [(LONG, 16), (DYNAMIC, 64), ({"rope_type": "default", "rope_theta": 50.0}, 0)])
def test_the_limit_is_found(rope, limit):
    assert longest_unchanged(config(rope)) == limit


def test_only_samples_of_other_positions_are_parted():
    lengths = np.array(LENGTHS, np.int32)

    def alike(rope: dict, positions: int) -> list[tuple[int, int]]:
        tiny = Tiny(config(rope, positions))
        model = tiny.hugging_face_model(tiny.perturbed(BOTH, 1))
        return [(part.start, part.stop) for part in LengthDependence(model, model.config).alike(lengths)]

    assert alike(LONG, 64) == [(0, 3), (3, 6)]
    assert alike(DYNAMIC, 16) == [(0, 1), (1, 2), (2, 3), (3, 6)]
    assert alike({"rope_type": "default", "rope_theta": 50.0}, 64) == [(0, 6)]


@pytest.mark.parametrize("rope", [LONG, DYNAMIC], ids=["longrope", "dynamic"])
def test_the_bits_of_a_sample_do_not_depend_on_how_a_batch_is_divided(rope):
    """Among workers, or into passes; positions change within the second micro-batch."""
    tiny, batch = Tiny(config(rope, 64 if rope is LONG else 16)), batch_of([31, 23, 17, 16, 9, 4])
    model = tiny.model(micro_batch=2)
    whole = model.log_probabilities([BOTH], batch, len(batch))
    assert np.array_equal(whole, model.log_probabilities([BOTH], batch, 2))
    for cuts in ([0, 2, 6], [0, 4, 6], [0, 2, 4, 6]):
        parts = [model.log_probabilities([BOTH], batch.part(low, high), len(batch)) for low, high in itertools.pairwise(cuts)]
        assert np.array_equal(whole, np.concatenate(parts, axis=1))


def test_an_index_of_tokens_chooses_as_it_does_alone():
    """DeepSeek V3.2's, with so few heads that scores are often equal, zero."""
    kind = {**COMMON, "head_dim": 8, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
    kind |= {"qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
    kind |= {"topk_group": 1, "moe_intermediate_size": 48, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4}
    tiny, batch = Tiny(AutoConfig.for_model("deepseek_v32", **kind | {"pad_token_id": 0})), batch_of(LENGTHS)
    alone = [tiny.expected(BOTH, batch.part(sample, sample + 1)) for sample in range(len(batch))]
    assert close(tiny.score(BOTH, batch, micro_batch=6), np.concatenate(alone, axis=1))
