"""Exports a model as a Hugging Face folder: weights, configuration, tokenizer, model card."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from es_lite.data.tokenizer import save_tokenizer
from es_lite.errors import RunError
from es_lite.files import expanded, new_folder
from es_lite.model.buffers import persistent_buffers
from es_lite.model.conversion import Conversion, on_saving
from es_lite.model.layout import Layer, Layout
from es_lite.model.sliced_safetensors import Writer
from es_lite.weights.parts import slices
from es_lite.weights.reading import LayerReader

SHARD_BYTES = 5 * 10**9

STATE = "es_lite.json"


def export(
    folder: Path,
    model: PreTrainedModel,
    layout: Layout,
    open_layer: Callable[[Layer], LayerReader],
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    card: str,
    state: dict[str, Any],
) -> None:
    """Writes `folder`, replacing it whole or not at all, with one slice of a tensor in memory at a time.

    open_layer: reads a layer at the step to export. dtype: "bf16" (rounded to nearest, ties to even) or "fp32". Files hold whole
    layers, up to SHARD_BYTES if possible. state: written as es_lite.json, with the folder's "step".
    Raises RunError if the disk is full.
    """
    try:
        with new_folder(folder) as partial:
            _weights(partial, model, layout, open_layer, {"bf16": "BF16", "fp32": "F32"}[dtype])
            config = model.config
            config.architectures = [type(model).__name__]
            config.dtype = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
            config.use_cache = True
            config.save_pretrained(partial)
            config.use_cache = False
            model.generation_config.save_pretrained(partial)
            if tokenizer is not None:
                save_tokenizer(tokenizer, partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
            (partial / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror}); the journal is complete: make room, and do it again"
        ) from None


def step_of(folder: Path) -> int | None:
    """The step that an exported folder holds; None if there is no such folder, or if it does not say."""
    try:
        step = json.loads((folder / STATE).read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return step if type(step) is int else None


def _weights(
    folder: Path, model: PreTrainedModel, layout: Layout, open_layer: Callable[[Layer], LayerReader], dtype: str
) -> None:
    """The names are those of the model's files on the hub."""
    shards = _shards(layout.layers, 2 if dtype == "BF16" else 4)
    saved = {layer.name: on_saving(model, {t.name: t.shape for t in layer.tensors}) for layer in layout.layers}
    buffers = _buffers(model)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        pairs = list(zip(names, shards, strict=True))
        places = {result: name for name, shard in pairs for layer in shard for c in saved[layer.name] for result in c.results}
        index = {"metadata": {"total_parameters": layout.size}, "weight_map": places | dict.fromkeys(buffers, names[-1])}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        shapes = {result: shape for layer in shard for c in saved[layer.name] for result, shape in c.results.items()}
        last = buffers if name == names[-1] else {}
        with Writer(folder / name, shapes, dtype, {"format": "pt"}, last) as writer:
            for layer in shard:
                with open_layer(layer) as reader:
                    for conversion in saved[layer.name]:
                        for values in _converted(model, layer, conversion, reader):
                            writer.write(values)


def _converted(model: PreTrainedModel, layer: Layer, conversion: Conversion, reader: LayerReader) -> Iterator[np.ndarray]:
    """What a layer's tensors become in files, float32, in the order of the conversion's results; in slices if possible."""
    tensors = {tensor.name: tensor for tensor in layer.tensors}
    if conversion.converter is None:
        (tensor,) = (tensors[name] for name in conversion.sources)
        yield from (reader.part(tensor, start, count).float32() for start, count in slices(tensor))
        return
    whole = []
    for tensor in (tensors[name] for name in conversion.sources):
        values = np.concatenate([reader.part(tensor, start, count).float32() for start, count in slices(tensor)])
        whole.append(torch.from_numpy(values).view(tensor.shape))
    made = conversion.convert(model, whole)
    yield from (made[name].contiguous().view(-1).numpy() for name in conversion.results)


def _buffers(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The persistent buffers as files have them; bfloat16 as float32."""
    values = persistent_buffers(model)
    conversions = on_saving(model, {name: tuple(value.shape) for name, value in values.items()})
    made = [c.convert(model, [values[name] for name in c.sources]) for c in conversions]
    found = {name: value for part in made for name, value in part.items()}
    half = torch.bfloat16, torch.float16
    return {name: (value.float() if value.dtype in half else value).numpy() for name, value in found.items()}


def _shards(layers: Sequence[Layer], itemsize: int) -> list[list[Layer]]:
    shards: list[list[Layer]] = [[]]
    size = 0
    for layer in layers:
        if shards[-1] and size + itemsize * layer.size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(layer)
        size += itemsize * layer.size
    return shards


def model_card(steps: int, recipe_toml: str, base: str, result: str) -> str:
    """README.md of an exported model.

    base: model.path, "" for a random start; recipe_toml: the recipe, "" to leave it out; result: the held-out score in words,
    or "".
    """
    header = "---\nlibrary_name: transformers\ntags:\n- es_lite\n- evolution-strategies\n"
    if base and not expanded(base).exists():
        header += f"base_model: {base}\n"
    origin = f"started from `{base}`" if base else "started from random weights"
    score = f"\nHeld-out score: {result}.\n" if result else ""
    recipe = f"\nThe recipe:\n\n```toml\n{recipe_toml}```\n" if recipe_toml else ""
    return (
        f"{header}---\n\n# Trained by es_lite\n\nAll parameters of this model were trained by evolution strategies, without "
        f"gradients: {steps} steps, {origin}.\n{score}{recipe}\n"
        "Methods: EA4LLM (arXiv 2510.10603), Evolution Strategies at Scale (arXiv 2509.24372).\n"
    )
