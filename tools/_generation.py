"""Generation, measured: es_lite compared with the plain loop, its share of the GEMM rate, and the parts of a step.

    python tools/benchmark.py generation               new tokens a second, compared with the plain loop in fp32 and bf16
    python tools/benchmark.py generation --rate        low-rank decoding as a share of the GEMM rate of the same thread
    python tools/benchmark.py generation --shares      prefill, decoding, grading and update as shares of a step
    python tools/benchmark.py generation --llama       llama.cpp, for orientation (needs the package xllamacpp)

No sequence ends early, so that all make the same number of tokens. What is compared takes turns, so that a machine that drifts
drifts for all; the first turn, which warms up, is not counted.
"""

import argparse
import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import _llama
import _packages
import numpy as np
import torch
from _measuring import HEADER, provenance, row, spread, table
from _plain_loop import PlainLoop
from _scoring import in_turns
from torch.nn.functional import linear
from transformers import AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from es_lite import system
from es_lite.algorithm.noise.kinds import kind_of
from es_lite.algorithm.record import Record
from es_lite.algorithm.shaping import utilities
from es_lite.data.chat import decode
from es_lite.data.prompt_batch import Prompts
from es_lite.engine.local import LocalEngine
from es_lite.engine.worker import DTYPES
from es_lite.fitness.grading import Completions, Graders
from es_lite.fitness.kinds import fitness_of
from es_lite.fitness.tasks import countdown
from es_lite.model.configuration import configuration
from es_lite.model.layout import Layout
from es_lite.model.origin import Origin
from es_lite.planning.plan import Plan
from es_lite.recipe import Recipe
from es_lite.scoring.perturbation import Perturbation
from es_lite.tables import (
    DataTable,
    ESTable,
    FitnessTable,
    GenerationTable,
    ModelTable,
    NoiseTable,
    RunTable,
    WorkersTable,
)
from es_lite.weights.store import Store

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
"""The shape of SmolLM2-135M: without its folder, random weights of this shape are measured, which takes as long."""

SIGMA = 1e-3
DECODED = 64
"""--rate: tokens of a sequence whose decoding is measured."""

PASSES = 4
"""--rate: how often the GEMM goes through the model's matrices in a turn."""


