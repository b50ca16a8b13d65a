"""Peak memory by formula, of es_lite and of AdamW: what compare_memory.py computes, and the models and loads it computes it for.

es_lite's formula is its plan (es_lite.planning.plan). AdamW's, in bytes, for P parameters of which R = V·H are a matrix of the
vocabulary V, B blocks, hidden size H, intermediate size I, Q and K the widths of the queries and of the keys, q and k their
heads, and n = micro-batch × length tokens, is a process's own memory and the largest of these moments:

    the loss:      12 P + 4 n (3 V + B·A + 3 H)     weights and two moments; log-softmax, its gradient, the gradient of the
                                                    logits; what a block keeps, A = 6 H + 4 I + 4 Q + 4 K + 2 + 2 q + k
    the head:      12 P + 4 R + 4 n (V + B·A)       its gradient is made from that of the logits
    the update:    16 P + 8 R                       all gradients; two temporaries of the largest tensor

With checkpointing a block keeps only its input, H instead of A, and there is a fourth, 12 P + 4 R + 4 n (B·H + A): the head's
gradient, and the last block computed again. If a step has several micro-batches, the sum of the gradients, 4 P, is there at
each of them.

The formula counts tensors. A measured peak is higher if the C allocator keeps holes (for AdamW on glibc about a tenth: its
gradients and activations are allocated and freed in turn), and lower by the library pages that other programs use too, up to
0.1 GiB a run.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from transformers import PretrainedConfig, PreTrainedModel

from es_lite import system
from es_lite.errors import UserError
from es_lite.fitness.kinds import fitness_of
from es_lite.model.configuration import SIZES
from es_lite.model.layout import Layout
from es_lite.model.origin import Origin
from es_lite.planning.plan import Plan
from es_lite.quantities import GIB
from es_lite.recipe import Recipe

TORCH_BYTES = 390 * 2**20
"""Memory of a process that has loaded torch and transformers, and trained a small model (measured)."""

MODES = {  # in the plot's order: what it is called, its colour
    "adamw": ("AdamW, fp32", "#d44c47"),
    "adamw-checkpointing": ("AdamW, fp32, gradient checkpointing", "#d9730d"),
    "bf16": ("es_lite, bf16 resident", "#0b6e99"),
    "lowrank": ("es_lite, bf16 resident, low-rank noise", "#17a2a2"),
    "int8": ("es_lite, int8 resident", "#448361"),
    "streamed": ("es_lite, bf16 streamed", "#9065b0"),
}
SHORT = {mode: name.removeprefix("es_lite, ") for mode, (name, _) in MODES.items()}
OURS = ("bf16", "lowrank", "int8", "streamed")


@dataclass(frozen=True)
class Load:
    """What is trained on, the same for all modes."""

    samples: int
    """Of a step."""
    length: int
    """Tokens of a sample."""
    micro_batch: int
    population: int
    workers: int
    steps: int
    text: str


@dataclass(frozen=True)
class Model:
    name: str
    given: str
    """model.config of the recipe: a size of the paper, or the path of a config.json."""
    skeleton: PreTrainedModel
    layout: Layout

    @property
    def config(self) -> PretrainedConfig:
        return self.skeleton.config


@dataclass(frozen=True)
class Figure:
    """Peak memory of one model trained in one mode."""

    size: str
    parameters: int
    mode: str
    parts: dict[str, int]
    """Bytes at the peak by what they are for, by formula."""
    measured: int | None = None
    """Bytes."""

    @property
    def computed(self) -> int:
        return sum(self.parts.values())

    @property
    def best(self) -> int:
        """Bytes, measured if that was done."""
        return self.measured or self.computed

    def document(self) -> dict[str, object]:
        """For JSON: parts, computed and measured in bytes."""
        check = {"computed": self.computed, "formula_over_measured": self.measured and round(self.computed / self.measured, 4)}
        return dataclasses.asdict(self) | check

    @property
    def largest(self) -> str:
        """The largest part and its share."""
        name = max(self.parts, key=lambda part: self.parts[part])
        return f"{name}, {self.parts[name] / self.computed:.0%}"


def load_model(given: str) -> Model:
    """A size of the paper or a config.json. Raises UserError if it is neither, or of another architecture than Qwen3."""
    path = Path(given).expanduser()
    if given not in SIZES and path.suffix != ".json":
        raise UserError(f"{given}: expected {', '.join(SIZES)} or a config.json")
    name, where = (given, given) if given in SIZES else (path.stem, str(path.absolute()))
    skeleton, layout = Origin("", where, 0, (), False, False).skeleton()
    if skeleton.config.model_type != "qwen3":
        raise UserError(f"{given}: is a {skeleton.config.model_type}; the formula for what a block keeps is that of qwen3 alone")
    return Model(name, where, skeleton, layout)


def block_bytes(config: PretrainedConfig) -> int:
    """What autograd keeps of a block for a token, float32 (the A of the formula, 4 bytes each)."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    queries, keys = heads * config.head_dim, groups * config.head_dim
    wide = 6 * config.hidden_size + 4 * config.intermediate_size + 4 * queries + 4 * keys
    return 4 * (wide + 2 + 2 * heads + groups)


