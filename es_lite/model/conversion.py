"""Between the tensors of a model's files and its parameters and buffers: transformers' own conversion of names and shapes.

Most tensors have the name that their parameter has, or another. Some are made of several (the matrices of a block's experts are
one parameter), and some files have several parameters in one tensor.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

Shape = tuple[int, ...]

USED = "_weight_conversions"
"""Where transformers, too, keeps what a model was loaded with."""


@dataclass
class Conversion:
    """Tensors that become others together."""

    sources: list[str] = field(default_factory=list)
    """Names, in the order in which they are converted."""
    patterns: list[str] = field(default_factory=list)
    """Of each source, what the converter knows it by."""
    converter: WeightConverter | None = None
    """None: there is one source, which only has another name."""
    renamings: Sequence[WeightRenaming] = ()
    """Of what the converter makes."""
    results: dict[str, Shape] = field(default_factory=dict)
    """Names and shapes of what they become."""

    def convert(self, model: PreTrainedModel, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the sources become, by name. tensors: the sources."""
        if self.converter is None:
            return dict(zip(self.results, tensors, strict=True))
        return self._made(model, next(iter(self.results)), tensors)

    def _made(self, model: PreTrainedModel, first: str, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(self.converter)
        assert converter is not None
        for source, pattern, tensor in zip(self.sources, self.patterns, tensors, strict=True):
            converter.add_tensor(first, source, pattern, tensor)  # type: ignore[arg-type]
        found = converter.convert(first, model=model, config=model.config)
        values = {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
        return {apply_renamings(name, list(self.renamings)): value for name, value in values.items()}

    def find_results(self, model: PreTrainedModel, first: str, shapes: Mapping[str, Shape]) -> None:
        """first: the name that the sources are first known by; shapes: of the sources, at least."""
        if self.converter is None:
            self.results = {first: shapes[self.sources[0]]}
            return
        tensors = [torch.empty(shapes[name], device="meta") for name in self.sources]
        self.results = {name: tuple(value.shape) for name, value in self._made(model, first, tensors).items()}


def on_loading(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> list[Conversion]:
    """How the tensors of a model's files become its parameters and buffers, as `from_pretrained` does it.

    model: a `layout.skeleton`, which keeps the conversions that are used, for `on_saving`. shapes: of the files' tensors. Tensors
    that are nothing of the model's are left out. Raises whatever transformers' conversions do of tensors that they do not fit.
    """
    mapping = get_model_conversion_mapping(model)
    renamings, converters = _kinds(mapping)
    known, by_pattern = model.state_dict(), {pattern: c for c in converters for pattern in c.source_patterns}
    found: dict[str, Conversion] = {}
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, known)
        if name not in known:
            continue
        conversion = found.setdefault(name, Conversion(converter=by_pattern[pattern] if pattern else None))
        if pattern or not conversion.sources:
            conversion.sources.append(key)
            conversion.patterns.append(pattern or key)
    for name, conversion in found.items():
        conversion.find_results(model, name, shapes)
    model.__dict__[USED] = [conversion for conversion in mapping if conversion.was_used()]
    return list(found.values())


def on_saving(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> list[Conversion]:
    """How parameters become the tensors of files, as `save_pretrained` does it, in the parameters' order. shapes: theirs."""
    mapping = model.__dict__.get(USED)
    if mapping is None:  # it was not loaded from files
        mapping = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    renamings, converters = _kinds([conversion.reverse_transform() for conversion in mapping[::-1]])
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    found: dict[str, Conversion] = {}
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = apply_converters(key, converters)
        if pattern is None:
            name = apply_renamings(key, renamings)
        converter = by_pattern[pattern] if pattern else None
        conversion = found.setdefault(name, Conversion(converter=converter, renamings=renamings))
        conversion.sources.append(key)
        conversion.patterns.append(pattern or key)
    for name, conversion in found.items():
        conversion.find_results(model, name, shapes)
    place = {name: position for position, name in enumerate(shapes)}
    return sorted(found.values(), key=lambda conversion: min(place[name] for name in conversion.sources))


def _kinds(mapping: Iterable[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    mapping = list(mapping)
    return [c for c in mapping if isinstance(c, WeightRenaming)], [c for c in mapping if isinstance(c, WeightConverter)]
