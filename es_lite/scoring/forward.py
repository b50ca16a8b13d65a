"""The perturbed forward: Hugging Face's own model, with a door at each layer that perturbs what passes.

Decoder blocks, embedding, final norm and head are replaced by proxies ("doors"). The unmodified forward of the model runs
once over all members and samples, the members of a noise pair folded into the batch dimension. Each door
makes its layer's perturbed tensors once, runs the layer on them micro-batch by micro-batch, and lets them go.
The head's door keeps only the log-probabilities of the true next tokens (EA4LLM, section 3).

Shapes: G members, B samples, T the longest sample, H hidden size.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from es_lite.algorithm.kernels import Threads
from es_lite.data import Batch
from es_lite.errors import UserError
from es_lite.scoring.logsumexp import RunningLogSumExp
from es_lite.scoring.perturb import Perturbation, Scratch
from es_lite.weights.layout import Layout, Tensor, blocks
from es_lite.weights.working import WorkingCopy

VOCABULARY_BLOCK = 2048
"""Rows of the head that are perturbed and multiplied at a time."""


class Doorway:
    """What the doors share in one pass: the perturbation, and the shape of the batch."""

    def __init__(self, scratch: Scratch, threads: Threads, micro_batch: int) -> None:
        self.scratch = scratch
        self.threads = threads
        self.micro_batch = micro_batch
        self.lengths = np.zeros(0, np.int32)
        """Lengths of the samples, int32 [B], longest first."""
        self.targets = np.zeros((0, 0), np.int32)
        """Tokens of the samples, int32 [B, T]."""
        self.log_probabilities = np.zeros((0, 0))
        """What the head's door leaves: mean log-probability of each member's samples, float64 [G, B]."""

    @property
    def samples(self) -> int:
        return self.lengths.size

    def micro_batches(self) -> Iterator[tuple[int, int, int]]:
        """(low, high, length): samples low … high - 1, padded to a common length."""
        for low in range(0, self.samples, self.micro_batch):
            yield low, min(low + self.micro_batch, self.samples), int(self.lengths[low])


class Door(nn.Module):
    """Stands for a module that is run on perturbed tensors; any attribute else is the module's own."""

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor], way: Doorway) -> None:
        super().__init__()
        self.__dict__["_inside"] = (module, tensors, way)  # not registered: the model must not list it as its own

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_inside"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module, tensors, way = self._inside
        rows = way.scratch.perturbation.members * way.samples
        out: torch.Tensor | None = None
        shared: list[torch.Tensor] = []
        wrap = False
        for member, values in enumerate(way.scratch.tensors(tensors)):
            base = member * way.samples
            if not _has_rows(args, rows):  # the same for all samples, such as learned positions
                shared.append(functional_call(module, values, args, kwargs).expand(way.samples, -1, -1))
                continue
            for low, high, length in way.micro_batches():
                part = slice(base + low, base + high)
                result = functional_call(module, values, _cut(args, rows, part, length), _cut(kwargs, rows, part, length))
                if isinstance(result, tuple):
                    wrap, result = True, result[0]
                if out is None:
                    out = result.new_zeros(rows, int(way.lengths[0]), *result.shape[2:])
                out[part, :length] = result
        if shared:
            return torch.cat(shared)
        return (out,) if wrap else out


class EmbeddingDoor(Door):
    """The embedding: only the rows that the batch uses are perturbed."""

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        module, tensors, way = self._inside
        used, places = torch.unique(ids[: way.samples], return_inverse=True)
        values = way.scratch.rows(tensors["weight"], used.numpy())
        return torch.cat([functional_call(module, {"weight": rows}, (places,)) for rows in values])


class HeadDoor(Door):
    """The head: blocks of the vocabulary, a running log-sum-exp, only at the positions that have a next token."""

    PROBE = torch.tensor([[[-30.0, -1.0, 0.5, 7.0, 40.0]]])
    """What the model gets for logits, so that what it does with them afterwards shows."""

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor], way: Doorway, scale: float, cap: float) -> None:
        super().__init__(module, tensors, way)
        self._scale = scale
        self._cap = cap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        _, tensors, way = self._inside
        tiles = [self._tile(hidden, part) for part in range(way.scratch.perturbation.members)]
        weight, bias = tensors["weight"], tensors.get("bias")
        for first in range(0, weight.shape[0], VOCABULARY_BLOCK):
            count = min(VOCABULARY_BLOCK, weight.shape[0] - first)
            # Biases first: what the scratch gives is valid until its next call.
            biases = [b.clone() for b in way.scratch.block(bias, first, count)] if bias else [None] * len(tiles)
            for matrix, offset, member in zip(way.scratch.block(weight, first, count), biases, tiles, strict=True):
                for states, running in member:
                    logits = nn.functional.linear(states, matrix, offset)
                    if self._cap:
                        logits = self._cap * torch.tanh(logits / self._cap)
                    elif self._scale != 1:
                        logits = logits * self._scale
                    running.update(_numpy(logits), first, way.threads)
        lengths = way.lengths.astype(np.int64) - 1
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        way.log_probabilities = np.stack(
            [np.add.reduceat(np.concatenate([r.log_probabilities() for _, r in member]), starts) / lengths for member in tiles]
        )
        return self.PROBE

    def _tile(self, hidden: torch.Tensor, member: int) -> list[tuple[torch.Tensor, RunningLogSumExp]]:
        """Per micro-batch of a member: the hidden states that have a next token, [n, H], and their log-sum-exp."""
        way = self._inside[2]
        tiles = []
        for low, high, length in way.micro_batches():
            counts = np.arange(length - 1) < way.lengths[low:high, None] - 1
            rows = slice(member * way.samples + low, member * way.samples + high)
            states = hidden[rows, : length - 1][torch.from_numpy(counts)]
            targets = way.targets[low:high, 1:length][counts]
            tiles.append((states, RunningLogSumExp(targets)))
        return tiles


