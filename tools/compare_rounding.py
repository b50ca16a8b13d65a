"""Training without a master: the held-out score over the steps, compared with an fp32 master and with plain rounding.

    python tools/compare_rounding.py [--steps 300] [--seeds 3] [--out benchmarks/rounding]

A small model of bytes is trained in five ways with the same arithmetic and seeds: with an fp32 master; without one, the bf16
or int8 weights themselves being updated by stochastic rounding; and the same with rounding to nearest, which es_lite does not
offer. Updates are a fraction of a weight's resolution. Writes OUT.png and OUT.json, prints a table.
"""

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from es_lite import system
from es_lite.algorithm.formats import Storage
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.record import Record
from es_lite.algorithm.shaping import utilities
from es_lite.data import batch
from es_lite.data.corpus import Corpus, split
from es_lite.data.texts import BUILTIN, Texts
from es_lite.model.configuration import configuration
from es_lite.model.layout import Layout, skeleton
from es_lite.model.random_weights import Random
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation
from es_lite.weights import working_copy
from es_lite.weights.parts import Part

MODEL = {
    "model_type": "qwen3",
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}
POPULATION, SIGMA, ALPHA, SAMPLES, LENGTH, EVERY = 24, 2e-2, 5e-4, 16, 32, 10

WAYS: dict[str, tuple[Storage, Storage, bool]] = {
    "fp32 master, bf16 weights": ("fp32", "bf16", True),
    "bf16, stochastic": ("bf16", "bf16", True),
    "int8, stochastic": ("int8", "int8", True),
    "bf16, to nearest": ("bf16", "bf16", False),
    "int8, to nearest": ("int8", "int8", False),
}
"""What is stored, what scoring uses, and whether the update is rounded stochastically."""

COLOURS = ("#37352f", "#0b6e99", "#d9730d", "#0b6e99", "#d9730d")
THREADS = Threads(1)


def corpus() -> tuple[Corpus, Corpus]:
    """The bytes of the built-in text in samples of LENGTH: to train on, and held out."""
    lines = [line for document in Texts(BUILTIN, 6000) for line in document]
    tokens = np.frombuffer("".join(lines).encode(), np.uint8).astype(np.int32)
    starts = np.arange(tokens.size // LENGTH + 1, dtype=np.int64) * LENGTH
    return split(Corpus(tokens[: starts[-1]], starts), 0.1)


def nearest(part: Part, record: Record) -> Part:
    """The update without stochastic rounding: computed in float32, then rounded to nearest."""
    whole = Part(part.tensor, 0, part.float32().copy())
    whole.advance([record], THREADS)
    part.put(whole.data, THREADS)
    return part


def path(way: str, seed: int, steps: int) -> list[float]:
    """The held-out score before the first step and after each EVERY steps."""
    storage, scored_from, stochastic = WAYS[way]
    model = skeleton(configuration("", MODEL))
    layout = Layout.of(model)
    theta_0 = Random(model, layout, seed, THREADS)
    store = [Part.empty(tensor, 0, tensor.size, storage) for tensor in layout.tensors]
    descriptor = working_copy.allocate(layout, scored_from)
    copy = working_copy.WorkingCopy(layout, scored_from, descriptor)
    for part in store:
        part.put(theta_0.read(part.tensor, 0, part.tensor.size), THREADS)
        copy.write(part, THREADS)
    scorer = PerturbedModel(model, layout, copy, torch.float32, Lanes(1, 1), SAMPLES)
    train_set, held_out = corpus()
    test = batch.pack(held_out, batch.spread(held_out, 64))

    def evaluate() -> float:
        return float(scorer.log_probabilities([UNPERTURBED], test, len(test)).mean())

    scores = [evaluate()]
    for step in range(steps):
        samples = batch.pack(train_set, batch.draw(len(train_set), SAMPLES, seed, step))
        pairs = [Perturbation(seed, step, pair, SIGMA, (1, -1)) for pair in range(POPULATION // 2)]
        record = Record.from_utilities(
            step,
            utilities(scorer.log_probabilities(pairs, samples, SAMPLES).mean(axis=1), "zscore"),
            seed=seed,
            noise=gaussian,
            sigma=SIGMA,
            alpha=ALPHA,
            scale="standard",
            antithetic=True,
        )
        for part in store:
            if stochastic:
                part.advance([record], THREADS)
            else:
                nearest(part, record)
            copy.write(part, THREADS)
        if (step + 1) % EVERY == 0:
            scores.append(evaluate())
    os.close(descriptor)
    return scores


def all_paths(seeds: int, steps: int) -> dict[str, list[list[float]]]:
    """`path` of every way and seed, as many at a time as there are cores."""
    jobs = [(way, seed) for way in WAYS for seed in range(seeds)]
    with ProcessPoolExecutor(system.cores(), multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(path, *zip(*jobs, strict=True), [steps] * len(jobs)))
    return {way: found[i * seeds : (i + 1) * seeds] for i, way in enumerate(WAYS)}


def draw(paths: dict[str, list[list[float]]], out: Path) -> None:
    steps = EVERY * np.arange(len(next(iter(paths.values()))[0]))
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(9, 5.5), constrained_layout=True)
    for (way, runs), colour in zip(paths.items(), COLOURS, strict=True):
        style = "--" if "nearest" in way else "-"
        gains = np.array(runs) - np.array(runs)[:, :1]
        axes.plot(steps, gains.mean(axis=0), style, color=colour, label=way, linewidth=2)
        for gain in gains if len(runs) > 1 else ():
            axes.plot(steps, gain, style, color=colour, alpha=0.3, linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("gain of the held-out score, nats a byte")
    axes.set_title("With a master and without: the mean, and each seed", loc="left", fontweight="bold")
    axes.legend(frameon=False)
    figure.savefig(out, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/rounding"), help="without a suffix")
    arguments = parser.parse_args(argv)
    if arguments.steps < EVERY or arguments.seeds < 1:
        parser.error(f"--steps is at least {EVERY}, --seeds at least 1")
    paths = all_paths(arguments.seeds, arguments.steps)
    draw(paths, arguments.out.with_suffix(".png"))
    found = {"command": " ".join(["tools/compare_rounding.py", *(argv or sys.argv[1:])]), "box": system.box(), "every": EVERY}
    arguments.out.with_suffix(".json").write_text(json.dumps(found | {"paths": paths}, indent=1) + "\n")
    print("| way | gain, mean over seeds | of the fp32 master's |\n|---|---|---|")
    gains = {way: float(np.mean([run[-1] - run[0] for run in runs])) for way, runs in paths.items()}
    for way, gain in gains.items():
        print(f"| {way} | {gain:+.4f} | {gain / next(iter(gains.values())):.0%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
