"""What plot_run draws in each of its panels: one run's metrics over the steps, in the run's colour."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes

GREY = "#6b6b6b"

Record = dict[str, float | None]


def columns(records: list[Record], *keys: str) -> list[np.ndarray]:
    """The steps and the values of `keys`, from the lines that have them all."""
    rows = [[record.get(key) for key in ("step", *keys)] for record in records]
    complete = [row for row in rows if None not in row]
    return list(np.array(complete, dtype=float).reshape(-1, 1 + len(keys)).T)


def draw_score(axes: Axes, records: list[Record], colour: str) -> None:
    steps, mean, std = columns(records, "score_mean", "score_std")
    axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.16, linewidth=0)
    line(axes, columns(records, "score_mean"), colour)
    line(axes, columns(records, "score_best"), colour, linestyle=":", linewidth=1.3)


def draw_evaluation(axes: Axes, records: list[Record], colour: str) -> None:
    steps, scores = columns(records, "eval_score")
    axes.plot(steps, scores, color=colour, marker="o", markersize=4.5)
    if len(steps):
        axes.annotate(
            f"{scores[-1]:#.4g}", (steps[-1], scores[-1]), (0, 7), textcoords="offset points",
            color=colour, ha="center", fontsize=9.5, fontweight="bold",
        )  # fmt: skip


def draw_shares(axes: Axes, records: list[Record], colour: str) -> None:
    for key, style in zip(SHARES, ("-", "--", ":"), strict=True):
        steps, shares = columns(records, f"eval_{key}")
        axes.plot(steps, 100 * shares, color=colour, linestyle=style, marker="o", markersize=3.5, linewidth=1.5)


def draw_length(axes: Axes, records: list[Record], colour: str) -> None:
    steps, lengths = columns(records, "eval_length")
    axes.plot(steps, lengths, color=colour, marker="o", markersize=3.5)
    line(axes, columns(records, "length"), colour, linewidth=0.9, alpha=0.5)


def draw_references(axes: Axes, runs: list[list[Record]]) -> None:
    """The scores of two models that know little: only the tokens' frequencies, or nothing."""
    records = [record for run in runs for record in run]
    _, scores = columns(records, "eval_score")
    # Far from a model's scores, they would flatten its own line: then they are only named.
    near = max(0.5, max(scores) - min(scores)) if len(scores) else math.inf
    lowest, highest = min(scores, default=0) - near, max(scores, default=0) + near
    lines = [(score, "unigram model of the training text", "--") for score in set(columns(records, "unigram_score")[1])]
    lines += [(-math.log(size), f"uniform over {size:,.0f} tokens", ":") for size in set(columns(records, "vocab_size")[1])]
    for score, what, style in sorted(lines, reverse=True):
        if lowest <= score <= highest:
            axes.axhline(score, color=GREY, linestyle=style, linewidth=1.3, label=f"{what}: {score:.3f}")
        else:
            where = "above" if score > highest else "below"
            axes.plot([], [], color=GREY, linestyle=style, label=f"{what}: {score:.3f}, far {where}")


def draw_tokens(axes: Axes, records: list[Record], colour: str) -> None:
    line(axes, columns(records, "tokens_per_second"), colour)


def draw_seconds(axes: Axes, records: list[Record], colour: str) -> None:
    steps, score, update = columns(records, "score_seconds", "update_seconds")
    axes.fill_between(steps, 0, score, color=colour, alpha=0.12, linewidth=0)
    axes.fill_between(steps, score, score + update, color=colour, alpha=0.5, linewidth=0)
    line(axes, [steps, score + update], colour, linewidth=1)


def draw_memory(axes: Axes, records: list[Record], colour: str) -> None:
    line(axes, columns(records, "pss_gib"), colour)
    line(axes, columns(records, "peak_pss_gib"), colour, linestyle="--", linewidth=1.3)


def draw_signal(axes: Axes, records: list[Record], colour: str) -> None:
    for key, style in (("signal", "-"), ("tied", ":")):
        steps, shares = columns(records, key)
        line(axes, [steps, 100 * shares], colour, linestyle=style)


def draw_gain(axes: Axes, records: list[Record], colour: str) -> None:
    """What all steps were expected to gain together, and what the held-out score gained."""
    steps, gains = columns(records, "gain_expected")
    line(axes, [steps, np.cumsum(gains)], colour, linestyle="--", linewidth=1.3)
    steps, scores = columns(records, "eval_score")
    if len(scores):
        axes.plot(steps, scores - scores[0], color=colour, marker="o", markersize=3.5)


def draw_sizes(axes: Axes, records: list[Record], colour: str) -> None:
    for key, style in (("alpha", "-"), ("sigma", "--"), ("drift_rms", ":")):
        steps, sizes = columns(records, key)
        line(axes, [steps[sizes > 0], sizes[sizes > 0]], colour, linestyle=style)


def line(axes: Axes, points: list[np.ndarray], colour: str, **style: Any) -> None:
    steps, values = points
    axes.plot(steps, values, color=colour, marker="o" if len(steps) == 1 else "", markersize=4, **style)


SHARES = {"accuracy": "right", "format": "in the right form", "cut": "cut off"}
"""Shares of the completions of an evaluation, in words."""
