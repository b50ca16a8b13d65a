"""The plan of a recipe: does it fit, how is the machine used, what does a step cost; what "auto" becomes."""

import os
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from es_lite import system
from es_lite.algorithm.noise.kinds import NoiseKind, kind_of
from es_lite.engine.base import Execution
from es_lite.errors import UserError
from es_lite.files import expanded
from es_lite.fitness.base import Fitness
from es_lite.model.configuration import intermediate_size
from es_lite.model.layout import Layout
from es_lite.planning.largest import largest_new_tokens
from es_lite.planning.needs import Needs
from es_lite.planning.rates import StepTime, Work
from es_lite.quantities import GIB, count, duration
from es_lite.recipe import Recipe
from es_lite.scoring.lengths import longest_unchanged
from es_lite.scoring.rehearsal import rehearse
from es_lite.tables import NoiseTable


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    layout: Layout
    execution: Execution
    memory: dict[str, int]
    """Bytes by part, of all processes."""
    limit: system.MemoryLimit
    gpu: dict[str, int]
    """Bytes by part on the GPU; empty if none is used."""
    gpu_limit: system.MemoryLimit
    disk: dict[str, int]
    """Bytes by part, of the run directory at its fullest."""
    free_disk: int
    export_bytes: int
    """Size of checkpoint/, and of best/."""
    passes: int
    """How often a step goes through the layers."""
    tokens: int
    """The most that a step scores: N members, M samples of full length."""
    noise: NoiseKind
    work: Work
    fitting_new_tokens: int = 0
    """If it does not fit: the greatest generation.max_new_tokens with which it would; 0 if none, or no text is generated."""

    @classmethod
    def of(cls, recipe: Recipe, fitness: Fitness, config: PretrainedConfig, layout: Layout) -> "Plan":
        """The plan, whether it fits or not (see `shortfall`).

        config: the model's. "auto": one worker per core, fewer if memory is short; resident if that fits, else streamed.
        Raises UserError if items are too long for the model, or if the recipe needs a GPU and there is none.
        """
        text = config.get_text_config()
        if recipe.workers.device == "cuda" and not system.gpu_memory():
            raise UserError('workers.device = "cuda": torch finds no GPU here; set it to "cpu", or install torch for your GPU')
        _check_rank(recipe.noise, layout)
        noise = kind_of(recipe.noise.kind, recipe.noise.rank_number)
        needs = Needs(recipe, fitness, config, layout)
        length = needs.item.tokens
        longest = getattr(text, "max_position_embeddings", None) or length
        new = needs.item.new_tokens
        if length + new > longest:
            most = f"the model's max_position_embeddings is {longest}"
            if new:
                raise UserError(f"fitness.max_length = {length} and generation.max_new_tokens = {new}: {most}; lower one of them")
            raise UserError(f"fitness.max_length = {length}: {most}; set at most that")
        if new and 0 < (unchanged := longest_unchanged(config)) < length + new:
            raise UserError(
                f"fitness.max_length = {length} and generation.max_new_tokens = {new}: beyond {unchanged} tokens, this model "
                "reads what it has read already in another way; lower one of them"
            )
        held = system.pss_bytes([os.getpid()])
        limit = system.memory_limit(recipe.memory.limit_bytes, held=held)
        streamed = recipe.memory.residency == "streamed"
        if streamed and layout.blocks_share:
            raise UserError(
                'memory.residency = "streamed": the blocks of this model share weights, so they cannot pass through memory one '
                'after the other; set it to "resident"'
            )
        parts = needs.streamed(limit.bytes) if streamed else needs.resident(limit.bytes)
        if recipe.memory.residency == "auto" and not layout.blocks_share and sum(parts.memory.values()) > limit.bytes:
            streamed, parts = True, needs.streamed(limit.bytes)

        fitting = 0
        if needs.generates and sum(parts.memory.values()) > limit.bytes:
            fitting = largest_new_tokens(recipe, fitness, config, layout, limit.bytes)

        run_dir = expanded(recipe.run.dir)
        sizes = [file.format.size for file in needs.files]
        stored, largest = sum(sizes), max(sizes)
        export = layout.size * (2 if recipe.run.checkpoint_dtype == "bf16" else 4)
        disk = {recipe.memory.folder: stored + (1 if streamed else parts.workers) * largest}
        if recipe.run.checkpoint_every:
            disk["checkpoint"] = 2 * export
        if recipe.eval.every and recipe.eval.best:
            disk["best"] = 2 * export
        passes = -(-recipe.fitness.samples // parts.pass_samples)
        scored = length + needs.item.new_tokens if needs.generates else length - 1
        tokens = recipe.es.population * recipe.fitness.samples * scored
        multiplied = layout.size - sum(t.size for t in layout.layers[0].tensors if t.vocabulary and not layout.tied)
        together = streamed or needs.device  # all members are scored in one task
        conversions = 1 if together else -(-needs.pairs // needs.group)
        if not needs.factored or recipe.memory.weights == needs.compute:
            conversions = 0
        # What is kept is made once a pass; low-rank factors always are.
        forwards = 1 if parts.kept else needs.forwards
        drawn = sum(noise.drawn(t.shape) for t in layout.tensors) * needs.pairs * passes
        anchored = layout.size if recipe.es.anchor else 0
        redrawn, theta_0 = (0, 2 * anchored) if recipe.model.path else (anchored, 0)
        rows = needs.tile_members * min(recipe.fitness.micro_batch, recipe.fitness.samples)
        return cls(
            recipe=recipe,
            layout=layout,
            execution=Execution(
                streamed=streamed,
                direct=streamed and stored > limit.bytes - sum(parts.memory.values()),
                device=recipe.workers.device,
                compute=needs.compute,
                workers=parts.workers,
                threads=needs.threads,
                members=parts.members,
                pass_samples=parts.pass_samples,
                micro_batch=recipe.fitness.micro_batch,
                tile_members=needs.tile_members,
                group=needs.group,
                prompt_members=needs.prompt_members,
                kept=parts.kept,
            ),
            memory=parts.memory,
            limit=limit,
            gpu=parts.gpu,
            gpu_limit=system.gpu_memory() or system.MemoryLimit(0, "no GPU") if parts.gpu else system.MemoryLimit(0, "not used"),
            disk=disk,
            free_disk=system.free_disk_bytes(run_dir) + system.folder_bytes(run_dir),
            export_bytes=export,
            passes=passes * needs.forwards,
            tokens=tokens,
            noise=noise,
            work=Work(
                flops=2.0 * multiplied * tokens,
                scoring_noise=drawn * (1 if needs.factored else forwards),
                converted=layout.size * passes * conversions * forwards,
                size=layout.size,
                pairs=needs.pairs,
                update_noise=sum(noise.drawn(t.shape, update=True) for t in layout.tensors) * needs.pairs,
                rounded=layout.size if recipe.memory.master == "none" else 0,
                redrawn=redrawn,
                read_bytes=stored * (passes * needs.forwards if streamed else 1) + theta_0,
                written_bytes=stored,
                hidden=text.hidden_size,
                intermediate=intermediate_size(config),
                rows=rows * (1 if needs.generates else length),
            ),
            fitting_new_tokens=fitting,
        )

    def rehearse(self, model: PreTrainedModel, fitness: Fitness) -> None:
        """Raises UserError if es_lite would not compute with `model`, a `layout.skeleton`, what transformers does."""
        longest = self.recipe.fitness.max_length + (self.recipe.generation.max_new_tokens if fitness.generates else 0)
        rehearse(model, self.layout, self.noise, fitness.generates, self.execution.compute == "bf16", longest)

    def shortfall(self) -> str | None:
        """What is needed, what there is and what to change, if the plan does not fit."""
        need, have = sum(self.gpu.values()), self.gpu_limit.bytes
        if need > have:
            return (
                f"does not fit: needs {need / GIB:.2f} GiB of GPU memory, {have / GIB:.2f} are available "
                f"({self.gpu_limit.source}). Lower fitness.micro_batch or fitness.max_length, or use a smaller model"
            )
        need, have = sum(self.memory.values()), self.limit.bytes
        if need > have:
            if not self.execution.streamed:
                changes = [] if self.layout.blocks_share else ['memory.residency = "streamed"']
                changes += ['memory.weights = "int8"'] if self.recipe.memory.weights != "int8" else []
            elif "perturbed layer" in self.memory:
                changes = ['noise.kind = "lowrank" (no perturbed layer)']
                changes += ["es.antithetic to false (half of it)"] if self.recipe.es.antithetic else []
            else:
                changes = []
            remedy = f"Set {' or '.join(changes)}, lower" if changes else "Lower"
            return (
                f"does not fit: needs {need / GIB:.2f} GiB of memory, {have / GIB:.2f} are available ({self.limit.source}). "
                f"{remedy} workers.count, fitness.micro_batch or fitness.max_length, or use a smaller model{self._or_shorter()}"
            )
        need, have = sum(self.disk.values()), self.free_disk
        if need > have:
            return (
                f"does not fit: needs {need / GIB:.2f} GiB of disk, {have / GIB:.2f} are free. "
                "Set run.dir to a larger disk, run.checkpoint_every to 0 and eval.best to false, which keeps no exports, or "
                'memory.master = "none", with memory.weights = "int8" for the least'
            )
        return None

    def _or_shorter(self) -> str:
        if self.recipe.fitness.kind != "reward":
            return ""
        if not self.fitting_new_tokens:
            return "; no generation.max_new_tokens fits with the rest as it is"
        return f"; with the rest as it is, generation.max_new_tokens = {self.fitting_new_tokens} is the most that fits"

    def summary(self, expected: StepTime, remaining: int) -> str:
        """Does it fit, how long does it take, what is there at the end? remaining: steps."""
        memory = f"{sum(self.memory.values()) / GIB:.2f} of {self.limit.bytes / GIB:.2f} GiB of memory"
        gpu = f", {sum(self.gpu.values()) / GIB:.2f} of {self.gpu_limit.bytes / GIB:.2f} GiB of GPU memory" if self.gpu else ""
        disk = f"{sum(self.disk.values()) / GIB:.2f} of {self.free_disk / GIB:.2f} GiB of disk"
        verdict = "does not fit" if self.shortfall() else "fits"
        budget = f" (run.minutes ends it after {self.recipe.run.minutes:g} min)" if self.recipe.run.minutes else ""
        return "\n".join(
            [
                f"{self.layout.size:,} parameters in {len(self.layout.layers)} layers",
                f"{verdict}: needs {memory}{gpu} and {disk}",
                f"a step takes about {duration(expected.step_seconds)} on this machine, {count(remaining, 'step')} about "
                f"{duration(remaining * expected.step_seconds)}{budget}",
                *self._outcome(),
            ]
        )

    def details(self, expected: StepTime) -> str:
        """How the machine is used, memory and disk by part, what a step does and at which rates."""
        work = self.work
        return "\n".join(
            [
                self.parts(),
                f"a step reads {work.read_bytes / GIB:.2f} GiB and writes {work.written_bytes / GIB:.2f} GiB, "
                f"{self._tokens()} ({work.flops / 1e12:.1f} TFLOP), "
                f"draws {(work.scoring_noise + work.update_noise + work.rounded + work.redrawn) / 1e9:.1f} G elements of noise",
                f"estimated from {expected.rates}",
            ]
        )

    def _tokens(self) -> str:
        written = self.recipe.es.population * self.recipe.fitness.samples * self.recipe.generation.max_new_tokens
        if self.recipe.fitness.kind != "reward":
            return f"scores up to {self.tokens:,} tokens"
        rows = self.work.rows
        return f"reads up to {self.tokens - written:,} tokens and writes up to {written:,}, {count(rows, 'sequence')} at a time"

    def parts(self) -> str:
        """How the machine is used; memory and disk by part."""
        execution = self.execution
        place = f"streamed{' past the page cache' * execution.direct}" if execution.streamed else "resident"
        if execution.device != "cpu":
            place += f", on {execution.device}"
        who = count(execution.workers, "lane" if execution.folded else "worker")
        items = "prompt" if self.recipe.fitness.kind == "reward" else "sample"
        return "\n".join(
            [
                f"{place}, {who} with {count(execution.threads, 'thread')} each, compute {execution.compute}, "
                f"{count(self.passes, 'pass')} of {count(execution.pass_samples, items)}",
                *_table("memory, all processes", self.memory, f"of {self.limit.bytes / GIB:.2f} ({self.limit.source})"),
                *(_table("GPU", self.gpu, f"of {self.gpu_limit.bytes / GIB:.2f} ({self.gpu_limit.source})") if self.gpu else []),
                *_table("disk", self.disk, f"of {self.free_disk / GIB:.2f} free"),
            ]
        )

    def _outcome(self) -> list[str]:
        run, size = self.recipe.run, f"{self.export_bytes / GIB:.2f} GiB in {self.recipe.run.checkpoint_dtype}"
        found = []
        if run.checkpoint_every:
            found.append(f"  {run.dir}/checkpoint: the model after the last step, a Hugging Face folder, {size}")
        if self.recipe.eval.every and self.recipe.eval.best:
            what = "prompts" if self.recipe.fitness.kind == "reward" else "text"
            found.append(f"  {run.dir}/best: the model that scored best on held-out {what}, if one beats the start, likewise")
        if not found:
            found = [f"  {run.dir}/journal.jsonl: from it, `es-lite replay {run.dir} --out DIR` makes the model ({size})"]
        return ["at the end:", *found]


def _check_rank(noise: NoiseTable, layout: Layout) -> None:
    """Raises UserError if a matrix is too small for the rank, or no matrix is perturbed."""
    if noise.kind != "lowrank":
        return
    matrices = [t for t in layout.tensors if len(t.shape) == 2 and t.sigma_factor]
    if not matrices:
        raise UserError(
            'noise.kind = "lowrank": the model has no matrix that is perturbed (es.groups may freeze them all); '
            'set noise.kind = "gaussian"'
        )
    smallest = min(matrices, key=lambda tensor: min(tensor.shape))
    most = min(smallest.shape)
    if noise.rank_number > most:
        height, width = smallest.shape
        raise UserError(
            f"noise.rank = {noise.rank}: {smallest.name} is {height} x {width}, so its noise has a rank of at most {most}; "
            "lower noise.rank, or freeze this tensor with es.groups"
        )


def _table(name: str, parts: dict[str, int], of: str) -> list[str]:
    rows = [f"  {part:<24} {size / GIB:>6.2f}" for part, size in parts.items()]
    return [f"{name}, GiB", *rows, f"  {'total':<24} {sum(parts.values()) / GIB:>6.2f}   {of}"]
