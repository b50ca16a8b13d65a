"""The perturbed model: Hugging Face's own forward, with proxies that perturb each layer when data reaches it.

Proxies replace decoder blocks and every other module that owns parameters, except the head. The model's unmodified forward runs
once over all members and samples; the input of its head goes to `heads.Head`.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from es_lite.data.batch import Batch
from es_lite.errors import UserError
from es_lite.model.configuration import size_of
from es_lite.model.layout import ANOTHER, Layout, Tensor, blocks
from es_lite.scoring.arguments import state_copies
from es_lite.scoring.attention import one_query_attention
from es_lite.scoring.device import DeviceScratch
from es_lite.scoring.embedding import EmbeddingProxy
from es_lite.scoring.generate import Limits, generate
from es_lite.scoring.heads import Head, HeadInput, LogitTransform
from es_lite.scoring.kept import KeptScratch
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.lengths import LengthDependence
from es_lite.scoring.perturbation import Perturbation
from es_lite.scoring.proxies import Proxy, ScoringState
from es_lite.scoring.scratch import Scratch
from es_lite.scoring.sequences import AllRows, SequenceRows, SequenceTile, check_cache
from es_lite.scoring.tiles import SampleRows
from es_lite.scoring.weights import Weights
from es_lite.system import trim_memory


class PerturbedModel:
    """A model under perturbed weights, which exist for one layer at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        weights: Weights,
        compute: torch.dtype,
        lanes: Lanes,
        micro_batch: int,
        tile_members: int = 1,
        prompt_members: int = 1,
        keep_weights: bool = False,
        device: torch.device | None = None,
        progress: Callable[[float], None] = lambda share: None,
        scratch: Scratch | DeviceScratch | None = None,
    ) -> None:
        """model: a new `layout.skeleton`, which is modified.

        tile_members: members that share a tile if their perturbations are factored, 1 or those of one or more perturbations.
        prompt_members: likewise, while prompts are read. keep_weights: what is perturbed or converted for a generation stays in
        memory until its end.
        device: compute there, with torch operations only; None: on the CPU, with the kernels. progress: called with the share of
        a call's work that is done. scratch: makes perturbed tensors; None: as `device` and `compute` say.
        """
        if scratch is None:
            scratch = DeviceScratch(device, compute) if device else Scratch(compute, lanes.all_threads)
        self._state = ScoringState(weights, scratch, lanes, micro_batch, tile_members, progress=progress, compute=compute)
        self._parameters = layout.size
        self._model = model
        self._prompt_members = prompt_members
        self._keep_weights = keep_weights
        self._kernels = device is None
        self._heads = size_of(model.config, "num_attention_heads")
        self._accepted = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in self._accepted else "past_key_values"
        for module in model.modules():  # such as the rotary frequencies; the parameters stay on the meta device
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(scratch.device)
        self._positions = LengthDependence(model, model.config)
        self._head_input, self._head = _replace_modules(model, layout, self._state)

    def log_probabilities(self, perturbations: Sequence[Perturbation], batch: Batch, pass_samples: int) -> np.ndarray:
        """Mean log-probability of each sample's true next tokens (EA4LLM, section 3), for each member of all perturbations:
        float64 [G, B].

        pass_samples: samples that go through the model at once (the hidden states of all of them, for all members, are in
        memory), a multiple of the micro-batch; it does not change a bit of the result.
        """
        passes = []
        for part, values in self._scored(perturbations, batch, pass_samples):
            counts = part.lengths.astype(np.int64) - 1
            starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
            passes.append(np.stack([np.add.reduceat(value, starts) / counts for value in values]))
        return np.concatenate(passes, axis=1)

    def token_log_probabilities(self, perturbations: Sequence[Perturbation], batch: Batch, pass_samples: int) -> np.ndarray:
        """The log-probability of each token but the first: object [G, B], of float64 [length - 1]. See `log_probabilities`."""
        passes = []
        for part, values in self._scored(perturbations, batch, pass_samples):
            ends = np.cumsum(part.lengths.astype(np.int64) - 1)[:-1]
            found = np.empty((len(values), len(part)), object)
            for member, value in enumerate(values):
                for sample, own in enumerate(np.split(value, ends)):
                    found[member, sample] = own
            passes.append(found)
        return np.concatenate(passes, axis=1)

    @torch.inference_mode()
    def head_input(self, perturbations: Sequence[Perturbation], batch: Batch) -> torch.Tensor:
        """What the head would get, [G·B, T, H]."""
        self._state.perturbations = perturbations
        with self._state.weights.passing():
            return self._states(batch)

    def _states(self, batch: Batch) -> torch.Tensor:
        """The same for the perturbations that are set, within a pass."""
        state = self._state
        state.rows = SampleRows(state.members, batch.lengths, state.micro_batch, state.tile_members, self._heads)
        ids = torch.from_numpy(batch.tokens.astype(np.int64)).repeat(state.members, 1).to(state.scratch.device)
        return self._forward(input_ids=ids, use_cache=False)

    def _forward(self, **arguments: Any) -> torch.Tensor:
        """The head's input, [rows, T, H]."""
        logits = self._model(**arguments).logits
        if not self._head.after.explains(logits):
            raise UserError(f"{type(self._model).__name__}: changes its logits in a way that es_lite does not know; {ANOTHER}")
        return self._head_input.take()

    @torch.inference_mode()
    def _scored(
        self, perturbations: Sequence[Perturbation], batch: Batch, pass_samples: int
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """Each pass's samples, and the log-probabilities of their tokens, sample after sample: float64 [G, scored tokens]."""
        state = self._state
        state.perturbations = perturbations
        passes = list(self._passes(batch, pass_samples))
        state.work, state.done = len(passes) * self._parameters * len(perturbations), 0.0
        for part in passes:
            self._positions.reset()
            with state.weights.passing():
                values = self._head.log_probabilities(self._states(part), part.tokens)
            yield part, values

    def _passes(self, batch: Batch, pass_samples: int) -> Iterator[Batch]:
        """The samples in passes; those of a pass have the same positions.

        Tiles are the same whichever samples are in the batch: cut at multiples of the micro-batch, and where positions change.
        """
        micro = self._state.micro_batch
        for alike in self._positions.alike(batch.lengths):
            low = alike.start
            while low < alike.stop:
                high = min(alike.stop, low + pass_samples if low % micro == 0 else -(-low // micro) * micro)
                yield batch.part(low, high)
                low = high

    @torch.inference_mode()
    def generate(
        self, perturbations: Sequence[Perturbation], prompts: Sequence[np.ndarray], limits: Limits, pass_prompts: int
    ) -> np.ndarray:
        """What each member of all perturbations writes after each prompt, greedily: object [members, prompts].

        An element is int32 [tokens], with the end token if it was written, or None if the model's logits were not numbers.
        prompts: int32 [tokens] each. pass_prompts: prompts that go through the model at once (all members' keys and values are in
        memory), a multiple of the micro-batch; it does not change a bit of the result.
        """
        state, scratch, passes = self._state, self._state.scratch, []
        assert not isinstance(scratch, KeptScratch)
        layers = check_cache(self._model.config)
        state.perturbations = perturbations
        forwards = -(-len(prompts) // pass_prompts) * limits.new_tokens
        state.work, state.done = forwards * self._parameters * len(perturbations), 0.0
        state.scratch = KeptScratch(scratch, self._keep_weights)
        try:
            for low in range(0, len(prompts), pass_prompts):
                part = prompts[low : low + pass_prompts]
                passes.append(
                    generate(
                        list(state.groups()), part, limits, state.micro_batch, self._prompt_members, layers, self._next_tokens
                    )
                )
                trim_memory()  # keys and values have other sizes each time, and leave holes
        finally:
            state.scratch = scratch
        return np.concatenate(passes, axis=1)

    def _next_tokens(
        self, tiles: Sequence[SequenceTile], tokens: np.ndarray, seen: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """See `generate.Forward`."""
        state = self._state
        state.rows = SequenceRows(tiles)
        device = state.scratch.device
        ids, mask, places = (torch.from_numpy(array.astype(np.int64)).to(device) for array in (tokens, seen, positions))
        arguments: dict[str, Any] = {self._cache_name: AllRows(seen.shape[1] - tokens.shape[1], tiles[0].cache.layers)}
        optional = {"position_ids": places, "logits_to_keep": 1}
        arguments |= {name: value for name, value in optional.items() if name in self._accepted}
        attention = one_query_attention(state.lanes.threads) if self._kernels else contextlib.nullcontext()
        with state.weights.passing(), attention:
            return self._head.greatest(self._forward(input_ids=ids, attention_mask=mask, use_cache=True, **arguments))


def _replace_modules(model: PreTrainedModel, layout: Layout, state: ScoringState) -> tuple[HeadInput, Head]:
    """Replaces every block, and every module outside the blocks that owns parameters, by its proxy, and the head by its input.

    A module that owns some itself is replaced with all that is in it. Raises UserError if that includes the blocks.
    """
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    tensor_of = {tensor.name: tensor for tensor in layout.tensors}
    layer_of = {tensor.name: layer for layer in layout.layers for tensor in layer.tensors}

    def tensors(module: nn.Module, recurse: bool) -> dict[str, Tensor]:
        return {n: tensor_of[by_identity[id(p)]] for n, p in module.named_parameters(recurse=recurse)}

    prefix, block_list = blocks(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise UserError(f"{type(model).__name__}: its head is not a linear map of the hidden states; {ANOTHER}")
    own = tensors(head, recurse=False)
    head_input, our_head = HeadInput(state.compute), Head(layer_of[own["weight"].name], own, LogitTransform.of(model), state)
    replaced: dict[str, nn.Module] = {}
    of_head = {id(parameter) for parameter in head.parameters()}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in (prefix, *replaced))
        own_parameters = [p for p in module.parameters(recurse=False) if by_identity[id(p)] not in layout.unused]
        if inside or not own_parameters:
            continue
        parts = list(module.modules())
        if module not in (head, embedding) and any(part in (head, embedding, block_list) for part in parts):
            if all(id(p) in of_head for p in own_parameters):  # BERT's: the head's bias under another name
                continue
            raise UserError(
                f"{type(model).__name__}: {by_identity[id(own_parameters[0])]} belongs to a part of it that has layers in it, "
                f"and to no layer; {ANOTHER}"
            )
        own = tensors(module, recurse=True)
        layer = layer_of[next(iter(own.values())).name]
        if module is head:
            replaced[name] = head_input
        elif module is embedding:
            cast(Any, module).padding_idx = None  # may be beyond the rows that are made; only gradients need it
            replaced[name] = EmbeddingProxy(module, layer, own, state)
        else:
            replaced[name] = Proxy(module, layer, own, state)
    copies = state_copies(model.config)
    for index, block in enumerate(block_list):
        block_list[index] = Proxy(block, layout.blocks[index], tensors(block, recurse=True), state, copies)
    for name, proxy in replaced.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, proxy)
    return head_input, our_head
