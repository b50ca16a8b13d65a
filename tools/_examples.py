"""What a model wrote at the start, in the middle and at the end of a run: read from samples.jsonl, and drawn below a plot."""

import json
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import SubFigure

PROMPTS = 3
"""Prompts that are shown: the first ones of the evaluations."""

COLUMNS = 56
"""Characters of a line of a completion."""

LINES = 8
"""Lines of a completion; the rest is left out, which "…" says."""

PROMPT_CHARACTERS = 150
LINE_INCHES = 0.165
GREY = "#6b6b6b"


@dataclass(frozen=True)
class Example:
    """A prompt, and a heading with lines for each of the steps; no lines where there is no completion."""

    prompt: str
    completions: list[tuple[str, list[str]]]

    @property
    def lines(self) -> int:
        return 3 + max(len(lines) for _, lines in self.completions)


@dataclass(frozen=True)
class Examples:
    run: str
    """Its name."""
    examples: list[Example]

    @property
    def height(self) -> float:
        """In inches."""
        return LINE_INCHES * (4 + sum(example.lines for example in self.examples))

    def draw(self, figure: SubFigure) -> None:
        """Draws them with one column a step."""
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_title(f"What {self.run} wrote on held-out prompts, which are the same at each step")
        total = sum(example.lines for example in self.examples)
        style: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "parse_math": False}
        line = 0.4  # below the title
        for example in self.examples:
            axes.text(0, 1 - line / total, example.prompt, fontsize=9.5, fontweight="bold", **style)
            for column, (heading, lines) in enumerate(example.completions):
                x = column / len(example.completions)
                axes.text(x, 1 - (line + 1) / total, heading, fontsize=8.5, color=GREY, **style)
                text = "\n".join(lines)
                axes.text(x, 1 - (line + 2) / total, text, fontsize=8.5, family="monospace", linespacing=1.25, **style)
            line += example.lines
        # Of characters that the font does not have, it draws boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")


def read(run: Path, name: str) -> Examples | None:
    """The examples of RUN/samples.jsonl; None if there is none. Lines that are not complete are left out.

    name: of the run.
    """
    by_prompt: dict[str, dict[int, dict[str, Any]]] = {}
    try:
        lines = (run / "samples.jsonl").read_bytes().splitlines()
    except OSError:
        return None
    for line in lines:
        try:
            sample = json.loads(line)
            # A crash may have had a step evaluated twice, with the same completions.
            by_prompt.setdefault(_question(sample["prompt"]), {})[int(sample["step"])] = sample
        except (ValueError, TypeError, KeyError, IndexError):
            continue
    steps = sorted({step for samples in by_prompt.values() for step in samples})
    if not steps:
        return None
    shown = list(dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])))
    return Examples(name, [_example(prompt, samples, shown) for prompt, samples in list(by_prompt.items())[:PROMPTS]])


def _example(prompt: str, samples: dict[int, dict[str, Any]], steps: list[int]) -> Example:
    completions = []
    for step in steps:
        sample = samples.get(step, {})
        score = sample.get("score")
        heading = f"step {step}" + (f", reward {score:.4g}" if score is not None else "") + ", cut off" * bool(sample.get("cut"))
        completions.append((heading, _wrapped(sample.get("completion", ""))))
    return Example(textwrap.shorten(prompt, PROMPT_CHARACTERS, placeholder=" …"), completions)


def _question(prompt: str | list[dict[str, str]]) -> str:
    """The text of a prompt, or its last message of the user."""
    if isinstance(prompt, str):
        return prompt
    asked = [message["content"] for message in prompt if message["role"] == "user"]
    return (asked or [prompt[-1]["content"]])[-1]


def _wrapped(text: str) -> list[str]:
    """Lines of at most COLUMNS characters; what cannot be printed is escaped."""
    lines = []
    for line in text.splitlines():
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line.expandtabs(4))
        lines += textwrap.wrap(line, COLUMNS, drop_whitespace=False) or [""]
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], "…"]
