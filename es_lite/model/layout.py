"""A model as layers: its skeleton on the meta device, its decoder blocks, its tensors and their numbers in the noise."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self
from unittest import mock

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from es_lite.errors import UserError
from es_lite.model.ghosts import OwnForward

ANOTHER = "take a model of another architecture"
"""What to do about a model that cannot be used."""


@dataclass(frozen=True)
class Tensor:
    """One parameter of the model; tied parameters are one tensor."""

    name: str
    shape: tuple[int, ...]
    number: int
    """Its number in the noise's counter: its position among the model's parameters (with shared noise, that of the first
    tensor of its shape)."""
    sigma_factor: float
    """σ is multiplied by this."""
    coefficient_factor: float
    """A record's coefficients are multiplied by this."""
    decay_factor: float
    """A record's weight decay is multiplied by this."""
    vocabulary: bool = False
    """Whether it is the matrix of the token embedding or of the head, with one row per token."""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Elements of a row, the last dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return self.size // max(1, self.width)


@dataclass(frozen=True)
class Layer:
    """The unit of loading and perturbing: the embedding, one decoder block, or the final norm with the head."""

    index: int
    name: str
    tensors: tuple[Tensor, ...]

    block: bool = True
    """Whether it is a decoder block, all of which is needed at once."""

    @property
    def size(self) -> int:
        """Elements."""
        return sum(tensor.size for tensor in self.tensors)


@dataclass(frozen=True)
class Factors:
    """What σ and α are multiplied by for the parameters whose name `pattern` matches (re.search)."""

    pattern: str
    sigma: float
    alpha: float


