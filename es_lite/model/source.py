"""θ₀: a pretrained model's safetensors, or random weights that the run's seed determines."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from transformers import PreTrainedModel

from es_lite.algorithm.jit import Threads
from es_lite.errors import DamagedFile, UserError
from es_lite.files import view_of
from es_lite.model import random_weights
from es_lite.model.configuration import locate, read_json
from es_lite.model.layout import Layout, Tensor
from es_lite.model.sliced_safetensors import Entry, Reader, open_tensors

EXPONENTS = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
"""Masks of the exponent's bits, which are all set in values that are not finite."""


class Source(Protocol):
    """θ₀ in slices."""

    def read(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        """float32 [count]: elements start … of `tensor`."""
        ...

    def fingerprint(self) -> str:
        """Identifies this θ₀ among all others."""
        ...


class Pretrained:
    """θ₀ from a folder's safetensors; names and shapes are checked against the configuration."""

    def __init__(self, folder: Path, model: PreTrainedModel, layout: Layout) -> None:
        self._layout = layout
        self._reader = Reader()
        found = _entries(folder)
        self._entries: dict[str, Entry] = {}
        prefix = model.base_model_prefix + "."
        for tensor in layout.tensors:
            names = (tensor.name, tensor.name.removeprefix(prefix), prefix + tensor.name)
            entry = next((found[name] for name in names if name in found), None)
            if entry is None:
                raise UserError(f"{folder}: no safetensors file in it has the tensor {tensor.name}, which its config.json needs")
            if entry.shape != tensor.shape:
                raise UserError(
                    f"{entry.file}: {tensor.name} has shape {list(entry.shape)}, but config.json makes it "
                    f"{list(tensor.shape)}; the weights and the configuration are of different models"
                )
            self._entries[tensor.name] = entry

    def read(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        entry = self._entries[tensor.name]
        with _remedy():
            return self._reader.float32(entry, start, count)

    def fingerprint(self) -> str:
        """SHA-256 of the stored bytes of every tensor, in layout order. Raises UserError if a value is not finite."""
        digest = hashlib.sha256()
        for tensor in self._layout.tensors:
            entry = self._entries[tensor.name]
            digest.update(f"{tensor.name} {entry.dtype}".encode())
            for start in range(0, tensor.size, 2**22):
                with _remedy():
                    stored = self._reader.raw(entry, start, min(2**22, tensor.size - start))
                bits, exponent = stored.view(f"u{stored.itemsize}"), EXPONENTS[entry.dtype]
                if (bits & exponent == exponent).any():  # infinite or not a number
                    raise UserError(f"{entry.file}: {tensor.name} has values that are not finite; the model is broken")
                digest.update(view_of(stored))
        return digest.hexdigest()


REMEDY = "download it or create it again"


@contextlib.contextmanager
def _remedy() -> Iterator[None]:
    """Adds the remedy to the error for a pretrained model's damaged file."""
    try:
        yield
    except DamagedFile as error:
        raise UserError(f"{error}; {REMEDY}") from None


def _entries(folder: Path) -> dict[str, Entry]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{index}: has no weight_map of tensors to files; {REMEDY}")
        files = sorted(set(places.values()))
        if any(os.path.basename(name) != name for name in files):
            raise UserError(f"{index}: names files outside its folder")
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        pickled = " (a .bin file is a pickle, which es_lite never loads)" if list(folder.glob("*.bin")) else ""
        raise UserError(f"{folder}: no safetensors files{pickled}; save the model with save_pretrained")
    entries: dict[str, Entry] = {}
    for name in files:
        with _remedy():
            entries |= open_tensors(folder / name)[0]
    return entries


def open_source(
    path: str, model: PreTrainedModel, layout: Layout, seed: int, threads: Threads, initialisation: int = random_weights.NEWEST
) -> Source:
    """θ₀ of the recipe's model: of the folder `path` if given, else random from `seed`, in this version of the initialisation."""
    if path:
        return Pretrained(locate(path), model, layout)
    return random_weights.VERSIONS[initialisation](model, layout, seed, threads)
