"""Scoring in this process: its FLOP/s, and low-rank noise compared with plain inference of the same model."""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from _measuring import HEADER, StepLoad, row, seconds_of
from torch.nn.functional import linear

from es_lite import system
from es_lite.data.batch import Batch
from es_lite.engine.worker import DTYPES
from es_lite.fitness.kinds import fitness_of
from es_lite.model.configuration import configuration
from es_lite.model.layout import skeleton
from es_lite.model.origin import Origin
from es_lite.planning.plan import Plan
from es_lite.recipe import Recipe
from es_lite.scoring.heads import VOCABULARY_BLOCK
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.logsumexp import RunningLogSumExp
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation
from es_lite.tables import DataTable, ESTable, FitnessTable, ModelTable, NoiseTable, RunTable, WorkersTable
from es_lite.weights.parts import Part, slices
from es_lite.weights.working_copy import WorkingCopy, allocate

RANKS = (1, 4)
"""Of the low-rank noise that is compared with plain inference."""

TILE_ROWS = (32, 64, 128, 256, 512, 1024, 2048)
"""Rows that a linear map is measured with."""

COLD_MATRICES = 40
"""Weights that are multiplied one after the other: of a model's size, no cache holds them."""


@dataclass
class Loaded:
    """A model with random weights in bf16, as a worker holds it, and samples of random tokens."""

    load: StepLoad
    lanes: Lanes
    tile_members: int = 1

    def __post_init__(self) -> None:
        origin = Origin(path="", config=self.load.config, seed=0, groups=(), nes=False, shared_noise=False)
        self.model, self.layout = origin.skeleton()
        self.copy = WorkingCopy(self.layout, "bf16", allocate(self.layout, "bf16"))
        theta_0 = origin.source(self.model, self.layout, self.lanes.threads)
        for tensor in self.layout.tensors:
            for start, count in slices(tensor):
                self.copy.write(Part(tensor, start, theta_0.read(tensor, start, count)), self.lanes.threads)
        self.compute = DTYPES[system.compute_dtype("auto")]
        vocabulary = min(8192, self.model.config.get_text_config().vocab_size)
        shape = self.load.samples, self.load.length
        tokens = np.random.default_rng(0).integers(0, vocabulary, shape).astype(np.int32)
        self.batch = Batch(tokens, np.full(self.load.samples, self.load.length, np.int32))

        micro_batch = min(self.load.micro_batch, self.load.samples)
        options = {"tile_members": self.tile_members}
        self.scorer = PerturbedModel(self.model, self.layout, self.copy, self.compute, self.lanes, micro_batch, **options)
        self.pass_samples = -(-self.load.samples // micro_batch) * micro_batch

    def scores(self, perturbations: Sequence[Perturbation]) -> np.ndarray:
        """Log-probabilities of the samples under each member."""
        return self.scorer.log_probabilities(perturbations, self.batch, self.pass_samples)

    def plain(self) -> Callable[[], np.ndarray]:
        """Plain inference of the same tokens: Hugging Face's body on micro-batches, es_lite's log-sum-exp of the logits.

        It returns what `scores` returns for the unperturbed model, but for each token.
        """
        model = skeleton(configuration("", self.load.config))
        state = {}
        for tensor in self.layout.tensors:
            bits = torch.from_numpy(np.array(self.copy.part(tensor).data)).view(torch.bfloat16)
            state[tensor.name] = bits.view(tensor.shape).to(self.compute)
        model.load_state_dict(state, strict=False, assign=True)  # a tied head's name is missing
        model.tie_weights()
        weights = model.get_output_embeddings().weight
        ids, each = torch.from_numpy(self.batch.tokens.astype(np.int64)), self.load.micro_batch

        def infer() -> np.ndarray:
            with torch.inference_mode():
                states = [model.base_model(input_ids=part, use_cache=False)[0][:, :-1] for part in ids.split(each)]
                hidden = torch.cat(states).flatten(0, 1)
                run = RunningLogSumExp(self.batch.tokens[:, 1:].reshape(-1).copy())
                for first in range(0, weights.shape[0], VOCABULARY_BLOCK):
                    run.update(linear(hidden, weights[first : first + VOCABULARY_BLOCK]), first, self.lanes.threads)
                return run.log_probabilities()

        return infer


def scoring(arguments: argparse.Namespace) -> None:
    """Matrix FLOP/s of scoring (2 a weight and token, without attention), and its share of the GEMM rate of 2048×1024×4096."""
    print(HEADER)
    load = dataclasses.replace(StepLoad.of(arguments), samples=arguments.tokens // 256, length=256)
    loaded = Loaded(load, Lanes(1, arguments.threads))
    a, b = torch.randn(2048, 1024, dtype=loaded.compute), torch.randn(4096, 1024, dtype=loaded.compute)
    flops = 2 * loaded.layout.size * load.samples * (load.length - 1)
    cases = {
        "unperturbed": UNPERTURBED,
        "one member": Perturbation(1, 0, 0, 1e-3, (1,)),
        "an antithetic pair": Perturbation(1, 0, 0, 1e-3, (1, -1)),
    }
    gemm_flops = 2 * 2048 * 1024 * 4096
    for name, perturbation in cases.items():
        rates, ratios = [], []
        for _ in range(arguments.repeats):
            gemm = gemm_flops / statistics.median(seconds_of(lambda: linear(a, b), 20))
            rates.append(perturbation.members * flops / _seconds(partial(loaded.scores, [perturbation])) / 1e9)
            ratios.append(rates[-1] * 1e9 / gemm)
        print(row(f"{name}, {arguments.tokens} tokens a member", rates, "GFLOP/s"))
        print(row(f"{name}, share of the GEMM rate ({gemm / 1e9:.0f} GFLOP/s)", ratios, ""))


def plain(arguments: argparse.Namespace) -> None:
    """Speed of scoring compared with plain inference for as many members: low-rank noise in the plan's tiles, and gaussian."""
    print(HEADER)
    load = StepLoad.of(arguments)
    loaded = Loaded(load, Lanes(1, arguments.threads), tile_members_of(load))
    infer = loaded.plain()
    cases: dict[str, Callable[[], object]] = {"plain inference": lambda: [infer() for _ in range(load.population)]}
    kinds = {f"low rank {rank}": ("lowrank", rank) for rank in RANKS} | {"gaussian": ("gaussian", 0)}
    for name, kind in kinds.items():
        pairs = [Perturbation(1, 0, pair, 1e-3, (1, -1), *kind) for pair in range(load.population // 2)]
        cases[name] = partial(loaded.scores, pairs)
    seconds = in_turns(cases, arguments.repeats)
    for name, values in seconds.items():
        print(row(f"{name}, {load.population} members", values, "s"))
    print(row("members in a tile of low-rank noise", [loaded.tile_members], ""))
    for name in kinds:
        ratios = [base / own for base, own in zip(seconds["plain inference"], seconds[name], strict=True)]
        print(row(f"{name}, speed over plain inference", ratios, "times"))


def tiles(arguments: argparse.Namespace) -> None:
    """FLOP/s of one linear map of the model by the rows that are multiplied together, with weights that come from memory."""
    print(HEADER)
    config = configuration("", arguments.config).get_text_config()
    width, inner = config.hidden_size, config.intermediate_size
    compute = DTYPES[system.compute_dtype("auto")]
    torch.set_num_threads(arguments.threads)
    matrices = [torch.randn(inner, width, dtype=compute) for _ in range(COLD_MATRICES)]
    cases = {rows: partial(_all_products, torch.randn(rows, width, dtype=compute), matrices) for rows in TILE_ROWS}
    for rows, seconds in in_turns(cases, arguments.repeats).items():
        flops = 2 * rows * width * inner * len(matrices)
        print(row(f"{rows} rows", [flops / took / 1e9 for took in seconds], "GFLOP/s"))


def tile_members_of(load: StepLoad) -> int:
    """Members that the plan lets share a tile under low-rank noise."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            run=RunTable(dir=folder),  # whose size is counted
            model=ModelTable(config=load.config),
            data=DataTable(tokenizer="bpe"),
            fitness=FitnessTable(samples=load.samples, max_length=load.length, micro_batch=load.micro_batch),
            es=ESTable(population=load.population, antithetic=True),
            noise=NoiseTable(kind="lowrank"),
            workers=WorkersTable(count=1, threads=1),
        )
        model, layout = Origin.of_recipe(recipe).skeleton()
        return Plan.of(recipe, fitness_of("logprob"), model.config, layout).execution.tile_members


def _all_products(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> None:
    for matrix in matrices:
        linear(x, matrix)


def in_turns(cases: Mapping[Any, Callable[[], object]], repeats: int) -> dict[Any, list[float]]:
    """Seconds of each case, which take turns; the first turn, which warms up, is not counted."""
    turns = [[_seconds(work) for work in cases.values()] for _ in range(repeats + 1)]
    return {case: list(seconds) for case, seconds in zip(cases, zip(*turns[1:], strict=True), strict=True)}


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
