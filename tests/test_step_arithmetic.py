"""A step of known scores moves weights as the papers' formulas say, in float64, element by element."""

import math
import re

import numpy as np
import pytest
from transformers import AutoConfig

from es_lite.algorithm import noise
from es_lite.algorithm import record as records
from es_lite.algorithm.jit import Threads
from es_lite.weights.layout import Layout, Multipliers, layout, skeleton
from es_lite.weights.stored import Part

SEED, STEP, SIGMA, ALPHA = 2**63 + 12345, 6, 0.04, 0.7
SCORES = [-3.25, -3.5, -2.0, -9.75, -3.0, -1.25, -3.5, -2.75]
GROUPS = (Multipliers(r"norm", 0.5, 3.0), Multipliers(r"mlp\.(up|down)", 2.0, 0.25), Multipliers(r"q_proj", 0.0, 0.0))
TINY = {
    "vocab_size": 90,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
}


def layout_of(groups=(), nes: bool = False) -> Layout:
    return layout(skeleton(AutoConfig.for_model("qwen3", **TINY)), groups, nes)


def zscores(scores: list[float]) -> list[float]:
    """EA4LLM, algorithm 1; a score that is not finite is left out."""
    kept = [r for r in scores if math.isfinite(r)]
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((r - mean) ** 2 for r in kept) / len(kept))
    return [(r - mean) / (std + 1e-8) if math.isfinite(r) else 0.0 for r in scores]


def ranks(scores: list[float]) -> list[float]:
    """-1 for the least to 1 for the greatest; equal ones share the mean of their places."""
    kept = [r for r in scores if math.isfinite(r)]

    def place(r: float) -> float:
        return sum(other < r for other in kept) + (sum(other == r for other in kept) - 1) / 2

    return [2 * place(r) / (len(kept) - 1) - 1 if math.isfinite(r) else 0.0 for r in scores]


