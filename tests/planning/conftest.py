"""Plans of the 0.5B recipe, on a machine that the test decides about."""

import functools
from collections.abc import Callable

import pytest
from support import ROOT
from transformers import PretrainedConfig

from es_lite import system
from es_lite.fitness.kinds import fitness_of
from es_lite.model.layout import Factors, Layout
from es_lite.model.origin import Origin
from es_lite.planning.needs import Needs
from es_lite.planning.plan import Plan
from es_lite.recipe import Recipe
from es_lite.system import MemoryLimit

RECIPE = ROOT / "recipes" / "qwen3_0p5b_cpu.toml"
GIB = 2**30

SETTINGS = (
    *("es.sigma=1e-3", "es.alpha=5e-4", "noise.kind=gaussian", "data.vocab_size=8192", "eval.samples=16"),
    *("fitness.samples=8", "fitness.max_length=256", "fitness.micro_batch=4"),
)
"""What the tests' figures are of, whatever the recipe says."""


@functools.cache
def model_of(config: str, groups: tuple[Factors, ...] = ()) -> tuple[PretrainedConfig, Layout]:
    model, layout = Origin("", config, 0, groups, False, False).skeleton()
    return model.config, layout


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the machine has; 8 cores, 64 GiB of memory, bf16 and no GPU until it is called."""

    def machine(cores: int = 8, memory: int = 64 * GIB, gpu: int = 0) -> None:
        monkeypatch.setattr(system, "cores", lambda: cores)
        monkeypatch.setattr(system, "memory_limit", lambda limit=0, **_: MemoryLimit(limit or memory, "the test"))
        monkeypatch.setattr(system, "gpu_memory", lambda: MemoryLimit(gpu, "a GPU") if gpu else None)
        monkeypatch.setattr(system, "compute_dtype", lambda *_, **__: "bf16")
        monkeypatch.setattr(system, "free_disk_bytes", lambda path: 100 * GIB)

    machine()
    return machine


@pytest.fixture
def recipe_of() -> Callable[..., Recipe]:
    """The recipe with SETTINGS, and some keys overridden."""
    return lambda *overrides: Recipe.load(RECIPE, (*SETTINGS, *overrides))


@pytest.fixture
def planned(machine, recipe_of) -> Callable[..., Plan]:
    """The plan of the recipe with some keys overridden."""

    def planned(*overrides: str) -> Plan:
        recipe = recipe_of(*overrides)
        model = model_of(recipe.model.config, Origin.of_recipe(recipe).groups)
        return Plan.of(recipe, fitness_of(recipe.fitness.kind), *model)

    return planned


@pytest.fixture
def needs_of(machine, recipe_of) -> Callable[..., Needs]:
    """The needs of the recipe with some keys overridden."""

    def needs_of(*overrides: str) -> Needs:
        recipe = recipe_of(*overrides)
        config, layout = model_of(recipe.model.config)
        return Needs(recipe, fitness_of(recipe.fitness.kind), config, layout)

    return needs_of
