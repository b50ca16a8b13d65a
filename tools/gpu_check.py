"""Checks es_lite on a GPU, and measures it there: one command, which writes benchmarks/gpu.md.

    python tools/gpu_check.py [--config qwen3-0.5b] [--repeats 2]

First the tests that use a GPU. Then the real command with workers.device = "cuda" and with "cpu", the weights resident and
streamed, in bf16 and int8: seconds of a step (the first step of a run is left out; runs alternate) and peak memory. Last, the
scores of the first step on both devices: they may differ by TOLERANCE, because the order of a matrix product's sums is the
library's.

Exit code 2 without a GPU; 1 if a test fails, a run fails, or scores differ by more; the page is written if all runs succeed.
`--device torch` runs the GPU's code on the CPU, to check this program on a machine without a GPU.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _measuring import Finished, StepLoad, add_load, provenance, run, spread, table

from es_lite import system

ROOT = Path(__file__).resolve().parents[1]

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-3}
"""The greatest relative difference of a score, by the less exact of the two compute types."""

RESIDENCIES = ("resident", "streamed")
WEIGHTS = ("bf16", "int8")
STEPS = 3


@dataclass(frozen=True)
class Case:
    residency: str
    weights: str
    compute: str
    """workers.compute."""
    steps: int

    @property
    def name(self) -> str:
        return f"{self.weights}, {self.residency}"


@dataclass(frozen=True)
class Comparison:
    """A case on the CPU and on the device, the same number of runs of each."""

    case: Case
    cpu: list[Finished]
    device: list[Finished]

    @property
    def compute(self) -> str:
        """The type that each computed in."""
        return " and ".join(dict.fromkeys([self.cpu[0].compute, self.device[0].compute]))

    @property
    def difference(self) -> float:
        """The greatest relative difference of a score of the first step; infinite if a score is not finite."""
        pairs = [
            scores
            for cpu, device in zip(self.cpu, self.device, strict=True)
            for scores in zip(cpu.scores[0], device.scores[0], strict=True)
        ]
        missing = float("inf")
        return max(missing if cpu is None or device is None else abs(cpu - device) / abs(cpu) for cpu, device in pairs)

    @property
    def tolerance(self) -> float:
        return max(TOLERANCE[finished.compute] for finished in (self.cpu[0], self.device[0]))

    @property
    def agree(self) -> bool:
        return self.difference <= self.tolerance


def tests_that_use_a_gpu() -> list[Path]:
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if 'torch.device("cuda")' in path.read_text()]


def run_tests(paths: Sequence[Path]) -> tuple[bool, str]:
    """Whether all tests of the files pass, and pytest's last line. Their output is shown."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return done.returncode == 0, (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")


def compare(case: Case, device: str, load: StepLoad, repeats: int, directory: str | None) -> Comparison:
    """Raises subprocess.CalledProcessError if a run fails."""
    runs: dict[str, list[Finished]] = {"cpu": [], device: []}
    for _ in range(repeats):
        for name, finished in runs.items():
            print(f"{case.name}, compute {case.compute}, on {name}", flush=True)
            workers = {"device": name, "compute": case.compute}
            memory = {"weights": case.weights, "residency": case.residency}
            finished.append(run(load, case.steps, directory, workers=workers, memory=memory))
    return Comparison(case, runs["cpu"], runs[device])


def page(where: str, device: str, tests: str, timed: Sequence[Comparison], checked: Sequence[Comparison]) -> str:
    """Markdown. where: command, commit, box and GPU."""
    head = ["weights", "compute", "a step on the CPU, s", f"on {device}, s", "times as fast", "scoring on the CPU, s"]
    speed = [[*head, f"on {device}, s", "peak PSS on the CPU, GiB", f"with {device}, GiB"]]
    for found in timed:
        sides = (found.cpu, found.device)
        steps, scoring = ([[f.median(name) for f in side] for side in sides] for name in ("step_seconds", "score_seconds"))
        memory = [[f.peak_gib for f in side] for side in sides]
        ratios = [cpu / other for cpu, other in zip(*steps, strict=True)]
        speed.append([found.case.name, found.compute, *map(cell, [*steps, ratios, *scoring, *memory])])
    scores = [["weights", "compute", "greatest relative difference", "tolerance", ""]]
    for found in (*timed, *checked):
        values = f"{found.difference:.1e}", f"{found.tolerance:.0e}"
        scores.append([found.case.name, found.compute, *values, "agree" if found.agree else "**differ**"])
    return f"""# Scoring on a GPU

{where}

Tests that use a GPU: {tests}.

## A step

Medians with least and greatest; a step's update is on the CPU. PSS is host memory of all processes, without the GPU's.

{table(speed)}

## Scores of the first step, on the device and on the CPU

{table(scores)}
"""


def cell(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({spread(values)})"


def problem_of(arguments: argparse.Namespace) -> str:
    """Why nothing can be checked here, in one sentence; "" if it can."""
    if arguments.device == "cuda" and not system.gpu_memory():
        return "torch finds no GPU here: run this on a machine with one, with torch installed for it"
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed: pip install 'es_lite[dev]'"
    if not arguments.out.parent.is_dir():
        return f"--out {arguments.out}: {arguments.out.parent} is not a folder"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_load(parser)
    parser.add_argument("--device", choices=("cuda", "torch"), default="cuda", help="what is compared with the CPU")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    parser.add_argument("--residency", nargs="+", choices=RESIDENCIES, default=RESIDENCIES)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind")
    parser.add_argument("--tests", nargs="+", type=Path, help="files of tests to run; default: those that use a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/gpu.md")
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    if problem := problem_of(arguments):
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 2

    passed, tests = run_tests(arguments.tests or tests_that_use_a_gpu())
    load, device = StepLoad.of(arguments), arguments.device
    cases = [Case(residency, weights, "auto", STEPS) for residency in arguments.residency for weights in arguments.weights]
    exact = [Case("resident", weights, "fp32", 1) for weights in arguments.weights]
    try:
        timed = [compare(case, device, load, arguments.repeats, arguments.directory) for case in cases]
        checked = [compare(case, device, load, 1, arguments.directory) for case in exact]
    except subprocess.CalledProcessError as error:
        print(f"gpu_check: the command failed with exit code {error.returncode}; its message is above", file=sys.stderr)
        return 1
    gpu = system.gpu_memory()
    name = f"{gpu.source}, CUDA {torch.version.cuda}" if gpu and device == "cuda" else "none, the GPU's code ran on the CPU"
    text = page(f"{provenance('gpu_check.py', words)}; GPU: {name}", device, tests, timed, checked)
    arguments.out.write_text(text)
    print(f"{text}\n{arguments.out}")
    differ = [f"{c.case.name}, {c.compute}" for c in (*timed, *checked) if not c.agree]
    if differ:
        print(f"gpu_check: scores differ by more than the tolerance: {'; '.join(differ)}", file=sys.stderr)
    if not passed:
        print(f"gpu_check: tests failed: {tests}", file=sys.stderr)
    return 0 if passed and not differ else 1


if __name__ == "__main__":
    sys.exit(main())
