"""θ₀: slices of a pretrained model's files, random weights from the seed, and the fingerprint of either."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import config_of
from safetensors.torch import save_file

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.place import INITIALISATION, Place
from es_lite.errors import UserError
from es_lite.model.layout import Factors, Layout, Tensor, skeleton
from es_lite.model.random_weights import Random
from es_lite.model.source import Pretrained, open_source

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ONE = Threads(1)
NORM = "model.norm.weight"


class Folder:
    """A model's folder, which `Pretrained` reads, and the tensors in it."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32, tied: bool = True) -> None:
        self.path = path
        self.skeleton = skeleton(config_of("qwen3", tied))
        self.layout = Layout.of(self.skeleton)
        torch.manual_seed(3)
        self.tensors = {tensor.name: torch.randn(tensor.shape).to(dtype) for tensor in self.layout.tensors}
        self.save()

    def save(self, prefix: str | None = None, **files: list[str]) -> None:
        """One file, or `files`: the tensors of each, and an index. prefix: instead of "model."."""
        for path in self.path.glob("*"):
            path.unlink()
        named = {name.replace("model.", prefix, 1) if prefix is not None else name: t for name, t in self.tensors.items()}
        if not files:
            save_file(named, self.path / "model.safetensors")
            return
        for file, names in files.items():
            save_file({name: named[name] for name in names}, self.path / f"{file}.safetensors")
        self.index({name: f"{file}.safetensors" for file, names in files.items() for name in names})

    def index(self, weight_map: object) -> None:
        (self.path / "model.safetensors").unlink(missing_ok=True)  # which would be taken before it
        (self.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def open(self) -> Pretrained:
        return Pretrained(self.path, self.skeleton, self.layout)

    def values(self, tensor: Tensor) -> np.ndarray:
        return self.tensors[tensor.name].float().numpy().ravel()

    def is_read(self) -> bool:
        source = self.open()
        return all(np.array_equal(source.read(t, 0, t.size), self.values(t)) for t in self.layout.tensors)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


# Pretrained: reading


@pytest.mark.parametrize("dtype", TYPES)
def test_any_slice_is_read_in_float32(tmp_path, dtype):
    folder = Folder(tmp_path, TYPES[dtype])
    source = folder.open()
    for tensor in folder.layout.tensors:
        for start, count in ((0, tensor.size), (0, 0), (3, 5), (tensor.size - 1, 1)):
            part = source.read(tensor, start, count)
            assert part.dtype == np.float32
            assert np.array_equal(part, folder.values(tensor)[start : start + count])


@pytest.mark.parametrize("prefix", ["model.", "", "model.model."], ids=["as is", "without a prefix", "with another prefix"])
def test_names_may_have_the_prefix_of_the_base_model_or_not(folder, prefix):
    folder.save(prefix)
    assert folder.is_read()


def test_several_files_are_read_by_their_index(folder):
    names = list(folder.tensors)
    folder.save(first=names[::2], second=names[1::2])
    assert folder.is_read()


def test_files_that_the_index_does_not_name_are_not_read(folder):
    folder.save(first=list(folder.tensors))
    (folder.path / "optimizer.safetensors").write_text("not a safetensors file")
    assert folder.is_read()


def test_other_tensors_in_a_file_do_not_matter(folder):
    """Such as a head that is saved although it is tied."""
    folder.tensors["lm_head.weight"] = torch.zeros(300, 64)
    folder.save()
    assert folder.is_read()


# Pretrained: refusals. What the command says about more broken folders is tested in tests/bad_input


def refused(folder: Folder) -> str:
    with pytest.raises(UserError) as raised:
        folder.open()
    return str(raised.value)


def test_a_missing_tensor_is_refused_by_name(folder):
    del folder.tensors[NORM]
    folder.save()
    assert f"{folder.path}: no safetensors file in it has the tensor {NORM}" in refused(folder)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(folder):
    folder.tensors[NORM] = torch.zeros(63)
    folder.save()
    assert f"{folder.path}/model.safetensors: {NORM} has shape [63], but config.json makes it [64]" in refused(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder.path / "model.safetensors").unlink()
    assert f"{folder.path}: no safetensors files; save the model with save_pretrained" in refused(folder)
    (folder.path / "pytorch_model.bin").write_bytes(b"")
    assert "no safetensors files (a .bin file is a pickle, which es_lite never loads)" in refused(folder)


@pytest.mark.parametrize("weight_map", [["model.safetensors"], {NORM: 3}, None])
def test_an_index_without_a_map_is_refused(folder, weight_map):
    folder.index(weight_map)
    message = refused(folder)
    assert "model.safetensors.index.json: has no weight_map of tensors to files; download it or create it again" in message


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "sub/model.safetensors"])
def test_an_index_that_leads_outside_the_folder_is_refused(folder, name):
    folder.index({NORM: name})
    assert "model.safetensors.index.json: names files outside its folder" in refused(folder)


def test_the_message_about_a_damaged_file_says_what_to_do(folder):
    path = folder.path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    message = refused(folder)
    assert message.startswith(f"{path}: truncated or not a safetensors file")
    assert message.endswith("; download it or create it again")


@pytest.mark.parametrize("operation", ["read", "fingerprint"])
def test_a_file_that_is_damaged_later_is_refused_with_what_to_do(folder, operation):
    source = folder.open()
    os.truncate(folder.path / "model.safetensors", 2000)
    tensor = folder.layout.tensors[-1]
    with pytest.raises(UserError, match=r"model\.safetensors: .*; download it or create it again$"):
        source.read(tensor, 0, tensor.size) if operation == "read" else source.fingerprint()


