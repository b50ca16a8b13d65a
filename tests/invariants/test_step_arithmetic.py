"""A step moves the weights as the papers' formulas say, computed here in float64, element by element."""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import plain
import pytest
from journals import documents_of, write_documents
from plain import EVERY_KIND, KINDS
from support import FITNESSES, RECIPE, ROOT, TINY, finished_run, replayed, tensors, write_reward_recipe
from transformers import AutoConfig

from es_lite.algorithm.formats import NO_SCALES
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.kinds import NoiseKind, kind_of
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.algorithm.noise.place import Place
from es_lite.algorithm.record import Record
from es_lite.algorithm.shaping import utilities
from es_lite.model.configuration import configuration
from es_lite.model.layout import Factors, Layout, Tensor, skeleton
from es_lite.model.origin import Origin
from es_lite.weights.parts import Part

SCORES = [-3.25, -3.5, -2.0, -9.75, -3.0, -1.25, -3.5, -2.75]
GROUPS = (Factors(r"norm", 0.5, 3.0), Factors(r"mlp\.(up|down)", 2.0, 0.25), Factors(r"q_proj", 0.0, 0.0))
SIZES = {
    "vocab_size": 90,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
}
ALONE = Threads(1)


@dataclass(frozen=True)
class Formula:
    """A step with these settings, as the papers have it."""

    seed: int = 2**63 + 12345
    step: int = 6
    sigma: float = 0.04
    alpha: float = 0.7
    shaping: str = "zscore"
    scale: str = "nes"
    antithetic: bool = True
    weight_decay: float = 0.02
    anchor: float = 0.0
    groups: tuple[Factors, ...] = ()
    kind: NoiseKind = gaussian

    def record(self, scores: list[float]) -> Record:
        """The program's record of the step."""
        return Record.from_utilities(
            self.step,
            utilities(np.array(scores), self.shaping),
            seed=self.seed,
            noise=self.kind,
            sigma=self.sigma,
            alpha=self.alpha,
            scale=self.scale,
            antithetic=self.antithetic,
            weight_decay=self.weight_decay,
            anchor=self.anchor,
        )

    def moved(
        self,
        theta: np.ndarray,
        name: str,
        shape: tuple[int, ...],
        number: int,
        scores: list[float],
        theta_0: np.ndarray | float = 0.0,
    ) -> np.ndarray:
        """θ + α (or α/σ) · 1/N Σ w_j ε_j - α λ θ, or - α λ (θ - θ₀), in float64, with σ and α of the tensor's group.

        shape: the tensor's; number: its position among the model's parameters.
        """
        group = next((g for g in self.groups if re.search(g.pattern, name)), Factors("", 1, 1))
        alpha, sigma = self.alpha * group.alpha, self.sigma * group.sigma
        utilities = {"zscore": zscores, "rank": ranks}[self.shaping](scores)
        gradient = np.zeros(theta.size)
        for member, utility in enumerate(utilities):
            pair, sign = (member // 2, (1, -1)[member % 2]) if self.antithetic else (member, 1)
            gradient += utility * sign * self.noise(pair, number, shape) / len(scores)
        step_size = 0.0 if alpha == 0 else alpha / sigma if self.scale == "nes" else alpha
        pull = self.weight_decay * theta + self.anchor * (theta - theta_0)
        return theta + step_size * gradient - alpha * pull

    def noise(self, pair: int, number: int, shape: tuple[int, ...]) -> np.ndarray:
        """ε of a tensor; a matrix's is A Bᵀ/√r if the noise is low-rank, from numbers that are drawn for A, then for B."""
        place, rank = Place(self.seed, self.step, pair, number), self.kind.RANK
        if not rank or len(shape) != 2:
            kind = gaussian if rank else self.kind
            return kind.epsilon(place, shape, 0, math.prod(shape)).astype(np.float64)
        drawn = gaussian.epsilon(place, (), 0, sum(shape) * rank).astype(np.float64).reshape(-1, rank)
        return (drawn[: shape[0]] @ drawn[shape[0] :].T / math.sqrt(rank)).ravel()


def zscores(scores: list[float]) -> list[float]:
    """EA4LLM, algorithm 1; a score that is not finite does not count."""
    kept = [r for r in scores if math.isfinite(r)]
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((r - mean) ** 2 for r in kept) / len(kept))
    return [(r - mean) / (std + 1e-8) if math.isfinite(r) else 0.0 for r in scores]


