"""The recipe of a run: TOML tables read into frozen dataclasses (`tables`), with every mistake reported at once."""

import dataclasses
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w

from es_lite import typed_toml
from es_lite.errors import UserError
from es_lite.tables import (
    DataTable,
    ESTable,
    EvalTable,
    FitnessTable,
    GenerationTable,
    LogTable,
    MemoryTable,
    ModelTable,
    NoiseTable,
    RewardTable,
    RunTable,
    WorkersTable,
)

RAY_ONLY = ("workers.address", "workers.hosts", "workers.host_dir", "run.verify_every")
"""Keys that only workers.engine = "ray" uses."""

ONLY = {
    "logprob": ("data.lines", "data.samples"),
    "reward": (
        *("data.system", "data.template", "data.chat", "data.options"),
        *("reward.functions", "reward.weights", "reward.seconds", "generation.max_new_tokens"),
    ),
}
"""Keys that one kind of fitness uses alone."""


@dataclass(frozen=True)
class Recipe:
    run: RunTable = field(default_factory=RunTable)
    model: ModelTable = field(default_factory=ModelTable)
    data: DataTable = field(default_factory=DataTable)
    fitness: FitnessTable = field(default_factory=FitnessTable)
    reward: RewardTable = field(default_factory=RewardTable)
    generation: GenerationTable = field(default_factory=GenerationTable)
    es: ESTable = field(default_factory=ESTable)
    noise: NoiseTable = field(default_factory=NoiseTable)
    workers: WorkersTable = field(default_factory=WorkersTable)
    memory: MemoryTable = field(default_factory=MemoryTable)
    eval: EvalTable = field(default_factory=EvalTable)
    log: LogTable = field(default_factory=LogTable)

    @classmethod
    def load(cls, path: Path, overrides: typing.Sequence[str] = ()) -> "Recipe":
        """The recipe in the TOML file `path`, with `table.key=value` overrides through the same checks.

        Raises UserError, which lists every problem with its key, what was expected and the nearest right name.
        """
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such recipe; example recipes are in recipes/") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:  # no UTF-8, no TOML, or a number of thousands of digits
            raise UserError(f"{path}: not valid TOML: {error}") from None
        problems: list[str] = []
        for override in overrides:
            typed_toml.override(document, override, problems)
        recipe = _recipe(document, problems)
        if problems:
            listing = "\n".join(f"  {problem}" for problem in problems)
            raise UserError(f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}\n{listing}")
        if not recipe.run.dir:
            recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, dir=f"runs/{path.stem}"))
        return recipe

    def dumps(self) -> str:
        """The recipe as TOML, defaults included; `load` reads it back."""
        return tomli_w.dumps(dataclasses.asdict(self))

    def changes(self, new: "Recipe") -> list[str]:
        """Each key that differs in `new`, as `table.key: old -> new`."""
        return [
            f"{table}.{key}: {before!r} -> {getattr(getattr(new, table), key)!r}"
            for table, keys in dataclasses.asdict(self).items()
            for key in keys
            if (before := getattr(getattr(self, table), key)) != getattr(getattr(new, table), key)
        ]


def _recipe(document: dict, problems: list[str]) -> Recipe:
    """The recipe, with defaults for tables that have problems; contradictions are sought only among the others."""
    tables = {}
    for name, values in document.items():
        before = len(problems)
        table = typed_toml.read(Recipe, {name: values}, "", problems)
        if len(problems) == before:
            tables[name] = getattr(table, name)
    recipe = Recipe(**tables)
    broken = document.keys() - tables.keys()
    problems += [text for involved, text in _contradictions(recipe) if not broken & involved]
    return recipe


def _contradictions(recipe: Recipe) -> typing.Iterator[tuple[set[str], str]]:
    """(tables involved, message) for each contradiction."""
    es, noise, path, config = recipe.es, recipe.noise, recipe.model.path, recipe.model.config
    if bool(path) == bool(config):
        yield {"model"}, "model: give one of model.path and model.config" + (", not both" if path else "")
    if es.antithetic and es.population % 2:
        yield {"es"}, f"es.population = {es.population}: must be even with es.antithetic = true"
    yield from _auto_contradictions(recipe)
    if es.anchor and es.weight_decay:
        yield (
            {"es"},
            "es.anchor and es.weight_decay: parameters can decay towards θ₀ or towards 0, not both; set one of them to 0",
        )
    if es.baseline == "item" and es.shaping == "rank":
        yield {"es"}, 'es.baseline = "item": ranks do not depend on it; remove it, or set es.shaping = "zscore"'
    if recipe.fitness.kind == "reward" and recipe.data.path == DataTable.path:
        yield {"data", "fitness"}, 'data.path: missing; rewards need prompts: a file, or a task such as "builtin:countdown"'
    if config and not recipe.data.tokenizer:
        yield (
            {"model", "data"},
            'data.tokenizer: a model made from model.config has none of its own; give "bpe", a folder or a hub name',
        )
    for index, group in enumerate(es.groups):
        if not group.pattern:
            yield {"es"}, f"es.groups[{index}].pattern: missing"
        if group.sigma == 0 and group.alpha != 0:
            yield (
                {"es"},
                f"es.groups[{index}]: sigma = 0 leaves nothing to learn from; set alpha = 0 too, which freezes the group",
            )
    if noise.rank != "auto" and noise.kind != "lowrank":
        yield {"noise"}, f'noise.rank = {noise.rank}: "{noise.kind}" noise has no rank; remove it, or set noise.kind = "lowrank"'
    if recipe.eval.every and not recipe.eval.path and recipe.eval.fraction == 0:
        yield {"eval"}, "eval.fraction = 0: nothing is held out for eval.every; give eval.path or a fraction"
    for name in RAY_ONLY if recipe.workers.engine != "ray" else ():
        if _is_set(recipe, name):
            yield {name.partition(".")[0], "workers"}, f'{name}: only workers.engine = "ray" uses it; remove it, or set that'
    for kind, used in ONLY.items():
        for name in used if kind != recipe.fitness.kind else ():
            if _is_set(recipe, name):
                yield {name.partition(".")[0], "fitness"}, f'{name}: only fitness.kind = "{kind}" uses it; remove it, or set that'


def _is_set(recipe: Recipe, name: str) -> bool:
    """Whether the key "table.key" differs from its default."""
    table, key = name.split(".")
    return getattr(getattr(recipe, table), key) != getattr(getattr(Recipe(), table), key)


def _auto_contradictions(recipe: Recipe) -> typing.Iterator[tuple[set[str], str]]:
    """The same, of "auto"."""
    es = recipe.es
    for name in ("alpha", "sigma"):
        every = f"{name}_decay_every"
        if getattr(es, name) == "auto" and getattr(es, every):
            yield (
                {"es"},
                f'es.{every} = {getattr(es, every)}: es.{name} = "auto" has no decay of its own; remove it, or give a number',
            )
    if es.alpha == "auto":
        least = 4 if es.antithetic else 3
        if recipe.fitness.samples < 2:
            yield (
                {"es", "fitness"},
                'fitness.samples = 1: es.alpha = "auto" compares samples with each other; take at least 2, or give a number',
            )
        if es.population < least:
            yield {"es"}, f'es.population = {es.population}: es.alpha = "auto" needs at least {least} members; or give a number'
    elif es.alpha_start != ESTable.alpha_start:
        yield {"es"}, f'es.alpha_start = {es.alpha_start:g}: only es.alpha = "auto" begins there; remove it, or set that'
