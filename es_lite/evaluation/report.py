"""The figures of an evaluation as a JSON object, and that object as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from es_lite.evaluation.figures import Figure
from es_lite.fitness.base import GradedCompletion

TITLES = {
    "reward": "reward",
    "accuracy": "right",
    "accuracy_strict": "right, strict match",
    "format": "right form",
    "length": "characters",
    "cut": "cut off",
}
SHARES = ("accuracy", "accuracy_strict", "format", "cut")
"""Shown as percentages."""


@dataclass(frozen=True)
class Side:
    """What one model wrote, in the order of the prompts."""

    name: str
    step: int | None
    """Of a run."""
    samples: Sequence[GradedCompletion]
    columns: dict[str, np.ndarray]
    """See `figures.columns`."""
    new_tokens: int
    seconds: float
    """Of generation."""
    graders_killed: int

    def figures(self) -> dict[str, Any]:
        found = {name: _figure(values) for name, values in self.columns.items()}
        return found | {
            "new_tokens": self.new_tokens,
            "tokens_per_second": self.new_tokens / self.seconds,
            "seconds": self.seconds,
            "graders_killed": self.graders_killed,
        }


@dataclass(frozen=True)
class Text:
    """The mean log-probability of a text's samples, float64 [samples], under both models."""

    path: str
    tokens: int
    own: np.ndarray
    base: np.ndarray


def document(side: Side, settings: dict[str, Any], base: Side | None, kl: np.ndarray, text: Text | None) -> dict[str, Any]:
    """The JSON object; `null` where there is no figure. kl: of each completion; only with a base."""
    found: dict[str, Any] = {
        "model": side.name,
        "step": side.step,
        **settings,
        "prompts": len(side.samples),
        "figures": side.figures(),
    }
    completions = [asdict(sample) for sample in side.samples]
    if base is not None and text is not None:
        found["against"] = {
            "model": base.name,
            "figures": base.figures(),
            "difference": {name: _figure(values - base.columns[name]) for name, values in side.columns.items()},
            "kl": _figure(kl),
            "text": {
                "path": text.path,
                "tokens": text.tokens,
                "log_probability": _figure(text.own),
                "base_log_probability": _figure(text.base),
                "difference": _figure(text.own - text.base),
            },
        }
        for completion, other, value in zip(completions, base.samples, kl, strict=True):
            completion |= {"base_completion": other.completion, "base_score": other.score, "kl": float(value)}
    return found | {"completions": completions}


def table(found: dict[str, Any]) -> str:
    """What people read of the object that `document` makes."""
    own, against = found["figures"], found.get("against")
    others = [against["figures"]] if against else []
    rows = [["", found["model"], *([against["model"], "difference"] if against else [])]]
    for name in (name for name, value in own.items() if isinstance(value, dict) or value is None):
        title = TITLES.get(name) or "  " + name.removeprefix("functions.").rpartition("/")[2]
        cells = [_cell(side[name], name) for side in (own, *others)]
        rows.append([title, *cells, *([_cell(against["difference"][name], name, sign="+")] if against else [])])
    if against:
        text = against["text"]
        kept = [text["log_probability"], text["base_log_probability"]]
        rows.append(["KL from the base, a token", _cell(against["kl"], "kl")])
        row = ["log-probability of the text", *(_cell(value, "text") for value in kept)]
        rows.append([*row, _cell(text["difference"], "text", sign="+")])
    rows.append(["prompts", f"{found['prompts']:,}"])
    for title, name in (("new tokens", "new_tokens"), ("new tokens a second", "tokens_per_second"), ("seconds", "seconds")):
        rows.append([title, *(f"{side[name]:,.{0 if side[name] >= 100 else 1}f}" for side in (own, *others))])
    if any(side["graders_killed"] for side in (own, *others)):
        rows.append(["graders killed", *(str(side["graders_killed"]) for side in (own, *others))])
    widths = [max(len(row[place]) for row in rows if place < len(row)) for place in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join([*lines, *_notes(found)])


def _notes(found: dict[str, Any]) -> list[str]:
    """What the figures mean, where their names do not say it."""
    notes = ["", f"{found['task']}, greedy; mean ± standard error over prompts"]
    if found.get("against"):
        text = found["against"]["text"]
        notes.append("difference: prompt by prompt; KL: nats, on the greedy completions of the first")
        notes.append(f"text: {text['path']}, {text['tokens']:,} tokens, nats a token")
    return notes


def _figure(values: np.ndarray) -> dict[str, float | None] | None:
    figure = Figure.of(values)
    return None if figure is None else asdict(figure)


def _cell(figure: dict[str, float | None] | None, name: str, sign: str = "") -> str:
    """The mean and its error, with as many digits as the error makes sense of."""
    if figure is None:
        return "-"
    mean, error = figure["mean"], figure["error"]
    assert mean is not None
    if name in SHARES:
        tail = "" if error is None else f" ± {100 * error:.1f}"
        return f"{100 * mean:{sign}.1f}{tail} %"
    size = max(abs(mean), error or 0.0)
    digits = 1 if size >= 100 else 2 if size >= 10 else 4
    tail = "" if error is None else f" ± {error:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{tail}"
