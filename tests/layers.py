"""Tiny models in layer files: layouts, θ₀ as arrays, records, and what a layer holds after them, computed in plain numpy."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from es_lite.algorithm.formats import Storage
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.model.layout import Factors, Layer, Layout, Tensor, skeleton
from es_lite.scoring.weights import Weights
from es_lite.weights import store
from es_lite.weights.layer_file import LayerFile
from es_lite.weights.parts import Part, dtype_of
from es_lite.weights.store import Store
from es_lite.weights.stream import Stream
from es_lite.weights.working_copy import WorkingCopy, allocate

STORAGES: tuple[Storage, ...] = ("fp32", "bf16", "int8")
ALONE = Threads(1)

COMBINATIONS = [("fp32", "bf16"), ("fp32", "int8"), ("bf16", "bf16"), ("int8", "int8")]
"""What layers are stored as, and the format that they are scored from."""

MODELS = pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
IN_EVERY_STORAGE = pytest.mark.parametrize("storage", STORAGES)
TYPES = pytest.mark.parametrize(("storage", "working"), COMBINATIONS, ids=map("-".join, COMBINATIONS))

BLOCK = 32
"""The head is asked for in blocks of this many rows."""

ROWS = np.array([0, 3, 4, 77, 255, 256, 300], np.int64)
"""The rows of the embedding that a batch uses."""

QWEN3 = {
    "vocab_size": 1001,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 301, "n_embd": 40, "n_layer": 2, "n_head": 4, "n_positions": 24, "bos_token_id": 0, "eos_token_id": 0}
GROUPS = (Factors("k_proj|ln_2", 0, 0), Factors("norm|ln_f", 0.5, 1), Factors("mlp", 1, 0.75))
"""Some tensors are frozen, some have factors of their own."""


def config_of(name: str) -> PretrainedConfig:
    """name: "tied", "untied" (Qwen 3) or "gpt2", whose embedding layer has a matrix of positions too."""
    kind, keys = ("gpt2", GPT2) if name == "gpt2" else ("qwen3", QWEN3)
    return AutoConfig.for_model(kind, **keys, pad_token_id=None, tie_word_embeddings=name != "untied")


@functools.cache
def layout_of(name: str) -> Layout:
    return Layout.of(skeleton(config_of(name)), GROUPS)


class Arrays:
    """θ₀ in memory: the rows of its matrices differ in magnitude, and one row is zero.

    Attributes:
        opened: how often `open` has been called.
    """

    def __init__(self, layout: Layout) -> None:
        random = np.random.default_rng(1)
        self.values: dict[str, np.ndarray] = {}
        self.opened = 0
        for tensor in layout.tensors:
            values = 0.1 * random.standard_normal((tensor.rows, tensor.width), np.float32)
            if len(tensor.shape) > 1:
                values *= np.geomspace(0.5, 2, tensor.rows, dtype=np.float32)[:, None]
                values[3] = 0
            else:
                values += 1
            self.values[tensor.name] = values.ravel()

    def read(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        return self.values[tensor.name][start : start + count].copy()

    def fingerprint(self) -> str:
        return "arrays"

    def open(self) -> "Arrays":
        self.opened += 1
        return self


def records(count: int, anchored: bool = False) -> list[Record]:
    """Steps 0 … count - 1, each with another kind of noise: antithetic or not, with weight decay or without; in each, one member
    has the coefficient 0. anchored: the decay goes towards θ₀."""
    out = []
    kinds = list(plain.KINDS.values())[::-1]  # low-rank noise, which depends on a tensor's shape, is in the first steps
    for step in range(count):
        coefficients = 2e-3 * np.random.default_rng(step).standard_normal(6).astype(np.float32)
        coefficients[step % 6] = 0
        decay = float(np.float32(1e-2 if step % 3 else 0))
        noise, members = kinds[step % len(kinds)], tuple(float(c) for c in coefficients)
        pulls = {"decay": 0.0, "anchor": 8 * decay} if anchored else {"decay": decay}
        out.append(
            Record(step, 2**63 + step // 2, 1e-2, bool(step % 2), coefficients=members, kind=noise.NAME, rank=noise.RANK, **pulls)
        )
    return out


def expected(layer: Layer, theta_0: Arrays, storage: Storage, history: Sequence[Record]) -> dict[str, tuple]:
    """Each tensor's elements and scales, as stored, after the records of `history`, by name."""
    out = {}
    for tensor in layer.tensors:
        stored, scales = plain.stored_as(dtype_of(tensor, storage), theta_0.values[tensor.name], tensor.width)
        for record in history:
            coefficients = np.array(record.coefficients, np.float32)
            if record.antithetic:
                coefficients = coefficients[::2] - coefficients[1::2]
            coefficients *= np.float32(tensor.coefficient_factor)
            decay = np.float32(record.decay) * np.float32(tensor.decay_factor)
            anchor = np.float32(record.anchor) * np.float32(tensor.decay_factor)
            if coefficients.any() or decay or anchor:
                place = {"seed": record.seed, "step": record.step, "tensor": tensor.number}
                pull = {"anchor": anchor, "origin": theta_0.values[tensor.name]} if record.anchor else {}
                noise = {"noise": record.noise, "shape": tensor.shape, "pairs": np.arange(coefficients.size)}
                stored, scales = plain.advanced(stored, scales, **place, **noise, coefficients=coefficients, decay=decay, **pull)
        out[tensor.name] = stored, scales
    return out


