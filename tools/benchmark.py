"""The project's figures, each measured in one run of one program: medians with their spread.

    python tools/benchmark.py noise                    elements a second and thread, fused with σ, addition and rounding, by kind
    python tools/benchmark.py scoring                  FLOP/s of scoring, compared with the GEMM rate of the same thread
    python tools/benchmark.py plain                    scoring compared with plain inference, with low-rank and gaussian noise
    python tools/benchmark.py generation               generation compared with the plain loop; `generation --help` says what else
    python tools/benchmark.py tiles                    FLOP/s of a linear map by the rows that are multiplied together
    python tools/benchmark.py kinds                    a step, its scoring and its update by kind of noise, and the peak PSS
    python tools/benchmark.py workers                  scoring on one worker and on two
    python tools/benchmark.py update                   the update on one worker and on two, and on paper on 8 and on 64
    python tools/benchmark.py step [--against COMMAND] a step of the real command and its peak PSS, compared with another loop
    python tools/benchmark.py int8                     a step and its peak PSS from int8 weights, compared with bf16
    python tools/benchmark.py engines                  a step on a cluster of this machine alone, compared with one without Ray
    python tools/benchmark.py streaming                a streamed step, compared with a resident one and with its transfers alone

COMMAND prints one JSON line with "step_seconds" last. Runs alternate, so that a machine that drifts drifts for both sides.
Prints Markdown for benchmarks/.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _generation
import _scoring
import _update
import numpy as np
from _measuring import HEADER, Finished, StepLoad, add_load, provenance, row, run, seconds_of, spread, table

from es_lite.algorithm import update as update_kernels
from es_lite.algorithm.noise.kinds import NoiseKind, kind_of
from es_lite.algorithm.noise.place import Place
from es_lite.planning.rates import disk_rates

KINDS = {"gaussian": ("gaussian", 0), "rademacher": ("rademacher", 0), "lowrank": ("lowrank", 1)}
"""Kinds of noise that are measured, with their ranks."""

ON_PAPER = (1, 2, 8, 64)
"""Workers that the update is computed for."""


def noise(arguments: argparse.Namespace) -> None:
    """Elements a second of one thread into bf16, by kind; an antithetic pair's two perturbations count as two."""
    print(HEADER)
    place = Place(seed=1, step=2, pair=3, tensor=4)
    shape = (2**12, 2**12)
    size = math.prod(shape)
    weights = np.random.default_rng(0).integers(0x3C00, 0x3D00, size).astype(np.uint16)
    plus, minus, theta = np.empty_like(weights), np.empty_like(weights), np.zeros(size, np.float32)
    pairs = np.arange(4, dtype=np.uint32)
    coefficients = np.ones(4, np.float32)

    def cases(kind: NoiseKind) -> dict[str, tuple[int, Callable[[], None]]]:
        return {
            "one perturbation": (1, lambda: kind.perturb(plus, None, weights, place, 1e-3, shape)),
            "an antithetic pair": (2, lambda: kind.perturb(plus, minus, weights, place, 1e-3, shape)),
            "update, 4 pairs": (4, lambda: update_kernels.advance(theta, kind, place, pairs, coefficients, 0.0, shape)),
        }

    by_kind = {name: cases(kind_of(*kind)) for name, kind in KINDS.items()}
    rates: dict[tuple[str, str], list[float]] = {(name, case): [] for name in by_kind for case in by_kind[name]}
    for _ in range(arguments.repeats):
        for name, case in rates:
            count, work = by_kind[name][case]
            rates[name, case] += [count * size / seconds / 1e6 for seconds in seconds_of(work)]
    for (name, case), values in rates.items():
        print(row(f"{name}, {case}", values, "million elements/s/thread"))


def run_on(
    workers: int,
    steps: int,
    arguments: argparse.Namespace,
    weights: str = "bf16",
    residency: str = "resident",
    noise: str = "gaussian",
    engine: str = "local",
) -> Finished:
    """A fresh run of the real command on that many workers of one thread; noise: of KINDS."""
    kind, rank = KINDS[noise]
    tables: dict[str, dict[str, Any]] = {
        "memory": {"weights": weights, "master": arguments.master, "residency": residency},
        "noise": {"kind": kind} | ({"rank": rank} if rank else {}),
        "workers": {"count": workers, "threads": 1, "engine": engine},
    }
    return run(StepLoad.of(arguments), steps, arguments.directory, **tables)


