"""Kinds of noise compared by what is learned: held-out scores of one recipe, run with each kind on the same samples and seeds.

    python tools/compare_kinds.py RECIPE DIR [--seeds 3] [--set table.key=value ...]   prints a table, writes DIR/kinds.json
    python tools/compare_kinds.py DIR [DIR ...] --out PNG                              draws what was found, a panel for each

Runs are the real command's, in DIR/KIND-SEED, and one after the other. A run that is there already is continued, or kept if it is
complete.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from _measuring import commit, table

from es_lite import system

KINDS = {  # what is set, and the colour
    "gaussian": (("noise.kind=gaussian",), "#37352f"),
    "rademacher": (("noise.kind=rademacher",), "#d9730d"),
    "low rank 1": (("noise.kind=lowrank", "noise.rank=1"), "#0b6e99"),
    "low rank 4": (("noise.kind=lowrank", "noise.rank=4"), "#448361"),
    "low rank 16": (("noise.kind=lowrank", "noise.rank=16"), "#9065b0"),
}


def run(recipe: Path, settings: Sequence[str], folder: Path) -> list[tuple[int, float]]:
    """(step, held-out score) of the finished run. Raises CalledProcessError, after the command's own message, if it fails."""
    words = [word for setting in (*settings, f"run.dir={folder}") for word in ("--set", setting)]
    command = [sys.executable, "-m", "es_lite.train", str(recipe), "--resume", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["eval_score"] for line in lines if line.get("eval_score") is not None}
    if not found:
        sys.exit(f"compare_kinds: {recipe}: evaluates nothing; set eval.every")
    return sorted(found.items())


def compare(recipe: Path, folder: Path, seeds: int, settings: Sequence[str]) -> str:
    """Runs every kind with every seed, and writes the scores to `folder`. Returns a table."""
    folder.mkdir(parents=True, exist_ok=True)
    always = ("run.checkpoint_every=0", "eval.best=false", "log.tensorboard=false", *settings)
    found: dict[str, list[list[tuple[int, float]]]] = {}
    for seed in range(seeds):
        for name, (kind, _) in KINDS.items():
            print(f"{recipe.stem}, {name}, seed {seed}", file=sys.stderr, flush=True)
            place = folder / f"{name.replace(' ', '-')}-{seed}"
            found.setdefault(name, []).append(run(recipe, (*always, *kind, f"run.seed={seed}"), place))
    document = {"recipe": recipe.name, "settings": settings, "commit": commit(), "box": system.box(), "scores": found}
    (folder / "kinds.json").write_text(json.dumps(document, indent=1) + "\n")
    rows = [["noise", "steps", "held-out score at the end, mean over seeds", "each seed", "gain", "of gaussian's gain"]]
    gains = {name: [scores[-1][1] - scores[0][1] for scores in runs] for name, runs in found.items()}
    for name, runs in found.items():
        last, gain = [scores[-1][1] for scores in runs], statistics.mean(gains[name])
        share = f"{gain / statistics.mean(gains['gaussian']):.0%}"
        each = ", ".join(f"{score:.4f}" for score in last)
        rows.append([name, str(runs[0][-1][0]), f"{statistics.mean(last):.4f}", each, f"{gain:+.4f}", share])
    return table(rows)


def draw(folders: Sequence[Path], out: Path) -> None:
    """The mean over seeds of each kind's held-out score, and each seed's in a thinner line."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, len(folders), figsize=(7.5 * len(folders), 5.5), constrained_layout=True, squeeze=False)
    for axes, folder in zip(panels[0], folders, strict=True):
        document = json.loads((folder / "kinds.json").read_text())
        for name, runs in document["scores"].items():
            steps, colour = np.array(runs[0])[:, 0], KINDS[name][1]
            scores = np.array(runs)[:, :, 1]
            axes.plot(steps, scores.mean(axis=0), color=colour, label=name, linewidth=2)
            for seed in scores if len(runs) > 1 else ():
                axes.plot(steps, seed, color=colour, alpha=0.3, linewidth=0.8)
        seeds = len(next(iter(document["scores"].values())))
        axes.set_title(f"{document['recipe']}, {seeds} seed{'s' * (seeds > 1)}", loc="left", fontweight="bold")
        axes.set_xlabel("step (the same scored tokens)")
        axes.set_ylabel("held-out score, nats a token")
        axes.legend(frameon=False)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", metavar="RECIPE DIR, or DIR", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="settings")
    parser.add_argument("--out", metavar="PNG", type=Path, help="draw, instead of running anything")
    arguments = parser.parse_args(argv)
    if arguments.out:
        draw(arguments.places, arguments.out)
    elif len(arguments.places) != 2 or arguments.seeds < 1:
        parser.error("expected RECIPE DIR and at least one seed; or --out to draw")
    else:
        print(compare(*arguments.places, arguments.seeds, arguments.settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