def contents(file: LayerFile) -> tuple[dict[str, tuple], dict[str, str]]:
    """Each tensor's elements and scales in the file, by name, and its metadata, as the safetensors library reads them."""
    with safe_open(file.path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    out = {}
    for name in [name for name in tensors if not name.endswith(".SCB")]:
        value = tensors[name]
        scales = tensors.get(name.removesuffix("weight") + "SCB", torch.zeros(0))
        out[name] = (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy().ravel(), scales.numpy()
    return out, metadata


def same(found: dict[str, tuple], wanted: dict[str, tuple]) -> bool:
    """Both hold the same bits of the same tensors."""
    return found.keys() == wanted.keys() and all(
        plain.same_bits(a, b) for name, pair in wanted.items() for a, b in zip(found[name], pair, strict=True)
    )


def files_of(folder: Path, layout: Layout, storage: Storage) -> list[LayerFile]:
    """All layers' files, not written yet."""
    folder.mkdir(exist_ok=True)
    return Store(folder, layout, storage).files


def written(folder: Path, layout: Layout, storage: Storage, step: int = 0) -> list[LayerFile]:
    """All layers' files, written at `step` from θ₀."""
    files, theta_0 = files_of(folder, layout, storage), Arrays(layout)
    for file in files:
        store.advance_layer(file, theta_0.open, records(step), step, None, ALONE)
    return files


@contextmanager
def working_copy(layout: Layout, storage: Storage) -> Iterator[WorkingCopy]:
    """A working copy of zeros."""
    descriptor = allocate(layout, storage)
    try:
        yield WorkingCopy(layout, storage, descriptor)
    finally:
        os.close(descriptor)


def bits_of(files: Sequence[LayerFile]) -> dict[str, bytes]:
    """The bytes of every file in the folder, also of those that should not be there."""
    return {path.name: path.read_bytes() for path in sorted(files[0].path.parent.iterdir())}


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Changes one bit of a file."""
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def open_files() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/dev/fd"))


def streamed(files: Sequence[LayerFile], layout: Layout, working: Storage, step: int, direct: bool = False) -> Stream:
    """A stream whose next pass brings the layers to `step`."""
    stream = Stream(files, layout, working, Threads(2), direct)
    stream.advance(records(step), step)
    return stream


def seen(part: Part) -> tuple:
    """A copy of all that scoring can use of a part."""
    return part.tensor, part.start, part.data.dtype, part.data.tobytes(), part.own_scales.tobytes()


def asked(weights: Weights, layout: Layout, at: Callable[[str], None] = lambda layer: None) -> Iterator[tuple]:
    """What scoring asks for in a pass, in its order. at: is called with each layer's name while the layer is in use."""
    first, final = layout.layers[0], layout.layers[-1]
    with weights.passing():
        with weights.opened(first):
            for tensor in first.tensors:
                yield (
                    tuple(map(np.ndarray.tobytes, weights.rows(tensor, ROWS)))
                    if tensor.vocabulary
                    else seen(weights.part(tensor))
                )
        at(first.name)
        for layer in layout.blocks:
            with weights.opened(layer):
                yield from (seen(weights.part(tensor)) for tensor in layer.tensors)
                at(layer.name)
                yield from (seen(weights.part(tensor)) for tensor in layer.tensors[::-1])
        with weights.opened(final):
            yield from (seen(weights.part(tensor)) for tensor in final.tensors if not tensor.vocabulary)
            head = next(tensor for tensor in (*final.tensors, *first.tensors) if tensor.vocabulary)
            yield from (seen(block) for block in weights.blocks(head, BLOCK))
        at(final.name)


def resident(folder: Path, layout: Layout, storage: Storage, working: Storage, step: int) -> tuple[list[tuple], dict[str, bytes]]:
    """What scoring gets from a working copy at `step`, and the files at that step: the reference for streams."""
    files, theta_0 = written(folder, layout, storage, step), Arrays(layout)
    with working_copy(layout, working) as copy:
        for file in files:
            store.advance_layer(file, theta_0.open, [], step, copy, ALONE)
        return list(asked(copy, layout)), bits_of(files)
