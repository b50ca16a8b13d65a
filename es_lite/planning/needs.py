"""The memory that a recipe takes, by part: resident, streamed, and with a device."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PretrainedConfig

from es_lite import system
from es_lite.algorithm.noise import on_device
from es_lite.files import expanded
from es_lite.fitness.base import Fitness
from es_lite.model.layout import Layer, Layout
from es_lite.recipe import Recipe
from es_lite.scoring.heads import VOCABULARY_BLOCK
from es_lite.weights import working_copy
from es_lite.weights.conveyor import BUFFERS, buffer_bytes, sections_of
from es_lite.weights.parts import SLICE, dtype_of
from es_lite.weights.store import Store

COORDINATOR_BYTES = 400 * 2**20
"""Memory of the coordinator: python, torch, transformers, numba, the tokenizer and a small corpus (measured, as the next two)."""

SHARED_BYTES = 290 * 2**20
"""Memory that workers share: the process that they are forked from, with all imports."""

WORKER_BYTES = 260 * 2**20
"""What a worker takes in addition, after it has run a model."""

HIDDEN_BYTES = 256 * 2**20
"""Hidden states that a resident worker holds at once; more would only cost memory."""

CUDA_BYTES = 3 * 2**30
"""An allowance, not measured, for the GPU's driver and libraries: on the host for the coordinator and the worker each, and on the
GPU."""

PRODUCT_BYTES, PRODUCTS = 680_000, 256
"""What oneDNN keeps of a product in bf16 that it has compiled (measured), and of how many (`engine.preload`)."""

UPDATE_BYTES = 4 * SLICE * 4
"""Buffers of the update."""

TILE_TOKENS = 256
"""Rows that a tile of low-rank noise has at least, if half of the population has them. Fewer do not reach the processor's rate,
because the weights come from memory for each tile; more are no faster (benchmarks/lowrank.md)."""


@dataclass(frozen=True)
class Parts:
    """What one way to run (resident, streamed, with a device) takes: memory by part, and how much is scored at once."""

    memory: dict[str, int]
    """Bytes on the host, of all processes."""
    workers: int
    members: int
    """Members whose hidden states are in memory together."""
    pass_samples: int
    kept: bool = False
    """A worker keeps what it has perturbed or converted for a generation."""
    gpu: dict[str, int] = field(default_factory=dict)
    """Bytes on the GPU."""


class Needs:
    """Computes the memory of each way to run a recipe."""

    def __init__(self, recipe: Recipe, fitness: Fitness, config: PretrainedConfig, layout: Layout) -> None:
        """config: the model's. Raises UserError if the model cannot be used for this fitness."""
        text = config.get_text_config()
        self.recipe = recipe
        self.layout = layout
        self.files = Store(expanded(recipe.run.dir), layout, recipe.memory.storage).files
        self.device = recipe.workers.device != "cpu"
        self.compute = system.compute_dtype(recipe.workers.compute, device=recipe.workers.device)
        alone = system.cores() if self.device else 1  # with a device, one worker does the update alone
        self.threads = alone if recipe.workers.threads == "auto" else int(recipe.workers.threads)
        self.pair_members = 2 if recipe.es.antithetic else 1
        self.pairs = recipe.es.population // self.pair_members
        self.itemsize = 2 if self.compute == "bf16" else 4
        self.width, self.vocabulary = text.hidden_size, text.vocab_size
        self.samples = max(recipe.fitness.samples, recipe.eval.samples if recipe.eval.every else 0)
        self.item = fitness.memory(recipe, config, self.itemsize)
        self.factored = recipe.noise.kind == "lowrank"
        self.generates = fitness.generates
        micro = recipe.fitness.micro_batch
        self.prompt_members = self._tile_members(self.item.tokens)
        self.tile_members = self._tile_members(1) if self.generates else self.prompt_members
        self.group = max(1, self.tile_members // self.pair_members)
        self.activations = self.prompt_members * self.item.activations
        if self.generates:
            self.activations = max(self.activations, self.tile_members * micro * self.item.decoding)
        self.forwards = max(1, self.item.new_tokens)
        """How often a pass goes through the layers: once, or once for each token that is written."""

    def _tile_members(self, tokens: int) -> int:
        """Members that share a tile: 1 or those of whole perturbations, at most half of the population, so that two cores have
        work. It depends on the recipe alone, because the bits of a product depend on how many rows it has.

        tokens: of an item that pass a layer together.
        """
        recipe, pair = self.recipe, self.pair_members
        rows = min(recipe.fitness.micro_batch, recipe.fitness.samples) * tokens
        wanted = -(-TILE_TOKENS // rows)
        if not self.factored or wanted == 1:
            return 1
        return max(1, min(-(-wanted // pair), recipe.es.population // 2 // pair) * pair)

    def _coordinator(self) -> dict[str, int]:
        """Bytes of the coordinator and of the processes that grade."""
        graders = {"graders": self.item.graders} if self.generates else {}
        text = {"text": self.item.text} if self.item.text else {}
        return {"coordinator": COORDINATOR_BYTES, **text, **graders}

    def scratch(self, pass_samples: int) -> dict[str, int]:
        """Bytes for what is perturbed or converted at a time: a block, a part of the head, rows of the embedding."""
        rows = min(self.vocabulary, pass_samples * self.item.tokens) * self.width
        blocks = self.layout.blocks
        if not self.factored:
            largest = max(block.size for block in blocks)
            return {"perturbed layer": self.pair_members * self.itemsize * max(largest, VOCABULARY_BLOCK * self.width, rows)}
        found = {"perturbed rows": self.pair_members * self.itemsize * max(rows, *(_size(block, 3) for block in blocks))}
        if self.recipe.memory.weights != self.compute:
            largest = max(_size(block, 2) - _size(block, 3) for block in blocks)
            found["converted layer"] = self.itemsize * max(largest, VOCABULARY_BLOCK * self.width)
        return found

    def resident(self, limit: int) -> Parts:
        """One working copy for all, and what each worker scores with; limit: bytes that are available."""
        micro = self.recipe.fitness.micro_batch
        copy = {
            "working copy": working_copy.size_bytes(self.layout, self.recipe.memory.weights),
            **self._coordinator(),
            "shared by workers": SHARED_BYTES,
        }
        if self.device:
            return self._with_device(copy | {"worker": WORKER_BYTES}, limit)
        members = max(self.pair_members, self.tile_members)
        hidden = members * self.item.hidden
        # Sequences are written tile by tile: more at once would only cost memory, as with more hidden states.
        most = 1 if self.generates else max(1, HIDDEN_BYTES // hidden // micro)
        pass_samples = min(most, -(-self.samples // micro)) * micro
        worker = {
            "workers": WORKER_BYTES,
            **self.scratch(pass_samples),
            "hidden states": pass_samples * hidden,
            **self._cache(members * min(pass_samples, self.samples)),
            **self._products(),
            "activations": self.activations,
            "update buffers": UPDATE_BYTES,
        }
        kept = {"kept weights": self._kept_bytes()} if self._kept_bytes() else {}

        def total(workers: int, worker: dict[str, int]) -> int:
            return sum(copy.values()) + workers * sum(worker.values())

        workers = self._workers(-(-self.pairs // self.group))
        # Fewer workers that keep weights are faster than more that make them at every token.
        ways = [(n, worker | kept) for n in range(workers, 0, -1)] + [(n, worker) for n in range(workers, 0, -1)]
        if self.recipe.workers.count != "auto":
            ways = [(workers, worker | kept), (workers, worker)]
        count, chosen = next((way for way in ways if total(*way) <= limit), ways[-1])
        memory = copy | {f"{name} ({count}x)": count * size for name, size in chosen.items()}
        return Parts(memory, count, members, pass_samples, kept=chosen is not worker)

    def _cache(self, sequences: int) -> dict[str, int]:
        """Bytes of the keys and values of so many sequences."""
        return {"keys and values": sequences * self.item.cache} if self.generates else {}

    def _products(self) -> dict[str, int]:
        """Bytes of compiled products: tiles that sequences leave have many numbers of rows."""
        return {"compiled products": PRODUCT_BYTES * PRODUCTS} if self.generates and self.compute == "bf16" else {}

    def _kept_bytes(self) -> int:
        """What a worker can keep during a generation: perturbed weights, or weights in the compute type; 0 if there is none."""
        if not self.generates or (self.factored and self.recipe.memory.weights == self.compute):
            return 0
        return self.layout.size * self.itemsize * (1 if self.factored else self.pair_members)

    def streamed(self, limit: int) -> Parts:
        """Buffers that layers pass through, and one process that scores all members, in as few passes as fit."""
        weights = self.recipe.memory.weights
        passing = {
            **self._coordinator(),
            "worker": SHARED_BYTES + WORKER_BYTES,
            "window": BUFFERS * buffer_bytes(self.files, self.layout),
        }
        if weights != self.recipe.memory.storage:
            parts = [section.parts for file in self.files for section in sections_of(file, self.layout)]
            passing["rounded layer"] = max(sum(dtype_of(t, weights).itemsize * n for t, _, n in part) for part in parts)
        if self.device:
            return self._with_device(passing, limit)
        tiles = max(self.pair_members, self.recipe.es.population // self.tile_members if self.factored else 0)
        lanes = self._workers(tiles * -(-self.recipe.fitness.samples // self.recipe.fitness.micro_batch))

        def memory(pass_samples: int) -> dict[str, int]:
            return {
                **passing,
                **self.scratch(pass_samples),
                "hidden states": pass_samples * self._population * self.item.hidden,
                **self._cache(pass_samples * self._population),
                **self._products(),
                f"activations ({lanes}x)": lanes * self.activations,
                "update buffers": UPDATE_BYTES,
            }

        pass_samples = self._pass_samples(lambda samples: sum(memory(samples).values()) <= limit)
        return Parts(memory(pass_samples), lanes, self._population, pass_samples)

    @property
    def _population(self) -> int:
        """Members scored together if folded: the population and, in some steps, θ itself."""
        return self.recipe.es.population + 1

    def _with_device(self, host: dict[str, int], limit: int) -> Parts:
        """One process that scores all members on the device, to which layers are copied through two pinned buffers."""
        layer = max(block.size for block in self.layout.blocks) * (2 if self.recipe.memory.weights == "bf16" else 1)
        host = host | {"pinned buffers": 2 * layer, "update buffers": UPDATE_BYTES}

        def there(pass_samples: int) -> dict[str, int]:
            return {
                "copied layers": 2 * layer,
                **self.scratch(pass_samples),
                "noise": 20 * 8 * on_device.CHUNK // 8 + 8 * on_device.CHUNK * 4,
                "hidden states": pass_samples * self._population * self.item.hidden,
                **self._cache(pass_samples * self._population),
                "activations": self.activations,
            }

        if self.recipe.workers.device == "torch":  # the device is the host
            pass_samples = self._pass_samples(lambda samples: sum((host | there(samples)).values()) <= limit)
            return Parts(host | there(pass_samples), 1, self._population, pass_samples)
        gpu = system.gpu_memory()
        room = gpu.bytes if gpu else 0
        pass_samples = self._pass_samples(lambda samples: CUDA_BYTES + sum(there(samples).values()) <= room)
        on_gpu = {"driver": CUDA_BYTES, **there(pass_samples)}
        return Parts(host | {"GPU's libraries (2x)": 2 * CUDA_BYTES}, 1, self._population, pass_samples, gpu=on_gpu)

    def _pass_samples(self, fits: Callable[[int], bool]) -> int:
        """Samples of a pass: as many micro-batches as fit, at least one, in passes of similar size."""
        micro = self.recipe.fitness.micro_batch
        micro_batches = -(-self.samples // micro)
        each = (-(-micro_batches // passes) * micro for passes in range(1, micro_batches + 1))
        return next(filter(fits, each), micro)

    def _workers(self, useful: int) -> int:
        """Workers or lanes: as the recipe says, or one per `threads` cores, at most `useful`."""
        if self.recipe.workers.count != "auto":
            return int(self.recipe.workers.count)
        return max(1, min(system.cores() // self.threads, useful))


def _size(layer: Layer, dimensions: int) -> int:
    """Elements of the layer's tensors that have at least so many dimensions."""
    return sum(tensor.size for tensor in layer.tensors if len(tensor.shape) >= dimensions)
