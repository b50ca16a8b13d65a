"""Model configurations and model folders that are broken or do not fit together."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import message_of, refused
from safetensors.numpy import load_file, save_file
from support import TINY, contents, leftovers, train, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved_model: Path, tmp_path: Path) -> Path:
    """A good model folder, to be broken."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


# Configurations


@pytest.mark.parametrize(
    "broken",
    [
        {"model_type": "quen3"},
        {"model_type": "vit"},
        {"num_attention_heads": 0},
        {"hidden_size": -1},
        {"hidden_size": "wide"},
        {"hidden_act": "no-such-activation"},
        {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"quantization_config": "gptq"},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_model_is_refused(tmp_path: Path, broken: dict) -> None:
    recipe = write_recipe(tmp_path, model={"config": TINY | broken})
    assert "model.config" in refused(recipe, tmp_path / "run")


REFUSED = {
    "not causal": ({"model_type": "bert", "pad_token_id": 0}, "BertLMHeadModel: is not causal as it is configured"),
    "in both directions": (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True, "pad_token_id": 0},
        "Gemma3ForCausalLM: is not causal as it is configured",
    ),
    "needs a language": (
        {"model_type": "xmod", "pad_token_id": 0},
        "XmodForCausalLM: does not run on the tokens of a text alone",
    ),
    "a parameter of no layer": (
        {"model_type": "hrm_text", "pad_token_id": 0},
        "HrmTextForCausalLM: model.z_L_init belongs to a part of it that has layers in it, and to no layer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_would_be_scored_wrongly_is_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    keys, message = REFUSED[case]
    recipe = write_recipe(tmp_path, model={"config": TINY | keys})
    assert message in refused(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_blocks_that_share_weights_are_not_streamed(tmp_path: Path) -> None:
    types = {"model_type": "zamba", "num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]}
    keys = TINY | types | {"pad_token_id": 0, "mamba_d_state": 8, "mamba_dt_rank": 8, "n_mamba_heads": 2}
    keys.pop("head_dim")
    recipe = write_recipe(tmp_path, model={"config": keys})
    message = refused(recipe, tmp_path / "run", "memory.residency=streamed")
    assert "the blocks of this model share weights, so they cannot pass through memory one after the other" in message
    assert not (tmp_path / "run").exists()


# Folders: each function breaks one, and returns what the message must say


def no_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return f"{folder}: no safetensors files"


def only_a_pickle(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "a pickle, which es_lite never loads"


def no_configuration(folder: Path) -> str:
    (folder / "config.json").unlink()
    return f"{folder}/config.json: missing"


def configuration_that_is_not_json(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return f"{folder}/config.json: cannot be read as JSON"


def configuration_of_another_shape(folder: Path) -> str:
    change_configuration(folder, intermediate_size=48)
    return (
        f"{folder}/model.safetensors: model.layers.0.mlp.gate_proj.weight has shape [64, 32], but config.json makes it [48, 32]"
    )


def configuration_with_one_more_layer(folder: Path) -> str:
    change_configuration(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    return "has the tensor model.layers.2."


def truncated(folder: Path) -> str:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    return f"{path}: truncated or not a safetensors file"


def truncated_to_nothing(folder: Path) -> str:
    os.truncate(folder / "model.safetensors", 0)
    return f"{folder}/model.safetensors: truncated or not a safetensors file"


def header_that_is_not_json(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"[" + path.read_bytes()[9:])
    return f"{path}: truncated or not a safetensors file"


def header_longer_than_the_file(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    return f"{path}: truncated or not a safetensors file"


def offsets_that_overlap(folder: Path) -> str:
    change_header(folder, lambda header: header["model.norm.weight"].update(data_offsets=[0, 128]))
    return f"{folder}/model.safetensors: truncated or not a safetensors file"


def offsets_outside_the_file(folder: Path) -> str:
    change_header(folder, lambda header: header["model.norm.weight"].update(data_offsets=[2**40, 2**40 + 128]))
    return f"{folder}/model.safetensors: truncated or not a safetensors file"


def tensor_missing(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    return f"{folder}: no safetensors file in it has the tensor model.norm.weight"


def tensor_of_whole_numbers(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    return f"{folder}/model.safetensors: tensors of type I8 cannot be used"


def index_of_a_missing_file(folder: Path) -> str:
    write_index(folder, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").unlink()  # which would be taken before the index
    return f"{folder}/model-00001-of-00002.safetensors"


def index_that_leads_outside(folder: Path) -> str:
    shutil.copy(folder / "model.safetensors", folder.parent)
    write_index(folder, "../model.safetensors")
    (folder / "model.safetensors").unlink()
    return f"{folder}/model.safetensors.index.json: names files outside its folder"


def index_without_a_map(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors", 3]}')
    (folder / "model.safetensors").unlink()
    return f"{folder}/model.safetensors.index.json"


def change_configuration(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_header(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def write_index(folder: Path, file: str) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


@pytest.mark.parametrize(
    "break_it",
    [
        no_weights,
        only_a_pickle,
        no_configuration,
        configuration_that_is_not_json,
        configuration_of_another_shape,
        configuration_with_one_more_layer,
        truncated,
        truncated_to_nothing,
        header_that_is_not_json,
        header_longer_than_the_file,
        offsets_that_overlap,
        offsets_outside_the_file,
        tensor_missing,
        tensor_of_whole_numbers,
        index_of_a_missing_file,
        index_that_leads_outside,
        index_without_a_map,
    ],
    ids=lambda function: function.__name__,
)
def test_a_broken_model_folder_is_refused(model: Path, tmp_path: Path, break_it: Callable[[Path], str]) -> None:
    expected = break_it(model)
    recipe = write_recipe(tmp_path, model={"config": "", "path": str(model)})
    before = contents(model)
    assert expected in refused(recipe, tmp_path / "run")
    assert contents(model) == before
    assert not (tmp_path / "run/journal.jsonl").exists()


def test_a_model_that_is_missing_is_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model={"config": "", "path": f"{tmp_path}/gone"})
    assert f"model.path = '{tmp_path}/gone': no such folder" in refused(recipe, tmp_path / "run")


def test_weights_that_are_not_finite_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    """By the command in a process of its own."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, model / "model.safetensors")
    recipe = write_recipe(tmp_path, model={"config": "", "path": str(model)})
    finished = train(recipe, tmp_path / "run")
    assert finished.code == 2
    expected = f"{model}/model.safetensors: model.layers.1.mlp.up_proj.weight has values that are not finite"
    assert expected in message_of(finished.err)
    assert leftovers(tmp_path / "run") == []