# Pretrained: the fingerprint


@pytest.mark.parametrize("dtype", TYPES)
def test_the_fingerprint_is_of_the_stored_bytes(tmp_path, dtype):
    folder = Folder(tmp_path, TYPES[dtype])
    parts = []
    for tensor in folder.layout.tensors:
        parts.append(f"{tensor.name} {dtype}".encode())
        parts.append(folder.tensors[tensor.name].view(torch.uint8).numpy().tobytes())
    assert folder.open().fingerprint() == sha256(*parts)


def test_the_fingerprint_does_not_depend_on_how_tensors_are_named_or_divided_among_files(folder):
    fingerprint = folder.open().fingerprint()
    folder.save("")
    assert folder.open().fingerprint() == fingerprint
    names = list(folder.tensors)
    folder.save(first=names[::2], second=names[1::2])
    assert folder.open().fingerprint() == fingerprint


def test_one_other_bit_is_another_fingerprint(folder):
    fingerprint = folder.open().fingerprint()
    bits = folder.tensors[NORM].view(torch.int32)
    bits[7] ^= 1
    folder.save()
    assert folder.open().fingerprint() != fingerprint


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path, dtype, value):
    folder = Folder(tmp_path, TYPES[dtype])
    name = "model.layers.1.mlp.up_proj.weight"
    folder.tensors[name][3, 4] = value
    folder.save()
    with pytest.raises(UserError, match=rf"model\.safetensors: {name} has values that are not finite"):
        folder.open().fingerprint()


# Random


def random_of(name: str = "qwen3", seed: int = 5, threads: int = 1, shared: bool = False, **changes) -> tuple[Random, Layout]:
    model = skeleton(config_of(name, tied=False, **changes))
    layout = Layout.of(model, shared=shared)
    return Random(model, layout, seed, Threads(threads)), layout


@pytest.mark.parametrize("shared", [False, True], ids=["own noise", "shared noise"])
def test_a_matrix_is_the_noise_of_its_position_times_the_initial_range(shared):
    """Also if training noise is shared: equal matrices would make equal layers."""
    source, layout = random_of(seed=2**64 - 5, shared=shared, initializer_range=0.05)
    for position, tensor in enumerate(layout.tensors):
        if len(tensor.shape) > 1:
            place = Place(2**64 - 5, INITIALISATION, 0, position)
            expected = np.float32(0.05) * gaussian.epsilon(place, tensor.shape, 0, tensor.size)
            found = source.read(tensor, 0, tensor.size)
            assert found.dtype == np.float32 and found.tobytes() == expected.tobytes()


def test_any_slice_is_a_slice_of_the_whole():
    source, layout = random_of()
    for tensor in layout.tensors:
        whole = source.read(tensor, 0, tensor.size)
        for start, count in ((0, 0), (1, 9), (5, 11), (tensor.size - 3, 3)):
            assert np.array_equal(source.read(tensor, start, count), whole[start : start + count])


def test_threads_change_no_bit():
    one, layout = random_of(vocab_size=3001)
    two, _ = random_of(vocab_size=3001, threads=2)
    for tensor in layout.tensors:
        assert np.array_equal(one.read(tensor, 0, tensor.size), two.read(tensor, 0, tensor.size))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", {"model.norm.weight": 1, "model.layers.0.self_attn.q_norm.weight": 1}),
        ("qwen2", {"model.norm.weight": 1, "model.layers.0.self_attn.q_proj.bias": 0}),
        ("gemma3", {"model.norm.weight": 0}),  # which adds 1 to it
        ("gpt2", {"transformer.ln_f.weight": 1, "transformer.ln_f.bias": 0, "transformer.h.0.attn.c_attn.bias": 0}),
        ("phi", {"model.final_layernorm.weight": 1, "lm_head.bias": 0}),
    ],
)
def test_vectors_are_as_the_architecture_initialises_them(name, expected):
    source, layout = random_of(name)
    vectors = {tensor.name: tensor for tensor in layout.tensors if len(tensor.shape) == 1}
    for vector, value in expected.items():
        assert source.read(vectors[vector], 2, 7).tolist() == [value] * 7
    for tensor in vectors.values():
        assert set(source.read(tensor, 0, tensor.size).tolist()) <= {0, 1}


def test_a_random_models_fingerprint_depends_on_all_that_its_weights_depend_on():
    base = random_of()[0].fingerprint()
    assert random_of(threads=2)[0].fingerprint() == base
    others = [
        random_of(seed=6),
        random_of(initializer_range=0.03),
        random_of(hidden_size=32),
        random_of(num_hidden_layers=3),
        random_of("llama"),
    ]
    assert len({base, *(source.fingerprint() for source, _ in others)}) == len(others) + 1


def test_groups_change_neither_the_weights_nor_the_fingerprint():
    model = skeleton(config_of("qwen3"))
    plain, grouped = Layout.of(model), Layout.of(model, [Factors("mlp", 0.5, 2)], nes=True)
    sources = [Random(model, layout, 5, ONE) for layout in (plain, grouped)]
    assert sources[0].fingerprint() == sources[1].fingerprint()
    tensor = next(tensor for tensor in plain.tensors if "mlp" in tensor.name)
    assert np.array_equal(*(source.read(tensor, 0, tensor.size) for source in sources))


# Which of the two


def test_a_path_is_read_and_without_one_weights_are_random(folder):
    assert isinstance(open_source(str(folder.path), folder.skeleton, folder.layout, 5, ONE), Pretrained)
    assert isinstance(open_source("", folder.skeleton, folder.layout, 5, ONE), Random)
