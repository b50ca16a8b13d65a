"""What tools that backpropagate begin with: a recipe's model, as transformers has it, on θ₀, and the recipe's samples."""

import tempfile
from pathlib import Path

import torch

from es_lite.algorithm.jit import Threads
from es_lite.fitness.logprob import LogProb, Samples
from es_lite.model.origin import Origin
from es_lite.recipe import Recipe


def model_and_samples(recipe: Recipe, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Samples]:
    origin = Origin.of_recipe(recipe)
    skeleton, layout = origin.skeleton()
    theta_0 = origin.source(skeleton, layout, Threads(torch.get_num_threads()))
    model = type(skeleton)(skeleton.config).to(dtype)
    for tensor in layout.tensors:
        values = torch.from_numpy(theta_0.read(tensor, 0, tensor.size)).view(tensor.shape)
        model.get_parameter(tensor.name).data = values.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        return model, LogProb().open(recipe, model.config, None, Path(folder))
