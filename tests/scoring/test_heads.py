"""The head in blocks of the vocabulary, and what a model does with its logits."""

import numpy as np
import pytest
import torch
from architectures import BOTH, PLUS, Tiny, batch_of, close, config_of, of_kind
from plain import KINDS

from es_lite.errors import UserError
from es_lite.model.layout import Factors, skeleton
from es_lite.scoring import heads
from es_lite.scoring.heads import HeadInput, LogitTransform
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.model import PerturbedModel

NOISE = pytest.mark.parametrize("noise", [KINDS["gaussian"], KINDS["lowrank 3"]], ids=["gaussian", "lowrank"])
"""The head's own path for each: perturbed blocks, or corrections."""


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "granite", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@NOISE
def test_blocks_of_the_vocabulary_add_up(monkeypatch, name, tied, noise):
    tiny, batch, both = Tiny(config_of(name, tied)), batch_of(), of_kind(BOTH, noise)
    whole = tiny.score(both, batch, tile_members=2)
    monkeypatch.setattr(heads, "VOCABULARY_BLOCK", 64)
    blocks = tiny.score(both, batch, tile_members=2)
    assert close(blocks, whole)
    assert close(blocks, tiny.expected(both, batch))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tile_members", [1, 2])
@NOISE
def test_a_head_with_a_bias(monkeypatch, tied, tile_members, noise):
    """In one block of the vocabulary, and in several."""
    tiny, batch, both = Tiny(config_of("phi", tied)), batch_of(), of_kind(BOTH, noise)
    assert any(tensor.name == "lm_head.bias" for tensor in tiny.layout.tensors)
    expected = tiny.expected(both, batch)
    assert close(tiny.score(both, batch, tile_members=tile_members), expected)
    monkeypatch.setattr(heads, "VOCABULARY_BLOCK", 64)
    assert close(tiny.score(both, batch, tile_members=tile_members), expected)


@pytest.mark.parametrize("frozen", ["lm_head.weight", "lm_head.bias", "lm_head"])
@NOISE
def test_a_head_may_be_frozen_in_part(monkeypatch, frozen, noise):
    tiny, batch, both = Tiny(config_of("phi", False), [Factors(frozen, 0, 0)]), batch_of(), of_kind(BOTH, noise)
    monkeypatch.setattr(heads, "VOCABULARY_BLOCK", 64)
    assert close(tiny.score(both, batch, tile_members=2), tiny.expected(both, batch))


def test_the_hidden_states_are_taken_once():
    head_input, hidden = HeadInput(torch.float32), torch.ones(2, 3, 4)
    assert torch.equal(head_input(hidden), LogitTransform.PROBE)
    assert head_input.take() is hidden
    with pytest.raises(IndexError):
        head_input.take()


# After the head


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("qwen3", {}, LogitTransform(1.0, 0.0)),
        ("gpt2", {}, LogitTransform(1.0, 0.0)),
        ("cohere", {"logit_scale": 0.25}, LogitTransform(0.25, 0.0)),
        ("granite", {"logits_scaling": 4.0}, LogitTransform(0.25, 0.0)),
        ("gemma2", {"final_logit_softcapping": 3.0}, LogitTransform(1.0, 3.0)),
        ("gemma2", {"final_logit_softcapping": None}, LogitTransform(1.0, 0.0)),
    ],
)
def test_what_a_model_does_with_its_logits_is_found(name, changes, expected):
    model = skeleton(config_of(name, **changes))
    modules = dict(model.named_modules())
    assert LogitTransform.of(model) == expected
    assert dict(model.named_modules()) == modules, "the model is as it was"


@pytest.mark.parametrize(("name", "change"), [("cohere", {"logit_scale": 1.0}), ("granite", {"logits_scaling": 1.0})])
def test_the_scale_of_logits_changes_the_scores(name, change):
    batch = batch_of()
    scaled, plain = Tiny(config_of(name)).score(PLUS, batch), Tiny(config_of(name, **change)).score(PLUS, batch)
    assert np.abs(scaled - plain).min() > 1e-2


def test_the_cap_of_logits_changes_the_scores():
    batch = batch_of()
    capped, plain = (Tiny(config_of("gemma2", final_logit_softcapping=cap)).score(PLUS, batch) for cap in (3.0, None))
    assert np.abs(capped - plain).min() > 1e-2


def test_a_model_without_a_linear_head_is_refused(monkeypatch):
    tiny = Tiny(config_of("qwen3"))
    model = skeleton(tiny.config)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with pytest.raises(UserError, match="Qwen3ForCausalLM: its head is not a linear map"):
        PerturbedModel(model, tiny.layout, tiny.working, torch.float32, Lanes(1, 1), 1)


def test_logits_changed_in_an_unknown_way_are_refused(monkeypatch):
    tiny = Tiny(config_of("gemma2"))
    model = skeleton(tiny.config)
    plain = type(model).forward

    def odd(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = out.logits + 1
        return out

    monkeypatch.setattr(type(model), "forward", odd)
    with pytest.raises(UserError, match="Gemma2ForCausalLM: changes its logits in a way"):
        PerturbedModel(model, tiny.layout, tiny.working, torch.float32, Lanes(1, 1), 1)