class PerturbedModel:
    """Scores samples under perturbed weights that only ever exist a layer at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        working: WorkingCopy,
        compute: torch.dtype,
        threads: Threads,
        micro_batch: int,
    ) -> None:
        """model: a fresh `layout.skeleton`, which this takes over."""
        self._way = Doorway(Scratch(working, compute, threads), threads, micro_batch)
        self._model = model
        _hang_doors(model, layout, self._way)

    @torch.inference_mode()
    def score(self, perturbation: Perturbation, batch: Batch, pass_samples: int) -> np.ndarray:
        """Mean log-probability of each sample's true next tokens, float64 [G, B], for each member of the perturbation.

        pass_samples: samples that go through the model at once (hidden states of all of them are in memory),
        a multiple of the micro-batch; how many does not change a bit of the result.
        """
        way = self._way
        way.scratch.perturbation = perturbation
        passes = []
        for low in range(0, batch.lengths.size, pass_samples):
            way.lengths = batch.lengths[low : low + pass_samples]
            way.targets = batch.tokens[low : low + pass_samples, : way.lengths[0]]
            ids = torch.from_numpy(way.targets.astype(np.int64)).repeat(perturbation.members, 1)
            self._model(input_ids=ids, use_cache=False)
            passes.append(way.log_probabilities)
        return np.concatenate(passes, axis=1)


def _hang_doors(model: PreTrainedModel, layout: Layout, way: Doorway) -> None:
    """Replaces every module that owns parameters, outside the blocks, and every block, by its door."""
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    tensor_of = {tensor.name: tensor for tensor in layout.tensors}

    def tensors(module: nn.Module, recurse: bool) -> dict[str, Tensor]:
        return {n: tensor_of[by_identity[id(p)]] for n, p in module.named_parameters(recurse=recurse)}

    prefix, block_list = blocks(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__}: its head is not a linear map of the hidden states, which es_lite needs")
    scale, cap = _after_head(model)
    doors: dict[str, Door] = {}
    for name, module in model.named_modules():
        if name.startswith(prefix + ".") or not tensors(module, recurse=False):
            continue
        if module is head:
            doors[name] = HeadDoor(module, tensors(module, False), way, scale, cap)
        else:
            if module is embedding:
                module.padding_idx = None  # a number of a row that need not be made; only gradients know it
            kind = EmbeddingDoor if module is embedding else Door
            doors[name] = kind(module, tensors(module, False), way)
    for index, block in enumerate(block_list):
        block_list[index] = Door(block, tensors(block, recurse=True), way)
    for name, door in doors.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, door)


def _after_head(model: PreTrainedModel) -> tuple[float, float]:
    """(scale, cap): what the model does with its logits, logits·scale or cap·tanh(logits/cap), found by trying it."""

    class Body(nn.Module):
        def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=torch.zeros(1, 1, 1))

    class Head(nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return HeadDoor.PROBE

    body, head = model.base_model, model.get_output_embeddings()
    head_name = next(name for name, module in model.named_modules() if module is head)
    setattr(model, model.base_model_prefix, Body())
    setattr(model, head_name, Head())
    with torch.inference_mode():
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits
    setattr(model, model.base_model_prefix, body)
    setattr(model, head_name, head)
    scale = float(logits[0, 0, -1] / HeadDoor.PROBE[0, 0, -1])
    if torch.allclose(logits, HeadDoor.PROBE * scale, rtol=1e-5):
        return scale, 0.0
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None) or 0.0
    if cap and torch.allclose(logits, cap * torch.tanh(HeadDoor.PROBE / cap), rtol=1e-5):
        return 1.0, cap
    raise UserError(f"{type(model).__name__}: changes its logits in a way that es_lite does not know")


def _has_rows(args: tuple, rows: int) -> bool:
    return any(isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) for value in args)


def _cut(value: Any, rows: int, part: slice, length: int) -> Any:
    """The same arguments for the samples `part`, cut to `length` tokens.

    Tensors: [rows or 1, T, ...] states and positions, [rows or 1, heads or 1, T, T] masks.
    """
    if isinstance(value, torch.Tensor):
        if value.dim() and value.shape[0] == rows:
            value = value[part]
        if value.dim() == 4:
            return value[..., :length, :length]
        return value[:, :length] if value.dim() > 1 else value
    if isinstance(value, tuple):
        return tuple(_cut(item, rows, part, length) for item in value)
    if isinstance(value, dict):
        return {name: _cut(item, rows, part, length) for name, item in value.items()}
    return value


def _numpy(logits: torch.Tensor) -> np.ndarray:
    return (logits.view(torch.uint16) if logits.dtype == torch.bfloat16 else logits).numpy()
