"""A row to put beside Table 1 of Evolution Strategies at Scale (arXiv 2509.24372): Countdown, on this machine and in your time.

    python tools/reproduce_table1.py MODEL --dir DIR [--minutes M] [--population N] [--prompts M] [--new-tokens T] [--test K]
                                     [--set table.key=value ...]

MODEL is a Hugging Face folder or a hub name; the paper's row is found by its name, or
else rows of its size are shown. Writes DIR/recipe.toml, made from
recipes/countdown_qwen2p5_0p5b.toml with the paper's problems (four numbers up to 100; 200 to train on), trains it in DIR/run, and
evaluates it and the base model on K of the 2,000 held-out problems. Prints the row and the paper's. The same command
again continues a run that was stopped, also by --minutes, which counts for each command (without the evaluation at its end).

The problems are not the paper's own, but of the same kind, made by es_lite from a seed.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from _measuring import table

from es_lite import system
from es_lite.errors import UserError
from es_lite.files import expanded
from es_lite.recipe import Recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "countdown_qwen2p5_0p5b.toml"

PAPER = {  # accuracy in %: base, PPO, GRPO with groups of 8, of 30, GRPO (second implementation), Dr. GRPO, ES
    "Qwen2.5-0.5B-Instruct": (0.1, 0.3, 0.3, 0.5, 13.0, 13.5, 14.4),
    "Qwen2.5-1.5B-Instruct": (0.7, 14.2, 13.9, 14.8, 27.8, 31.0, 37.3),
    "Qwen2.5-3B-Instruct": (10.0, 20.1, 30.9, 32.5, 37.8, 43.8, 60.5),
    "Qwen2.5-7B-Instruct": (31.2, 55.1, 54.2, 52.8, 57.0, 57.5, 66.8),
    "Llama-3.2-1B-Instruct": (0.4, 11.2, 14.5, 13.0, 14.9, 13.9, 16.8),
    "Llama-3.2-3B-Instruct": (3.2, 35.3, 39.4, 38.8, 42.5, 47.8, 51.6),
    "Llama-3.1-8B-Instruct": (8.1, 42.8, 49.9, 51.3, 46.9, 50.2, 61.2),
}
"""Table 1 of the paper's second version; a row of an older version may differ."""

PAPER_POPULATION, PAPER_PROMPTS, PAPER_STEPS = 30, 200, 500
PAPER_GENERATIONS = PAPER_POPULATION * PAPER_PROMPTS * PAPER_STEPS
"""Completions that ES was trained with."""

STDERR = 2
"""Where the commands print: the table has standard output to itself."""

HEAD = ["Countdown, right %", "base", "PPO", "GRPO (8)", "GRPO (30)", "GRPO-v", "Dr. GRPO", "ES", "ES trained with"]


@dataclass(frozen=True)
class Trained:
    """What a run has used so far, from its metrics."""

    steps: int
    generations: int
    tokens: int
    hours: float

    @classmethod
    def of(cls, run: Path, population: int, prompts: int) -> "Trained":
        metrics = run / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        steps = {line["step"]: line for line in lines if line["step"] > 0}  # after a crash, a step may have two lines
        return cls(
            steps=len(steps),
            generations=len(steps) * population * prompts,
            tokens=sum(line.get("generated_tokens") or 0 for line in steps.values()),
            hours=sum(line.get("step_seconds") or 0.0 for line in steps.values()) / 3600,
        )


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe, which is written to DIR/recipe.toml, also over an older one. Raises UserError."""
    path = options.dir / "recipe.toml"
    document: dict[str, Any] = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    document["model"]["path"] = options.model
    document["data"].pop("options", None)
    document["run"] |= {"dir": str(options.dir / "run"), "minutes": options.minutes, "iterations": options.iterations}
    document["fitness"] |= {"samples": options.prompts, "micro_batch": min(options.prompts, 16)}
    document["generation"]["max_new_tokens"] = options.new_tokens
    document["es"]["population"] = options.population
    options.dir.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(document), encoding="utf-8")
    return Recipe.load(path, options.settings)


def train(recipe: Recipe, options: argparse.Namespace) -> None:
    """Trains, or continues. Raises CalledProcessError, after the command's own message, if it fails."""
    sets = [word for setting in options.settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "es_lite.train", str(options.dir / "recipe.toml"), "--resume", *sets]
    subprocess.run(command, check=True, stdout=STDERR)


