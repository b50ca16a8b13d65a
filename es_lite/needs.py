"""The memory that a recipe takes, by part: resident, streamed, and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PretrainedConfig

from es_lite import system
from es_lite.recipe import Recipe
from es_lite.runs.origin import Origin
from es_lite.scoring.doors import VOCABULARY_BLOCK
from es_lite.weights import working
from es_lite.weights.conveyor import BUFFERS, buffer_bytes, cut
from es_lite.weights.layout import Layout
from es_lite.weights.stored import SLICE, Storage, dtype_of

COORDINATOR_BYTES = 400 * 2**20
"""Memory of the coordinator: python, torch, transformers, numba, the tokenizer and a small corpus (measured, as the next two)."""

SHARED_BYTES = 290 * 2**20
"""What workers share: the process that they are forked from, which has imported all that they need."""

WORKER_BYTES = 260 * 2**20
"""What a worker has of its own beside, having run a model."""

HIDDEN_BYTES = 256 * 2**20
"""Hidden states that a resident worker holds at once where the choice is free: beyond this, passes only cost memory."""

CUDA_BYTES = 3 * 2**30
"""Host memory of a process for the GPU's driver and libraries, and what they keep on the GPU (an allowance, not measured)."""


@dataclass(frozen=True)
class Parts:
    """What a residency takes: memory by part, and how much is scored at once."""

    memory: dict[str, int]
    """Bytes on the host, of all processes."""
    workers: int
    members: int
    """Whose hidden states are in memory together."""
    pass_samples: int
    gpu: dict[str, int] = field(default_factory=dict)
    """Bytes on the GPU."""


class Needs:
    """Sizes that both residencies are made of."""

    def __init__(self, recipe: Recipe, text: PretrainedConfig, layout: Layout) -> None:
        """text: the configuration of the language model."""
        self.recipe = recipe
        self.layout = layout
        origin = Origin.of_recipe(recipe)
        self.storage: Storage = origin.storage
        self.files = origin.files(Path(recipe.run.dir).expanduser(), layout)
        self.cuda = recipe.workers.device == "cuda"
        self.compute = system.compute_dtype(recipe.workers.compute, device=recipe.workers.device)
        alone = system.cores() if self.cuda else 1  # on a GPU, one worker has the update to itself
        self.threads = alone if recipe.workers.threads == "auto" else int(recipe.workers.threads)
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

    def resident(self, limit: int) -> Parts:
        """A copy of the weights for all, and for each worker what it scores with; limit: bytes that there are."""
        micro = self.recipe.fitness.micro_batch
        copy = {
            "working copy": working.size_bytes(self.layout, self.recipe.memory.weights),
            "coordinator": COORDINATOR_BYTES,
            "shared by workers": SHARED_BYTES,
        }
        if self.cuda:
            return self._on_gpu(copy | {"worker": WORKER_BYTES})
        hidden = self.hidden(self.pair)
        pass_samples = min(max(1, HIDDEN_BYTES // hidden // micro), -(-self.samples // micro)) * micro
        worker = {
            "workers": WORKER_BYTES,
            "perturbed layer": self.perturbed(pass_samples),
            "hidden states": pass_samples * hidden,
            "activations": self.activations,
            "update buffers": 4 * SLICE * 4,
        }

        def total(workers: int) -> int:
            return sum(copy.values()) + workers * sum(worker.values())

        workers = self._places(self.tasks)
        if self.recipe.workers.count == "auto":
            workers = next((n for n in range(workers, 0, -1) if total(n) <= limit), 1)
        memory = copy | {f"{name} ({workers}x)": workers * size for name, size in worker.items()}
        return Parts(memory, workers, self.pair, pass_samples)

    def streamed(self, limit: int) -> Parts:
        """Buffers that layers pass through, and one process that scores all members; as few passes as fit."""
        weights: Storage = self.recipe.memory.weights
        passing = {
            "coordinator": COORDINATOR_BYTES,
            "worker": SHARED_BYTES + WORKER_BYTES,
            "window": BUFFERS * buffer_bytes(self.files, self.layout),
        }
        if weights != self.storage:
            parts = [section.parts for file in self.files for section in cut(file, self.layout)]
            passing["converted layer"] = max(sum(dtype_of(t, weights).itemsize * n for t, _, n in part) for part in parts)
        if self.cuda:
            return self._on_gpu(passing)
        members = self.recipe.es.population + 1  # and θ itself, where σ is new
        lanes = self._places(self.pair * -(-self.recipe.fitness.samples // self.recipe.fitness.micro_batch))

        def memory(pass_samples: int) -> dict[str, int]:
            return {
                **passing,
                "perturbed layer": self.perturbed(pass_samples),
                "hidden states": pass_samples * self.hidden(members),
                f"activations ({lanes}x)": lanes * self.activations,
                "update buffers": 4 * SLICE * 4,
            }

        pass_samples = self._pass_samples(lambda samples: sum(memory(samples).values()) <= limit)
        return Parts(memory(pass_samples), lanes, members, pass_samples)

    def _on_gpu(self, host: dict[str, int]) -> Parts:
        """One process that scores all members on the GPU, the layers copied there through two pinned buffers."""
        members = self.recipe.es.population + 1
        layer = max(block.size for block in self.layout.blocks) * (2 if self.recipe.memory.weights == "bf16" else 1)

        def gpu(pass_samples: int) -> dict[str, int]:
            return {
                "driver": CUDA_BYTES,
                "copied layers": 2 * layer,
                "perturbed layer": self.perturbed(pass_samples),
                "noise": 20 * 8 * 2**22 // 8 + 8 * 2**22 * 4,  # what torch_noise makes of a chunk
                "hidden states": pass_samples * self.hidden(members),
                "activations": self.activations,
            }

        limit = system.gpu_memory()
        there = limit.bytes if limit else 0
        pass_samples = self._pass_samples(lambda samples: sum(gpu(samples).values()) <= there)
        memory = host | {"GPU's libraries": CUDA_BYTES, "pinned buffers": 2 * layer, "update buffers": 4 * SLICE * 4}
        return Parts(memory, 1, members, pass_samples, gpu(pass_samples))

    def _pass_samples(self, fits: Callable[[int], bool]) -> int:
        """Samples of a pass: as many as fit, a multiple of the micro-batch, in passes of like size; one micro-batch at least."""
        micro = self.recipe.fitness.micro_batch
        micro_batches = -(-self.samples // micro)
        each = (-(-micro_batches // passes) * micro for passes in range(1, micro_batches + 1))
        return next(filter(fits, each), micro)

    def _places(self, useful: int) -> int:
        """Workers or lanes: as the recipe says, or as many as there are cores for and work is."""
        if self.recipe.workers.count != "auto":
            return int(self.recipe.workers.count)
        return max(1, min(system.cores() // self.threads, useful))
