"""A model's configuration: from a folder, the hub, a config.json, a table of keys, or one of the paper's sizes."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from es_lite.errors import UserError
from es_lite.files import expanded

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
"""The model sizes of EA4LLM."""


def locate(path: str) -> Path:
    """The local folder of a Hugging Face folder or hub name; downloads it if necessary. Raises UserError."""
    folder = expanded(path)
    if folder.is_dir():
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"model.path = {path!r}: no such folder (and not a hub name such as Qwen/Qwen3-0.6B)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except Exception as error:  # the hub's client raises many kinds, from no network to a private model
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"model.path = {path!r}: no such folder, and it cannot be downloaded from the hub: {reason}") from None


def configuration(path: str, config: str | dict) -> PretrainedConfig:
    """The configuration of the model folder `path` or, if that is "", `config`: a size of the paper, a config.json, or keys."""
    if path:
        return _from_file(f"model.path = {path!r}", locate(path) / "config.json")
    if isinstance(config, str) and config.endswith(".json"):
        return _from_file(f"model.config = {config!r}", expanded(config))
    if isinstance(config, dict):
        where, document = "model.config", dict(config)
    elif config in SIZES:
        where, document = f"model.config = {config!r}", dict(SIZES[config])
    else:
        raise UserError(f"model.config = {config!r}: expected {', '.join(SIZES)}, a .json file or a table")
    kind = document.pop("model_type", None)
    if kind is None:
        raise UserError(f'{where}: has no model_type, for instance "qwen3"')
    with _accepted(where):
        return AutoConfig.for_model(kind, **document)


def _from_file(where: str, file: Path) -> PretrainedConfig:
    """As `from_pretrained` reads it, which also knows infinities and what is not a number."""
    document = read_json(file)
    if "model_type" not in document:
        raise UserError(f'{where}: has no model_type, for instance "qwen3"')
    kind = document["model_type"]
    if kind not in CONFIG_MAPPING and "auto_map" in document:
        raise UserError(
            f"{where}: needs code from the model's folder, which es_lite never runs; name a file of your own as model.code"
        )
    if document.get("quantization_config"):
        how = document["quantization_config"]
        method = how.get("quant_method", "unknown") if isinstance(how, dict) else how
        raise UserError(
            f"{where}: its weights are quantised ({method}), which es_lite does not read; take the model in bf16 or fp32"
        )
    with _accepted(where):
        return (CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else AutoConfig.for_model(kind)).from_pretrained(str(file))


@contextlib.contextmanager
def _accepted(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each configuration class has its own checks and exceptions
        raise UserError(f"{where}: not a configuration that transformers accepts: {error}") from None


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises UserError if there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; a model folder has config.json and safetensors files") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object")
    return document


def size_of(config: PretrainedConfig, name: str, default: int = 0) -> int:
    """A size of a model's text part, such as "head_dim", the greatest if its layers have several; `default` if there is none."""
    text = config.get_text_config()
    layers = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]
    values = [getattr(layer, name, None) for layer in layers]
    return max((int(np.max(value)) for value in values if value), default=0) or default


def intermediate_size(config: PretrainedConfig) -> int:
    """The width within a feed-forward part."""
    return size_of(config, "intermediate_size", 4 * config.get_text_config().hidden_size)