@dataclass(frozen=True)
class Layout:
    layers: tuple[Layer, ...]
    unused: frozenset[str] = frozenset()
    """Parameters that a text does not pass, such as those for images: they are not perturbed, and stay as they are."""
    blocks_share: bool = False
    """Blocks use parameters of other layers, so layers cannot pass through memory one after the other."""

    @classmethod
    def of(cls, model: PreTrainedModel, groups: Sequence[Factors] = (), nes: bool = False, shared: bool = False) -> Self:
        """The layers of `model`: the parameters before the blocks, each block, the parameters after them.

        groups: the first whose pattern matches a name applies. nes: coefficients are proportional to α/σ, so those of a group are
        multiplied by alpha/sigma instead of alpha. shared: tensors of equal shape get the noise of the first.
        Raises UserError if a group's pattern matches no parameter.
        """
        prefix, block_list = blocks(model)
        block_of = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        named = list(model.named_parameters())
        _check_patterns(groups, [name for name, _ in named])
        unused = _unused(model, prefix)
        first_block = next(i for i, (name, _) in enumerate(named) if block_of.match(name))
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head is not None and head.weight is embedding.weight
        tensors_of: list[list[Tensor]] = [[] for _ in range(len(block_list) + 2)]
        first_of_shape: dict[tuple[int, ...], int] = {}
        for position, (name, parameter) in enumerate(named):
            shape = tuple(parameter.shape)
            first = first_of_shape.setdefault(shape, position)
            group = next((g for g in groups if re.search(g.pattern, name)), Factors("", 1.0, 1.0))
            group = Factors("", 0.0, 0.0) if name in unused else group
            is_head = head is not None and parameter is getattr(head, "weight", None) and not tied
            tensor = Tensor(
                name,
                shape,
                number=first if shared else position,
                sigma_factor=group.sigma,
                coefficient_factor=group.alpha / group.sigma if nes and group.sigma else group.alpha,
                decay_factor=group.alpha,
                vocabulary=is_head or parameter is getattr(embedding, "weight", None),
            )
            match = block_of.match(name)
            index = 1 + int(match[1]) if match else 0 if position < first_block and not is_head else -1
            tensors_of[index].append(tensor)
        names = ["embedding", *(f"block-{i:03d}" for i in range(len(block_list))), "final"]
        last = len(names) - 1
        layers = tuple(Layer(i, names[i], tuple(tensors_of[i]), block=0 < i < last) for i in range(len(names)))
        own = [{id(p) for p in block.parameters()} for block in block_list]
        there = [{id(model.get_parameter(t.name)) for t in layer.tensors} for layer in layers[1:-1]]
        return cls(layers, unused, blocks_share=own != there)

    @property
    def blocks(self) -> tuple[Layer, ...]:
        return self.layers[1:-1]

    @property
    def tied(self) -> bool:
        """Whether the head uses the embedding's matrix."""
        return not any(tensor.vocabulary for tensor in self.layers[-1].tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for layer in self.layers for tensor in layer.tensors)

    @property
    def size(self) -> int:
        """Elements of the whole model; tied tensors count once."""
        return sum(layer.size for layer in self.layers)

    def factor_shares(self) -> dict[tuple[float, float], float]:
        """The share of the parameters that have each pair of factors, for coefficients and for decay."""
        shares: dict[tuple[float, float], float] = {}
        for tensor in self.tensors:
            factors = tensor.coefficient_factor, tensor.decay_factor
            shares[factors] = shares.get(factors, 0.0) + tensor.size / max(1, self.size)
        return shares

    def structure(self) -> str:
        """SHA-256 of names, shapes and noise numbers, on which the meaning of a journal's records depends."""
        listing = json.dumps([[t.name, t.shape, t.number] for t in self.tensors])
        return hashlib.sha256(listing.encode()).hexdigest()


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The Hugging Face model of `config` in eval mode: its parameters on the meta device, its buffers real.

    Raises UserError if there is no such model.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for buffers that are drawn at random
            model = on_meta(lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=False), _to_meta)
    except Exception as error:  # each architecture raises its own exceptions for impossible sizes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"model.config (or that of model.path): no causal model of type {config.model_type!r} can be built: {reason}"
        ) from None
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's decoder blocks: the largest list of as many modules as its configuration has layers or, if
    there is none, of any number. Raises UserError if it has none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) and _of_text(model, name)]
    lists = [item for item in lists if len(item[1]) == count] or lists
    if not lists:
        raise UserError(
            f"{type(model).__name__}: has no list of decoder blocks, so es_lite cannot process it layer by layer; {ANOTHER}"
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _of_text(model: PreTrainedModel, name: str) -> bool:
    """Whether a module belongs to the part of the model that text passes, not to one for images or sound."""
    text, part = model.config.get_text_config(), model
    config = model.config
    for attribute in name.split("."):
        part = getattr(part, attribute)
        if isinstance(part, PreTrainedModel):
            config = part.config
    return config is model.config or config is text or type(config) is type(text)


def _unused(model: PreTrainedModel, blocks: str) -> frozenset[str]:
    """The names of the parameters outside the blocks that a text does not pass: those of a model that takes images or sound too.

    blocks: the name of their list. Of what is in them, a text may pass some today and others later (experts).
    """
    config = model.config
    if not config.sub_configs and config.get_text_config() is config:
        return frozenset()
    try:
        unused = OwnForward(model).unused(np.array([0, 1], np.int32))
    except Exception:  # whatever its own code raises; the rehearsal says so
        return frozenset()
    return frozenset(name for name in unused if not name.startswith(f"{blocks}."))


def _check_patterns(groups: Sequence[Factors], names: Sequence[str]) -> None:
    for index, group in enumerate(groups):
        if not any(re.search(group.pattern, name) for name in names):
            raise UserError(
                f"es.groups[{index}].pattern = {group.pattern!r}: matches no parameter; they are named {', '.join(names[:3])}, …"
            )


def on_meta(build: Callable[[], PreTrainedModel], registered: Callable[[nn.Parameter], nn.Parameter]) -> PreTrainedModel:
    """The model that `build` makes; `registered` replaces each parameter as it is registered, before anything touches its memory.

    Under `torch.device("meta")` the buffers (the rotary frequencies) would be lost too.
    """
    register = nn.Module.register_parameter

    def replacing(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else registered(parameter))

    with mock.patch.object(nn.Module, "register_parameter", replacing):
        return build()


def _to_meta(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.is_meta else nn.Parameter(parameter.data.to("meta"), requires_grad=False)