def adamw_parts(model: Model, load: Load, checkpointing: bool) -> dict[str, int]:
    """Bytes at the peak of AdamW in fp32, by the formula above."""
    config, parameters, tokens = model.config, model.layout.size, min(load.micro_batch, load.samples) * load.length
    matrix = 4 * config.vocab_size * config.hidden_size
    block = tokens * block_bytes(config)
    kept = config.num_hidden_layers * (4 * tokens * config.hidden_size if checkpointing else block)
    final, logits = 12 * tokens * config.hidden_size, 4 * tokens * config.vocab_size
    summed = 4 * parameters if load.samples > load.micro_batch else 0
    moments = [
        {"gradients": summed, "activations": kept + final, "logits": 3 * logits},
        {"gradients": summed + matrix, "activations": kept, "logits": logits},
        {"gradients": summed + matrix, "activations": kept + block * checkpointing},
        {"gradients": 4 * parameters, "temporaries": 2 * matrix},
    ]
    held = {"process": TORCH_BYTES, "weights": 4 * parameters, "AdamW's moments": 8 * parameters}
    return held | max(moments, key=lambda parts: sum(parts.values()))


def recipe_for(model: Model, load: Load, mode: str, run: Path) -> Path:
    """The recipe of the run that is planned and measured, written next to the run directory `run`."""
    streamed, int8 = mode == "streamed", mode == "int8"
    tables = {
        "run": {"dir": str(run), "iterations": load.steps},
        "model": {"config": model.given},
        "data": {"path": load.text, "tokenizer": "bpe", "vocab_size": min(8192, model.config.vocab_size)},
        "fitness": {"samples": load.samples, "max_length": load.length, "micro_batch": load.micro_batch},
        "es": {"population": load.population, "antithetic": True},
        "noise": {"kind": "lowrank" if mode == "lowrank" else "gaussian"},
        "workers": {"count": load.workers, "threads": 1},
        "memory": {"weights": "int8" if int8 else "bf16", "residency": "streamed" if streamed else "resident"},
        "log": {"tensorboard": False},
    }
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_name(f"{run.name}.toml")
    path.write_text(tomli_w.dumps(tables))
    return path


def computed(model: Model, load: Load, mode: str, folder: Path) -> tuple[Figure, str | None]:
    """The figure by formula, and why it cannot be measured here, in numbers; None if it can.

    Raises UserError if es_lite does not take the load.
    """
    if mode in OURS:
        recipe = Recipe.load(recipe_for(model, load, mode, folder / model.name / mode))
        plan = Plan.of(recipe, fitness_of(recipe.fitness.kind), model.config, model.layout)
        return Figure(model.name, model.layout.size, mode, plan.memory), plan.shortfall()
    figure = Figure(model.name, model.layout.size, mode, adamw_parts(model, load, mode == "adamw-checkpointing"))
    need, limit = figure.computed, system.memory_limit()
    short = f"does not fit: needs {need / GIB:.2f} GiB of memory, {limit.bytes / GIB:.2f} are available ({limit.source})"
    return figure, short if need > limit.bytes else None
