"""Runs of the real command that are measured, and Markdown of what was found: shared by the tools that measure or compare."""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from es_lite import system
from es_lite.model.configuration import configuration
from es_lite.runs.journal import Journal

REPEATS = 5

HEADER = "| what | median | spread | |\n|---|---|---|---|"
"""Of a table of rows."""


@dataclass(frozen=True)
class StepLoad:
    """What a step of a measured run does."""

    config: str
    """model.config of the recipe."""
    population: int
    samples: int
    length: int
    """Tokens of a sample."""
    micro_batch: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "StepLoad":
        return cls(**{name: getattr(arguments, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Finished:
    """A run of the real command that has ended."""

    steps: list[dict[str, Any]]
    """The metrics of each step."""
    scores: list[list[float | None]]
    """Of each step's members."""
    compute: str

    def median(self, metric: str) -> float:
        """Over all steps but the first, which also warms up."""
        return statistics.median(step[metric] for step in self.steps[1:])

    @property
    def peak_gib(self) -> float:
        """Peak PSS of all processes."""
        return self.steps[-1]["peak_pss_gib"]


def add_load(parser: argparse.ArgumentParser) -> None:
    """The options that a `StepLoad` and the runs are made from."""
    parser.add_argument("--config", default="qwen3-0.5b", help="a size of the paper, or a config.json")
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--directory", help="where runs are kept while they are measured; default: the temporary folder")


def run(load: StepLoad, steps: int, directory: str | None, **tables: dict[str, Any]) -> Finished:
    """A fresh run of `python -m es_lite.train`; the keys of `tables` are added to the recipe's.

    Raises subprocess.CalledProcessError, after the command's own message, if it fails.
    """
    vocab_size = configuration("", load.config).get_text_config().vocab_size
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        document: dict[str, dict[str, Any]] = {
            "run": {"dir": f"{folder}/run", "iterations": steps},
            "model": {"config": load.config},
            "data": {"tokenizer": "bpe", "vocab_size": min(8192, vocab_size)},
            "fitness": {"samples": load.samples, "max_length": load.length, "micro_batch": load.micro_batch},
            "es": {"population": load.population, "antithetic": True},
            "log": {"tensorboard": False},
        }
        for name, table in tables.items():
            document.setdefault(name, {}).update(table)
        path = Path(folder) / "recipe.toml"
        path.write_text(tomli_w.dumps(document))
        subprocess.run([sys.executable, "-m", "es_lite.train", str(path)], check=True, stdout=subprocess.DEVNULL)
        journal = Journal.open(Path(folder) / "run" / "journal.jsonl")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return Finished([json.loads(line) for line in lines], journal.scores, journal.header["compute"])


def seconds_of(work: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Seconds of each call of `work`, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> str:
    """Least and greatest."""
    return f"{min(values):.3g}–{max(values):.3g}"


def row(name: str, values: Sequence[float], unit: str) -> str:
    """A line of a table: median, spread, unit."""
    return f"| {name} | {statistics.median(values):.3g} | {spread(values)} | {unit} |"


def table(rows: Sequence[Sequence[object]]) -> str:
    """Markdown; the first row is the header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def provenance(tool: str, words: Sequence[str]) -> str:
    """The command, the commit and the box, for people who want to measure it again."""
    box = ", ".join(f"{name} {value}" for name, value in system.box().items())
    return f"`{shlex.join(['python', f'tools/{tool}', *words])}`, commit {commit()}; {box}"


def commit() -> str:
    """The commit that is checked out; "unknown" without git."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
