"""The rehearsal accepts what es_lite computes as transformers does, and refuses all else, before anything is loaded."""

import time

import numpy as np
import psutil
import pytest
import torch
from architectures import COMMON, config_of
from plain import KINDS
from transformers import AutoConfig, PretrainedConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from es_lite.errors import UserError
from es_lite.model.configuration import configuration
from es_lite.model.ghosts import OwnForward, ghost
from es_lite.model.layout import Layout, skeleton
from es_lite.scoring.rehearsal import rehearse

NOISE = pytest.mark.parametrize("noise", [KINDS["gaussian"], KINDS["lowrank 1"]], ids=["gaussian", "lowrank"])


def rehearsed(config: PretrainedConfig, noise=KINDS["gaussian"], writes: bool = False) -> None:
    model = skeleton(config)
    rehearse(model, Layout.of(model), noise, writes)


def refused(config: PretrainedConfig, **how) -> str:
    with pytest.raises(UserError) as raised:
        rehearsed(config, **how)
    return str(raised.value)


@NOISE
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2", "phi", "gpt_oss", "mixtral", "lfm2", "jamba", "mpt", "deepseek_v3"])
def test_what_can_be_scored_is_accepted(name, noise):
    rehearsed(config_of(name), noise)


@NOISE
@pytest.mark.parametrize("name", ["qwen3", "qwen3-sliding", "gemma3", "gpt2", "phi", "mixtral"])
def test_what_can_write_is_accepted(name, noise):
    rehearsed(config_of(name), noise, writes=True)


BERT = {**COMMON, "pad_token_id": 0}


@pytest.mark.parametrize(
    "config",
    [AutoConfig.for_model("bert", **BERT), config_of("gemma3", use_bidirectional_attention=True)],
    ids=["bert", "gemma3"],
)
def test_a_model_that_sees_later_tokens_is_refused(config):
    assert "is not causal as it is configured" in refused(config)


@pytest.mark.parametrize(("kind", "most"), [("roberta", 62), ("opt", 64), ("gpt2", 64)])
def test_positions_that_are_fewer_than_the_configuration_says_are_counted(kind, most):
    """RoBERTa's begin behind its padding token's, and have no rows for it."""
    opt = {"ffn_dim": 96, "word_embed_proj_dim": 64} if kind == "opt" else {}
    config = (
        AutoConfig.for_model(kind, **BERT | opt | {"pad_token_id": 1}, is_decoder=True) if kind != "gpt2" else config_of("gpt2")
    )
    model = skeleton(config)
    rehearse(model, Layout.of(model), KINDS["gaussian"], False, longest_text=most)
    if most < 64:
        with pytest.raises(UserError, match=r"RobertaForCausalLM: 63 tokens are too many.*lower fitness\.max_length"):
            rehearse(model, Layout.of(model), KINDS["gaussian"], False, longest_text=most + 1)


def test_a_bert_that_is_a_decoder_is_accepted():
    rehearsed(AutoConfig.for_model("bert", **BERT, is_decoder=True))


def test_a_model_that_does_not_run_on_text_alone_is_refused_with_the_reason():
    message = refused(AutoConfig.for_model("xmod", **BERT | {"languages": ["en_XX", "de_DE"]}))
    assert message.startswith("XmodForCausalLM: does not run on the tokens of a text alone: ValueError: Input language unknown")


def test_a_block_that_sees_more_than_its_tile_is_refused(monkeypatch):
    """Here it depends on how many rows it is given."""
    forward = Qwen3DecoderLayer.forward

    def odd(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states, *args, **kwargs) * hidden_states.shape[1]

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", odd)
    assert "is not causal" in refused(config_of("qwen3"))  # a shorter text is computed otherwise

    def other(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states, *args, **kwargs) * (1 + 0.1 * (hidden_states.shape[0] - 1))

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", other)
    assert "it does not compute what it does as a whole, so its scores would be wrong" in refused(config_of("qwen3"))


def test_a_block_that_fails_is_refused_with_the_reason(monkeypatch):
    forward = Qwen3DecoderLayer.forward

    def failing(self, hidden_states, *args, **kwargs):
        if hidden_states.shape[0] > 1:
            raise IndexError("one at a time")
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", failing)
    message = refused(config_of("qwen3"))
    assert message.startswith("Qwen3ForCausalLM: es_lite cannot run it layer by layer: IndexError: one at a time; take a model")


def test_what_can_be_scored_but_cannot_write_is_refused_for_writing_only():
    rehearsed(config_of("jamba"))
    assert "keeps a state other than keys and values while it writes" in refused(config_of("jamba"), writes=True)
    rehearsed(config_of("mpt"))
    assert 'or fitness.kind = "logprob"' in refused(config_of("mpt"), writes=True)


def test_a_model_that_does_not_stand_bf16_is_refused_for_bf16_only():
    keys = {"vocab_size": 300, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64}
    model = skeleton(AutoConfig.for_model("xglm", **keys, pad_token_id=1))
    layout = Layout.of(model)
    rehearse(model, layout, KINDS["lowrank 1"], writes=False)
    with pytest.raises(UserError, match=r'XGLMForCausalLM: cannot be computed in bf16: .*; set workers\.compute = "fp32"'):
        rehearse(model, layout, KINDS["lowrank 1"], writes=False, bf16=True)
    qwen = skeleton(config_of("qwen3"))
    rehearse(qwen, Layout.of(qwen), KINDS["gaussian"], writes=False, bf16=True)


@pytest.mark.long
def test_the_largest_model_takes_seconds_and_no_memory():
    """52 billion parameters."""
    model = skeleton(configuration("", "qwen3-32b"))
    layout = Layout.of(model)
    process, began = psutil.Process(), time.monotonic()
    before = process.memory_info().rss
    rehearse(model, layout, KINDS["lowrank 1"], writes=False)
    assert process.memory_info().rss - before < 2**30
    assert time.monotonic() - began < 120  # a bound against hours, not a measurement


VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 28}


# Ghosts


def test_a_ghost_takes_no_memory_and_keeps_tokens_apart():
    assert ghost((2**20, 2**20)).untyped_storage().nbytes() == 4
    model = skeleton(config_of("qwen3"))
    own = OwnForward(model)
    one, other = own.states(np.array([11, 12, 13], np.int32)), own.states(np.array([11, 14, 13], np.int32))
    assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1]) and not torch.allclose(one[2], other[2])


def test_parameters_that_a_text_does_not_pass_are_found():
    gemma = {"text_config": {**COMMON, "model_type": "gemma3_text"}, "vision_config": VISION}
    model = skeleton(AutoConfig.for_model("gemma3", **gemma))
    layout = Layout.of(model)
    assert layout.unused and all("vision" in name or "multi_modal" in name for name in layout.unused)
    assert all(
        (t.sigma_factor, t.coefficient_factor, t.decay_factor) == (0, 0, 0) for t in layout.tensors if t.name in layout.unused
    )
    assert all(t.sigma_factor == 1 for t in layout.tensors if t.name not in layout.unused)
    rehearse(model, layout, KINDS["lowrank 1"], writes=False)
    assert not Layout.of(skeleton(config_of("qwen3"))).unused
