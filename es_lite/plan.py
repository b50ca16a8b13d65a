"""The command `plan`: prints what a recipe needs, before anything is loaded.

    python -m es_lite.plan RECIPE [--set table.key=value ...]

It prints whether the recipe fits, how long it takes and what is there at the end, then details. Exit code 2 if it does not fit.
The command `train` makes the same plan.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from es_lite.errors import UserError
from es_lite.files import expanded
from es_lite.fitness.kinds import fitness_of
from es_lite.model.origin import Origin
from es_lite.planning.plan import Plan
from es_lite.planning.rates import step_time
from es_lite.recipe import Recipe
from es_lite.terminal import accept_any_text, exit_code_of


def tell(path: Path, overrides: Sequence[str]) -> None:
    """Prints the plan of the recipe at `path`. Raises UserError, also if it does not fit."""
    recipe = Recipe.load(path, overrides)
    model, layout = Origin.of_recipe(recipe).skeleton()
    fitness = fitness_of(recipe.fitness.kind)
    plan = Plan.of(recipe, fitness, model.config, layout)
    plan.rehearse(model, fitness)
    expected = step_time(plan.work, plan.execution, plan.noise, expanded(recipe.run.dir))
    print(f"{plan.summary(expected, recipe.run.iterations)}\n\n{plan.details(expected)}")
    if problem := plan.shortfall():
        raise UserError(f"{path}: {problem}")


def main(argv: Sequence[str] | None = None) -> int:
    accept_any_text()
    parser = argparse.ArgumentParser(prog="es-lite plan", description="Say what a recipe needs on this machine.")
    parser.add_argument("recipe", type=Path, help="a TOML file; example recipes are in recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="overrides", help="override a key")
    arguments = parser.parse_args(argv)
    return exit_code_of(lambda: tell(arguments.recipe, arguments.overrides))


if __name__ == "__main__":
    sys.exit(main())