def ranks(scores: list[float]) -> list[float]:
    """-1 for the lowest score to 1 for the highest; equal ones share the mean of their ranks."""
    kept = [r for r in scores if math.isfinite(r)]

    def rank(r: float) -> float:
        return sum(other < r for other in kept) + (sum(other == r for other in kept) - 1) / 2

    return [2 * rank(r) / (len(kept) - 1) - 1 if math.isfinite(r) else 0.0 for r in scores]


def layout_of(groups: tuple[Factors, ...] = (), nes: bool = False, **sizes: int) -> Layout:
    return Layout.of(skeleton(AutoConfig.for_model("qwen3", **SIZES | sizes)), groups, nes)


def initial(tensor: Tensor) -> np.ndarray:
    return 0.3 * np.random.default_rng(tensor.size).standard_normal(tensor.size, np.float32)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@EVERY_KIND
@pytest.mark.parametrize("shaping", ["zscore", "rank"])
@pytest.mark.parametrize("scale", ["standard", "nes"])
@pytest.mark.parametrize("antithetic", [False, True], ids=["members", "antithetic"])
@pytest.mark.parametrize("groups", [(), GROUPS], ids=["alike", "groups"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.02], ids=["", "decay"])
def test_a_step_is_the_papers_formula(noise, shaping, scale, antithetic, groups, weight_decay):
    formula = Formula(shaping=shaping, scale=scale, antithetic=antithetic, groups=groups, weight_decay=weight_decay, kind=noise)
    for scores in (SCORES, [*SCORES[:3], math.nan, *SCORES[4:]]):
        record = formula.record(scores)
        for number, tensor in enumerate(layout_of(groups, scale == "nes").tensors):
            theta = initial(tensor)
            found = theta.copy()
            Part(tensor, 0, found).advance([record], ALONE)
            assert found.dtype == np.float32
            if "q_proj" in tensor.name and groups:
                assert np.array_equal(found, theta)
                continue
            assert (
                relative_error(found, formula.moved(theta.astype(np.float64), tensor.name, tensor.shape, number, scores)) < 1e-6
            )
            # The movement alone, from θ = 0, which does not hide it.
            movement = np.zeros(tensor.size, np.float32)
            Part(tensor, 0, movement).advance([record], ALONE)
            assert (
                relative_error(movement, formula.moved(np.zeros(tensor.size), tensor.name, tensor.shape, number, scores)) < 1e-6
            )


@EVERY_KIND
@pytest.mark.parametrize("groups", [(), GROUPS], ids=["alike", "groups"])
def test_an_anchored_step_decays_towards_theta_0(noise, groups):
    formula = Formula(weight_decay=0.0, anchor=0.3, scale="standard", groups=groups, kind=noise)
    record = formula.record(SCORES)
    for number, tensor in enumerate(layout_of(groups).tensors):
        theta_0 = initial(tensor)
        theta = theta_0 + np.float32(0.1) * initial(replace(tensor, shape=(tensor.size + 1,)))[1:]
        found = theta.copy()
        Part(tensor, 0, found).advance([record], ALONE, lambda _, start, count, values=theta_0: values[start : start + count])
        wide = theta.astype(np.float64), tensor.name, tensor.shape, number, SCORES
        expected = formula.moved(*wide, theta_0)
        if "q_proj" in tensor.name and groups:
            assert np.array_equal(found, theta)
        else:
            assert relative_error(found - theta, expected - theta) < 1e-5
            assert relative_error(expected - theta, replace(formula, anchor=0.0).moved(*wide) - theta) > 1e-3


def test_consecutive_steps_each_have_their_own_sizes_and_noise():
    """Even if every step's noise is of another kind."""
    rng = np.random.default_rng(0)
    formulas = [
        Formula(step=t, alpha=0.7 * 0.5**t, sigma=0.04 * 0.9**t, groups=GROUPS, kind=noise)
        for t, noise in enumerate(KINDS.values())
    ]
    steps = [(formula, rng.standard_normal(8).tolist()) for formula in formulas]
    history = [formula.record(scores) for formula, scores in steps]
    for number, tensor in enumerate(layout_of(GROUPS, nes=True).tensors):
        theta = initial(tensor)
        expected = theta.astype(np.float64)
        for formula, scores in steps:
            expected = formula.moved(expected, tensor.name, tensor.shape, number, scores)
        Part(tensor, 0, theta).advance(history, ALONE)
        assert relative_error(theta, expected) < 1e-6


