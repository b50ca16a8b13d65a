"""The largest setting that fits, for the message about one that does not."""

from dataclasses import replace

from transformers import PretrainedConfig

from es_lite.fitness.base import Fitness
from es_lite.model.layout import Layout
from es_lite.planning.needs import Needs
from es_lite.recipe import Recipe


def largest_new_tokens(recipe: Recipe, fitness: Fitness, config: PretrainedConfig, layout: Layout, limit: int) -> int:
    """The greatest generation.max_new_tokens with which the recipe fits into `limit` bytes, the rest as it is; 0 if none."""

    def fits(new_tokens: int) -> bool:
        shorter = replace(recipe, generation=replace(recipe.generation, max_new_tokens=new_tokens))
        needs, residency = Needs(shorter, fitness, config, layout), recipe.memory.residency
        ways = [needs.resident] if residency != "streamed" else []
        ways += [needs.streamed] if residency != "resident" and not layout.blocks_share else []
        return any(sum(way(limit).memory.values()) <= limit for way in ways)

    low, high = 0, recipe.generation.max_new_tokens  # `high` does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
