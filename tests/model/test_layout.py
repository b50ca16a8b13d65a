"""A model's layers and tensors: where each parameter belongs, its number in the noise, and the factors of its group."""

import pytest
import torch
from architectures import COMMON, config_of
from torch import nn
from transformers import AutoConfig

from es_lite.errors import UserError
from es_lite.model.layout import Factors, Layer, Layout, Tensor, blocks, skeleton

BOTH_TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def layout_of(name: str = "qwen3", tied: bool = True, **options) -> Layout:
    return Layout.of(skeleton(config_of(name, tied)), **options)


def tensor_of(layout: Layout, name: str) -> Tensor:
    return next(tensor for tensor in layout.tensors if tensor.name == name)


def names_of(layer: Layer) -> list[str]:
    return [tensor.name for tensor in layer.tensors]


# Layers


@BOTH_TIED
def test_the_layers_of_qwen3(tied):
    layout = layout_of("qwen3", tied)
    assert [(layer.index, layer.name, layer.block) for layer in layout.layers] == [
        (0, "embedding", False),
        (1, "block-000", True),
        (2, "block-001", True),
        (3, "final", False),
    ]
    assert layout.blocks == layout.layers[1:3]
    assert layout.tied is tied
    assert names_of(layout.layers[0]) == ["model.embed_tokens.weight"]
    assert all(name.startswith("model.layers.1.") for name in names_of(layout.layers[2]))
    assert "model.layers.1.mlp.down_proj.weight" in names_of(layout.layers[2])
    assert names_of(layout.layers[3]) == (["model.norm.weight"] if tied else ["model.norm.weight", "lm_head.weight"])


@BOTH_TIED
def test_the_layers_of_gpt2(tied):
    """Its positions belong to the embedding's layer, but only the token embedding is used by rows."""
    layout = layout_of("gpt2", tied)
    assert [layer.name for layer in layout.layers] == ["embedding", "block-000", "block-001", "block-002", "final"]
    assert names_of(layout.layers[0]) == ["transformer.wte.weight", "transformer.wpe.weight"]
    final = ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    assert names_of(layout.layers[-1]) == (final if tied else [*final, "lm_head.weight"])
    matrices = ["transformer.wte.weight"] if tied else ["transformer.wte.weight", "lm_head.weight"]
    assert [tensor.name for tensor in layout.tensors if tensor.vocabulary] == matrices


@BOTH_TIED
@pytest.mark.parametrize("name", ["qwen3", "llama-biases", "gemma2", "gpt2", "phi"])
def test_every_parameter_is_one_tensor_of_its_shape(name, tied):
    model = skeleton(config_of(name, tied))
    layout = Layout.of(model)
    parameters = dict(model.named_parameters())
    assert len(layout.tensors) == len(parameters)
    assert {tensor.name: tensor.shape for tensor in layout.tensors} == {n: tuple(p.shape) for n, p in parameters.items()}
    assert layout.size == sum(parameter.numel() for parameter in parameters.values())
    assert [tensor for layer in layout.layers for tensor in layer.tensors] == list(layout.tensors)
    assert layout.size == sum(layer.size for layer in layout.layers)


def test_a_model_without_a_head_has_a_layout(monkeypatch):
    """Scoring refuses it later, and says why."""
    model = skeleton(config_of("qwen3", tied=False))
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    assert len(Layout.of(model).tensors) == len(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("shape", "size", "width", "rows"),
    [((6, 4), 24, 4, 6), ((5,), 5, 5, 1), ((), 1, 1, 1), ((2, 3, 4), 24, 4, 6), ((0,), 0, 0, 0)],
)
def test_sizes_of_a_tensor(shape, size, width, rows):
    tensor = Tensor("x", shape, 0, 1.0, 1.0, 1.0)
    assert (tensor.size, tensor.width, tensor.rows) == (size, width, rows)


# Numbers in the noise


@BOTH_TIED
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "phi"])
def test_a_tensors_number_is_its_position_among_the_models_parameters(name, tied):
    model = skeleton(config_of(name, tied))
    numbers = {parameter: number for number, (parameter, _) in enumerate(model.named_parameters())}
    assert {tensor.name: tensor.number for tensor in Layout.of(model).tensors} == numbers


def test_groups_do_not_change_numbers():
    numbers = [tensor.number for tensor in layout_of().tensors]
    assert [tensor.number for tensor in layout_of(groups=[Factors("mlp", 0, 0)], nes=True).tensors] == numbers


def test_with_shared_noise_tensors_of_equal_shape_have_the_number_of_the_first():
    own, shared = layout_of(tied=False), layout_of(tied=False, shared=True)
    first: dict[tuple[int, ...], int] = {}
    for tensor in sorted(own.tensors, key=lambda tensor: tensor.number):
        first.setdefault(tensor.shape, tensor.number)
    assert [tensor.number for tensor in shared.tensors] == [first[tensor.shape] for tensor in shared.tensors]
    assert len(first) < len(own.tensors)


# Groups