@dataclass(frozen=True)
class Load:
    """What is generated."""

    model: Path
    """A Hugging Face folder; where it is missing, random weights of SmolLM2's shape are taken."""
    population: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    compute: str
    """es_lite's compute type, as `workers.compute`."""

    @property
    def table(self) -> ModelTable:
        return ModelTable(path=str(self.model)) if self.model.exists() else ModelTable(config=SMOLLM2)

    @property
    def config(self) -> PretrainedConfig:
        return configuration(self.table.path, self.table.config)

    @property
    def sequences(self) -> int:
        return self.population * self.prompts

    def tokens(self) -> np.ndarray:
        """The prompts, random: int32 [prompts, prompt_tokens]."""
        vocabulary = self.config.get_text_config().vocab_size
        return np.random.default_rng(0).integers(0, vocabulary, (self.prompts, self.prompt_tokens)).astype(np.int32)

    def items(self, new_tokens: int) -> Prompts:
        """The prompts, with no token that ends what is written."""
        return Prompts.pack(np.arange(self.prompts), list(self.tokens()), (), new_tokens)

    def pairs(self, noise: NoiseTable) -> list[Perturbation]:
        kind = noise.kind, noise.rank_number
        return [Perturbation(1, 0, pair, SIGMA, (1, -1), *kind) for pair in range(self.population // 2)]


@dataclass
class Engine:
    """An engine of this machine that generates with one kind of noise, as a run would."""

    load: Load
    noise: NoiseTable
    local: LocalEngine
    plan: Plan
    layout: Layout
    perturbations: list[Perturbation] = field(init=False)

    def __post_init__(self) -> None:
        self.perturbations = self.load.pairs(self.noise)

    def generate(self, new_tokens: int) -> np.ndarray:
        """What the population writes: object [members, prompts] of int32 [new_tokens]."""
        written = self.local.score(self.perturbations, self.load.items(new_tokens), lambda share: None)
        assert all(ids is not None and ids.size == new_tokens for ids in written.flat), "a sequence ended early"
        return written


@contextlib.contextmanager
def engine(load: Load, noise: str, workers: int, threads: int = 1) -> Iterator[Engine]:
    """The engine that the command would make: the plan's tiles, and its choice of the compute type."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            run=RunTable(dir=folder),
            model=load.table,
            data=DataTable(path="builtin:countdown", tokenizer="" if load.table.path else "bpe"),
            fitness=FitnessTable("reward", samples=load.prompts, max_length=load.prompt_tokens, micro_batch=load.prompts),
            generation=GenerationTable(load.new_tokens),
            es=ESTable(population=load.population, antithetic=True, sigma=SIGMA),
            noise=NoiseTable(kind=noise),  # type: ignore[arg-type]
            workers=WorkersTable(count=workers, threads=threads, compute=load.compute),  # type: ignore[arg-type]
        )
        origin = Origin.of_recipe(recipe)
        model, layout = origin.skeleton()
        plan = Plan.of(recipe, fitness_of("reward"), model.config, layout)
        store = Store(Path(folder) / recipe.memory.folder, layout, origin.storage)
        store.folder.mkdir(exist_ok=True)
        with (
            (Path(folder) / "lock").open("w") as lock,
            LocalEngine(recipe, origin, layout, store, plan.execution, lock, print) as local,
        ):
            local.advance([], lambda share: None)
            yield Engine(load, recipe.noise, local, plan, layout)


def compared(load: Load, kinds: Sequence[str], turns: int, plain_members: int, threads: int) -> None:
    """New tokens of the population a second: es_lite with `threads` workers, the plain loop with `threads` threads."""
    with contextlib.ExitStack() as opened:
        engines = {kind: opened.enter_context(engine(load, kind, threads)) for kind in kinds}
        loops = {name: PlainLoop(load.table, DTYPES[name], load.tokens(), load.new_tokens, SIGMA) for name in ("fp32", "bf16")}
        torch.set_num_threads(threads)
        cases: dict[str, Callable[[], object]] = {}
        tokens: dict[str, int] = {}
        for name, loop in loops.items():
            what = f"plain loop, {name}, {threads} threads"
            cases[what] = lambda loop=loop: loop.run(plain_members)
            tokens[what] = plain_members * load.prompts * load.new_tokens
        for kind, own in engines.items():
            what = f"es_lite, {kind}, {own.plan.execution.compute}, {threads} workers"
            cases[what] = lambda own=own: own.generate(load.new_tokens)
            tokens[what] = load.sequences * load.new_tokens
        rates = {what: [tokens[what] / took for took in seconds] for what, seconds in in_turns(cases, turns).items()}
    print(HEADER)
    for what, values in rates.items():
        print(row(what, values, "new tokens/s"))
    plain = max((what for what in rates if what.startswith("plain")), key=lambda what: statistics.median(rates[what]))
    for what, values in rates.items():
        if what.startswith("es_lite"):
            ratios = [own / other for own, other in zip(values, rates[plain], strict=True)]
            print(row(f"{what}, over {plain}", ratios, "times"))


def rate(load: Load, turns: int) -> None:
    """FLOP/s of low-rank decoding on one worker with one thread, compared with the GEMM rate of the same matrices and rows.

    The GEMM multiplies as many rows as a tile has by every matrix of the blocks and the head, PASSES times; each layer has
    matrices of its own, so that they come from memory, as in a model. Decoding: a generation of 65 tokens without one of 1, by
    the same matrices, without what attention and the noise add.
    """
    torch.set_num_threads(1)
    with engine(load, "lowrank", 1) as own:
        execution = own.plan.execution
        rows = execution.tile_members * load.prompts
        matrices = matrices_of(own.layout, DTYPES[execution.compute])
        inputs = {width: torch.randn(rows, width, dtype=DTYPES[execution.compute]) for width in {m.shape[1] for m in matrices}}

        def gemm() -> None:
            for _ in range(PASSES):
                for matrix in matrices:
                    linear(inputs[matrix.shape[1]], matrix)

        cases: dict[str, Callable[[], object]] = {
            "gemm": gemm,
            "one": lambda: own.generate(1),
            "all": lambda: own.generate(1 + DECODED),
        }
        seconds = in_turns(cases, turns)
    flops = 2.0 * sum(matrix.numel() for matrix in matrices)  # a row
    most = [PASSES * rows * flops / took / 1e9 for took in seconds["gemm"]]
    decoding = [DECODED * load.sequences * flops / (a - b) / 1e9 for a, b in zip(seconds["all"], seconds["one"], strict=True)]
    print(HEADER)
    print(row(f"GEMM, {rows} rows, {execution.compute}, one thread", most, "GFLOP/s"))
    print(row(f"low-rank decoding, tiles of {rows} sequences, {execution.compute}, one thread", decoding, "GFLOP/s"))
    print(row("share of the GEMM rate", [own / gemm for own, gemm in zip(decoding, most, strict=True)], ""))


def shares(load: Load, kind: str, turns: int, workers: int) -> None:
    """Seconds of the parts of a step, and their shares; grading is Countdown's, of texts that all have an answer to compute."""
    problems, _ = countdown.rows("", {"train": load.prompts, "test": 1}, 0)
    steps = iter(range(turns + 1))
    parts: dict[str, list[float]] = {name: [] for name in ("prefill", "decoding", "grading", "update")}
    tokenizer = AutoTokenizer.from_pretrained(load.model) if load.model.exists() else None
    with engine(load, kind, workers) as own, Graders(countdown.FUNCTIONS, system.cores(), 10.0) as graders:
        graders.start()
        noise = kind_of(own.noise.kind, own.noise.rank_number)
        for step in steps:
            times = [time.perf_counter()]
            own.generate(1)
            times.append(time.perf_counter())
            written = own.generate(load.new_tokens)
            times.append(time.perf_counter())
            batches = []
            for member in written:
                texts = [decode(tokenizer, ids) if tokenizer else " ".join(map(str, ids)) for ids in member]
                texts = [text + _answer(row.columns["numbers"]) for text, row in zip(texts, problems, strict=True)]
                batches.append(Completions(problems, texts, [ids.tolist() for ids in member], step))
            grades = graders.grade_all(batches)
            scores = np.array([(countdown.WEIGHTS @ grade.parts).mean() for grade in grades])
            times.append(time.perf_counter())
            scores += np.arange(len(scores))  # equal scores would move nothing
            record = Record.from_utilities(
                step,
                utilities(scores, "zscore"),
                seed=1,
                noise=noise,
                sigma=SIGMA,
                alpha=1e-6,
                scale="standard",
                antithetic=True,
            )
            own.local.advance([record], lambda share: None)
            times.append(time.perf_counter())
            prefill, both, grading, update = np.diff(times)
            for name, value in zip(parts, (prefill, both - prefill, grading, update), strict=True):
                parts[name].append(float(value))
    parts = {name: values[1:] for name, values in parts.items()}
    totals = [sum(values) for values in zip(*parts.values(), strict=True)]
    rows = [["part of a step", "s", "spread", "share"]]
    for name, values in (parts | {"step": totals}).items():
        share = statistics.median(a / b for a, b in zip(values, totals, strict=True))
        rows.append([name, f"{statistics.median(values):.3g}", spread(values), f"{share:.1%}"])
    print(table(rows))


def matrices_of(layout: Layout, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random matrices of the shapes that a token is multiplied by: those of all blocks, and the head."""
    shapes = [tensor.shape for block in layout.blocks for tensor in block.tensors if len(tensor.shape) == 2]
    vocabulary = [tensor.shape for layer in layout.layers for tensor in layer.tensors if tensor.vocabulary]
    return [torch.randn(math.prod(shape), dtype=dtype).view(*shape) for shape in (*shapes, vocabulary[-1])]


def _answer(numbers: Sequence[int]) -> str:
    return f"</think>\n<answer> {' + '.join(map(str, numbers))} </answer>"


def generation(words: Sequence[str]) -> None:
    """The sub-command, with options of its own. words: after "generation"."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py generation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    for option, text in (
        ("--rate", "low-rank decoding as a share of the GEMM rate, N = 32"),
        ("--shares", "the parts of a step, N = 30"),
        ("--llama", "llama.cpp"),
    ):
        what.add_argument(option, action="store_true", help=text)
    default = _packages.CACHE / "smollm2-135m-instruct"
    parser.add_argument("--model", type=Path, default=default, help="a Hugging Face folder; if missing: random weights")
    parser.add_argument("--population", type=int, help="N, even; default: 16, with --rate 32, with --shares 30")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="the plain loop's threads; es_lite's workers of one thread")
    parser.add_argument("--compute", default="auto", choices=("auto", "bf16", "fp32"), help="es_lite's type; auto: the plan's")
    parser.add_argument("--kinds", nargs="+", default=["lowrank", "gaussian"], choices=("lowrank", "gaussian", "rademacher"))
    parser.add_argument("--plain-members", type=int, default=4, help="of a turn of the plain loop, whose rate they do not change")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args(words)
    population = arguments.population or (32 if arguments.rate else 30 if arguments.shares else 16)
    if population < 2 or population % 2 or min(arguments.turns, arguments.plain_members) < 1:
        parser.error("--population must be even, and --turns and --plain-members at least 1")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(f"{provenance('benchmark.py', ['generation', *words])}\n", flush=True)
    new_tokens = 1 + DECODED if arguments.rate else arguments.new_tokens
    load = Load(
        arguments.model.expanduser(), population, arguments.prompts, arguments.prompt_tokens, new_tokens, arguments.compute
    )
    weights = f"`{load.model.name}`" if load.model.exists() else "random weights of SmolLM2-135M's shape"
    if arguments.llama:
        _llama.measure(arguments.prompt_tokens, arguments.new_tokens, arguments.turns)
        return
    print(
        f"{weights}: N = {population}, {load.prompts} prompts of {load.prompt_tokens} tokens, {load.new_tokens} new tokens; "
        f"{os.getloadavg()[0]:.1f} processes were running before\n",
        flush=True,
    )
    if arguments.rate:
        rate(load, arguments.turns)
    elif arguments.shares:
        shares(load, arguments.kinds[0], arguments.turns, arguments.threads)
    else:
        compared(load, arguments.kinds, arguments.turns, arguments.plain_members, arguments.threads)
