"""The tables of a recipe: one frozen dataclass each, with defaults and checks.

A field's type and `Check` say what it accepts. docs/recipe.md documents the keys.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from es_lite.quantities import parse_size
from es_lite.typed_toml import Check


def at_least(bound: float) -> Check:
    return Check(f"at least {bound}", lambda value: value >= bound)


ABOVE_0 = Check("greater than 0", lambda value: value > 0)
FACTOR = Check("greater than 0 and at most 1", lambda value: 0 < value <= 1)
FRACTION = Check("at least 0 and less than 1", lambda value: 0 <= value < 1)
SEED = Check("from 0 to 2**64 - 1", lambda value: 0 <= value < 2**64)
SIZE = Check('a size such as "8 GiB" or "512 MiB", or "" for none', lambda value: value == "" or parse_size(value) > 0)
COUNT_OR_AUTO = Check('"auto" or a whole number of at least 1', lambda v: v == "auto" or (isinstance(v, int) and v >= 1))
NUMBER_OR_AUTO = Check('"auto" or a number greater than 0', lambda v: v == "auto" or (isinstance(v, float) and v > 0))
PATTERN = Check("a regular expression", lambda value: _compiles(value))


def _compiles(pattern: str) -> bool:
    try:
        return bool(pattern) and re.compile(pattern) is not None
    except re.error:
        return False


@dataclass(frozen=True)
class RunTable:
    dir: str = ""
    """The run directory; "" stands for runs/<name of the recipe file>."""
    seed: Annotated[int, SEED] = 0
    """Determines all noise, which samples are drawn, and a random model's weights."""
    iterations: Annotated[int, at_least(0)] = 100
    """Steps of the whole run, including those before a resume."""
    minutes: Annotated[float, at_least(0)] = 0.0
    """The command ends before the step that would exceed this many minutes, with a checkpoint; 0 is off."""
    checkpoint_every: Annotated[int, at_least(0)] = 0
    """Steps between checkpoints; 0 writes one only if the run is stopped."""
    checkpoint_dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of the tensors in checkpoint/ and best/."""
    verify_every: Annotated[int, at_least(0)] = 10
    """Steps after which the hosts' weights are compared, by a checksum a layer; 0: never."""


@dataclass(frozen=True)
class ModelTable:
    path: str = ""
    """A Hugging Face folder, or a hub name such as "Qwen/Qwen3-0.6B"."""
    config: str | dict = ""
    """Instead of a path: a size of the paper ("qwen3-0.5b"), a config.json, or a table of its keys."""
    code: str = ""
    """A Python file of your own that is run first: it registers an architecture, or a part of one, with transformers."""


@dataclass(frozen=True)
class DataTable:
    path: str = "builtin:python-reference"
    """A .txt or .jsonl file, a folder of such files, or the built-in corpus. For rewards, prompts: a .jsonl, .json or .parquet
    file, a folder of them, a dataset's name, or a task ("builtin:countdown", "math:FILE", "reasoning-gym:NAME")."""
    lines: Annotated[int, at_least(0)] = 0
    """Read at most this many lines; 0 reads all."""
    samples: Literal["lines", "joined"] = "joined"
    """Each line is a sample, or lines are joined and cut at fitness.max_length."""
    tokenizer: str = ""
    """"" is the model's own; "bpe" is trained on the corpus and kept with the run; otherwise a folder or hub name."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether the token that begins a text stands before each sample; "auto": if the tokenizer itself puts it before a text."""
    vocab_size: Annotated[int, at_least(257)] = 8192
    """Size of a trained "bpe"; 257 (256 bytes and an end) is a model of bytes."""
    system: str = ""
    """Prompts: a system message before each; it makes messages of prompts that are strings."""
    template: str = ""
    """Prompts: a format string over a row's columns that makes its prompt, such as "{question}"; "" takes the column "prompt"."""
    chat: bool = False
    """Prompts that are strings become a user's message, for the tokenizer's chat template."""
    options: dict = field(default_factory=dict)
    """A task's own options, such as sizes and difficulty."""


@dataclass(frozen=True)
class FitnessTable:
    kind: Literal["logprob", "reward"] = "logprob"
    """EA4LLM's score: the mean log-probability of a sample's true next tokens; or the reward of what a member writes (Evolution
    Strategies at Scale)."""
    samples: Annotated[int, at_least(1)] = 5000
    """M: samples, or prompts, drawn for each step, the same for all members."""
    max_length: Annotated[int, at_least(2)] = 256
    """Tokens of the longest sample, or prompt."""
    micro_batch: Annotated[int, at_least(1)] = 16
    """Samples, or prompts, of a member that are computed together in a layer."""


@dataclass(frozen=True)
class RewardTable:
    functions: tuple[str, ...] = ()
    """Reward functions, whose values are summed: built-in names, dotted paths, or "file.py:function"; none: the task's own."""
    weights: tuple[float, ...] = ()
    """What each function's value is multiplied by; 0 only reports it; none: 1 each, or the task's own."""
    seconds: Annotated[float, ABOVE_0] = 10.0
    """The longest that grading one completion may take; then it counts as wrong."""


@dataclass(frozen=True)
class GenerationTable:
    max_new_tokens: Annotated[int, at_least(1)] = 128
    """A completion ends with an end token of the model, or after so many tokens."""


@dataclass(frozen=True)
class Group:
    """Factors of σ and α for parameters whose names match `pattern` (re.search); the first matching group applies."""

    pattern: Annotated[str, PATTERN] = ""
    sigma: Annotated[float, at_least(0)] = 1.0
    alpha: Annotated[float, at_least(0)] = 1.0


