"""What a recipe will need, said before anything is loaded: memory by part, disk, traffic, and what "auto" becomes.

    python -m es_lite.plan RECIPE [--set table.key=value ...]

prints the plan and an estimate of a step's seconds; exit code 2 where it does not fit. `es_lite.train` makes the same plan.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from es_lite import recipe as recipes
from es_lite import system
from es_lite.errors import UserError
from es_lite.recipe import Recipe
from es_lite.runs.origin import Origin
from es_lite.scoring.forward import VOCABULARY_BLOCK
from es_lite.weights.layout import Layout
from es_lite.weights.master import CHUNK
from es_lite.weights.working import size_bytes

GIB = 2**30

PROCESS_BYTES = 420 * 2**20
"""Private memory of a process that has loaded python, torch, transformers and numba, and run a model (measured)."""

HIDDEN_BYTES = 256 * 2**20
"""Hidden states that a worker holds at once where the choice is free: beyond this, passes only cost memory."""


@dataclass(frozen=True)
class Plan:
    workers: int
    threads: int
    compute: str
    """"bf16" or "fp32"."""
    pass_samples: int
    """Samples whose hidden states a worker holds at once, a multiple of fitness.micro_batch."""
    passes: int
    memory: dict[str, int]
    """Bytes by part, of the whole process group."""
    limit: system.MemoryLimit
    disk: dict[str, int]
    """Bytes by part, of the run directory at its fullest."""
    free_disk: int
    read_bytes: int
    """Read from the master by a step (from the disk, or from its cache where memory has room)."""
    written_bytes: int
    tokens: int
    """Scored by a step at most: N members, M samples of full length."""
    flops: float
    """Of the matrix products of a step's scoring, at most."""
    noise_elements: int
    """Drawn by a step, scoring and update."""

    def text(self) -> str:
        lines = [
            f"workers {self.workers}, {self.threads} thread{'s' * (self.threads > 1)} each, compute {self.compute}, "
            f"{self.passes} pass{'es' * (self.passes > 1)} of {self.pass_samples} samples",
            "",
            "memory, all processes      GiB",
            *(f"  {name:<24} {size / GIB:>6.2f}" for name, size in self.memory.items()),
            f"  {'total':<24} {sum(self.memory.values()) / GIB:>6.2f}   of {self.limit.bytes / GIB:.2f} ({self.limit.source})",
            "disk                       GiB",
            *(f"  {name:<24} {size / GIB:>6.2f}" for name, size in self.disk.items()),
            f"  {'total':<24} {sum(self.disk.values()) / GIB:>6.2f}   of {self.free_disk / GIB:.2f} free",
            f"a step reads {self.read_bytes / GIB:.2f} GiB and writes {self.written_bytes / GIB:.2f} GiB, "
            f"scores up to {self.tokens:,} tokens ({self.flops / 1e12:.1f} TFLOP), "
            f"draws {self.noise_elements / 1e9:.1f} G elements of noise",
        ]
        return "\n".join(lines)