@EVERY_KIND
def test_steps_at_once_or_one_by_one_or_in_slices_on_any_number_of_threads_give_the_same_bits(noise):
    history = [Formula(step=t, kind=noise).record(np.random.default_rng(t).standard_normal(8).tolist()) for t in range(3)]
    tensor = max(layout_of(GROUPS, nes=True, vocab_size=4001).tensors, key=lambda tensor: tensor.size)
    theta = initial(tensor)
    together = theta.copy()
    Part(tensor, 0, together).advance(history, ALONE)
    assert not np.array_equal(together, theta)

    one_by_one = theta.copy()
    for record in history:
        Part(tensor, 0, one_by_one).advance([record], Threads(2))
    assert one_by_one.tobytes() == together.tobytes()

    sliced = theta.copy()
    for low in range(0, theta.size, 33_333):
        Part(tensor, low, sliced[low : low + 33_333]).advance(history, Threads(2))
    assert sliced.tobytes() == together.tobytes()


@EVERY_KIND
def test_equal_scores_change_nothing_but_for_the_decay(noise):
    tensor = layout_of().tensors[0]
    for weight_decay in (0.0, 0.02):
        formula = Formula(weight_decay=weight_decay, kind=noise)
        theta = initial(tensor)
        before = theta.copy()
        Part(tensor, 0, theta).advance([formula.record([-2.5] * 8)], ALONE)
        assert np.array_equal(theta, before - np.float32(formula.alpha * weight_decay) * before)


@EVERY_KIND
def test_weights_move_towards_a_better_member_and_away_from_a_worse_one(noise):
    tensor, formula = layout_of().tensors[0], Formula(weight_decay=0.0, kind=noise)
    theta = np.zeros(tensor.size, np.float32)
    Part(tensor, 0, theta).advance([formula.record([1.0, 0.0, 0.0, 1.0])], ALONE)
    better, worse = (formula.noise(pair, 0, tensor.shape) for pair in (0, 1))
    assert theta @ better > 0 > theta @ worse


@EVERY_KIND
def test_the_update_is_the_gradient_of_a_linear_score(noise):
    """For scores g·(σε_j) and NES, the expected step is along g: many members find it."""
    number, first = next((i, tensor) for i, tensor in enumerate(layout_of().tensors) if len(tensor.shape) == 2)
    tensor = replace(first, shape=(4, 6))  # few elements need fewer members
    formula = Formula(step=0, alpha=1.0, weight_decay=0.0, kind=noise)
    g = np.random.default_rng(3).standard_normal(tensor.size)
    scores = []
    for pair in range(4000):
        along = float(g @ formula.noise(pair, number, tensor.shape)) * formula.sigma
        scores += [along, -along]
    theta = np.zeros(tensor.size, np.float32)
    Part(tensor, 0, theta).advance([formula.record(scores)], ALONE)
    assert theta @ g / np.linalg.norm(theta) / np.linalg.norm(g) > 0.99
    # The z-score of g·σε is g·ε/|g|, and α/σ · E[(g·ε/|g|) ε] = α/σ · g/|g|.
    assert np.linalg.norm(theta) == pytest.approx(1 / formula.sigma, rel=0.03)


