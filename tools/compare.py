"""Variants of a recipe compared by what is learned: the same recipe, run with each variant's settings and with each seed.

    python tools/compare.py WHAT DIR [--recipe RECIPE] [--seeds 3] [--jobs 1] [--set table.key=value ...] [--out PNG]

WHAT is one of
    kinds       kinds of noise
    steps       α that is found, begun far too small and far too large, beside five constant α (--alphas), and three that decay
                from the middle ones
    sizes       EA4LLM's figure of model sizes, at a size that two cores pay
    samples     EA4LLM's ablation of the number of evaluation samples, in the paper's ratios 1 : 3 : 5 : 7
    population  EA4LLM's ablation of the population, 20, 30 and 40 members

Runs are the real command's, in DIR/VARIANT-SEED. A run that is there already is continued, or kept if it is complete. Writes
DIR/WHAT.json and a PNG (DIR/WHAT.png, if not --out), and prints a table.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from _measuring import commit, table

from es_lite import system
from es_lite.errors import UserError
from es_lite.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]

COLOURS = ("#37352f", "#d9730d", "#0b6e99", "#448361", "#9065b0", "#c14c8a", "#937264", "#d44c47", "#5f6b76", "#cb9b2c")

Settings = tuple[str, ...]

PAPERS = (
    "es.antithetic=false",
    "es.alpha=auto",
    "es.alpha_decay_every=0",
    "es.sigma=2e-2",
    "es.sigma_decay_every=0",
    "fitness.micro_batch=8",
)
"""Members as in EA4LLM, none of which share noise, all with the same σ; each variant finds its own α."""


@dataclass(frozen=True)
class Comparison:
    variants: dict[str, Settings]
    """What is set, by name; the first is what others are compared with."""
    settings: Settings = ()
    """For all of them."""
    across: str = "step (the same scored tokens)"


def sized(width: int, layers: int) -> Settings:
    config = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
    }
    return tuple(f"model.config.{key}={value}" for key, value in config.items())


def steps(alphas: Sequence[float], iterations: int) -> Comparison:
    """alphas: five. iterations: of the recipe. Decays end at a tenth of where they begin."""
    decay = f"es.alpha_decay={0.1**0.1!r}", f"es.alpha_decay_every={max(1, iterations // 10)}"
    alphas = sorted(alphas)
    middle = alphas[2]
    variants: dict[str, Settings] = {
        "auto": ("es.alpha=auto",),
        "auto, begun 100 times too small": ("es.alpha=auto", f"es.alpha_start={middle / 100!r}"),
        "auto, begun 10 times too large": ("es.alpha=auto", f"es.alpha_start={middle * 10!r}"),
    }
    variants |= {f"constant {alpha:g}": (f"es.alpha={alpha!r}",) for alpha in alphas}
    variants |= {f"decaying from {alpha:g}": (f"es.alpha={alpha!r}", *decay) for alpha in alphas[1:4]}
    return Comparison(variants, ("es.alpha_decay=1.0", "es.alpha_decay_every=0", "es.sigma_decay_every=0"))


COMPARISONS = {
    "kinds": Comparison(
        {
            "gaussian": ("noise.kind=gaussian",),
            "rademacher": ("noise.kind=rademacher",),
            **{f"low rank {rank}": ("noise.kind=lowrank", f"noise.rank={rank}") for rank in (1, 4, 16)},
        }
    ),
    "sizes": Comparison(
        {
            "20 thousand parameters": sized(32, 1),
            "90 thousand": sized(64, 2),
            "0.6 million": sized(128, 4),
        },
        ("es.population=30", "fitness.samples=40", *PAPERS),
    ),
    "samples": Comparison(
        {f"{count} samples": (f"fitness.samples={count}",) for count in (8, 24, 40, 56)},
        ("es.population=30", *PAPERS),
        across="step",
    ),
    "population": Comparison(
        {f"{count} members": (f"es.population={count}",) for count in (20, 30, 40)},
        ("fitness.samples=40", *PAPERS),
        across="step",
    ),
}


def run(recipe: Path, settings: Sequence[str], folder: Path) -> list[tuple[int, float]]:
    """(step, held-out score) of the finished run. Raises CalledProcessError, after the command's own message, if it fails."""
    print(f"{recipe.stem}, {folder.name}", file=sys.stderr, flush=True)
    words = [word for setting in (*settings, f"run.dir={folder}") for word in ("--set", setting)]
    command = [sys.executable, "-m", "es_lite.train", str(recipe), "--resume", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["eval_score"] for line in lines if line.get("eval_score") is not None}
    if not found:
        sys.exit(f"compare: {recipe}: evaluates nothing; set eval.every")
    return sorted(found.items())