def moved(theta, tensor, number, scores, shaping, scale, antithetic, groups, weight_decay, alpha=ALPHA, sigma=SIGMA, step=STEP):
    """θ + α (or α/σ) · 1/N Σ w_j ε_j - α λ θ, float64, with the σ and α of the tensor's group."""
    group = next((g for g in groups if re.search(g.pattern, tensor.name)), Multipliers("", 1, 1))
    alpha, sigma = alpha * group.alpha, sigma * group.sigma
    weights = {"zscore": zscores, "rank": ranks}[shaping](scores)
    gradient = np.zeros(theta.size)
    for member, weight in enumerate(weights):
        pair, sign = (member // 2, (1, -1)[member % 2]) if antithetic else (member, 1)
        epsilon = noise.gaussian(SEED, step, pair, number, 0, theta.size).astype(np.float64)
        gradient += weight * sign * epsilon / len(scores)
    step_size = 0.0 if alpha == 0 else alpha / sigma if scale == "nes" else alpha
    return theta + step_size * gradient - alpha * weight_decay * theta


def start(tensor) -> np.ndarray:
    return 0.3 * np.random.default_rng(tensor.size).standard_normal(tensor.size, np.float32)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("shaping", ["zscore", "rank"])
@pytest.mark.parametrize("scale", ["standard", "nes"])
@pytest.mark.parametrize("antithetic", [False, True], ids=["members", "antithetic"])
@pytest.mark.parametrize("groups", [(), GROUPS], ids=["alike", "groups"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.02], ids=["", "decay"])
def test_a_step_is_the_papers_formula(shaping, scale, antithetic, groups, weight_decay):
    for scores in (SCORES, [*SCORES[:3], math.nan, *SCORES[4:]]):
        record = records.make(
            STEP,
            scores,
            seed=SEED,
            sigma=SIGMA,
            alpha=ALPHA,
            shaping_kind=shaping,
            scale=scale,
            antithetic=antithetic,
            weight_decay=weight_decay,
        )
        for number, tensor in enumerate(layout_of(groups, scale == "nes").tensors):
            theta = start(tensor)
            formula = (tensor, number, scores, shaping, scale, antithetic, groups, weight_decay)
            expected = moved(theta.astype(np.float64), *formula)
            found = theta.copy()
            Part(tensor, 0, found).advance([record], Threads(1))
            assert found.dtype == np.float32
            if "q_proj" in tensor.name and groups:
                assert np.array_equal(found, theta)
                continue
            assert relative_error(found, expected) < 1e-6
            # The movement itself, where θ is 0 and does not hide it.
            step = np.zeros(tensor.size, np.float32)
            Part(tensor, 0, step).advance([record], Threads(1))
            assert relative_error(step, moved(np.zeros(tensor.size), *formula)) < 1e-6


def make(step: int, scores: list[float], **changes) -> records.Record:
    options = {
        "seed": SEED,
        "sigma": SIGMA,
        "alpha": ALPHA,
        "shaping_kind": "zscore",
        "scale": "nes",
        "antithetic": True,
        "weight_decay": 0.02,
    }
    return records.make(step, scores, **options | changes)


def test_steps_follow_one_another_each_with_its_own_sizes_and_noise():
    rng = np.random.default_rng(0)
    steps = [(t, rng.standard_normal(8).tolist(), ALPHA * 0.5**t, SIGMA * 0.9**t) for t in range(4)]
    history = [make(t, scores, alpha=alpha, sigma=sigma) for t, scores, alpha, sigma in steps]
    for number, tensor in enumerate(layout_of(GROUPS, nes=True).tensors):
        theta = start(tensor)
        expected = theta.astype(np.float64)
        for t, scores, alpha, sigma in steps:
            expected = moved(expected, tensor, number, scores, "zscore", "nes", True, GROUPS, 0.02, alpha, sigma, t)
        Part(tensor, 0, theta).advance(history, Threads(1))
        assert relative_error(theta, expected) < 1e-6


def test_steps_at_once_or_one_by_one_in_slices_or_threads_have_the_same_bits():
    history = [make(t, np.random.default_rng(t).standard_normal(8).tolist()) for t in range(3)]
    tensor = max(
        layout(skeleton(AutoConfig.for_model("qwen3", **TINY | {"vocab_size": 4001})), GROUPS, True).tensors, key=lambda t: t.size
    )
    theta = start(tensor)
    together = theta.copy()
    Part(tensor, 0, together).advance(history, Threads(1))
    assert not np.array_equal(together, theta)

    one_by_one = theta.copy()
    for record in history:
        Part(tensor, 0, one_by_one).advance([record], Threads(2))
    assert one_by_one.tobytes() == together.tobytes()

    sliced = theta.copy()
    for low in range(0, theta.size, 33_333):
        Part(tensor, low, sliced[low : low + 33_333]).advance(history, Threads(2))
    assert sliced.tobytes() == together.tobytes()


def test_equal_scores_move_nothing_but_the_decay():
    tensor = layout_of().tensors[0]
    for weight_decay in (0.0, 0.02):
        theta = start(tensor)
        before = theta.copy()
        Part(tensor, 0, theta).advance([make(0, [-2.5] * 8, weight_decay=weight_decay)], Threads(1))
        assert np.array_equal(theta, before - np.float32(ALPHA * weight_decay) * before)


def test_a_better_member_is_moved_towards_and_a_worse_one_away_from():
    tensor = layout_of().tensors[0]
    theta = np.zeros(tensor.size, np.float32)
    Part(tensor, 0, theta).advance([make(STEP, [1.0, 0.0, 0.0, 1.0], weight_decay=0.0)], Threads(1))
    better, worse = (noise.gaussian(SEED, STEP, pair, 0, 0, theta.size) for pair in (0, 1))
    assert theta @ better > 0 > theta @ worse


def test_the_update_is_the_gradient_of_a_linear_score():
    """For scores g·(σε_j) and NES, the expected step is along g: many members find it."""
    tensor = next(tensor for tensor in layout_of().tensors if tensor.name == "model.norm.weight")
    g = np.random.default_rng(3).standard_normal(tensor.size)
    members = 8000
    scores = []
    for pair in range(members // 2):
        along = float(g @ noise.gaussian(SEED, 0, pair, tensor.number, 0, tensor.size)) * SIGMA
        scores += [along, -along]
    theta = np.zeros(tensor.size, np.float32)
    Part(tensor, 0, theta).advance([make(0, scores, weight_decay=0.0, alpha=1.0)], Threads(1))
    assert theta @ g / np.linalg.norm(theta) / np.linalg.norm(g) > 0.99
    # The z-score of g·σε is g·ε/|g|, and α/σ · E[(g·ε/|g|) ε] = α/σ · g/|g|.
    assert np.linalg.norm(theta) == pytest.approx(1 / SIGMA, rel=0.03)