@dataclass(frozen=True)
class ESTable:
    population: Annotated[int, at_least(2)] = 30
    """N: members per step."""
    sigma: Annotated[float | str, NUMBER_OR_AUTO] = 1e-3
    """σ: the perturbation's standard deviation; "auto": found in the first steps, then held."""
    alpha: Annotated[float | str, NUMBER_OR_AUTO] = 5e-4
    """α: the step size; "auto": found from the scores of each step."""
    alpha_start: Annotated[float, ABOVE_0] = 5e-4
    """Where an α that is "auto" begins."""
    shaping: Literal["zscore", "rank"] = "zscore"
    baseline: Literal["member", "item"] = "member"
    """Scores are compared with the members' mean; "item": with each item's own, and with the spread of all items' (EGGROLL)."""
    scale: Literal["standard", "nes"] = "standard"
    """θ += α ĝ, or θ += α/σ ĝ."""
    antithetic: bool = False
    """Members 2p and 2p+1 are θ ± σε of pair p."""
    alpha_decay: Annotated[float, FACTOR] = 1.0
    alpha_decay_every: Annotated[int, at_least(0)] = 0
    """α is multiplied by alpha_decay every alpha_decay_every steps; 0 is off."""
    sigma_decay: Annotated[float, FACTOR] = 1.0
    sigma_decay_every: Annotated[int, at_least(0)] = 0
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """λ of θ -= α λ θ, decoupled from the scores."""
    anchor: Annotated[float, at_least(0)] = 0.0
    """λ of θ -= α λ (θ - θ₀): the decay goes towards the model that the run began with, not towards 0."""
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True)
class NoiseTable:
    kind: Literal["gaussian", "rademacher", "lowrank"] = "gaussian"
    """"lowrank": matrices are perturbed by A Bᵀ/√r, which leaves them untouched (EGGROLL)."""
    rank: Annotated[int | str, COUNT_OR_AUTO] = "auto"
    """r of "lowrank"; "auto" is 1."""
    shared: bool = False
    """Tensors of equal shape get equal noise, as in the published code; a known defect, for comparisons only."""

    @property
    def rank_number(self) -> int:
        """The rank as a number; 0 for kinds that have none."""
        if self.kind != "lowrank":
            return 0
        return 1 if self.rank == "auto" else int(self.rank)


@dataclass(frozen=True)
class WorkersTable:
    count: Annotated[int | str, COUNT_OR_AUTO] = "auto"
    """Worker processes or, if weights are streamed, lanes of one; "auto" is one per core, fewer if memory is short."""
    threads: Annotated[int | str, COUNT_OR_AUTO] = "auto"
    """Threads per worker or lane; "auto" is 1, or with a device one per core."""
    deadline: Annotated[float, at_least(0)] = 0.0
    """Seconds after which a worker's task counts as hung; 0: the time that the slowest machine would take, at least 600."""
    compute: Literal["auto", "bf16", "fp32"] = "auto"
    """The type that layers are computed in; "auto" is bf16 on a GPU or if the CPU has AVX512-BF16, AMX or Arm BF16, else fp32."""
    device: Literal["cpu", "cuda", "torch"] = "cpu"
    """"cuda": one process scores the whole population on the GPU; the update stays on the CPU. "torch": the same code on the CPU,
    to test it."""
    engine: Literal["local", "ray"] = "local"
    """"local": this machine's processes; "ray": hosts, each of which has such processes."""
    address: str = "local"
    """Of the cluster to join; "auto": the one that this machine belongs to; "local" starts one, of this machine alone."""
    hosts: Annotated[int, at_least(1)] = 1
    """A run on Ray begins with at least so many hosts, or not at all."""
    host_dir: str = "~/.cache/es_lite/hosts"
    """Where hosts keep their layers' files; this machine's are in the run directory."""


@dataclass(frozen=True)
class MemoryTable:
    limit: Annotated[str, SIZE] = ""
    """Memory that all processes together may use; "" is all that the machine and its cgroups leave."""
    weights: Literal["bf16", "int8"] = "bf16"
    """Type of the weights that are scored from; "int8" is row-wise absmax."""
    master: Literal["fp32", "none"] = "fp32"
    """The parameters in full precision, on disk; "none": the weights themselves are updated, by stochastic rounding."""
    residency: Literal["auto", "resident", "streamed"] = "auto"
    """The weights stay in memory, or pass through it layer by layer; "auto" streams what does not fit."""

    @property
    def limit_bytes(self) -> int:
        """`limit` in bytes; 0 if there is none."""
        return parse_size(self.limit)

    @property
    def storage(self) -> Literal["fp32", "bf16", "int8"]:
        """What the layers' files hold and updates are applied to."""
        return "fp32" if self.master == "fp32" else self.weights

    @property
    def folder(self) -> str:
        """The folder of the layers' files in the run directory."""
        return "master" if self.master == "fp32" else "weights"


@dataclass(frozen=True)
class EvalTable:
    path: str = ""
    """Held-out text or prompts; "" takes the task's own, or the last `fraction` of data.path."""
    fraction: Annotated[float, FRACTION] = 0.05
    every: Annotated[int, at_least(0)] = 0
    """Steps between evaluations; 0 is off."""
    samples: Annotated[int, at_least(1)] = 64
    """At most this many held-out samples or prompts, evenly spaced."""
    best: bool = True
    """Keep best/, the model that scored best; false saves its disk (`es_lite.replay --step` makes it from the journal)."""


@dataclass(frozen=True)
class LogTable:
    tensorboard: bool = True
    """Write TensorBoard events too, if the package is installed."""
