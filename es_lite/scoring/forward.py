"""The perturbed forward: Hugging Face's own model, with a door at each layer that perturbs what passes.

Decoder blocks, embedding, final norm and head are replaced by proxies (`doors`). The unmodified forward of the model runs
once over all members and samples, the members of all given perturbations folded into the batch dimension.

Shapes: B samples, T the longest sample.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from es_lite.data import Batch
from es_lite.errors import UserError
from es_lite.scoring.device import DeviceScratch
from es_lite.scoring.doors import Door, Doorway, EmbeddingDoor, HeadDoor
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.perturb import Perturbation, Scratch, Weights
from es_lite.weights.layout import Layout, Tensor, blocks


class PerturbedModel:
    """Scores samples under perturbed weights that only ever exist a layer at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        weights: Weights,
        compute: torch.dtype,
        lanes: Lanes,
        micro_batch: int,
        device: torch.device | None = None,
    ) -> None:
        """model: a fresh `layout.skeleton`, which this takes over. device: where to compute; None is here, with the kernels."""
        scratch = DeviceScratch(device, compute) if device else Scratch(compute, lanes.all_threads)
        self._way = Doorway(weights, scratch, lanes, micro_batch)
        self._model = model
        for module in model.modules():  # such as the rotary frequencies; the parameters stay on the meta device
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(scratch.device)
        _hang_doors(model, layout, self._way)

    @torch.inference_mode()
    def score(self, perturbations: Sequence[Perturbation], batch: Batch, pass_samples: int) -> list[np.ndarray]:
        """Mean log-probability of each sample's true next tokens, for each member: float64 [members, B] a perturbation.

        pass_samples: samples that go through the model at once (hidden states of all of them, for all members, are in memory),
        a multiple of the micro-batch; how many does not change a bit of the result.
        """
        way = self._way
        way.perturbations = perturbations
        passes = []
        for low in range(0, batch.lengths.size, pass_samples):
            way.lengths = batch.lengths[low : low + pass_samples]
            way.targets = batch.tokens[low : low + pass_samples, : way.lengths[0]]
            ids = torch.from_numpy(way.targets.astype(np.int64)).repeat(way.members, 1).to(way.scratch.device)
            with way.weights.passing():
                self._model(input_ids=ids, use_cache=False)
            passes.append(way.log_probabilities)
        scores = np.concatenate(passes, axis=1)
        return [scores[first : first + perturbation.members] for first, perturbation in way.folded()]


def _hang_doors(model: PreTrainedModel, layout: Layout, way: Doorway) -> None:
    """Replaces every module that owns parameters, outside the blocks, and every block, by its door."""
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    tensor_of = {tensor.name: tensor for tensor in layout.tensors}
    layer_of = {tensor.name: layer for layer in layout.layers for tensor in layer.tensors}

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
            own = tensors(module, False)
            doors[name] = HeadDoor(module, layer_of[own["weight"].name], own, way, scale, cap)
        else:
            if module is embedding:
                module.padding_idx = None  # a number of a row that need not be made; only gradients know it
            kind = EmbeddingDoor if module is embedding else Door
            own = tensors(module, False)
            doors[name] = kind(module, layer_of[next(iter(own.values())).name], own, way)
    for index, block in enumerate(block_list):
        block_list[index] = Door(block, layout.blocks[index], tensors(block, recurse=True), way)
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