def evaluate(run: Path, test: int, out: Path) -> dict[str, Any]:
    """What `python -m es_lite.evaluate` finds for the run's last step and for the model that it started from; kept in `out`."""
    options = ["--against", "start", "--samples", str(test), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "es_lite.evaluate", str(run), *options], check=True, stdout=STDERR)
    return json.loads(out.read_text(encoding="utf-8"))


def papers_models(model: str) -> tuple[list[str], bool]:
    """The paper's models to compare with: of this name, or else of this size; whether the name is the same."""
    name = _plain(model)
    same = [known for known in PAPER if name.endswith(_plain(known))]
    return same or [known for known in PAPER if _size(known) == _size(model)], bool(same)


def rows(model: str, found: dict[str, Any], trained: Trained) -> list[list[str]]:
    """The table: this run's row, and the paper's."""
    ours = [found["against"]["figures"]["accuracy"], found["figures"]["accuracy"]]
    base, own = (_percent(figure["mean"], figure["error"]) for figure in ours)
    used = f"{trained.generations:,} completions ({trained.steps} steps, {trained.tokens:,} tokens, {trained.hours:.2f} h)"
    theirs = f"{PAPER_GENERATIONS:,} completions ({PAPER_STEPS} steps)"
    made = [HEAD, [f"es_lite, {Path(model).name}", base, "–", "–", "–", "–", "–", own, used]]
    known, same = papers_models(model)
    for name in known:
        title = f"the paper, {name}" + ("" if same else " (another model)")
        made.append([title, *(f"{value:.1f}" for value in PAPER[name]), theirs])
    return made if known else [*made, ["the paper has no model of this size", *["–"] * (len(HEAD) - 1)]]


def notes(recipe: Recipe, found: dict[str, Any]) -> str:
    """How both rows were made."""
    es, box = recipe.es, system.box()
    problems = f"problems with {json.dumps(recipe.data.options)}, " if recipe.data.options else ""
    ours = [
        f"es_lite: the model after the last step, greedy, {found['prompts']:,} held-out problems, mean ± standard error",
        f"{problems}N = {es.population}, {recipe.fitness.samples} prompts a step, drawn anew",
        f"at most {recipe.generation.max_new_tokens} new tokens",
        f"sigma {es.sigma}, alpha {es.alpha}, {recipe.noise.kind} noise",
        f"{box['cpu']}, {box['cores']} cores ({box['cpu_features']})",
    ]
    theirs = [
        f"The paper: N = {PAPER_POPULATION}, its {PAPER_PROMPTS} problems in each step, at most 512 new tokens, sigma 0.001",
        "alpha 0.0005, 2,000 held-out problems, of the same kind but not the same",
        'PPO and GRPO were tuned for each model; those with "-v" and "Dr." are of another implementation',
    ]
    return "; ".join(ours) + ".\n" + "; ".join(theirs) + "."


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def _size(name: str) -> str:
    """Billions of parameters, as names give them: "0.5b"."""
    sizes = re.findall(r"(?<![\d.])(\d+(?:\.\d+)?)[bB](?![a-zA-Z])", Path(name).name)
    return sizes[-1] if sizes else ""


def _percent(mean: float, error: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=60.0, help="to train, for this command; 0: no limit; default: 60")
    parser.add_argument(
        "--iterations", type=int, default=PAPER_STEPS, metavar="T", help="steps at most; default: 500, the paper's"
    )
    parser.add_argument("--population", type=int, default=16, metavar="N", help="even; default: 16 (the paper: 30)")
    parser.add_argument("--prompts", type=int, default=8, metavar="M", help="a step; default: 8 (the paper: 200)")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="T", help="default: 128 (the paper: 512)")
    parser.add_argument("--test", type=int, default=200, metavar="K", help="held-out problems; default: 200 (the paper: 2,000)")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="settings", help="of the recipe")
    options = parser.parse_args(argv)
    if options.test < 1:
        parser.error("--test: expected at least 1")
    try:
        recipe = recipe_of(options)
    except (UserError, OSError) as error:
        print(f"reproduce_table1: {error}", file=sys.stderr)
        return 2
    run = expanded(recipe.run.dir)
    try:
        train(recipe, options)
        found = evaluate(run, options.test, options.dir / "evaluation.json")
    except subprocess.CalledProcessError as error:
        return error.returncode  # after the command's own message
    trained = Trained.of(run, recipe.es.population, recipe.fitness.samples)
    print(f"{table(rows(options.model, found, trained))}\n\n{notes(recipe, found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
