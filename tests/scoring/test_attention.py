"""Attention of one new token: against float64, on rows alone, and within Hugging Face's models."""

import numpy as np
import pytest
import torch
from architectures import BOTH, Tiny, config_of, of_kind
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.scoring import attention
from es_lite.scoring.attention import attend, keys_of, one_query_attention
from es_lite.scoring.generate import Limits

ALONE = Threads(1)
ROWS = 11


def operands(
    heads: int, queries: int, slots: int, width: int, capacity: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, and keys and values of a cache that may have room for more; what is not in use is NaN."""
    generator = torch.Generator().manual_seed(slots * width + queries)
    capacity = capacity or slots
    query, few = (torch.randn(ROWS, heads, n, width, generator=generator).bfloat16() for n in (queries, slots))
    keys = keys_of(ROWS, heads, capacity, width, few).fill_(torch.nan)
    values = torch.full((ROWS, heads, capacity, width), torch.nan).bfloat16()
    keys[:, :, :slots] = few
    values[:, :, :slots] = torch.randn(ROWS, heads, slots, width, generator=generator)
    return query, keys[:, :, :slots], values[:, :, :slots]


def mask(slots: int) -> torch.Tensor:
    """Padding on the left, a window, or slots here and there: bool [ROWS, slots], always with the newest."""
    seen = torch.ones(ROWS, slots, dtype=torch.bool)
    for row in range(ROWS):
        seen[row, : row * slots // ROWS] = False
    seen[3, ::2] = False
    seen[:, -1] = True
    return seen


def expected(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    scores = (query.double() @ keys.double().transpose(2, 3) * scale).masked_fill(~seen[:, None, None], -torch.inf)
    return scores.softmax(dim=-1) @ values.double()


@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize(("slots", "width"), [(1, 16), (2, 64), (15, 32), (16, 64), (17, 80), (100, 128), (130, 16)])
def test_it_is_softmax_attention(queries, slots, width):
    """To one rounding of the result: bfloat16 has 8 bits, the sums before it 24."""
    query, keys, values = operands(2, queries, slots, width, slots + 5)
    seen, scale = mask(slots), 1.3 / width**0.5
    found, exact = attend(query, keys, values, seen, scale, ALONE), expected(query, keys, values, seen, scale)
    assert found.shape == query.shape and found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2e-6).all()


def test_a_row_has_the_same_bits_alone_and_with_any_number_of_threads():
    query, keys, values = operands(3, 3, 40, 64, 50)
    seen = mask(40)
    together = attend(query, keys, values, seen, 0.125, ALONE)
    assert torch.equal(attend(query, keys, values, seen, 0.125, Threads(3)), together)
    for row in range(ROWS):
        some = slice(row, row + 1)
        assert torch.equal(attend(query[some], keys[some], values[some], seen[some], 0.125, ALONE)[0], together[row])


@pytest.mark.parametrize("where", ["query", "keys", "values"])
def test_what_is_not_a_number_shows_in_its_row_alone(where):
    query, keys, values = operands(1, 2, 20, 16)
    seen = torch.ones(ROWS, 20, dtype=torch.bool)
    before = attend(query, keys, values, seen, 0.25, ALONE)
    {"query": query, "keys": keys, "values": values}[where][4, 0, 1] = torch.nan
    after = attend(query, keys, values, seen, 0.25, ALONE)
    assert after[4].isnan().any()
    others = [row for row in range(ROWS) if row != 4]
    assert torch.equal(after[others], before[others])


def test_great_scores_leave_one_slot():
    query, keys, values = operands(1, 1, 20, 16)
    query[:], keys[:] = 100, -100
    keys[:, :, 7] = 100
    found = attend(query, keys, values, torch.ones(ROWS, 20, dtype=torch.bool), 1.0, ALONE)
    assert torch.equal(found, values[:, :, 7:8])


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 24)], ids=str)
def test_keys_that_the_kernel_cannot_read_are_stored_as_usual(dtype, width):
    assert keys_of(2, 3, 10, width, torch.empty(0, dtype=dtype)).is_contiguous()


def test_models_attend_with_it_only_within():
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    with pytest.raises(RuntimeError, match="stop"), one_query_attention(ALONE):
        assert AttentionInterface()["sdpa"] is not sdpa_attention_forward
        raise RuntimeError("stop")
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3"])
def test_models_write_what_they_write_with_torchs_attention(monkeypatch, name):
    """In bfloat16, in which a few of the tokens may differ; and each layer attends with it for each token but the first."""
    tiny, calls = Tiny(config_of(name, attention="sdpa", head_dim=16)), []
    prompts = [np.arange(3, 3 + length, dtype=np.int32) for length in (4, 9, 2)]
    own = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *each: calls.append(each) or own(*each))
    written = []
    for torchs in (False, True):
        if torchs:
            monkeypatch.setattr(attention, "LANES", 1000)  # no width is a multiple of it
        model = tiny.model(torch.bfloat16, tile_members=2)
        written.append(model.generate([of_kind(BOTH, LowRank(1))], prompts, Limits((), 6), 3))
        assert len(calls) == 5 * tiny.config.num_hidden_layers
    same = [a == b for one, other in zip(written[0].flat, written[1].flat, strict=True) for a, b in zip(one, other, strict=True)]
    assert len(same) == 36 and np.mean(same) > 0.8
