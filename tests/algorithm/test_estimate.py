"""What scores say of a step, on a quadratic model whose gradient and curvature are known."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from es_lite.algorithm.estimate import FOLDS, Averages, Estimate, estimate, tied
from es_lite.algorithm.record import pair_coefficients
from es_lite.algorithm.shaping import means, utilities

DIMENSIONS, PAIRS, ITEMS, SIGMA = 40, 12, 6, 0.02


class Quadratic:
    """Scores r_b(θ) = g_b·θ - ½ Σ h θ², at θ = 0: items have gradients of their own around a common one."""

    def __init__(self, seed: int, dimensions: int = DIMENSIONS) -> None:
        self.random = np.random.default_rng(seed)
        self.gradient = 0.3 * self.random.standard_normal(dimensions)
        self.curvatures = self.random.uniform(0.5, 2.0, dimensions)
        self.apart = 1.0
        """How far items are from each other."""

    def step(self, antithetic: bool) -> tuple[np.ndarray, np.ndarray]:
        """Scores [N, items] of a population on new items, and ε, [pairs, dimensions]."""
        self.items = items = self.gradient + self.apart * self.random.standard_normal((ITEMS, self.gradient.size))
        noise = self.random.standard_normal((PAIRS, self.gradient.size))
        members = SIGMA * (np.repeat(noise, 2, axis=0) * np.tile([[1], [-1]], (PAIRS, 1)) if antithetic else noise)
        return members @ items.T - (0.5 * members**2 @ self.curvatures)[:, None], noise


def unit(antithetic: bool, shaping: str = "zscore") -> Callable[[np.ndarray], np.ndarray]:
    """c_p at α = 1, of scores."""

    def of(scores: np.ndarray) -> np.ndarray:
        shaped = utilities(means(scores), shaping)
        return pair_coefficients(shaped / len(shaped), antithetic)

    return of


def of_all() -> Averages:
    """The mean of all steps, drawn towards nothing."""
    averages = Averages()
    averages.FEWEST, averages.EXPECTED_WITHIN = math.inf, 1e9  # type: ignore[misc]
    return averages


def many(
    model: Quadratic, antithetic: bool, steps: int = 2000, shaping: str = "zscore"
) -> tuple[Averages, list[float], list[float], list[float]]:
    """The estimates of many steps, and what their steps really gain for each unit of α, on all items, cost, and seem to gain."""
    averages, gains, costs, seeming = of_all(), [], [], []
    for _ in range(steps):
        scores, noise = model.step(antithetic)
        found = estimate(scores, unit(antithetic, shaping), SIGMA, antithetic, np.zeros(ITEMS))
        averages.add(found)
        moved = unit(antithetic, shaping)(scores) @ noise
        gains.append(float(model.gradient @ moved))
        costs.append(float(0.5 * model.curvatures @ moved**2))
        seeming.append(found.slope)
    return averages, gains, costs, seeming


@pytest.mark.parametrize("shaping", ["zscore", "rank"])
@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "members"])
def test_the_gain_on_unseen_items_is_found_without_bias(antithetic: bool, shaping: str):
    """But for what one item less says: of 6, 5 % here."""
    averages, gains, _, seeming = many(Quadratic(1), antithetic, shaping=shaping)
    assert averages.gain == pytest.approx(np.mean(gains), rel=0.08)
    assert np.mean(seeming) > 1.3 * np.mean(gains), "the items of the step itself promise more than there is"


def test_nor_has_it_a_bias_where_few_items_outweigh_the_others():
    """One in ten pulls the other way, ten times as strongly: on the mean of all, steps gain nothing, though most agree."""
    random, averages, count = np.random.default_rng(13), of_all(), 8
    for _ in range(3000):
        along = np.where(random.random(count) < 0.1, -9.0, 1.0)
        d = random.standard_normal(PAIRS)[:, None] * along
        scores = np.stack([d, -d], axis=1).reshape(2 * PAIRS, count)
        averages.add(estimate(scores, unit(True), SIGMA, True))
    assert abs(averages.gain) < 0.1 * averages.slope, "three standard errors"
    assert averages.signal > 0.5, "the share that items agree on in one step, of whichever kind its items are"


def test_the_cost_is_that_of_the_random_part():
    """What a step costs along the gradient of its items is not in it: a small part where there are many more dimensions than
    pairs."""
    averages, _, costs, _ = many(Quadratic(2, 2000), True, 300)
    assert averages.cost == pytest.approx(np.mean(costs), rel=0.05)


def test_the_whole_cost_is_found_where_the_next_step_has_the_same_items():
    """The gradient lies along the greatest curvature here, so that a step costs more than its random part; and items are alike,
    so that no gain is only theirs."""
    model = Quadratic(10, 200)
    model.apart = 0.01
    model.gradient[:3], model.curvatures[:3] = 3.0, 200.0
    averages, costs = of_all(), []
    averages.COSTS, averages.CHANGE = 10**9, 0.0  # type: ignore[misc]
    for _ in range(400):
        scores, noise = model.step(True)
        averages.add(estimate(scores, unit(True), SIGMA, True, np.zeros(ITEMS)))
        moved = 0.03 * unit(True)(scores) @ noise
        costs.append(float(0.5 * model.curvatures @ moved**2))
        then = model.items @ moved - costs[-1]
        averages.compare(estimate(scores + then, unit(True), SIGMA, True, then), 0.03)
    assert averages.excess > 1.5
    assert averages.cost * 0.03**2 == pytest.approx(np.mean(costs), rel=0.1)


def test_what_may_be_rounding_is_not_taken_for_a_cost():
    """A step that is far too small to see its gain."""
    averages = Averages()
    first = Estimate(1.0, gain=1.0, seen=1e-4, agreed=5e-5, scatter=4e-4, squares=0.1, pairs=8, curvature=100.0, centre=-5.0)
    averages.add(first)
    averages.compare(replace(first, centre=-5.0 - 1e-4), 1e-5)
    assert 1 < averages.excess < 1.2


@pytest.mark.parametrize(("share", "excess"), [(1.0, 2.5), (0.4, 1.21)], ids=["all of the gain is real", "a part"])
def test_what_only_the_steps_own_items_gain_is_soon_gained(share: float, excess: float):
    """Of steps that gain three quarters of what they do to first order, and whose random part costs a tenth of that."""
    averages = Averages()
    step = Estimate(slope=1.0, gain=share, seen=1e-9, agreed=5e-10, scatter=4e-9, squares=0.1, pairs=10**9, curvature=100.0)
    for _ in range(100):
        averages.add(replace(step, centre=0.0))
        averages.compare(replace(step, centre=0.01 * 0.75), 0.01)
    assert averages.excess == pytest.approx(excess, abs=0.01)


def test_a_signal_of_few_pairs_is_drawn_towards_what_is_to_be_expected():
    """After one step of eight pairs, which would say 0 or 1 by chance, and after many."""
    for share, first, last in ((0.0, 0.183, 0.02), (0.5, 0.279, 0.445), (1.0, 1.0, 1.0)):
        averages = Averages()
        for step in range(400):
            averages.add(Estimate(slope=1.0, gain=share, seen=1.0, agreed=share, scatter=4.0, squares=1.0, pairs=8))
            if step == 0:
                assert averages.gain == pytest.approx(first, abs=0.001)
        assert averages.gain == pytest.approx(last, abs=0.001)
        assert averages.signal == pytest.approx(share)


def test_without_a_comparison_the_cost_is_that_of_the_random_part():
    averages = Averages()
    first = Estimate(slope=1.0, seen=1e-4, agreed=5e-5, scatter=4e-4, squares=0.1, curvature=100.0)
    averages.add(first)
    averages.compare(first, 0.1)
    assert averages.excess == 1 and averages.cost == pytest.approx(10.0)


def test_the_curvature_is_half_the_trace():
    model = Quadratic(3)
    averages = Averages()
    averages.CHANGE = 0.0  # type: ignore[misc]
    for _ in range(500):
        scores, _ = model.step(True)
        averages.add(estimate(scores, unit(True), SIGMA, True, np.zeros(ITEMS)))
    assert averages.curvature == pytest.approx(0.5 * model.curvatures.sum(), rel=0.03)


def test_the_error_of_the_curvature_is_its_deviation_over_steps():
    for antithetic in (True, False):
        model, found = Quadratic(11), []
        for _ in range(400):
            scores, _ = model.step(antithetic)
            found.append(estimate(scores, unit(antithetic), SIGMA, antithetic, np.zeros(ITEMS)))
        deviation = np.std([one.curvature for one in found])
        assert np.mean([one.curvature_error for one in found]) == pytest.approx(deviation, rel=0.1)


def test_the_error_of_the_curvature_counts_the_items_too():
    """Here the pairs agree on every item, and items do not agree on what a perturbation costs."""
    costs = np.array([1.0, 3.0, 5.0, 7.0])
    scores = np.repeat(np.array([[0.1], [-0.1], [0.2], [-0.2]]), 4, axis=1) - 0.5**2 * costs
    found = estimate(scores, unit(True), 0.5, True, np.zeros(4))
    assert found.curvature == pytest.approx(4.0)
    assert found.curvature_error == pytest.approx(np.std(costs, ddof=1) / 2)


def test_the_error_of_the_curvature_counts_how_it_varies_between_items():
    """By far more than between pairs, here."""
    random, found = np.random.default_rng(12), []
    for _ in range(400):
        curvatures, noise = random.exponential(50.0, ITEMS), random.standard_normal((PAIRS, DIMENSIONS))
        scores = -(SIGMA**2) * np.outer(np.repeat((noise**2).mean(axis=1), 2), curvatures)
        scores += np.repeat(random.standard_normal(PAIRS), 2)[:, None] * np.tile(
            [[1.0], [-1.0]], (PAIRS, 1)
        )  # else all are equal
        found.append(estimate(scores, unit(True), SIGMA, True, np.zeros(ITEMS)))
    deviation = np.std([one.curvature for one in found])
    assert np.mean([one.curvature_error**2 for one in found]) ** 0.5 == pytest.approx(deviation, rel=0.1)
    assert deviation == pytest.approx(50.0 / ITEMS**0.5, rel=0.15)


def test_a_measurement_of_the_curvature_counts_by_the_errors_of_all_so_far():
    """A low one is not believed more because its own error is smaller, as it is where items curve little."""
    averages = Averages()
    averages.CHANGE = 0.0  # type: ignore[misc]
    measured = ((100.0, 3.0), (160.0, 3.0), (40.0, 0.0), (40.0, 0.0))
    for curvature, error in measured:
        averages.add(Estimate(curvature=curvature, curvature_error=error))
    first = 130.0  # both count alike, and leave an error of 9/2
    second = first + (4.5 / (4.5 + 6.0)) * (40.0 - first)  # the errors of three are 6 on average
    left = 4.5 * (1 - 4.5 / 10.5)
    assert averages.curvature == pytest.approx(second + left / (left + 4.5) * (40.0 - second))


@pytest.mark.parametrize(("few", "many"), [(10.0, 5000.0), (5000.0, 10.0)])
def test_a_curvature_that_was_small_soon_follows_one_that_is_large(few: float, many: float):
    averages = Averages()
    for curvature in (few, many, many, many):
        averages.add(Estimate(curvature=curvature, curvature_error=1000.0))
    assert averages.curvature == pytest.approx(many, abs=0.2 * 5000)


def test_the_signal_is_the_share_of_the_variance_that_all_items_would_show():
    """|g|² of |g|² + |noise of an item|²/M."""
    model = Quadratic(4)
    averages, *_ = many(model, True)
    common = float(model.gradient @ model.gradient)
    assert averages.signal == pytest.approx(common / (common + DIMENSIONS / ITEMS), abs=0.02)


def test_items_that_say_nothing_in_common_have_no_signal_on_average():
    random, averages = np.random.default_rng(5), of_all()
    for _ in range(4000):
        scores = random.standard_normal((2 * PAIRS, ITEMS))
        averages.add(estimate(scores, unit(True), SIGMA, True))
    assert abs(averages.signal) < 0.02
    assert abs(averages.gain) < 0.02 * averages.slope


def test_items_that_all_say_the_same_are_nothing_but_signal():
    of_members = np.random.default_rng(6).standard_normal(2 * PAIRS)
    for items in (ITEMS, 5 * FOLDS + 3):
        found = estimate(np.repeat(of_members[:, None], items, axis=1), unit(True), SIGMA, True)
        assert found.agreed == pytest.approx(found.seen, rel=1e-12)
        assert found.gain == pytest.approx(found.slope, rel=1e-12)


def test_by_hand():
    """Two pairs, three items; d = [[1, 2, 3], [-1, 0, 1]]."""
    d = np.array([[1.0, 2, 3], [-1, 0, 1]])
    scores = np.stack([d[0], -d[0], d[1], -d[1]]) + np.array([5.0, 7, 9])
    found = estimate(scores, lambda scores: (scores[::2] - scores[1::2])[:, -1] / 4, 0.1, True, np.array([6.0, 8, 10]))
    assert found.slope == pytest.approx((1.5 * 2 + 0.5 * 0) / 0.1)
    assert found.gain == pytest.approx(((1.5 * 1 - 0.5 * 1) + (1.5 * 2 + 0.5 * 0) + (1.0 * 3 + 0.0 * 1)) / 3 / 0.1)
    assert found.seen == pytest.approx((2**2 + 0) / 2)
    assert found.agreed == pytest.approx(((1 * 2 + 1 * 3 + 2 * 3) / 3 + (0 - 1 + 0) / 3) / 2)
    assert found.scatter == pytest.approx((1 + 4 + 9 + 1 + 0 + 1) / 6)
    assert found.squares == pytest.approx(1.5**2 + 0.5**2)
    assert found.curvature == pytest.approx(1 / 0.1**2)


@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "members"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_member_without_a_finite_score_is_left_out_with_its_pair(antithetic, broken):
    scores, _ = Quadratic(7).step(antithetic)
    coefficients = unit(antithetic)(scores)
    size = 2 if antithetic else 1
    spoiled = scores.copy()
    spoiled[2 * size] = broken
    rest = np.delete(scores, range(2 * size, 3 * size), axis=0)
    found = estimate(spoiled, lambda _: coefficients, SIGMA, antithetic, np.zeros(ITEMS))
    expected = estimate(rest, lambda _: np.delete(coefficients, 2), SIGMA, antithetic, np.zeros(ITEMS))
    for name in ("slope", "gain", "seen", "agreed", "scatter"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12)


def test_an_item_that_does_not_count_for_all_members_is_left_out():
    scores, _ = Quadratic(8).step(True)
    coefficients = unit(True)(scores)
    spoiled = scores.copy()
    spoiled[3, 1] = math.nan
    found = estimate(spoiled, lambda _: coefficients, SIGMA, True, np.zeros(ITEMS))
    assert found == estimate(np.delete(scores, 1, axis=1), lambda _: coefficients, SIGMA, True, np.zeros(ITEMS - 1))


@pytest.mark.parametrize(
    "scores",
    [np.full((4, 3), -12.087), np.full((4, 3), np.nan), np.zeros((4, 1)), np.zeros((2, 3))],
    ids=["equal", "not finite", "one item", "one pair"],
)
def test_nothing_is_said_where_nothing_is_known(scores):
    found = estimate(scores, lambda scores: np.zeros(len(scores) // 2), SIGMA, True)
    assert found == Estimate()
    averages = Averages()
    averages.add(found)
    assert (averages.signal, averages.gain, averages.cost) == (None, 0.0, None)


def test_a_theta_that_cannot_be_scored_tells_no_curvature():
    scores, _ = Quadratic(9).step(True)
    assert estimate(scores, unit(True), SIGMA, True, np.full(ITEMS, np.nan)).curvature is None


def averaged(share: float, pairs: int, steps: int) -> Averages:
    """Of steps whose slopes are 0, 1, 2 …, and of whose gain this share is real."""
    averages = Averages()
    for step in range(steps):
        slope = float(step)
        averages.add(
            Estimate(slope, gain=share * slope, seen=1.0, agreed=share, scatter=4.0, squares=1.0, pairs=pairs, curvature=5.0)
        )
    return averages


def test_averages_of_a_weak_signal_are_over_all_steps_then_over_the_last_quarter():
    assert averaged(1e-3, 1000, 6).slope == pytest.approx(np.mean(range(6)))
    unknown = averaged(1e-3, 1000, 400)
    assert 250 < unknown.slope < 330  # a weight of 1/100 for the newest
    unknown.add(Estimate())  # nothing known of the curvature: it stays
    assert unknown.curvature == 5


@pytest.mark.parametrize(("share", "pairs", "steps_back"), [(0.9, 8, 3.0), (0.5, 8, 11.5), (0.5, 32, 3.0), (0.25, 8, 111.5)])
def test_averages_of_a_stronger_signal_are_over_fewer_steps(share: float, pairs: int, steps_back: float):
    """Over as many as leave an error of 10 %, and over 4 at least: each step counts (1 - 1/n) times the one after it."""
    assert 1999 - averaged(share, pairs, 2000).slope == pytest.approx(steps_back, rel=0.01)


def test_the_share_of_tied_members():
    assert tied(np.array([1.0, 2, 3, 4])) == 0
    assert tied(np.array([1.0, 2, 1, 4])) == 0.5
    assert tied(np.array([0.0, -0.0, 5, 5])) == 1
    assert tied(np.array([1.0, 1, np.nan, np.nan])) == 0.5
