"""A model as layers: its skeleton on the meta device, its decoder blocks, its tensors and their numbers."""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from es_lite.errors import UserError


@dataclass(frozen=True)
class Tensor:
    """One parameter of the model, tied ones once."""

    name: str
    shape: tuple[int, ...]
    number: int
    """Its number in the noise's counter: its place among the model's parameters (or that of its noise's first sharer)."""
    sigma: float
    """Multiplier of σ."""
    coefficient: float
    """Multiplier of the records' coefficients."""
    alpha: float
    """Multiplier of the weight decay."""
    vocabulary: bool = False
    """It is the token embedding's or the head's matrix: one row a token, used by rows."""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Elements of a row: of the last dimension."""
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
    """A decoder block, all of which is needed at once."""

    @property
    def size(self) -> int:
        """Elements."""
        return sum(tensor.size for tensor in self.tensors)


@dataclass(frozen=True)
class Layout:
    layers: tuple[Layer, ...]

    @property
    def blocks(self) -> tuple[Layer, ...]:
        return self.layers[1:-1]

    @property
    def tied(self) -> bool:
        """The head is the embedding's matrix."""
        return not any(tensor.vocabulary for tensor in self.layers[-1].tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for layer in self.layers for tensor in layer.tensors)

    @property
    def size(self) -> int:
        """Elements of the whole model, tied tensors once."""
        return sum(layer.size for layer in self.layers)

    def structure(self) -> str:
        """SHA-256 of names, shapes and noise numbers: what a journal's records mean depends on all three."""
        listing = json.dumps([[t.name, t.shape, t.number] for t in self.tensors])
        return hashlib.sha256(listing.encode()).hexdigest()


@dataclass(frozen=True)
class Multipliers:
    """A group of parameters, as `layout` applies it: the first pattern that is found in a name counts."""

    pattern: str
    sigma: float
    alpha: float


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The Hugging Face model of `config`, its parameters on the meta device, its buffers real, in eval mode.

    Raises UserError where there is no such model.
    """
    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each architecture fails in ways of its own on sizes that make no sense
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"model.config (or that of model.path): no causal model of type {config.model_type!r} can be built: {reason}"
        ) from None
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's decoder blocks. Raises UserError where it has none."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists or count < 1:
        raise UserError(f"{type(model).__name__}: has no list of decoder blocks, so es_lite cannot take it layer by layer")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def layout(model: PreTrainedModel, groups: Sequence[Multipliers] = (), nes: bool = False, shared: bool = False) -> Layout:
    """The layers of `model`: parameters before the blocks, each block, parameters after them.

    groups: multipliers of σ and α by name; with nes (c ~ α/σ), a group's coefficients are multiplied by
    alpha/sigma, else by alpha. shared: tensors of equal shape get the noise of the first.
    """
    prefix, block_list = blocks(model)
    block_of = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    named = list(model.named_parameters())
    first_block = next(i for i, (name, _) in enumerate(named) if block_of.match(name))
    for index, group in enumerate(groups):
        if not any(re.search(group.pattern, name) for name, _ in named):
            some = ", ".join(name for name, _ in named[:3])
            raise UserError(f"es.groups[{index}].pattern = {group.pattern!r}: matches no parameter; they are named {some}, …")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    members: list[list[Tensor]] = [[] for _ in range(len(block_list) + 2)]
    first_of_shape: dict[tuple[int, ...], int] = {}
    for number, (name, parameter) in enumerate(named):
        shape = tuple(parameter.shape)
        first = first_of_shape.setdefault(shape, number)
        group = next((g for g in groups if re.search(g.pattern, name)), Multipliers("", 1.0, 1.0))
        coefficient = group.alpha / group.sigma if nes and group.sigma else group.alpha
        is_head = head is not None and parameter is getattr(head, "weight", None) and not _tied(model)
        rows_of_tokens = is_head or parameter is getattr(embedding, "weight", None)
        number_of_noise = first if shared else number
        tensor = Tensor(name, shape, number_of_noise, group.sigma, coefficient, group.alpha, rows_of_tokens)
        match = block_of.match(name)
        index = 1 + int(match[1]) if match else 0 if number < first_block and not is_head else -1
        members[index].append(tensor)
    names = ["embedding", *(f"block-{i:03d}" for i in range(len(block_list))), "final"]
    last = len(names) - 1
    return Layout(tuple(Layer(i, names[i], tuple(members[i]), block=0 < i < last) for i in range(len(names))))


def _tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Moves each parameter to the meta device as it is registered, before anything touches its memory.

    Under `torch.device("meta")` the buffers (the rotary frequencies) would be lost too.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