def test_a_journal_of_every_kind_of_noise_replays_with_the_bits_of_plain_numpy(tmp_path: Path) -> None:
    """Of a run that an earlier version made, with other kinds in its records: some tensors have factors, some are frozen."""
    header, *documents = documents_of(ROOT / "tests/fixtures/old_runs/master-bf16/journal.jsonl")
    for document, noise in zip(documents, list(KINDS.values())[1:], strict=False):
        document |= {"kind": noise.NAME} | ({"rank": noise.RANK} if noise.RANK else {})
    journal = tmp_path / "journal.jsonl"
    write_documents(journal, [header, *documents])
    assert {document["kind"] for document in documents} == {"gaussian", "rademacher", "lowrank"}

    found, theta = replayed(journal, tmp_path / "after"), replayed(journal, tmp_path / "before", "--step", "0")
    _, layout = Origin.of_header(header, journal).skeleton()
    for tensor in layout.tensors:
        expected = theta[tensor.name].ravel()
        for document in documents:
            coefficients = np.array(document["coefficients"], np.float32)
            assert document["antithetic"]
            coefficients = (coefficients[::2] - coefficients[1::2]) * np.float32(tensor.coefficient_factor)
            expected, _ = plain.advanced(
                expected,
                NO_SCALES,
                seed=document["seed"],
                step=document["step"],
                tensor=tensor.number,
                pairs=np.arange(coefficients.size),
                coefficients=coefficients,
                decay=np.float32(document["decay"]) * np.float32(tensor.decay_factor),
                noise=kind_of(document["kind"], document.get("rank", 0)),
                shape=tensor.shape,
            )
        assert plain.same_bits(found[tensor.name].ravel(), expected), tensor.name
        assert np.array_equal(expected, theta[tensor.name].ravel()) == ("k_proj" in tensor.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fitness", "tables", "formula"),
    [
        ("logprob", {}, Formula()),
        ("reward", {"es": {"sigma": 0.1, "shaping": "rank"}}, Formula(shaping="rank")),
        (
            "logprob",
            {
                "es": {
                    "population": 5,
                    "antithetic": False,
                    "shaping": "rank",
                    "scale": "nes",
                    "alpha": 1e-3,
                    "weight_decay": 0.5,
                    "groups": [{"pattern": "mlp", "sigma": 2.0, "alpha": 0.5}],
                },
                "noise": {"kind": "lowrank", "rank": 3},
            },
            Formula(shaping="rank", antithetic=False, groups=(Factors("mlp", 2.0, 0.5),), kind=LowRank(3)),
        ),
    ],
    ids=["zscore", "reward-rank", "rank-nes-groups-decay-lowrank"],
)
def test_a_step_of_the_command_moves_the_model_as_the_formula_says(
    tmp_path: Path, fitness: str, tables: dict, formula: Formula
) -> None:
    recipe = FITNESSES[fitness](tmp_path, run={"iterations": 1, "seed": 7}, **tables)
    run = finished_run(recipe, tmp_path / "run")
    scores = json.loads((run / "journal.jsonl").read_text().splitlines()[1])["scores"]
    before, after = replayed(run, tmp_path / "before", "--step", "0"), tensors(run)
    es = RECIPE["es"] | {"scale": "standard", "weight_decay": 0.0} | tables.get("es", {})
    sizes = {name: es[name] for name in ("scale", "sigma", "alpha", "weight_decay")}
    formula = replace(formula, seed=7, step=0, **sizes)
    errors = updates = 0.0
    for number, (name, parameter) in enumerate(skeleton(configuration("", TINY)).named_parameters()):
        theta = before[name].astype(np.float64).ravel()
        expected = formula.moved(theta, name, tuple(parameter.shape), number, scores)
        updates += float(np.sum(np.square(expected - theta)))
        errors += float(np.sum(np.square(after[name].ravel() - expected)))
    assert updates > 0
    assert np.sqrt(errors / updates) < 1e-6


NOTING = """
import json, os

def note(what, prompts, ids, value):
    rewards = [None if prompt.startswith("Item 3:") else value(tokens) for prompt, tokens in zip(prompts, ids)]
    with open(f"{__file__}.{what}.{os.getpid()}", "a") as file:
        file.write(json.dumps([ids, rewards]) + "\\n")
    return rewards

def total(prompts, completion_ids, **_):
    return note("total", prompts, completion_ids, sum)

def tokens(prompts, completion_ids, **_):
    return note("tokens", prompts, completion_ids, len)
"""
"""Reward functions that keep what they paid, a line for each member; one of the prompts does not count."""


@pytest.mark.slow
def test_a_members_score_is_the_mean_of_weighted_rewards_over_the_prompts_that_count(tmp_path: Path) -> None:
    functions = tmp_path / "noting.py"
    functions.write_text(NOTING)
    recipe = write_reward_recipe(
        tmp_path,
        run={"iterations": 1},
        reward={"functions": [f"{functions}:total", f"{functions}:tokens"], "weights": [0.25, -3.0]},
        fitness={"samples": 12},
        eval={"every": 0},
    )
    run = finished_run(recipe, tmp_path / "run")
    paid: dict[str, dict[str, list]] = {"total": {}, "tokens": {}}
    for what, by_completions in paid.items():
        for notes in tmp_path.glob(f"noting.py.{what}.*"):
            by_completions |= {str(ids): rewards for ids, rewards in map(json.loads, notes.read_text().splitlines())}
    assert paid["total"].keys() == paid["tokens"].keys()
    expected = []
    for member, totals in paid["total"].items():
        pairs = [(a, b) for a, b in zip(totals, paid["tokens"][member], strict=True) if a is not None]
        assert len(pairs) == 11
        expected.append(sum(0.25 * a - 3.0 * b for a, b in pairs) / 11)
    scores = json.loads((run / "journal.jsonl").read_text().splitlines()[1])["scores"]
    assert len(set(scores)) == 4 and len(expected) == 5  # the unperturbed model too, in the first step
    assert all(min(abs(score - other) for other in expected) < 1e-12 * abs(score) for score in scores)
