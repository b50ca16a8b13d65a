"""Draws runs from their metrics.jsonl: score, evaluation, speed and memory over the steps, in one PNG.

    python tools/plot_run.py RUN [RUN ...] [--out PNG]

A colour is a run; a line's style is what it shows. A key that is missing or null on a line leaves no point. Runs with rewards
have panels for what was written, and below them some of it, from the first such run's samples.jsonl.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import _examples
import matplotlib.pyplot as plt
from _panels import (
    GREY,
    SHARES,
    Record,
    draw_evaluation,
    draw_gain,
    draw_length,
    draw_memory,
    draw_references,
    draw_score,
    draw_seconds,
    draw_shares,
    draw_signal,
    draw_sizes,
    draw_tokens,
)
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#937264", "#d44c47", "#5f6b76")
STYLE = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 10.5,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": GREY,
    "axes.edgecolor": "#bbbbbb",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}


def read_metrics(run: Path) -> list[Record]:
    """The lines of RUN/metrics.jsonl; one that a crash tore is left out, with a message on stderr.

    Raises ValueError if there is no such file, or nothing in it.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the folder of a run") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({"step": record["step"], **record})
        except (ValueError, TypeError, KeyError):
            print(f"plot_run: {path}, line {number} is not complete and is left out", file=sys.stderr)
    if not records:
        raise ValueError(f"{path}: no step in it yet")
    return records


PANELS = {  # title, unit of the y-axis, the function that draws a run
    "score": ("Training: scores of the population", "score (higher is better)", draw_score),
    "evaluation": ("Evaluation: score on held-out text", "log-probability (nats a token)", draw_evaluation),
    "signal": ("What items agree on, of the spread of scores", "%", draw_signal),
    "gain": ("Gain in score since the first evaluation", "score", draw_gain),
    "sizes": ("Sizes of steps", "", draw_sizes),
    "tokens": ("Speed: tokens scored a second", "tokens a second", draw_tokens),
    "seconds": ("Speed: seconds a step", "seconds", draw_seconds),
    "memory": ("Memory of all processes (PSS)", "GiB", draw_memory),
}
LAYOUT = [
    *([["score", "evaluation"]] * 2),
    ["signal", "gain"],
    ["sizes", "memory"],
    ["tokens", "seconds"],
]

REWARD_PANELS = PANELS | {
    "score": ("Training: mean rewards of the population", "reward", draw_score),
    "evaluation": ("Evaluation: mean reward on held-out prompts", "reward", draw_evaluation),
    "shares": ("Evaluation: shares of the completions", "%", draw_shares),
    "length": ("Length of the completions", "characters", draw_length),
    "tokens": ("Speed: tokens written a second", "tokens a second", draw_tokens),
}
REWARD_LAYOUT = [
    *([["score", "evaluation"]] * 3),
    *([["shares", "length"]] * 2),
    *([["signal", "gain"]] * 2),
    *([["sizes", "memory"]] * 2),
    *([["tokens", "seconds"]] * 2),
]


def writes(records: list[Record]) -> bool:
    """Whether it is a run with rewards on what the model wrote."""
    return any(record.get("generated_tokens") is not None or record.get("eval_length") is not None for record in records)


def draw(runs: dict[str, list[Record]], examples: _examples.Examples | None, out: Path) -> None:
    """Writes the PNG, 1400 pixels wide, 1200 high or, with rewards, more; runs: by name. Raises OSError if it cannot be."""
    colours = dict(zip(runs, itertools.cycle(COLOURS), strict=False))
    rewards = any(map(writes, runs.values()))
    heights = [15.0 if rewards else 12.0, *([examples.height] if examples else [])]
    with plt.rc_context(STYLE):
        whole = plt.figure(figsize=(14, sum(heights)))
        figure, *below = whole.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        panels = figure.subplot_mosaic(REWARD_LAYOUT if rewards else LAYOUT, sharex=True)
        for panel, (title, unit, draw_run) in (REWARD_PANELS if rewards else PANELS).items():
            axes = panels[panel]
            axes.set(title=title, ylabel=unit)
            for name, records in runs.items():
                draw_run(axes, records, colours[name])
            if not any(len(drawn.get_xdata()) for drawn in axes.lines):
                axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color=GREY)
        for panel in ("tokens", "seconds", "memory"):
            panels[panel].margins(y=0.3)  # room for the legend
            panels[panel].set_ylim(bottom=0)
        for panel in ("tokens", "seconds"):
            panels[panel].set_xlabel("step")
            panels[panel].xaxis.get_major_locator().set_params(integer=True)
        if any((drawn.get_ydata() > 0).any() for drawn in panels["sizes"].lines):
            panels["sizes"].set_yscale("log")
        # A signal is unbiased, and so may be far below 0 in the first steps.
        panels["signal"].set_ylim(bottom=max(-25, panels["signal"].get_ylim()[0]))
        draw_references(panels["evaluation"], list(runs.values()))
        add_legends(panels)
        if len(runs) == 1:
            figure.suptitle(*runs, fontsize=14, color=GREY)
        else:
            handles = [Line2D([], [], color=colour, linewidth=4, label=name) for name, colour in colours.items()]
            figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=11)
        if examples:
            examples.draw(below[0])
        whole.savefig(out, format="png")
        plt.close(whole)


def add_legends(panels: dict[str, Axes]) -> None:
    """Explains the styles, in grey, because colours are runs."""
    solid, dashed, dotted = (Line2D([], [], color=GREY, linestyle=style) for style in ("-", "--", ":"))
    pale, dark = (Patch(color=GREY, alpha=alpha, linewidth=0) for alpha in (0.2, 0.5))
    panels["score"].legend([solid, pale, dotted], ["mean", "mean ± std", "best member"], ncols=3)
    panels["seconds"].legend([pale, dark], ["scoring", "update"], loc="upper right", ncols=2)
    panels["memory"].legend([solid, dashed], ["now", "peak"], loc="lower right", ncols=2)
    panels["signal"].legend([solid, dotted], ["signal", "members with another's score"], ncols=2)
    panels["gain"].legend([solid, dashed], ["held out", "expected, sum of all steps"], loc="lower right")
    panels["sizes"].legend([solid, dashed, dotted], ["α", "σ", "drift (RMS of θ − θ₀)"], ncols=3)
    if "shares" in panels:
        panels["shares"].set_ylim(-4, 118)  # room for the legend
        panels["shares"].legend([solid, dashed, dotted], SHARES.values(), loc="upper right", ncols=3)
        panels["length"].set_ylim(bottom=0)
        thin = Line2D([], [], color=GREY, linewidth=0.9, alpha=0.5)
        panels["length"].legend([solid, thin], ["held-out prompts", "population, mean"], loc="upper right", ncols=2)
    if panels["evaluation"].get_legend_handles_labels()[0]:
        panels["evaluation"].legend()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw runs from their metrics.jsonl.")
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folder of a run; several are overlaid")
    parser.add_argument("--out", metavar="PNG", type=Path, help="default: plot.png in the first RUN")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.runs[0] / "plot.png"
    try:
        records = {run: read_metrics(run) for run in arguments.runs}
    except ValueError as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 2
    names = [run.resolve().name for run in records]
    if len(set(names)) < len(names):
        names = [str(run) for run in records]
    named = dict(zip(names, records.values(), strict=True))
    shown = (_examples.read(run, name) for run, name in zip(records, names, strict=True))
    try:
        draw(named, next(filter(None, shown), None), out)
    except OSError as error:
        print(f"plot_run: {out}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
