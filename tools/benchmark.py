"""The project's figures, each measured in one run of one program, as medians with their spread.

    python tools/benchmark.py noise                    elements a second a thread, fused with σ, add and rounding
    python tools/benchmark.py scoring                  FLOP/s of scoring, beside the GEMM rate of the same thread
    python tools/benchmark.py workers                  scoring on two workers, beside one
    python tools/benchmark.py step [--against COMMAND] a step of the real command and its peak PSS, beside another loop
    python tools/benchmark.py int8                     a step and its peak PSS from int8 weights, beside bf16
    python tools/benchmark.py streaming                a streamed step, beside a resident one and its disk transfers alone

COMMAND prints one JSON line with "step_seconds" last. Runs alternate, so that a machine that drifts drifts for both.
Prints Markdown for benchmarks/.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from es_lite import system
from es_lite.algorithm import kernels, update
from es_lite.data import Batch
from es_lite.rates import disk_rates
from es_lite.runs.origin import Origin
from es_lite.scoring.forward import PerturbedModel
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.perturb import UNPERTURBED, Perturbation
from es_lite.weights import working
from es_lite.weights.stored import Part, slices

REPEATS = 5


def seconds_of(work: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def row(name: str, values: Sequence[float], unit: str) -> str:
    return f"| {name} | {statistics.median(values):.3g} | {min(values):.3g}–{max(values):.3g} | {unit} |"


def header() -> str:
    box = ", ".join(f"{name} {value}" for name, value in system.box().items())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    command = f"`python tools/benchmark.py {shlex.join(sys.argv[1:])}`"
    return f"{command}, commit {commit}; {box}\n\n| what | median | spread | |\n|---|---|---|---|"


def noise(arguments: argparse.Namespace) -> None:
    """Elements a second of one thread into bf16; an antithetic pair's two perturbations count as two."""
    place = {"seed": 1, "step": 2, "pair": 3, "tensor": 4}
    size = 2**24
    weights = np.random.default_rng(0).integers(0x3C00, 0x3D00, size).astype(np.uint16)
    plus, minus, theta = np.empty_like(weights), np.empty_like(weights), np.zeros(size, np.float32)
    pairs = np.arange(4, dtype=np.uint32)
    coefficients = np.ones(4, np.float32)
    cases = {
        "one perturbation": (1, lambda: kernels.perturb(plus, None, weights, sigma=1e-3, **place)),
        "an antithetic pair": (2, lambda: kernels.perturb(plus, minus, weights, sigma=1e-3, **place)),
        "update, 4 pairs": (
            4,
            lambda: update.advance(theta, seed=1, step=2, tensor=4, pairs=pairs, coefficients=coefficients, decay=0.0),
        ),
    }
    for name, (count, work) in cases.items():
        print(row(name, [count * size / s / 1e6 for s in seconds_of(work)], "million elements/s/thread"))


def scoring(arguments: argparse.Namespace) -> None:
    """Matrix FLOP/s of scoring (2 a weight a token, attention left out) over the GEMM rate of 2048×1024×4096."""
    lanes = Lanes(1, arguments.threads)
    origin = Origin(path="", config=arguments.config, seed=0, groups=(), nes=False, shared_noise=False)
    model, layout = origin.skeleton()
    copy = working.WorkingCopy(layout, "bf16", working.allocate(layout, "bf16"))
    theta_0 = origin.source(model, layout, lanes.threads)
    for tensor in layout.tensors:
        for start, count in slices(tensor):
            copy.write(Part(tensor, start, theta_0.read(tensor, start, count)), lanes.threads)
    compute = {"bf16": torch.bfloat16, "fp32": torch.float32}[system.compute_dtype("auto")]
    scorer = PerturbedModel(model, layout, copy, compute, lanes, arguments.micro_batch)
    samples, length = arguments.tokens // 256, 256
    tokens = np.random.default_rng(0).integers(0, 8192, (samples, length)).astype(np.int32)
    batch = Batch(tokens, np.full(samples, length, np.int32))
    a, b = torch.randn(2048, 1024, dtype=compute), torch.randn(4096, 1024, dtype=compute)
    flops = 2 * layout.size * samples * (length - 1)
    cases = {
        "unperturbed": (1, UNPERTURBED),
        "one member": (1, Perturbation(1, 0, 0, 1e-3, (1,))),
        "an antithetic pair": (2, Perturbation(1, 0, 0, 1e-3, (1, -1))),
    }
    gemm_flops = 2 * 2048 * 1024 * 4096
    for name, (members, perturbation) in cases.items():
        rates, ratios = [], []
        for _ in range(arguments.repeats):
            gemm = gemm_flops / statistics.median(seconds_of(lambda: torch.nn.functional.linear(a, b), 20))
            start = time.perf_counter()
            scorer.score([perturbation], batch, samples)
            rates.append(members * flops / (time.perf_counter() - start) / 1e9)
            ratios.append(rates[-1] * 1e9 / gemm)
        print(row(f"{name}, {arguments.tokens} tokens a member", rates, "GFLOP/s"))
        print(row(f"{name}, of the GEMM rate ({gemm / 1e9:.0f} GFLOP/s)", ratios, ""))


