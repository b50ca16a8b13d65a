"""A rehearsal of scoring, before anything is loaded: the proxied forward compared with the model's own, on `model.ghosts`.

Two forwards that agree on ghosts do the same with the same weights; and a state that changes with a later token shows that the
model is not causal.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.data.batch import Batch
from es_lite.errors import UserError
from es_lite.model.configuration import size_of
from es_lite.model.ghosts import GhostProducts, OwnForward, ghost, ghost_rows
from es_lite.model.layout import ANOTHER, Layer, Layout, Tensor
from es_lite.scoring.generate import Limits
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import Perturbation
from es_lite.scoring.scratch import Scratch
from es_lite.weights.parts import Part

SHORTER = 4
"""Tokens of the second sample, which begins as the first does, and of the third, which is another."""

LONGEST = 7
"""Tokens of the first sample; also tried are as many as there are rows, and heads, in case dimensions are told by their size."""

MANY_HEADS = 64
"""With more heads, a text of as many tokens would take too long."""

NEW_TOKENS = 3
"""That are written after each of them."""

TOLERANCE = 1e-3
"""Relative to the greatest magnitude; a product of other rows has other last bits."""


LEARNED = 16
"""Positions that are learned have so many rows more than the model has positions, at most."""


def rehearse(
    model: PreTrainedModel, layout: Layout, noise: NoiseKind, writes: bool, bf16: bool = False, longest_text: int = 0
) -> None:
    """Raises UserError if the model is not causal, or if es_lite would not compute with it what transformers does.

    model: a `layout.skeleton`, which is not changed. noise: the kind that is to be used. writes: text is to be generated. bf16:
    layers are to be computed in it, which some models do not stand; what is compared here is float32. longest_text: tokens that
    it is to be used with at most.
    """
    name, text = type(model).__name__, model.config.get_text_config()
    perturbation = Perturbation(sigma=1.0, signs=(1, -1), kind=noise.NAME, rank=noise.RANK)
    own, heads = OwnForward(model), size_of(model.config, "num_attention_heads")
    for longest in sorted({LONGEST, 3 * perturbation.members, heads if SHORTER < heads <= MANY_HEADS else LONGEST}):
        lengths = (longest, SHORTER, SHORTER)
        tokens = _tokens(text.vocab_size, longest)
        try:
            expected = [own.states(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        except Exception as error:  # whatever its own code raises
            if longest > LONGEST:  # it has fewer positions
                continue
            raise UserError(f"{name}: does not run on the tokens of a text alone: {_reason(error)}") from None
        if any(states.shape[:-1] != (length,) for states, length in zip(expected, lengths, strict=True)):
            raise UserError(f"{name}: does not have one hidden state for each token of a text; {ANOTHER}")
        if not _agree(expected[1], expected[0][:SHORTER]):
            raise UserError(
                f"{name}: is not causal as it is configured: what it makes of a token depends on later ones, so it gives no "
                "log-probabilities of a text; take a model that predicts the next token"
            )
        with _refused(f"{name}: es_lite cannot run it layer by layer", ANOTHER):
            found = _proxied(model, layout).head_input([perturbation], Batch(tokens, np.array(lengths, np.int32)))
        for member in found.unflatten(0, (perturbation.members, len(lengths))):
            if not all(_agree(states[:length], own) for states, own, length in zip(member, expected, lengths, strict=True)):
                raise UserError(
                    f"{name}: layer by layer, it does not compute what it does as a whole, so its scores would be wrong; take a "
                    "model of another architecture"
                )
    if _learns_positions(model) and longest_text > LONGEST:
        with _refused(f"{name}: {longest_text} tokens are too many", "lower fitness.max_length"):
            own.states(_tokens(text.vocab_size, longest_text)[0])
    if bf16:
        with _refused(f"{name}: cannot be computed in bf16", 'set workers.compute = "fp32"'):
            rows = _tokens(text.vocab_size, LONGEST)
            samples = Batch(rows, np.array((LONGEST, SHORTER, SHORTER), np.int32))
            _proxied(model, layout, torch.bfloat16).head_input([perturbation], samples)
    if not writes:
        return
    remedy = f'{ANOTHER}, or fitness.kind = "logprob"'
    with _refused(f"{name}: es_lite cannot write with it", remedy):
        rows = _tokens(text.vocab_size, LONGEST)
        prompts = [rows[0], rows[1][:SHORTER], rows[2][:SHORTER]]
        written = _proxied(model, layout).generate([perturbation], prompts, Limits((), NEW_TOKENS), len(prompts))
    for prompt, completions in zip(prompts, written.T, strict=True):
        whole = prompt
        for _ in range(NEW_TOKENS):
            whole = np.append(whole, np.int32(own.next_token(whole)))
        if not all(np.array_equal(completion, whole[prompt.size :]) for completion in completions):
            raise UserError(f"{name}: token by token, it does not write what it writes after a whole text; {remedy}")


def _learns_positions(model: PreTrainedModel) -> bool:
    """Whether it may have a vector for each position; some have fewer than their configuration says."""
    positions = size_of(model.config, "max_position_embeddings")
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return positions > 0 and any(positions <= rows <= positions + LEARNED for rows in tables)


@contextlib.contextmanager
def _refused(what: str, remedy: str) -> Iterator[None]:
    """Within it, the model's own layers run on ghosts; whatever their code raises becomes a UserError."""
    try:
        with GhostProducts():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {_reason(error)}; {remedy}") from None