def make(recipe: Recipe, config: PretrainedConfig, layout: Layout) -> Plan:
    """The plan of a recipe, whether it fits or not (`shortfall` tells).

    config is the model's. Workers on "auto": one a core, or as many as fit. Raises UserError where the model cannot take
    fitness.max_length tokens.
    """
    run_dir = Path(recipe.run.dir).expanduser()
    limit = system.memory_limit(recipes.parse_size(recipe.memory.limit))
    compute = system.compute_dtype(recipe.workers.compute)
    cores = system.cores()
    threads = 1 if recipe.workers.threads == "auto" else int(recipe.workers.threads)
    members = 2 if recipe.es.antithetic else 1
    tasks = recipe.es.population // members
    text = config.get_text_config()
    itemsize = 2 if compute == "bf16" else 4
    micro, length, width = recipe.fitness.micro_batch, recipe.fitness.max_length, text.hidden_size

    sample_bytes = 3 * members * length * width * itemsize  # a layer's input and output, and the head's choice of them
    samples = max(recipe.fitness.samples, recipe.eval.samples if recipe.eval.every else 0)
    longest = getattr(text, "max_position_embeddings", None) or length
    if length > longest:
        raise UserError(f"fitness.max_length = {length}: the model has max_position_embeddings = {longest}; take that or less")
    pass_samples = min(max(1, HIDDEN_BYTES // sample_bytes // micro), -(-samples // micro)) * micro
    vocabulary = text.vocab_size
    scratch = (
        members
        * itemsize
        * max(
            max(layer.size for layer in layout.layers[1:-1]),
            VOCABULARY_BLOCK * width,
            min(vocabulary, pass_samples * length) * width,
        )
    )
    intermediate = getattr(text, "intermediate_size", None) or 4 * width
    activations = micro * length * (3 * intermediate * itemsize + 8 * width * 4 + 2 * VOCABULARY_BLOCK * itemsize)
    worker = {
        "processes": PROCESS_BYTES,
        "perturbed layer": scratch,
        "hidden states": pass_samples * sample_bytes,
        "activations": activations,
        "update buffers": 4 * CHUNK * 4,
    }
    fixed = {"working copy": size_bytes(layout), "coordinator": PROCESS_BYTES}

    def total(workers: int) -> int:
        return sum(fixed.values()) + workers * sum(worker.values())

    if recipe.workers.count == "auto":
        wanted = max(1, min(cores // threads, tasks))
        workers = next((n for n in range(wanted, 0, -1) if total(n) <= limit.bytes), 1)
    else:
        workers = int(recipe.workers.count)
    export = layout.size * (2 if recipe.run.checkpoint_dtype == "bf16" else 4)
    disk = {"master": 4 * (layout.size + workers * max(layer.size for layer in layout.layers))}
    if recipe.run.checkpoint_every:
        disk["checkpoint"] = 2 * export
    if recipe.eval.every:
        disk["best"] = 2 * export
    used = system.folder_bytes(run_dir)
    tied = config.tie_word_embeddings
    multiplied = layout.size - (0 if tied else vocabulary * width)
    tokens = recipe.es.population * recipe.fitness.samples * (length - 1)
    passes = -(-recipe.fitness.samples // pass_samples)
    return Plan(
        workers=workers,
        threads=threads,
        compute=compute,
        pass_samples=pass_samples,
        passes=passes,
        memory=fixed | {f"{name} ({workers}x)": workers * size for name, size in worker.items()},
        limit=limit,
        disk=disk,
        free_disk=system.free_disk_bytes(run_dir) + used,
        read_bytes=4 * layout.size,
        written_bytes=4 * layout.size,
        tokens=tokens,
        flops=2.0 * multiplied * tokens,
        noise_elements=tasks * layout.size * (passes + 1),
    )


def shortfall(plan: Plan) -> str | None:
    """What is needed, what there is and what to change, where the plan does not fit."""
    need, have = sum(plan.memory.values()), plan.limit.bytes
    if need > have:
        return (
            f"does not fit: needs {need / GIB:.2f} GiB of memory, there are {have / GIB:.2f} ({plan.limit.source}). "
            "Set workers.count, fitness.micro_batch or fitness.max_length lower, or take a smaller model"
        )
    need, have = sum(plan.disk.values()), plan.free_disk
    if need > have:
        return (
            f"does not fit: needs {need / GIB:.2f} GiB of disk, there are {have / GIB:.2f} free. "
            "Set run.dir to a larger disk, or run.checkpoint_every and eval.every to 0, which keeps no exports"
        )
    return None


def estimate_seconds(plan: Plan) -> tuple[float, str]:
    """Seconds of a step, from this machine's rates measured here and now, with those rates in words."""
    gemm, noise = _gemm_rate(plan.threads, plan.compute), _noise_rate()
    lanes = plan.workers * plan.threads
    seconds = plan.flops / (0.5 * gemm * plan.workers) + plan.noise_elements / (noise * lanes)
    return seconds, f"{gemm / 1e9:.0f} GFLOP/s a worker, half of it reached; {noise / 1e6:.0f} M noise elements/s a thread"


def _gemm_rate(threads: int, compute: str) -> float:
    """FLOP/s of this process on 2048×1024×4096."""
    import torch

    torch.set_num_threads(threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[compute]
    a, b = torch.randn(2048, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
    return 2 * 2048 * 1024 * 4096 / _fastest(lambda: torch.nn.functional.linear(a, b))


def _noise_rate() -> float:
    """Elements a second of one thread, into bfloat16."""
    import numpy as np

    from es_lite.algorithm import kernels

    weights, out = np.zeros(2**22, np.uint16), np.empty(2**22, np.uint16)
    return out.size / _fastest(lambda: kernels.perturb(out, None, weights, seed=0, step=0, pair=0, tensor=0, sigma=1e-3))


def _fastest(work) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m es_lite.plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="overrides")
    arguments = parser.parse_args(argv)
    try:
        recipe = recipes.load(arguments.recipe, arguments.overrides)
        model, layout = Origin.of_recipe(recipe).skeleton()
        plan = make(recipe, model.config, layout)
        print(f"{layout.size:,} parameters in {len(layout.layers)} layers\n{plan.text()}")
        seconds, rates = estimate_seconds(plan)
        print(f"a step takes about {seconds:.0f} s ({rates})")
        if problem := shortfall(plan):
            raise UserError(f"{arguments.recipe}: {problem}")
    except UserError as error:
        print(f"es_lite: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
