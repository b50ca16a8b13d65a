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
from es_lite.scoring.doors import VOCABULARY_BLOCK
from es_lite.weights import working
from es_lite.weights.layerfile import LayerFile
from es_lite.weights.layout import Layout
from es_lite.weights.stored import SLICE, Storage, dtype_of
from es_lite.weights.stream import BUFFERS, buffer_bytes, cut

GIB = 2**30

PROCESS_BYTES = 420 * 2**20
"""Private memory of a process that has loaded python, torch, transformers and numba, and run a model (measured)."""

HIDDEN_BYTES = 256 * 2**20
"""Hidden states that a resident worker holds at once where the choice is free: beyond this, passes only cost memory."""


@dataclass(frozen=True)
class Plan:
    streamed: bool
    workers: int
    """Members are scored in so many places at once: processes over a resident copy, lanes of one process in a stream."""
    threads: int
    """Of each."""
    compute: str
    """"bf16" or "fp32"."""
    members: int
    """Whose hidden states are in memory together."""
    pass_samples: int
    """Samples whose hidden states are held at once, a multiple of fitness.micro_batch."""
    passes: int
    """How often a step goes through the layers."""
    direct: bool
    """Streamed past the page cache, which has no room for the layers."""
    memory: dict[str, int]
    """Bytes by part, of the whole process group."""
    limit: system.MemoryLimit
    disk: dict[str, int]
    """Bytes by part, of the run directory at its fullest."""
    free_disk: int
    read_bytes: int
    """Read from the layers' files by a step (from the disk, or from its cache where memory has room)."""
    written_bytes: int
    tokens: int
    """Scored by a step at most: N members, M samples of full length."""
    flops: float
    """Of the matrix products of a step's scoring, at most."""
    noise_elements: int
    """Drawn by a step, scoring and update."""

    @property
    def processes(self) -> int:
        return 1 if self.streamed else self.workers

    @property
    def lanes(self) -> int:
        """Of each process."""
        return self.workers if self.streamed else 1

    def text(self) -> str:
        place = f"streamed{' past the page cache' * self.direct}, lanes" if self.streamed else "resident, workers"
        lines = [
            f"{place} {self.workers}, {self.threads} thread{'s' * (self.threads > 1)} each, compute {self.compute}, "
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

    config is the model's. "auto": as many workers as there are cores, or as fit; resident where that fits, else streamed.
    Raises UserError where the model cannot take fitness.max_length tokens.
    """
    length = recipe.fitness.max_length
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or length
    if length > longest:
        raise UserError(f"fitness.max_length = {length}: the model has max_position_embeddings = {longest}; take that or less")
    needs = _Needs(recipe, config.get_text_config(), layout)
    limit = system.memory_limit(recipes.parse_size(recipe.memory.limit))
    streamed = recipe.memory.residency == "streamed"
    parts = needs.streamed(limit.bytes) if streamed else needs.resident(limit.bytes)
    if recipe.memory.residency == "auto" and sum(parts.memory.values()) > limit.bytes:
        streamed, parts = True, needs.streamed(limit.bytes)

    run_dir = Path(recipe.run.dir).expanduser()
    files = needs.files
    stored, largest = sum(file.size for file in files), max(file.size for file in files)
    export = layout.size * (2 if recipe.run.checkpoint_dtype == "bf16" else 4)
    disk = {files[0].path.parent.name: stored + (1 if streamed else parts.workers) * largest}
    if recipe.run.checkpoint_every:
        disk["checkpoint"] = 2 * export
    if recipe.eval.every:
        disk["best"] = 2 * export
    used = system.folder_bytes(run_dir)
    passes = -(-recipe.fitness.samples // parts.pass_samples)
    tokens = recipe.es.population * recipe.fitness.samples * (length - 1)
    multiplied = layout.size - sum(t.size for t in layout.layers[0].tensors if t.vocabulary and not layout.tied)
    draws = needs.tasks + needs.tasks + (recipe.memory.master == "none")
    return Plan(
        streamed=streamed,
        workers=parts.workers,
        threads=needs.threads,
        compute=needs.compute,
        members=parts.members,
        pass_samples=parts.pass_samples,
        passes=passes,
        direct=streamed and stored > limit.bytes - sum(parts.memory.values()),
        memory=parts.memory,
        limit=limit,
        disk=disk,
        free_disk=system.free_disk_bytes(run_dir) + used,
        read_bytes=stored * (passes if streamed else 1),
        written_bytes=stored,
        tokens=tokens,
        flops=2.0 * multiplied * tokens,
        noise_elements=layout.size * (draws + needs.tasks * (passes - 1)),
    )


@dataclass(frozen=True)
class _Parts:
    """What a residency takes: memory by part, and how much is scored at once."""

    memory: dict[str, int]
    workers: int
    members: int
    pass_samples: int


class _Needs:
    """Sizes that both residencies are made of."""

    def __init__(self, recipe: Recipe, text: PretrainedConfig, layout: Layout) -> None:
        self.recipe = recipe
        self.layout = layout
        self.storage: Storage = "fp32" if recipe.memory.master == "fp32" else recipe.memory.weights
        directory = Path(recipe.run.dir).expanduser() / ("master" if self.storage == "fp32" else "weights")
        self.files = [LayerFile(directory, layer, self.storage) for layer in layout.layers]
        self.compute = system.compute_dtype(recipe.workers.compute)
        self.threads = 1 if recipe.workers.threads == "auto" else int(recipe.workers.threads)
        self.pair = 2 if recipe.es.antithetic else 1
        self.tasks = recipe.es.population // self.pair
        self.itemsize = 2 if self.compute == "bf16" else 4
        self.width, self.vocabulary = text.hidden_size, text.vocab_size
        self.intermediate = getattr(text, "intermediate_size", None) or 4 * self.width
        self.samples = max(recipe.fitness.samples, recipe.eval.samples if recipe.eval.every else 0)
        micro, length = recipe.fitness.micro_batch, recipe.fitness.max_length
        self.activations = micro * length * (3 * self.intermediate * self.itemsize + 8 * self.width * 4)
        self.activations += micro * length * 2 * VOCABULARY_BLOCK * self.itemsize

    def hidden(self, members: int) -> int:
        """Bytes of a sample's hidden states: a layer's input and output, and the head's choice of them."""
        return 3 * members * self.recipe.fitness.max_length * self.width * self.itemsize

    def perturbed(self, pass_samples: int) -> int:
        """Bytes of scratch for what is perturbed at a time: a block, a part of the head, rows of the embedding."""
        rows = min(self.vocabulary, pass_samples * self.recipe.fitness.max_length)
        largest = max(block.size for block in self.layout.blocks)
        return self.pair * self.itemsize * max(largest, VOCABULARY_BLOCK * self.width, rows * self.width)

    def resident(self, limit: int) -> _Parts:
        """A copy of the weights for all, and for each worker what it scores with."""
        micro = self.recipe.fitness.micro_batch
        hidden = self.hidden(self.pair)
        pass_samples = min(max(1, HIDDEN_BYTES // hidden // micro), -(-self.samples // micro)) * micro
        worker = {
            "processes": PROCESS_BYTES,
            "perturbed layer": self.perturbed(pass_samples),
            "hidden states": pass_samples * hidden,
            "activations": self.activations,
            "update buffers": 4 * SLICE * 4,
        }
        fixed = {"working copy": working.size_bytes(self.layout, self.recipe.memory.weights), "coordinator": PROCESS_BYTES}

        def total(workers: int) -> int:
            return sum(fixed.values()) + workers * sum(worker.values())

        workers = self._places(self.tasks)
        if self.recipe.workers.count == "auto":
            workers = next((n for n in range(workers, 0, -1) if total(n) <= limit), 1)
        memory = fixed | {f"{name} ({workers}x)": workers * size for name, size in worker.items()}
        return _Parts(memory, workers, self.pair, pass_samples)

    def streamed(self, limit: int) -> _Parts:
        """Buffers that layers pass through, and one process that scores all members; as few passes as fit."""
        micro = self.recipe.fitness.micro_batch
        members = self.recipe.es.population + 1  # and θ itself, where σ is new
        lanes = self._places(self.pair * -(-self.recipe.fitness.samples // micro))
        weights: Storage = self.recipe.memory.weights
        passing = {"window": BUFFERS * buffer_bytes(self.files, self.layout)}
        if weights != self.storage:
            parts = [section.parts for file in self.files for section in cut(file, self.layout)]
            sizes = [sum(dtype_of(t, weights).itemsize * count for t, _, count in part) for part in parts]
            passing["converted layer"] = max(sizes)

        def memory(pass_samples: int) -> dict[str, int]:
            return {
                "coordinator": PROCESS_BYTES,
                "process": PROCESS_BYTES,
                **passing,
                "perturbed layer": self.perturbed(pass_samples),
                "hidden states": pass_samples * self.hidden(members),
                f"activations ({lanes}x)": lanes * self.activations,
                "update buffers": 4 * SLICE * 4,
            }

        micro_batches = -(-self.samples // micro)
        for passes in range(1, micro_batches + 1):
            pass_samples = -(-micro_batches // passes) * micro
            if sum(memory(pass_samples).values()) <= limit:
                break
        return _Parts(memory(pass_samples), lanes, members, pass_samples)

    def _places(self, useful: int) -> int:
        """Workers or lanes: as the recipe says, or as many as there are cores for and work is."""
        if self.recipe.workers.count != "auto":
            return int(self.recipe.workers.count)
        return max(1, min(system.cores() // self.threads, useful))


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