def _tokens(vocabulary: int, longest: int) -> np.ndarray:
    """int32 [3, longest]; none is among the first ten, where tokens of special meaning are."""
    random = np.random.default_rng(0)
    tokens = random.integers(min(10, vocabulary // 2), vocabulary, (3, longest)).astype(np.int32)
    tokens[1] = tokens[0]
    return tokens


def _proxied(model: PreTrainedModel, layout: Layout, compute: torch.dtype = torch.float32) -> PerturbedModel:
    """The model as es_lite runs it."""
    return PerturbedModel(
        copy.deepcopy(model),
        layout,
        _GhostWeights(),
        compute,
        Lanes(1, 1),
        micro_batch=2,
        tile_members=2,
        prompt_members=2,
        scratch=_GhostScratch(compute),
    )


def _agree(states: torch.Tensor, others: torch.Tensor) -> bool:
    return states.shape == others.shape and bool((states - others).abs().max() <= TOLERANCE * others.abs().max())


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


class _GhostWeights:
    """`Weights` without memory."""

    def passing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def opened(self, layer: Layer) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def part(self, tensor: Tensor) -> Part:
        return Part(tensor, 0, np.broadcast_to(np.uint16(0), tensor.size))

    def rows(self, tensor: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.broadcast_to(np.uint16(0), (rows.size, tensor.width)), np.empty(0, np.float32)

    def blocks(self, tensor: Tensor, rows: int) -> Iterator[Part]:
        yield self.part(tensor)


class _GhostScratch(Scratch):
    """`Scratch` in which the perturbed tensors of all members are the same ghosts."""

    def __init__(self, compute: torch.dtype) -> None:
        super().__init__(compute, Threads(1))

    def tensors(self, perturbation: Perturbation, parts: Mapping[str, Part]) -> list[dict[str, torch.Tensor]]:
        return [self.base(parts) for _ in perturbation.signs]

    def kept(self, perturbation: Perturbation, parts: Mapping[str, Part]) -> list[dict[str, torch.Tensor]]:
        return self.tensors(perturbation, parts)

    def base(self, parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
        return {name: ghost(part.tensor.shape, self._compute) for name, part in parts.items()}

    def block(self, perturbation: Perturbation, part: Part) -> list[torch.Tensor]:
        return [own[""] for own in self.tensors(perturbation, {"": part})]

    def factors(self, *_: Any, **__: Any) -> None:
        return None

    def rows(
        self, perturbation: Perturbation, tensor: Tensor, rows: np.ndarray, weights: np.ndarray, scales: np.ndarray
    ) -> list[torch.Tensor]:
        return [ghost_rows(torch.from_numpy(rows), tensor.width).to(self._compute) for _ in perturbation.signs]