def workers(arguments: argparse.Namespace) -> None:
    """Seconds of scoring on one and on two workers; each run's first step, which also warms up, is left out."""
    print(HEADER)
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.repeats):
        for count in times:
            times[count] += [step["score_seconds"] for step in run_on(count, 3, arguments).steps[1:]]
    for count, values in times.items():
        print(row(f"scores, {count} worker{'s' * (count > 1)}", values, "s"))
    ratios = [one / two for one, two in zip(times[1], times[2], strict=True)]
    print(row("two workers over one", ratios, "times"))


def update(arguments: argparse.Namespace) -> None:
    """Seconds of the update: measured on one and on two workers, and on paper on as many as ON_PAPER says.

    "Shared" is how the engine divides an update: layers that would keep one worker busy for longest are shared by all.
    """
    measured: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.repeats):
        for count in measured:
            measured[count] += [step["update_seconds"] for step in run_on(count, 3, arguments).steps[1:]]
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        layout, files, rates = _update.measure(StepLoad.of(arguments), Path(folder), arguments.repeats)
    rows = [["workers", "measured, s", "spread", "on paper, large layers shared, s", "on paper, one task a layer, s", "tasks"]]
    for count in ON_PAPER:
        values = measured.get(count, [])
        found = [f"{statistics.median(values):.3g}", spread(values)] if values else ["", ""]
        rounds, whole = _update.divided(files, count), _update.undivided(layout)
        seconds = [_update.seconds_on_paper(tasks, files, count, rates) for tasks in (rounds, whole)]
        rows.append([str(count), *found, *(f"{value:.3g}" for value in seconds), str(sum(map(len, rounds)))])
    print(table(rows))
    print(
        f"\nOn paper: {rates.advance * 1e9:.2f} s a billion elements for a layer that is advanced whole, "
        f"{rates.advance_sections * 1e9:.2f} for sections of a layer, {rates.finish * 1e9:.2f} for completing its file."
    )


def step(arguments: argparse.Namespace) -> None:
    """A step on two workers, compared with `--against` if that is given; the first step of a run is left out."""
    print(HEADER)
    ours, theirs, peaks, updates = [], [], [], []
    for _ in range(arguments.repeats):
        finished = run_on(2, 3, arguments)
        ours.append(finished.median("step_seconds"))
        updates.append(finished.median("update_seconds"))
        peaks.append(finished.peak_gib)
        if arguments.against:
            output = subprocess.run(shlex.split(arguments.against), check=True, capture_output=True, text=True).stdout
            theirs.append(json.loads(output.splitlines()[-1])["step_seconds"])
    print(row("es_lite, a step", ours, "s"))
    print(row("es_lite, its update", updates, "s"))
    print(row("es_lite, peak PSS of all processes", peaks, "GiB"))
    if theirs:
        print(row("the other loop, a step", theirs, "s"))
        print(row("times as fast", [b / a for a, b in zip(ours, theirs, strict=True)], ""))


def int8(arguments: argparse.Namespace) -> None:
    """A step from int8 weights and one from bf16, on two workers; the first step of a run is left out."""
    print(HEADER)
    seconds: dict[str, list[float]] = {"bf16": [], "int8": []}
    peaks: dict[str, list[float]] = {"bf16": [], "int8": []}
    for _ in range(arguments.repeats):
        for weights in seconds:
            finished = run_on(2, 4, arguments, weights)
            seconds[weights].append(finished.median("step_seconds"))
            peaks[weights].append(finished.peak_gib)
    for weights in seconds:
        print(row(f"{weights}, a step", seconds[weights], "s"))
        print(row(f"{weights}, peak PSS of all processes", peaks[weights], "GiB"))
    print(row("int8 over bf16", [b / a for a, b in zip(*seconds.values(), strict=True)], "times as long"))


