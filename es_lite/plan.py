"""What a recipe will need, said before anything is loaded: memory by part, disk, traffic, and what "auto" becomes.

    python -m es_lite.plan RECIPE [--set table.key=value ...]

prints the plan and an estimate of a step's seconds; exit code 2 where it does not fit. `es_lite.train` makes the same plan.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from es_lite import recipe as recipes
from es_lite import system
from es_lite.errors import UserError
from es_lite.needs import Needs
from es_lite.rates import estimate_seconds
from es_lite.recipe import Recipe
from es_lite.runs.origin import Origin
from es_lite.weights.layout import Layout

GIB = 2**30


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
    folded: bool
    """One worker scores all members in one pass: streamed, or on a GPU."""
    direct: bool
    """Streamed past the page cache, which has no room for the layers."""
    gpu: dict[str, int]
    """Bytes by part on the GPU; empty where there is none to be used."""
    gpu_limit: system.MemoryLimit
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
        return 1 if self.folded else self.workers

    @property
    def lanes(self) -> int:
        """Of each process."""
        return self.workers if self.folded else 1

    def text(self) -> str:
        place = f"streamed{' past the page cache' * self.direct}" if self.streamed else "resident"
        place += ", lanes" if self.folded else ", workers"
        lines = [
            f"{place} {self.workers}, {self.threads} thread{'s' * (self.threads > 1)} each, compute {self.compute}, "
            f"{self.passes} pass{'es' * (self.passes > 1)} of {self.pass_samples} samples",
            "",
            "memory, all processes      GiB",
            *(f"  {name:<24} {size / GIB:>6.2f}" for name, size in self.memory.items()),
            f"  {'total':<24} {sum(self.memory.values()) / GIB:>6.2f}   of {self.limit.bytes / GIB:.2f} ({self.limit.source})",
            *self._gpu_lines(),
            "disk                       GiB",
            *(f"  {name:<24} {size / GIB:>6.2f}" for name, size in self.disk.items()),
            f"  {'total':<24} {sum(self.disk.values()) / GIB:>6.2f}   of {self.free_disk / GIB:.2f} free",
            f"a step reads {self.read_bytes / GIB:.2f} GiB and writes {self.written_bytes / GIB:.2f} GiB, "
            f"scores up to {self.tokens:,} tokens ({self.flops / 1e12:.1f} TFLOP), "
            f"draws {self.noise_elements / 1e9:.1f} G elements of noise",
        ]
        return "\n".join(lines)

    def _gpu_lines(self) -> list[str]:
        if not self.gpu:
            return []
        total = f"{sum(self.gpu.values()) / GIB:>6.2f}   of {self.gpu_limit.bytes / GIB:.2f} ({self.gpu_limit.source})"
        parts = [f"  {name:<24} {size / GIB:>6.2f}" for name, size in self.gpu.items()]
        return ["GPU                        GiB", *parts, f"  {'total':<24} {total}"]


def make(recipe: Recipe, config: PretrainedConfig, layout: Layout) -> Plan:
    """The plan of a recipe, whether it fits or not (`shortfall` tells).

    config is the model's. "auto": as many workers as there are cores, or as fit; resident where that fits, else streamed.
    Raises UserError where the model cannot take fitness.max_length tokens, or there is no GPU that is asked for.
    """
    length = recipe.fitness.max_length
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or length
    if length > longest:
        raise UserError(f"fitness.max_length = {length}: the model has max_position_embeddings = {longest}; take that or less")
    gpu = system.gpu_memory() if recipe.workers.device == "cuda" else None
    if recipe.workers.device == "cuda" and not gpu:
        raise UserError('workers.device = "cuda": torch finds no GPU here; set it to "cpu", or install torch for your GPU')
    needs = Needs(recipe, config.get_text_config(), layout)
    held = system.pss_bytes([os.getpid()])
    limit = system.memory_limit(recipes.parse_size(recipe.memory.limit), held=held)
    streamed = recipe.memory.residency == "streamed"
    parts = needs.streamed(limit.bytes) if streamed else needs.resident(limit.bytes)
    if recipe.memory.residency == "auto" and sum(parts.memory.values()) > limit.bytes:
        streamed, parts = True, needs.streamed(limit.bytes)

    run_dir = Path(recipe.run.dir).expanduser()
    files = needs.files
    stored, largest = sum(file.size for file in files), max(file.size for file in files)
    export = layout.size * (2 if recipe.run.checkpoint_dtype == "bf16" else 4)
    disk = {recipe.memory.folder: stored + (1 if streamed else parts.workers) * largest}
    if recipe.run.checkpoint_every:
        disk["checkpoint"] = 2 * export
    if recipe.eval.every and recipe.eval.best:
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
        folded=streamed or gpu is not None,
        gpu=parts.gpu,
        gpu_limit=gpu or system.MemoryLimit(0, ""),
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


def shortfall(plan: Plan) -> str | None:
    """What is needed, what there is and what to change, where the plan does not fit."""
    need, have = sum(plan.gpu.values()), plan.gpu_limit.bytes
    if need > have:
        return (
            f"does not fit: needs {need / GIB:.2f} GiB of GPU memory, there are {have / GIB:.2f} ({plan.gpu_limit.source}). "
            "Set fitness.micro_batch or fitness.max_length lower, or take a smaller model"
        )
    need, have = sum(plan.memory.values()), plan.limit.bytes
    if need > have:
        return (
            f"does not fit: needs {need / GIB:.2f} GiB of memory, there are {have / GIB:.2f} ({plan.limit.source}). "
            + (
                "Set es.antithetic to false (half of the perturbed layer), "
                if plan.streamed
                else 'Set memory.residency = "streamed" or memory.weights = "int8", '
            )
            + "workers.count, fitness.micro_batch or fitness.max_length lower, or take a smaller model"
        )
    need, have = sum(plan.disk.values()), plan.free_disk
    if need > have:
        return (
            f"does not fit: needs {need / GIB:.2f} GiB of disk, there are {have / GIB:.2f} free. "
            "Set run.dir to a larger disk, run.checkpoint_every to 0 and eval.best to false, which keeps no exports, or "
            'memory.master = "none", with memory.weights = "int8" for the least'
        )
    return None


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
        seconds, rates = estimate_seconds(plan, Path(recipe.run.dir).expanduser())
        print(f"a step takes about {seconds:.0f} s ({rates})")
        if problem := shortfall(plan):
            raise UserError(f"{arguments.recipe}: {problem}")
    except UserError as error:
        print(f"es_lite: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
