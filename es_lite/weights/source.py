"""θ₀: a pretrained model's safetensors, or random weights that the run's seed decides."""

import copy
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from es_lite.algorithm import kernels, noise
from es_lite.algorithm.jit import Threads
from es_lite.errors import UserError
from es_lite.weights.layout import Layout, Tensor
from es_lite.weights.tensorfile import Entry, Reader, open_tensors

_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}


def _qwen3(layers: int, hidden: int, heads: int, intermediate: int, **other: object) -> dict[str, object]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": intermediate}
    return _QWEN3 | {"max_position_embeddings": 32768, "tie_word_embeddings": False} | sizes | other


SIZES: dict[str, dict[str, object]] = {
    "qwen3-0.5b": _qwen3(24, 1024, 8, 4096, num_key_value_heads=4, tie_word_embeddings=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tie_word_embeddings=True),
    "qwen3-4b": _qwen3(36, 4096, 32, 9728, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288),
    "qwen3-14b": _qwen3(40, 5120, 40, 17408),
    "qwen3-32b": _qwen3(64, 8192, 64, 25600, max_position_embeddings=40960),
}
"""The configurations of EA4LLM."""


EXPONENTS = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
"""The exponent's bits, all set in what is not finite."""


class Source(Protocol):
    """θ₀ in slices."""

    def read(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        """float32 [count]: elements start … of `tensor`."""
        ...

    def fingerprint(self) -> str:
        """Tells this θ₀ from any other."""
        ...


def locate(path: str) -> Path:
    """The local folder of a Hugging Face folder or hub name, fetched when it is not at hand yet."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"model.path = {path!r}: no such folder (and not a hub name such as Qwen/Qwen3-0.6B)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except Exception as error:  # the hub's client raises many kinds, from no network to a private model
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"model.path = {path!r}: no such folder, and the hub does not give it: {reason}") from None


def configuration(path: str, config: str | dict) -> PretrainedConfig:
    """The configuration of a model folder (`path`), or of a size of the paper, a config.json, or a table of keys."""
    if path:
        where, document = f"model.path = {path!r}", _read_json(locate(path) / "config.json")
    elif isinstance(config, dict):
        where, document = "model.config", dict(config)
    elif config in SIZES:
        where, document = f"model.config = {config!r}", dict(SIZES[config])
    elif config.endswith(".json"):
        where, document = f"model.config = {config!r}", _read_json(Path(config).expanduser())
    else:
        raise UserError(f"model.config = {config!r}: expected {', '.join(SIZES)}, a .json file or a table")
    kind = document.pop("model_type", None)
    if kind is None:
        raise UserError(f'{where}: has no model_type, for instance "qwen3"')
    if "auto_map" in document:
        raise UserError(f"{where}: needs code from the model's folder, which es_lite never runs")
    try:
        return AutoConfig.for_model(kind, **document)
    except Exception as error:  # each configuration class has checks, and exceptions, of its own
        raise UserError(f"{where}: not a configuration that transformers takes: {error}") from None


def _read_json(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; a model folder has config.json and safetensors files") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object")
    return document


class Pretrained:
    """θ₀ from a folder's safetensors, names and shapes checked against the configuration."""

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
        return self._reader.float32(entry, start, count)

    def fingerprint(self) -> str:
        """SHA-256 of the stored bytes of every tensor, in layout order. Raises UserError where a value is not finite."""
        digest = hashlib.sha256()
        for tensor in self._layout.tensors:
            entry = self._entries[tensor.name]
            digest.update(f"{tensor.name} {entry.dtype}".encode())
            for start in range(0, tensor.size, 2**22):
                stored = self._reader.raw(entry, start, min(2**22, tensor.size - start))
                bits, exponent = stored.view(f"u{stored.itemsize}"), EXPONENTS[entry.dtype]
                if (bits & exponent == exponent).any():  # infinite or not a number
                    raise UserError(f"{entry.file}: {tensor.name} has values that are not finite; the model is broken")
                digest.update(memoryview(stored).cast("B"))
        return digest.hexdigest()


def _entries(folder: Path) -> dict[str, Entry]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{index}: has no weight_map of tensors to files; fetch or make it anew")
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
        entries |= open_tensors(folder / name)[0]
    return entries


class Random:
    """θ₀ drawn from the run's seed: matrices N(0, initializer_range²), vectors as the architecture starts them.

    A matrix is initializer_range·ε(seed, INITIALISATION, pair 0, its place among the layout's tensors), so any slice can be
    made alone.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, seed: int, threads: Threads) -> None:
        self._seed = seed
        self._threads = threads
        config = model.config.get_text_config()
        self._deviation = getattr(config, "initializer_range", 0.02)
        self._constants = {t.name: _initial_constant(model, t.name) for t in layout.tensors if len(t.shape) < 2}
        drawn_from = f"{noise.VERSION} {seed} {self._deviation} {sorted(self._constants.items())} {layout.structure()}"
        self._fingerprint = hashlib.sha256(drawn_from.encode()).hexdigest()
        self._numbers = {tensor.name: number for number, tensor in enumerate(layout.tensors)}

    def read(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        if tensor.name in self._constants:
            return np.full(count, self._constants[tensor.name], np.float32)
        out = np.empty(count, np.float32)
        place = {"seed": self._seed, "step": noise.INITIALISATION, "pair": 0, "tensor": self._numbers[tensor.name]}

        def part(low: int, high: int) -> None:
            kernels.fill(out[low:high], **place, scale=self._deviation, start=start + low)

        self._threads.each(count, part)
        return out

    def fingerprint(self) -> str:
        return self._fingerprint


def _initial_constant(model: PreTrainedModel, name: str) -> float:
    """What the architecture's own initialisation gives a vector: 1 or 0, mostly."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        return 0.0  # the bias of a linear map
    fresh: nn.Module = copy.deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in fresh.parameters(recurse=False):
            parameter.fill_(math.nan)
        model._init_weights(fresh)
    value = float(fresh.get_parameter(attribute).flatten()[0])
    if not math.isfinite(value):
        raise UserError(
            f"{type(model).__name__}: es_lite does not know how {name} starts; give model.path instead of model.config"
        )
    return value


def open_source(path: str, model: PreTrainedModel, layout: Layout, seed: int, threads: Threads) -> Source:
    """θ₀ of the recipe's model: `path` where given, else random from `seed`."""
    return Pretrained(locate(path), model, layout) if path else Random(model, layout, seed, threads)