RECIPE = """
[run]
dir = "{folder}/run"
iterations = {steps}
[model]
config = "{config}"
[data]
tokenizer = "bpe"
[fitness]
samples = {samples}
max_length = {length}
micro_batch = {micro_batch}
[es]
population = {population}
antithetic = true
[workers]
count = {workers}
threads = 1
[memory]
weights = "{weights}"
master = "{master}"
residency = "{residency}"
[log]
tensorboard = false
"""


def run_recipe(
    steps: int, workers: int, arguments: argparse.Namespace, weights: str = "bf16", residency: str = "resident"
) -> list[dict]:
    """Metrics of each step of a fresh run of the real command."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        path = Path(folder) / "recipe.toml"
        names = ("config", "samples", "length", "micro_batch", "population", "master")
        keys = {name: getattr(arguments, name) for name in names} | {"weights": weights, "residency": residency}
        path.write_text(RECIPE.format(folder=folder, steps=steps, workers=workers, **keys))
        command = [sys.executable, "-m", "es_lite.train", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def workers(arguments: argparse.Namespace) -> None:
    """Seconds of scoring on one and on two workers; each run's first step, which also warms up, is left out."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.repeats):
        for count in times:
            times[count] += [line["score_seconds"] for line in run_recipe(3, count, arguments)[1:]]
    for count, values in times.items():
        print(row(f"scores, {count} worker{'s' * (count > 1)}", values, "s"))
    ratios = [one / two for one, two in zip(times[1], times[2], strict=True)]
    print(row("two workers over one", ratios, "times"))


def step(arguments: argparse.Namespace) -> None:
    """A step on two workers, beside `--against` where given; the first step of a run is left out."""
    ours, theirs, peaks, updates = [], [], [], []
    for _ in range(arguments.repeats):
        lines = run_recipe(3, 2, arguments)
        ours.append(statistics.median(line["step_seconds"] for line in lines[1:]))
        updates.append(statistics.median(line["update_seconds"] for line in lines[1:]))
        peaks.append(lines[-1]["peak_pss_gib"])
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
    """A step from int8 weights beside one from bf16, on two workers; the first step of a run is left out."""
    seconds: dict[str, list[float]] = {"bf16": [], "int8": []}
    peaks: dict[str, list[float]] = {"bf16": [], "int8": []}
    for _ in range(arguments.repeats):
        for weights in seconds:
            lines = run_recipe(4, 2, arguments, weights)
            seconds[weights].append(statistics.median(line["step_seconds"] for line in lines[1:]))
            peaks[weights].append(lines[-1]["peak_pss_gib"])
    for weights in seconds:
        print(row(f"{weights}, a step", seconds[weights], "s"))
        print(row(f"{weights}, peak PSS of all processes", peaks[weights], "GiB"))
    print(row("int8 over bf16", [b / a for a, b in zip(*seconds.values(), strict=True)], "times as long"))


def streaming(arguments: argparse.Namespace) -> None:
    """A streamed step (from the second on, which also writes) beside a resident one and beside its transfers alone."""
    streamed, resident, disk, ratios, read, written = [], [], [], [], [], []
    for _ in range(arguments.repeats):
        lines = run_recipe(4, 2, arguments, arguments.weights, "streamed")[1:]
        streamed.append(statistics.median(line["step_seconds"] for line in lines))
        read.append(statistics.median(line["read_gib"] for line in lines))
        written.append(statistics.median(line["written_gib"] for line in lines))
        read_rate, write_rate = disk_rates(Path(arguments.directory or tempfile.gettempdir()))
        disk.append(2**30 * (read[-1] / read_rate + written[-1] / write_rate))
        lines = run_recipe(4, 2, arguments, arguments.weights)[1:]
        resident.append(statistics.median(line["step_seconds"] for line in lines))
        ratios.append(streamed[-1] / max(disk[-1], resident[-1]))
    print(row("streamed, a step", streamed, "s"))
    print(row("streamed, read", read, "GiB"))
    print(row("streamed, written", written, "GiB"))
    print(row("its transfers alone, at plain direct rates", disk, "s"))
    print(row("resident, a step", resident, "s"))
    print(row("streamed over the longer of the two", ratios, "times"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(COMMANDS))
    parser.add_argument("--config", default="qwen3-0.5b", help="a size of the paper")
    parser.add_argument("--tokens", type=int, default=4096, help="scoring: tokens a member, in samples of 256")
    parser.add_argument("--threads", type=int, default=1, help="scoring: threads")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--weights", default="bf16", choices=("bf16", "int8"), help="streaming: what is scored from")
    parser.add_argument("--master", default="fp32", choices=("fp32", "none"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", help="where runs are kept while they are measured; default: the temporary folder")
    parser.add_argument("--against", help="step: the command of another loop")
    arguments = parser.parse_args(argv)
    print(header(), flush=True)
    COMMANDS[arguments.what](arguments)
    return 0


COMMANDS = {"noise": noise, "scoring": scoring, "workers": workers, "step": step, "int8": int8, "streaming": streaming}


if __name__ == "__main__":
    sys.exit(main())