def test_the_first_pattern_found_in_a_name_counts():
    groups = [Factors("norm", 0, 0), Factors("embed|q_proj", 2.5, 3), Factors("mlp", 0.5, 2), Factors("proj", 9, 9)]
    layout = layout_of(groups=groups)
    for name, expected in {
        "model.layers.0.self_attn.q_norm.weight": (0, 0, 0),
        "model.embed_tokens.weight": (2.5, 3, 3),
        "model.layers.1.self_attn.q_proj.weight": (2.5, 3, 3),
        "model.layers.1.mlp.gate_proj.weight": (0.5, 2, 2),
        "model.layers.1.self_attn.o_proj.weight": (9, 9, 9),
    }.items():
        tensor = tensor_of(layout, name)
        assert (tensor.sigma_factor, tensor.coefficient_factor, tensor.decay_factor) == expected, name


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_every_tensor_belongs_to_the_first_group_that_matches(name):
    groups = [Factors("norm|ln_", 0, 0), Factors("emb|wte", 2.5, 1), Factors("mlp", 0, 0), Factors("", 0.5, 1)]
    layout = layout_of(name, groups=groups)
    assert {tensor.sigma_factor for tensor in layout.tensors} == {0, 2.5, 0.5}
    for tensor in layout.tensors:
        if "norm" in tensor.name or "ln_" in tensor.name:
            assert tensor.sigma_factor == 0


def test_tensors_without_a_group_have_factors_of_1():
    factors = {(t.sigma_factor, t.coefficient_factor, t.decay_factor) for t in layout_of(groups=[Factors("mlp", 2, 3)]).tensors}
    assert factors == {(2, 3, 3), (1, 1, 1)}


def test_with_nes_coefficients_are_proportional_to_alpha_over_sigma():
    groups = [Factors("norm", 0, 0), Factors("mlp", 0.5, 3)]
    layout = layout_of(groups=groups, nes=True)
    found = {(t.sigma_factor, t.coefficient_factor, t.decay_factor) for t in layout.tensors}
    assert found == {(0, 0, 0), (0.5, 6, 3), (1, 1, 1)}


@pytest.mark.parametrize("index", [0, 1])
def test_a_pattern_that_matches_nothing_is_refused(index):
    groups = [Factors("norm", 1, 1)] * index + [Factors("nrom", 1, 1), Factors("mlp", 1, 1)]
    with pytest.raises(
        UserError, match=rf"^es\.groups\[{index}\]\.pattern = 'nrom': matches no parameter; .*model\.embed_tokens"
    ):
        layout_of(groups=groups)


def test_a_pattern_may_match_only_what_an_earlier_one_has_taken():
    layout = layout_of(groups=[Factors("", 0.5, 1), Factors("norm", 9, 9)])
    assert {tensor.sigma_factor for tensor in layout.tensors} == {0.5}


# The structure


def test_the_structure_depends_on_names_shapes_and_numbers_alone():
    base = layout_of("qwen3", tied=False)
    assert layout_of("qwen3", tied=False, groups=[Factors("mlp", 0.5, 2)], nes=True).structure() == base.structure()
    others = [
        layout_of("qwen3", tied=True),
        layout_of("qwen3", tied=False, shared=True),
        layout_of("llama", tied=False),
        Layout.of(skeleton(config_of("qwen3", tied=False, intermediate_size=128))),
        Layout.of(skeleton(config_of("qwen3", tied=False, num_hidden_layers=3))),
    ]
    assert len({base.structure(), *(layout.structure() for layout in others)}) == len(others) + 1


# The skeleton


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2"])
def test_a_skeleton_has_no_parameters_in_memory_but_its_buffers(name):
    model = skeleton(config_of(name))
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert all(not buffer.is_meta and torch.isfinite(buffer).all() for buffer in buffers.values())
    if name != "gpt2":
        assert any("inv_freq" in buffer and values.any() for buffer, values in buffers.items())
    assert not model.training and not model.config.use_cache


def test_other_models_are_made_in_memory_again_afterwards():
    skeleton(config_of("qwen3"))
    with pytest.raises(UserError):
        skeleton(AutoConfig.for_model("qwen3", **COMMON | {"hidden_act": "no-such-activation"}))
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize(
    ("kind", "changes"), [("qwen3", {"hidden_size": -1}), ("vit", {})], ids=["sizes", "not a language model"]
)
def test_a_configuration_without_a_causal_model_is_refused(kind, changes):
    keys = COMMON if kind == "qwen3" else {}
    with pytest.raises(UserError, match=rf"^model\.config .*no causal model of type '{kind}' can be built: ") as raised:
        skeleton(AutoConfig.for_model(kind, **keys | changes))
    assert "\n" not in str(raised.value)


def test_the_blocks_are_the_list_of_most_parameters():
    """Others may be as long: with two blocks, for instance, a pair of norms."""
    model = skeleton(config_of("qwen3"))
    model.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
    prefix, found = blocks(model)
    assert prefix == "model.layers" and found is model.model.layers


def test_without_a_list_of_that_length_the_largest_list_has_the_blocks():
    """Such as that of a model whose blocks have two layers each."""
    model = skeleton(config_of("qwen3"))
    model.config.num_hidden_layers = 4
    model.norms = nn.ModuleList([nn.LayerNorm(4)])
    assert blocks(model)[1] is model.model.layers


def test_a_model_without_a_list_of_blocks_is_refused():
    model = skeleton(config_of("qwen3"))
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(UserError, match="Qwen3ForCausalLM: has no list of decoder blocks"):
        blocks(model)
