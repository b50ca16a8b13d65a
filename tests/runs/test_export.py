"""Exports: Hugging Face loads the exact weights, and the folder is replaced whole or not at all."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from layers import ALONE, STORAGES, Arrays, bits_of, config_of, expected, layout_of, open_files, records, written
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from es_lite.data.tokenizer import train_bpe
from es_lite.errors import RunError
from es_lite.files import finish_replacement
from es_lite.model.layout import Layout, skeleton
from es_lite.model.source import Pretrained
from es_lite.runs import export as module
from es_lite.runs.export import export, model_card, step_of
from es_lite.weights.parts import Part
from es_lite.weights.reading import LayerReader

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
KINDS = {
    "qwen3": TINY,
    "gemma3_text": TINY,
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Model:
    """A tiny model, its weights in float32 by name; it is also the reader of each of its layers."""

    def __init__(self, kind: str = "qwen3", tied: bool = False) -> None:
        self.skeleton = skeleton(AutoConfig.for_model(kind, **KINDS[kind], tie_word_embeddings=tied))
        self.layout = Layout.of(self.skeleton)
        random = np.random.default_rng(4)
        self.weights = {tensor.name: random.standard_normal(tensor.size, np.float32) for tensor in self.layout.tensors}

    def part(self, tensor, start, count):
        return Part(tensor, start, self.weights[tensor.name][start : start + count])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def export(self, folder: Path, dtype: str = "fp32", tokenizer=None, step: int = 5) -> None:
        state = {"step": step, "eval_score": None}
        export(folder, self.skeleton, self.layout, lambda layer: self, tokenizer, dtype, "the card\n", state)


def assert_loaded(folder: Path, model: Model, dtype: str) -> None:
    """from_pretrained finds every tensor and no other, of the expected type and with the exact bits."""
    found, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(found) is type(model.skeleton)
    parameters = dict(found.named_parameters())
    assert parameters.keys() == model.weights.keys()
    for name, parameter in parameters.items():
        expected = torch.from_numpy(model.weights[name]).view(parameter.shape).to(TYPES[dtype])
        assert parameter.dtype == TYPES[dtype] and torch.equal(parameter, expected), name


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_loads_the_exact_weights(tmp_path, kind, tied, dtype):
    model = Model(kind, tied)
    assert ("lm_head.weight" in model.weights) is not tied
    model.export(tmp_path / "out", dtype)
    assert_loaded(tmp_path / "out", model, dtype)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 50_000])
def test_shards_are_loaded_too(tmp_path, monkeypatch, size, tied):
    """A shard holds at least one layer, even if that is larger than a shard should be."""
    monkeypatch.setattr(module, "SHARD_BYTES", size)
    model = Model(tied=tied)
    model.export(tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(model.layout.layers) if size == 1 else len(files)
    assert count > 1 and files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    places = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert places.keys() == model.weights.keys()
    for name, file in places.items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert_loaded(tmp_path / "out", model, "fp32")


def test_a_run_can_start_from_an_export(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 50_000)
    model = Model()
    model.export(tmp_path / "out", "bf16")
    source = Pretrained(tmp_path / "out", model.skeleton, model.layout)
    for tensor in model.layout.tensors:
        expected = torch.from_numpy(model.weights[tensor.name]).bfloat16().float().numpy()
        assert np.array_equal(source.read(tensor, 0, tensor.size), expected)


def test_the_folder_has_everything_that_belongs_to_a_model(tmp_path):
    model = Model()
    tokenizer = train_bpe([["some text for it"]], 257)
    model.export(tmp_path / "out", tokenizer=tokenizer)
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["dtype"] == "float32" and config["use_cache"] is True
    assert (out / "generation_config.json").exists()
    assert (out / "README.md").read_text() == "the card\n"
    assert AutoTokenizer.from_pretrained(out).encode("text") == tokenizer.encode("text")
    assert step_of(out) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_step_of_no_folder_is_none(tmp_path):
    assert step_of(tmp_path) is None
    (tmp_path / "es_lite.json").write_text("{")
    assert step_of(tmp_path) is None


def test_a_new_export_replaces_the_old_one(tmp_path):
    Model(tied=True).export(tmp_path / "out", step=1)
    (tmp_path / "out" / "stray").write_text("from before")
    model = Model()
    model.export(tmp_path / "out", step=2)
    assert step_of(tmp_path / "out") == 2
    assert not (tmp_path / "out" / "stray").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_loaded(tmp_path / "out", model, "fp32")


def test_an_export_leaves_the_configuration_in_use_unchanged(tmp_path):
    model = Model()
    model.export(tmp_path / "out")
    assert model.skeleton.config.use_cache is False


class Crash(BaseException):
    """The process is gone: nothing in it can clean up."""


def crashing(function, at: int):
    """`function` at its calls before number `at` (from 0); that one never happens."""
    calls = iter(range(10**6))

    def wrapped(*args, **kwargs):
        if next(calls) == at:
            raise Crash
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("rename", [0, 1], ids=["before", "between"])
def test_a_crash_before_or_between_the_renames_leaves_the_old_folder(tmp_path, monkeypatch, rename):
    Model().export(tmp_path / "out", step=1)
    old = content(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crashing(Path.rename, rename))
        with pytest.raises(Crash):
            Model().export(tmp_path / "out", step=2)
    finish_replacement(tmp_path / "out")
    assert content(tmp_path / "out") == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Model().export(tmp_path / "out", step=2)
    assert step_of(tmp_path / "out") == 2


def test_a_crash_after_the_renames_leaves_the_new_folder(tmp_path, monkeypatch):
    Model().export(tmp_path / "out", step=1)
    Model().export(tmp_path / "other", step=2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", crashing(shutil.rmtree, 1))  # call 0 removes what an earlier export left unfinished
        with pytest.raises(Crash):
            Model().export(tmp_path / "out", step=2)
    finish_replacement(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_crash_in_the_first_export_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crashing(Path.rename, 0))
        with pytest.raises(Crash):
            Model().export(tmp_path / "out")
    finish_replacement(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_finishing_a_replacement_that_is_finished_changes_nothing(tmp_path):
    Model().export(tmp_path / "out")
    before = content(tmp_path / "out")
    finish_replacement(tmp_path / "out")
    finish_replacement(tmp_path / "absent")
    assert content(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("limit", [100, 20_000], ids=["in the header", "in the data"])
def test_a_full_disk_is_an_error_of_the_run_and_leaves_the_old_folder(tmp_path, limit):
    """A limit on the size of files stands in for the full disk."""
    Model().export(tmp_path / "out", step=1)
    before = content(tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(RunError) as error:
            Model().export(tmp_path / "out", step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "out") in str(error.value) and "None" not in str(error.value)
    assert content(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("storage", STORAGES)
def test_layers_that_are_behind_are_exported_at_the_step_asked_for_and_no_file_stays_open(tmp_path, storage):
    """A run exports many times: descriptors that stay open would end it."""
    layout, theta_0, history = layout_of("gpt2"), Arrays(layout_of("gpt2")), records(3)
    files = written(tmp_path / "layers", layout, storage, step=1)
    before, open_before = bits_of(files), open_files()
    for _ in range(3):
        export(
            tmp_path / "out",
            skeleton(config_of("gpt2")),
            layout,
            lambda layer: LayerReader.of_file(files[layer.index], history, 3, ALONE),
            None,
            "fp32",
            "",
            {"step": 3},
        )
    assert open_files() <= open_before
    assert bits_of(files) == before
    found = load_file(tmp_path / "out/model.safetensors")
    for layer in layout.layers:
        wanted = expected(layer, theta_0, storage, history)
        for tensor in layer.tensors:
            values = plain.as_float32(*wanted[tensor.name], tensor.width)
            assert plain.same_bits(found[tensor.name].ravel(), values), tensor.name


def test_the_card_says_what_there_is_to_say(tmp_path):
    least = model_card(7, "", "", "")
    assert "7 steps, started from random weights" in least and "toml" not in least and "Held-out" not in least
    full = model_card(7, "[es]\nsigma = 1\n", "Qwen/Qwen3-0.6B", "-2.5000 (a unit)")
    assert full.startswith("---\nlibrary_name: transformers\n") and "\nbase_model: Qwen/Qwen3-0.6B\n---" in full
    assert "7 steps, started from `Qwen/Qwen3-0.6B`" in full
    assert "\nHeld-out score: -2.5000 (a unit).\n" in full and "```toml\n[es]\nsigma = 1\n```" in full
    assert "base_model" not in model_card(7, "", str(tmp_path), ""), "a local folder is not a name on the hub"