def compare(comparison: Comparison, recipe: Path, folder: Path, seeds: int, settings: Sequence[str], jobs: int) -> dict:
    """Runs every variant with every seed, `jobs` at a time. Returns what was found, as it is written to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    always = "run.checkpoint_every=0", "eval.best=false", "log.tensorboard=false", *comparison.settings
    with ThreadPoolExecutor(jobs) as pool:
        runs = {
            name: [
                pool.submit(
                    run,
                    recipe,
                    (*always, *variant, *settings, f"run.seed={seed}"),
                    folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}",
                )
                for seed in range(seeds)
            ]
            for name, variant in comparison.variants.items()
        }
        try:
            scores = {name: [one.result() for one in each] for name, each in runs.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {"recipe": recipe.name, "settings": list(settings), "commit": commit(), "box": system.box(), "scores": scores}


def rows(scores: dict[str, list[list[tuple[int, float]]]]) -> str:
    """A table of the gains."""
    lines = [["variant", "steps", "held-out score at the end, mean over seeds", "each seed", "gain", "of the first's gain"]]
    gains = {name: statistics.mean(run[-1][1] - run[0][1] for run in runs) for name, runs in scores.items()}
    for name, runs in scores.items():
        last = [run[-1][1] for run in runs]
        share = f"{gains[name] / next(iter(gains.values())):.0%}"
        each = ", ".join(f"{score:.4f}" for score in last)
        lines.append([name, str(runs[0][-1][0]), f"{statistics.mean(last):.4f}", each, f"{gains[name]:+.4f}", share])
    return table(lines)


def draw(document: dict, across: str, out: Path) -> None:
    """The mean over seeds of each variant's held-out score, and each seed's in a thinner line."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(9, 6), constrained_layout=True)
    for (name, runs), colour in zip(document["scores"].items(), COLOURS * 2, strict=False):
        taken, scores = np.array(runs[0])[:, 0], np.array(runs)[:, :, 1]
        style = "--" if name.startswith("decaying") else "-"
        axes.plot(taken, scores.mean(axis=0), color=colour, label=name, linewidth=2, linestyle=style)
        for seed in scores if len(runs) > 1 else ():
            axes.plot(taken, seed, color=colour, alpha=0.3, linewidth=0.8)
    seeds = len(next(iter(document["scores"].values())))
    axes.set_title(f"{document['recipe']}, {seeds} seed{'s' * (seeds > 1)}", loc="left", fontweight="bold")
    axes.set(xlabel=across, ylabel="held-out score")
    axes.legend(frameon=False)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", metavar="WHAT", choices=[*COMPARISONS, "steps"])
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/quickstart.toml", help="default: recipes/quickstart.toml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with more than one, --set workers.count=1 helps")
    parser.add_argument("--alphas", type=float, nargs=5, default=(0.0125, 0.025, 0.05, 0.1, 0.2))
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="settings")
    parser.add_argument("--out", metavar="PNG", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1 or arguments.jobs < 1:
        parser.error("expected at least one seed, and one job")
    try:
        _compared(arguments)
    except UserError as error:
        print(f"compare: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:  # after the command's own message
        return error.returncode
    return 0


def _compared(arguments: argparse.Namespace) -> None:
    """Makes the runs that are missing, and writes what they reached. Raises UserError, CalledProcessError."""
    if arguments.what == "steps":
        comparison = steps(arguments.alphas, Recipe.load(arguments.recipe, arguments.settings).run.iterations)
    else:
        comparison = COMPARISONS[arguments.what]
    folder, what = arguments.folder, arguments.what
    document = compare(comparison, arguments.recipe, folder, arguments.seeds, arguments.settings, arguments.jobs)
    (folder / f"{what}.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(document, comparison.across, arguments.out or folder / f"{what}.png")
    print(rows(document["scores"]))


if __name__ == "__main__":
    sys.exit(main())
