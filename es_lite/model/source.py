"""θ₀: a pretrained model's safetensors, or random weights that the run's seed determines."""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from es_lite.algorithm.jit import Threads
from es_lite.errors import DamagedFile, UserError
from es_lite.files import view_of
from es_lite.model import random_weights
from es_lite.model.buffers import persistent_buffers, stored
from es_lite.model.configuration import locate, read_json
from es_lite.model.conversion import Conversion, on_loading
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
        """model: a `layout.skeleton`, whose buffers get the folder's values. Raises UserError if a parameter is missing."""
        self._layout = layout
        self._model = model
        self._reader = Reader()
        self._found = _entries(folder, model)
        conversions = _conversions(folder, model, self._found)
        self._conversions: dict[str, Conversion] = {}
        self._kept: tuple[Conversion, dict[str, np.ndarray]] | None = None
        """What was converted last."""
        others = _other_names(model)
        for tensor in layout.tensors:
            name = next((name for name in (tensor.name, *others[tensor.name]) if name in conversions), None)
            if name is None:
                raise UserError(f"{folder}: no safetensors file in it has the tensor {tensor.name}, which its config.json needs")
            conversion = conversions[name]
            if conversion.results[name] != tensor.shape:
                file = self._found[conversion.sources[0]].file
                raise UserError(
                    f"{file}: {tensor.name} has shape {list(conversion.results[name])}, but config.json makes it "
                    f"{list(tensor.shape)}; the weights and the configuration are of different models"
                )
            self._conversions[tensor.name] = conversion
            others[tensor.name] = [name]
        self._names = {name: own[0] for name, own in others.items() if own}
        self._buffers = _fill_buffers(model, self._found, conversions)

    def read(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        conversion = self._conversions[tensor.name]
        with _remedy():
            if conversion.converter is None:
                return self._reader.float32(self._found[conversion.sources[0]], start, count)
            part = self._converted(conversion)[self._names[tensor.name]][start : start + count]
            if start + count == tensor.size and len(conversion.results) == 1:
                self._kept = None  # it is read from front to back
            return part

    def _converted(self, conversion: Conversion) -> dict[str, np.ndarray]:
        """What several tensors of the files become: float32 [elements] by name."""
        if self._kept is None or self._kept[0] is not conversion:
            self._kept = None  # or both would be in memory
            entries = [self._found[name] for name in conversion.sources]
            tensors = [torch.from_numpy(self._reader.float32(e, 0, math.prod(e.shape))).view(e.shape) for e in entries]
            made = conversion.convert(self._model, tensors)
            self._kept = conversion, {name: value.contiguous().view(-1).numpy() for name, value in made.items()}
        return self._kept[1]

    def fingerprint(self) -> str:
        """SHA-256 of the stored bytes of every tensor, in layout order. Raises UserError if a value is not finite."""
        digest, done = hashlib.sha256(), set()
        for tensor in self._layout.tensors:
            conversion = self._conversions[tensor.name]
            for source in conversion.sources:
                name = tensor.name if conversion.converter is None else source
                if name not in done:  # several parameters may be made of it
                    self._add(digest, name, self._found[source])
                done.add(name)
        for name, value in self._buffers.items():
            digest.update(f"{name} {value.dtype}".encode() + stored(value))
        return digest.hexdigest()

    def _add(self, digest: "hashlib._Hash", name: str, entry: Entry) -> None:
        """Adds a tensor's stored bytes."""
        digest.update(f"{name} {entry.dtype}".encode())
        size = math.prod(entry.shape)
        for start in range(0, size, 2**22):
            with _remedy():
                stored = self._reader.raw(entry, start, min(2**22, size - start))
            bits, exponent = stored.view(f"u{stored.itemsize}"), EXPONENTS[entry.dtype]
            if (bits & exponent == exponent).any():  # infinite or not a number
                raise UserError(f"{entry.file}: {name} has values that are not finite; the model is broken")
            digest.update(view_of(stored))


def read_buffers(folder: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Gives the model's persistent buffers the values of the folder's files; returns all of them, by name."""
    if not persistent_buffers(model):  # then no file is opened
        return {}
    found = _entries(folder, model)
    return _fill_buffers(model, found, _conversions(folder, model, found))


def _fill_buffers(model: PreTrainedModel, found: dict[str, Entry], conversions: dict[str, Conversion]) -> dict[str, torch.Tensor]:
    """See `read_buffers`. found, conversions: of the folder's files."""
    buffers = persistent_buffers(model)
    for name in buffers.keys() & conversions.keys():
        conversion = conversions[name]
        tensors = []
        for source in conversion.sources:
            with _remedy(), safe_open(found[source].file, framework="pt") as file:
                tensors.append(file.get_tensor(source))
        value = conversion.convert(model, tensors)[name]
        if value.shape != buffers[name].shape:
            raise UserError(
                f"{found[conversion.sources[0]].file}: {name} has shape {list(value.shape)}, but config.json makes it "
                f"{list(buffers[name].shape)}; the weights and the configuration are of different models"
            )
        buffers[name].copy_(value)  # the model's own memory
    return buffers


def _other_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """For each parameter, the other names that it has in the model because it is tied."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    return {name: [other for other in by_identity[id(p)] if other != name] for name, p in model.named_parameters()}


def _conversions(folder: Path, model: PreTrainedModel, found: dict[str, Entry]) -> dict[str, Conversion]:
    """By the name of each parameter and buffer that the files give."""
    try:
        conversions = on_loading(model, {name: entry.shape for name, entry in found.items()})
    except Exception as error:  # torch's or transformers' own, if the tensors have other shapes
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{folder}: its tensors cannot be converted to those that its config.json needs ({type(error).__name__}: {reason}); "
            "the weights and the configuration are of different models"
        ) from None
    return {name: conversion for conversion in conversions for name in conversion.results}


REMEDY = "download it or create it again"


@contextlib.contextmanager
def _remedy() -> Iterator[None]:
    """Adds the remedy to the error for a pretrained model's damaged file."""
    try:
        yield
    except DamagedFile as error:
        raise UserError(f"{error}; {REMEDY}") from None


def _entries(folder: Path, model: PreTrainedModel) -> dict[str, Entry]:
    """The tensors of the files that `from_pretrained` takes: model.safetensors or, if there is none, those of the index."""
    named = getattr(model.config, "transformers_weights", None)
    whole, index = folder / (named or "model.safetensors"), folder / "model.safetensors.index.json"
    files = [whole.name]
    if not whole.exists() and index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{index}: has no weight_map of tensors to files; {REMEDY}")
        files = sorted(set(places.values()))
        if any(os.path.basename(name) != name for name in files):
            raise UserError(f"{index}: names files outside its folder")
    elif not whole.exists():
        raise UserError(f"{folder}: {_why_none(folder)}")
    entries: dict[str, Entry] = {}
    for name in files:
        with _remedy():
            entries |= open_tensors(folder / name)[0]
    return entries


def _why_none(folder: Path) -> str:
    """Why a folder has no weights, and what to do."""
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"has {', '.join(others[:3])}, but no model.safetensors and no index; transformers takes no other name: rename it"
    pickled = " (a .bin file is a pickle, which es_lite never loads)" if list(folder.glob("*.bin")) else ""
    return f"no safetensors files{pickled}; save the model with save_pretrained"


def open_source(
    path: str, model: PreTrainedModel, layout: Layout, seed: int, threads: Threads, initialisation: int = random_weights.NEWEST
) -> Source:
    """θ₀ of the recipe's model: of the folder `path` if given, else random from `seed`, in this version of the initialisation."""
    if path:
        return Pretrained(locate(path), model, layout)
    return random_weights.VERSIONS[initialisation](model, layout, seed, threads)