def kinds(arguments: argparse.Namespace) -> None:
    """A step on two workers, its scoring and its update, and its peak PSS, by kind; the first step of a run is left out."""
    print(HEADER)
    metrics = {"score_seconds": "scoring", "update_seconds": "update", "step_seconds": "step"}
    found: dict[str, list[Finished]] = {name: [] for name in KINDS}
    for _ in range(arguments.repeats):
        for name, runs in found.items():
            runs.append(run_on(2, 3, arguments, arguments.weights, noise=name))
    for name, runs in found.items():
        for metric, words in metrics.items():
            print(row(f"{name}, {words}", [finished.median(metric) for finished in runs], "s"))
        print(row(f"{name}, peak PSS of all processes", [finished.peak_gib for finished in runs], "GiB"))
    for name, runs in list(found.items())[1:]:
        for metric, words in metrics.items():
            ratios = [own.median(metric) / first.median(metric) for own, first in zip(runs, found["gaussian"], strict=True)]
            print(row(f"{name} over gaussian, {words}", ratios, "times as long"))


def streaming(arguments: argparse.Namespace) -> None:
    """A streamed step (from the second on, which also writes), compared with a resident one and with its transfers alone."""
    print(HEADER)
    streamed, resident, disk, ratios, read, written = [], [], [], [], [], []
    for _ in range(arguments.repeats):
        finished = run_on(2, 4, arguments, arguments.weights, "streamed")
        streamed.append(finished.median("step_seconds"))
        read.append(finished.median("read_gib"))
        written.append(finished.median("written_gib"))
        read_rate, write_rate = disk_rates(Path(arguments.directory or tempfile.gettempdir()))
        disk.append(2**30 * (read[-1] / read_rate + written[-1] / write_rate))
        resident.append(run_on(2, 4, arguments, arguments.weights).median("step_seconds"))
        ratios.append(streamed[-1] / max(disk[-1], resident[-1]))
    print(row("streamed, a step", streamed, "s"))
    print(row("streamed, read", read, "GiB"))
    print(row("streamed, written", written, "GiB"))
    print(row("its transfers alone, at plain direct rates", disk, "s"))
    print(row("resident, a step", resident, "s"))
    print(row("streamed over the longer of the two", ratios, "times"))


def engines(arguments: argparse.Namespace) -> None:
    """A step with and without Ray, on two workers; the first step of a run, which also warms up, is left out."""
    print(HEADER)
    found: dict[str, list[Finished]] = {"local": [], "ray": []}
    for _ in range(arguments.repeats):
        for engine, runs in found.items():
            runs.append(run_on(2, 5, arguments, engine=engine))
    seconds = {engine: [finished.median("step_seconds") for finished in runs] for engine, runs in found.items()}
    for engine, runs in found.items():
        print(row(f"{engine}, a step", seconds[engine], "s"))
        print(row(f"{engine}, its update", [finished.median("update_seconds") for finished in runs], "s"))
        print(row(f"{engine}, peak PSS of all processes", [finished.peak_gib for finished in runs], "GiB"))
    print(row("ray over local", [b / a for a, b in zip(*seconds.values(), strict=True)], "times as long"))
    print(row("ray less local", [1000 * (b - a) for a, b in zip(*seconds.values(), strict=True)], "ms"))
    print(row("ray, over the network", [finished.median("network_kib") for finished in found["ray"]], "KiB a host and step"))


COMMANDS = {
    "noise": noise,
    "scoring": _scoring.scoring,
    "plain": _scoring.plain,
    "tiles": _scoring.tiles,
    "kinds": kinds,
    "workers": workers,
    "update": update,
    "step": step,
    "int8": int8,
    "engines": engines,
    "streaming": streaming,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*COMMANDS, "generation"))
    add_load(parser)
    parser.add_argument("--tokens", type=int, default=4096, help="scoring: tokens a member, in samples of 256")
    parser.add_argument("--threads", type=int, default=1, help="scoring, plain, tiles: threads")
    parser.add_argument("--weights", default="bf16", choices=("bf16", "int8"), help="kinds, streaming: what is scored from")
    parser.add_argument("--master", default="fp32", choices=("fp32", "none"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", help="step: the command of another loop")
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["generation"]:  # which has options of its own
        _generation.generation(words[1:])
        return 0
    arguments = parser.parse_args(words)
    print(f"{provenance('benchmark.py', words)}\n", flush=True)
    COMMANDS[arguments.what](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
