"""Proxies: which rows of an argument belong to a micro-batch, and which rows of the embedding are perturbed."""

import numpy as np
import pytest
import torch
from architectures import BOTH, Tiny, batch_of, close, config_of

from es_lite.scoring.proxies import MicroBatch, ScoringState


def test_micro_batches_cover_the_rows_of_every_member():
    run = ScoringState(None, None, None, micro_batch=2, perturbations=(BOTH, BOTH), lengths=np.array([9, 7, 4], np.int32))
    assert [(first, perturbation) for first, perturbation in run.folded()] == [(0, BOTH), (2, BOTH)]
    found = [rows for member in range(run.members) for rows in run.micro_batches(member)]
    assert [row for rows in found for row in range(12)[rows.rows]] == list(range(12))
    assert [sample for rows in found for sample in range(3)[rows.samples]] == [0, 1, 2] * 4
    assert [(rows.length, rows.total) for rows in found] == [(9, 12), (4, 12)] * 4


def test_an_argument_is_cut_to_the_rows_of_a_micro_batch():
    rows = MicroBatch(slice(4, 6), slice(1, 3), length=3, total=8)
    states = torch.arange(8 * 5 * 2).view(8, 5, 2)
    assert torch.equal(rows.cut(states), states[4:6, :3])
    positions = torch.arange(5)[None]
    assert torch.equal(rows.cut(positions), positions[:, :3])  # the same for all samples
    mask = torch.arange(8 * 5 * 5).view(8, 1, 5, 5)
    assert torch.equal(rows.cut(mask), mask[4:6, :, :3, :3])
    assert torch.equal(rows.cut(mask[:1]), mask[:1, :, :3, :3])
    nested = rows.cut({"rotary": (positions, states), "cache": None, "scale": torch.tensor(2.0), "flag": True})
    assert torch.equal(nested["rotary"][0], positions[:, :3]) and torch.equal(nested["rotary"][1], states[4:6, :3])
    assert (nested["cache"], nested["scale"], nested["flag"]) == (None, torch.tensor(2.0), True)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("token", [0, 250, 299])
def test_a_padding_token_is_a_token_like_any_other(name, token):
    """Whatever its id: only the used rows of the embedding are made, and its row need not be among them."""
    tiny, batch = Tiny(config_of(name, pad_token_id=token)), batch_of([6, 3])
    assert close(tiny.score(BOTH, batch), tiny.expected(BOTH, batch))


def test_only_the_rows_of_the_embedding_that_a_batch_uses_are_asked_for(monkeypatch):
    tiny, batch, asked = Tiny(config_of("qwen3", tied=False)), batch_of([6, 3]), []
    rows_of = tiny.working.rows

    def rows(tensor, rows):
        asked.append((tensor.name, rows.tolist()))
        return rows_of(tensor, rows)

    monkeypatch.setattr(tiny.working, "rows", rows)
    tiny.score(BOTH, batch)
    assert asked == [("model.embed_tokens.weight", sorted(set(batch.tokens.ravel().tolist())))]
