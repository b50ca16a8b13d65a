"""Names and shapes of the tensors in files: what `from_pretrained` makes of them, and what `save_pretrained` writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import COMMON, config_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from es_lite.algorithm.jit import Threads
from es_lite.errors import UserError
from es_lite.model.layout import Layout
from es_lite.model.origin import Origin
from es_lite.model.source import Source
from es_lite.runs.export import export
from es_lite.weights.layer_format import LayerFormat
from es_lite.weights.reading import LayerReader

ONE = Threads(1)
APERTUS = {**COMMON, "pad_token_id": 0, "hidden_act": "xielu"}
CONFIGS = {
    "mixtral": lambda: config_of("mixtral", tied=False),  # matrices of experts, which are one parameter
    "qwen3_moe": lambda: config_of("qwen3_moe"),
    "deepseek_v3": lambda: config_of("deepseek_v3", tied=False),  # a buffer beside them
    "gpt_neox": lambda: config_of("gpt_neox", tied=False),  # embed_out
    "apertus": lambda: AutoConfig.for_model("apertus", **APERTUS),  # buffers
    "qwen3": lambda: config_of("qwen3"),
}


def saved(folder: Path, name: str) -> PreTrainedModel:
    """A model that `save_pretrained` wrote, with buffers that no other model has."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    return model


def opened(folder: Path) -> tuple[PreTrainedModel, Layout, Source]:
    origin = Origin(str(folder), "", 0, (), False, False)
    model, layout = origin.skeleton()
    return model, layout, origin.source(model, layout, ONE)


def exported(folder: Path, out: Path) -> None:
    model, layout, source = opened(folder)

    def layer(layer):
        return LayerReader.of_theta_0(LayerFormat(layer, "fp32"), source, [], ONE)

    export(out, model, layout, layer, None, "fp32", "", {"step": 0})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_files_are_read_as_from_pretrained_reads_them(tmp_path, name):
    model = saved(tmp_path, name)
    skeleton, layout, source = opened(tmp_path)
    parameters = dict(model.named_parameters())
    for tensor in layout.tensors:
        expected = parameters[tensor.name].detach().numpy().ravel()
        assert np.array_equal(source.read(tensor, 0, tensor.size), expected), tensor.name
        count = min(7, tensor.size // 2)
        assert np.array_equal(source.read(tensor, 1, count), expected[1 : 1 + count]), tensor.name
    state = model.state_dict()
    for buffer, value in skeleton.named_buffers():
        assert buffer not in state or torch.equal(value, state[buffer]), buffer


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_has_the_tensors_that_transformers_would_write(tmp_path, name):
    model = saved(tmp_path / "model", name)
    exported(tmp_path / "model", tmp_path / "export")
    theirs, ours = tensors(tmp_path / "model"), tensors(tmp_path / "export")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_the_fingerprint_depends_on_buffers_and_on_each_expert(tmp_path):
    saved(tmp_path, "deepseek_v3")
    found = {opened(tmp_path)[2].fingerprint()}
    file = tmp_path / "model.safetensors"
    names = [name for name in load_file(file) if "e_score_correction_bias" in name or "experts.2.up_proj" in name]
    assert len(names) == 2
    for name in names:
        changed = load_file(file)
        changed[name].view(-1)[0] += 1
        save_file(changed, file)
        found.add(opened(tmp_path)[2].fingerprint())
    assert len(found) == 3


def test_a_missing_expert_is_refused(tmp_path):
    saved(tmp_path, "mixtral")
    file = tmp_path / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "experts.3." not in name}
    save_file(kept, file)
    with pytest.raises(UserError, match=f"{file}: model.layers.0.mlp.experts.*has shape .3.*but config.json makes it .4"):
        opened(tmp_path)


def test_experts_of_unequal_shapes_are_refused(tmp_path):
    saved(tmp_path, "mixtral")
    file = tmp_path / "model.safetensors"
    values = load_file(file)
    name = next(name for name in values if "experts.3.w1" in name)
    values[name] = values[name][:-1].contiguous()
    save_file(values, file)
    with pytest.raises(UserError, match=r"its tensors cannot be converted to those that its config\.json needs"):
        opened(tmp_path)


def test_a_tied_matrix_may_be_saved_as_the_heads(tmp_path):
    model = saved(tmp_path, "qwen3")
    file = tmp_path / "model.safetensors"
    values = load_file(file)
    values["lm_head.weight"] = values.pop("model.embed_tokens.weight")
    save_file(values, file)
    _, layout, source = opened(tmp_path)
    expected = model.get_input_embeddings().weight.detach().numpy().ravel()
    assert np.array_equal(source.read(layout.tensors[0], 0, expected.size), expected)


# Which files


def test_another_safetensors_file_is_not_the_model(tmp_path):
    saved(tmp_path, "qwen3")
    before = opened(tmp_path)[2].fingerprint()
    save_file({name: value + 1 for name, value in tensors(tmp_path).items()}, tmp_path / "model_ema.safetensors")
    assert opened(tmp_path)[2].fingerprint() == before


def test_a_whole_file_is_taken_before_a_stale_index(tmp_path):
    saved(tmp_path, "qwen3")
    before = opened(tmp_path)[2].fingerprint()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    assert opened(tmp_path)[2].fingerprint() == before


def test_files_of_other_names_without_an_index_are_refused(tmp_path):
    saved(tmp_path, "qwen3")
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"has weights\.safetensors, but no model\.safetensors and no index"):
        opened(tmp_path)
