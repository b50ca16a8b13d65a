"""The project's figures, each measured in one run of one program: medians with their spread.

    python tools/benchmark.py noise                    elements a second and thread, fused with σ, addition and rounding
    python tools/benchmark.py scoring                  FLOP/s of scoring, compared with the GEMM rate of the same thread
    python tools/benchmark.py workers                  scoring on one worker and on two
    python tools/benchmark.py update                   the update on one worker and on two, and on paper on 8 and on 64
    python tools/benchmark.py step [--against COMMAND] a step of the real command and its peak PSS, compared with another loop
    python tools/benchmark.py int8                     a step and its peak PSS from int8 weights, compared with bf16
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
import time
from collections.abc import Sequence
from pathlib import Path

import _update
import numpy as np
import torch
from _measuring import Finished, StepLoad, add_load, provenance, row, run, seconds_of, spread, table

from es_lite import system
from es_lite.algorithm import update as update_kernels
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.kinds import kind_of
from es_lite.algorithm.noise.place import Place
from es_lite.data.batch import Batch
from es_lite.model.origin import Origin
from es_lite.planning.rates import disk_rates
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation
from es_lite.weights import working_copy
from es_lite.weights.parts import Part, slices

HEADER = "| what | median | spread | |\n|---|---|---|---|"

ON_PAPER = (1, 2, 8, 64)
"""Workers that the update is computed for."""


def noise(arguments: argparse.Namespace) -> None:
    """Elements a second of one thread into bf16; an antithetic pair's two perturbations count as two."""
    print(HEADER)
    place = Place(seed=1, step=2, pair=3, tensor=4)
    shape = (2**12, 2**12)
    size = math.prod(shape)
    weights = np.random.default_rng(0).integers(0x3C00, 0x3D00, size).astype(np.uint16)
    plus, minus, theta = np.empty_like(weights), np.empty_like(weights), np.zeros(size, np.float32)
    pairs = np.arange(4, dtype=np.uint32)
    coefficients = np.ones(4, np.float32)
    kind = kind_of(gaussian.NAME)
    cases = {
        "one perturbation": (1, lambda: gaussian.perturb(plus, None, weights, place, 1e-3, shape)),
        "an antithetic pair": (2, lambda: gaussian.perturb(plus, minus, weights, place, 1e-3, shape)),
        "update, 4 pairs": (4, lambda: update_kernels.advance(theta, kind, place, pairs, coefficients, 0.0, shape)),
    }
    for name, (count, work) in cases.items():
        print(row(name, [count * size / s / 1e6 for s in seconds_of(work)], "million elements/s/thread"))


def scoring(arguments: argparse.Namespace) -> None:
    """Matrix FLOP/s of scoring (2 a weight and token, without attention), and its share of the GEMM rate of 2048×1024×4096."""
    print(HEADER)
    lanes = Lanes(1, arguments.threads)
    origin = Origin(path="", config=arguments.config, seed=0, groups=(), nes=False, shared_noise=False)
    model, layout = origin.skeleton()
    copy = working_copy.WorkingCopy(layout, "bf16", working_copy.allocate(layout, "bf16"))
    theta_0 = origin.source(model, layout, lanes.threads)
    for tensor in layout.tensors:
        for start, count in slices(tensor):
            copy.write(Part(tensor, start, theta_0.read(tensor, start, count)), lanes.threads)
    compute = {"bf16": torch.bfloat16, "fp32": torch.float32}[system.compute_dtype("auto")]
    scorer = PerturbedModel(model, layout, copy, compute, lanes, arguments.micro_batch)
    samples, length = arguments.tokens // 256, 256
    vocabulary = min(8192, model.config.get_text_config().vocab_size)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (samples, length)).astype(np.int32)
    batch = Batch(tokens, np.full(samples, length, np.int32))
    a, b = torch.randn(2048, 1024, dtype=compute), torch.randn(4096, 1024, dtype=compute)
    flops = 2 * layout.size * samples * (length - 1)
    cases = {
        "unperturbed": UNPERTURBED,
        "one member": Perturbation(1, 0, 0, 1e-3, (1,)),
        "an antithetic pair": Perturbation(1, 0, 0, 1e-3, (1, -1)),
    }
    gemm_flops = 2 * 2048 * 1024 * 4096
    for name, perturbation in cases.items():
        rates, ratios = [], []
        for _ in range(arguments.repeats):
            gemm = gemm_flops / statistics.median(seconds_of(lambda: torch.nn.functional.linear(a, b), 20))
            start = time.perf_counter()
            scorer.log_probabilities([perturbation], batch, samples)
            rates.append(perturbation.members * flops / (time.perf_counter() - start) / 1e9)
            ratios.append(rates[-1] * 1e9 / gemm)
        print(row(f"{name}, {arguments.tokens} tokens a member", rates, "GFLOP/s"))
        print(row(f"{name}, share of the GEMM rate ({gemm / 1e9:.0f} GFLOP/s)", ratios, ""))


def run_on(
    workers: int, steps: int, arguments: argparse.Namespace, weights: str = "bf16", residency: str = "resident"
) -> Finished:
    """A fresh run of the real command on that many workers of one thread."""
    memory = {"weights": weights, "master": arguments.master, "residency": residency}
    return run(StepLoad.of(arguments), steps, arguments.directory, workers={"count": workers, "threads": 1}, memory=memory)


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


COMMANDS = {
    "noise": noise,
    "scoring": scoring,
    "workers": workers,
    "update": update,
    "step": step,
    "int8": int8,
    "streaming": streaming,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(COMMANDS))
    add_load(parser)
    parser.add_argument("--tokens", type=int, default=4096, help="scoring: tokens a member, in samples of 256")
    parser.add_argument("--threads", type=int, default=1, help="scoring: threads")
    parser.add_argument("--weights", default="bf16", choices=("bf16", "int8"), help="streaming: what is scored from")
    parser.add_argument("--master", default="fp32", choices=("fp32", "none"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", help="step: the command of another loop")
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    print(f"{provenance('benchmark.py', words)}\n", flush=True)
    COMMANDS[arguments.what](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
