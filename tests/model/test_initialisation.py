"""Random weights: as the architecture's own code draws them, and a function of the seed."""

import numpy as np
import pytest
import torch
from architectures import COMMON, config_of
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise.place import Place
from es_lite.errors import UserError
from es_lite.model.initialisation import Drawn, Initialisation
from es_lite.model.layout import Layout, skeleton
from es_lite.model.random_weights import FirstRandom, Random

MAMBA = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}
OTHERS: dict[str, tuple[str, dict]] = {
    "mamba": ("mamba", MAMBA),  # constants, a range, scaled residual projections
    "xlstm": ("xlstm", {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4}),
    "diffllama": ("diffllama", COMMON),  # vectors that are drawn
    "qwen3_next": (
        "qwen3_next",
        {
            **COMMON,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "bert": ("bert", {**COMMON, "is_decoder": True, "pad_token_id": 0}),  # a row of zeros for padding
}
NAMES = ["qwen3", "gpt2", "cohere", "gemma3", "gpt_oss", "mixtral", "jamba", *OTHERS]


def config(name: str) -> PretrainedConfig:
    if name not in OTHERS:
        return config_of(name, tied=False, **({"use_qk_norm": True} if name == "cohere" else {}))
    kind, keys = OTHERS[name]
    return AutoConfig.for_model(kind, **keys)


def random_of(config: PretrainedConfig, seed: int = 5) -> tuple[Random, Layout]:
    model = skeleton(config)
    layout = Layout.of(model)
    return Random(model, layout, seed, Threads(1)), layout


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_the_mean_and_deviation_that_transformers_gives_it(name):
    source, layout = random_of(config(name))
    torch.manual_seed(0)
    theirs = dict(AutoModelForCausalLM.from_config(config(name)).named_parameters())
    for tensor in layout.tensors:
        ours, own = source.read(tensor, 0, tensor.size).astype(np.float64), theirs[tensor.name].detach().double().numpy().ravel()
        spread = 8 * max(ours.std(), own.std()) + 1e-6  # five deviations of a normal sample's mean and deviation, with room
        assert abs(ours.mean() - own.mean()) < spread / np.sqrt(tensor.size), tensor.name
        assert abs(ours.std() - own.std()) < spread / np.sqrt(tensor.size), tensor.name
        assert (ours == 0).sum() >= (own == 0).sum(), tensor.name  # rows of padding


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_a_function_of_the_seed(name):
    torch.manual_seed(1)
    one, layout = random_of(config(name))
    torch.manual_seed(2)
    two, _ = random_of(config(name))
    other, _ = random_of(config(name), seed=6)
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()
    differs = False
    for tensor in layout.tensors:
        values = one.read(tensor, 0, tensor.size)
        assert np.array_equal(values, two.read(tensor, 0, tensor.size)), tensor.name
        assert np.array_equal(values[3:9], one.read(tensor, 3, min(6, tensor.size - 3))), tensor.name
        differs |= not np.array_equal(values, other.read(tensor, 0, tensor.size))
    assert differs


def test_listening_changes_neither_the_generator_nor_what_fills_tensors():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    random_of(config("diffllama"))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.nn.init.ones_(torch.empty(2)).tolist() == [1, 1]
    assert torch.nn.Linear(3, 2).weight.isfinite().all()


def test_residual_projections_of_gpt2_are_scaled():
    source, layout = random_of(config("gpt2"))
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    tensor = tensors["transformer.h.0.mlp.c_proj.weight"]
    assert source.read(tensor, 0, tensor.size).std() == pytest.approx(0.02 / np.sqrt(2 * 3), rel=0.05)


@pytest.mark.parametrize(
    ("how", "mean", "deviation", "low", "high"),
    [
        (Drawn("normal", 2.0, 0.5), 2, 0.5, 0, 4.5),
        (Drawn("uniform", low=-3.0, high=1.0), -1, 4 / np.sqrt(12), -3, 1),
        (Drawn("truncated", 1.0, 2.0, 0.0, 1.5), 0.7605, 0.4306, 0, 1.5),  # moments of the truncated normal distribution
    ],
)
def test_what_is_drawn_has_its_distribution(how, mean, deviation, low, high):
    values = how.values(Place(1, 2, 3, 4), 0, 40_000).astype(np.float64)
    assert values.mean() == pytest.approx(mean, abs=0.02) and values.std() == pytest.approx(deviation, rel=0.02)
    assert low <= values.min() and values.max() <= high
    assert np.array_equal(how.values(Place(1, 2, 3, 4), 11, 20), how.values(Place(1, 2, 3, 4), 0, 31)[11:])


def test_what_nobody_fills_is_refused_by_name(monkeypatch):
    model = skeleton(config("qwen3"))
    monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda self, module: None)
    monkeypatch.setattr(torch.nn.Embedding, "reset_parameters", lambda self: None)
    with pytest.raises(UserError, match=r"does not know how model\.embed_tokens\.weight is initialised"):
        Initialisation(model, 1).of("model.embed_tokens.weight")


def test_the_first_version_gives_what_it_gave():
    """Runs that began with it name no version in their header."""
    model = skeleton(config("gpt2"))
    layout = Layout.of(model)
    first = FirstRandom(model, layout, 5, Threads(1))
    tensor = next(tensor for tensor in layout.tensors if tensor.name.endswith("mlp.c_proj.weight"))
    assert first.read(tensor, 0, tensor.size).std() == pytest.approx(0.02, rel=0.05)
