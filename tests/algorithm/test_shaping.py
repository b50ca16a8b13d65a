"""Scores to utilities: z-score and rank."""

import numpy as np
import pytest

from es_lite.algorithm.shaping import item_baseline, means, utilities

SCORES = np.array([-3.25, -3.5, -2.0, -9.75, -3.0])


def test_zscore_divides_by_the_deviation_with_ddof_0_plus_1e_8():
    mean = sum(SCORES) / 5
    std = (sum((r - mean) ** 2 for r in SCORES) / 5) ** 0.5
    assert np.allclose(utilities(SCORES, "zscore"), [(r - mean) / (std + 1e-8) for r in SCORES], rtol=1e-14, atol=0)


def test_the_1e_8_matters_for_close_scores():
    """std is 1e-8 here, so the utilities are ±1/2; without the 1e-8 they would be ±1."""
    assert np.allclose(utilities(np.array([1e-8, -1e-8]), "zscore"), [0.5, -0.5], rtol=1e-12)


@pytest.mark.parametrize("score", [-2.5, 0.1, -12.087])
@pytest.mark.parametrize("members", [2, 6, 7, 30])
@pytest.mark.parametrize("kind", ["zscore", "rank"])
def test_equal_scores_have_the_utility_0(kind, members, score):
    """Also where their mean is not exactly the score."""
    assert utilities(np.full(members, score), kind).tolist() == [0] * members


def test_ranks_run_from_minus_one_to_one():
    assert utilities(SCORES, "rank").tolist() == [0, -0.5, 1, -1, 0.5]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([5, 1, 5, 2], [2 * 2.5 / 3 - 1, -1, 2 * 2.5 / 3 - 1, 2 / 3 - 1]),
        ([1, 1, 1, 2, 2], [-0.5, -0.5, -0.5, 0.75, 0.75]),
        ([0.0, -0.0, 7], [-0.5, -0.5, 1]),
    ],
)
def test_ties_share_their_mean_rank(scores, expected):
    assert np.allclose(utilities(np.array(scores, np.float64), "rank"), expected, rtol=1e-15)


@pytest.mark.parametrize("kind", ["zscore", "rank"])
def test_utilities_sum_to_0_and_keep_the_order(kind):
    shaped = utilities(SCORES, kind)
    assert abs(shaped.sum()) < 1e-12
    assert np.array_equal(np.argsort(shaped), np.argsort(SCORES))


@pytest.mark.parametrize("kind", ["zscore", "rank"])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_left_out(kind, broken):
    scores = np.insert(SCORES, [0, 3, 5], broken)
    shaped = utilities(scores, kind)
    assert shaped.dtype == np.float64
    assert shaped[[0, 4, 7]].tolist() == [0, 0, 0]
    assert np.array_equal(shaped[np.isfinite(scores)], utilities(SCORES, kind))


@pytest.mark.parametrize("kind", ["zscore", "rank"])
@pytest.mark.parametrize("scores", [[1.0, np.nan, np.inf], [np.nan, np.nan], [3.0], []])
def test_fewer_than_two_finite_scores_cannot_be_compared(kind, scores):
    finite = int(np.isfinite(scores).sum())
    with pytest.raises(ValueError, match=f"{finite} of {len(scores)} scores are finite"):
        utilities(np.array(scores, np.float64), kind)


@pytest.mark.parametrize("kind", ["zscore", "rank"])
def test_two_finite_scores_are_enough(kind):
    assert np.allclose(utilities(np.array([np.nan, 4.0, 1.0]), kind), [0, 1, -1], rtol=1e-7)


def test_the_scores_are_not_changed():
    scores = np.array([1.0, np.nan, 3.0])
    utilities(scores, "zscore")
    assert np.array_equal(scores, [1.0, np.nan, 3.0], equal_nan=True)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="median"):
        utilities(SCORES, "median")


# Items' baseline


def test_with_items_as_baseline_the_spread_is_that_of_all_items():
    """Each item's mean is taken off, and what is left is divided by the std of all of it (EGGROLL)."""
    scores = np.random.default_rng(1).normal(-3, 2, (6, 4)) + np.array([0.0, 10, -5, 2])
    centred = scores - scores.mean(axis=0)
    expected = centred.mean(axis=1) / (centred.std() + 1e-8)
    assert np.allclose(utilities(*_with(scores)), expected, rtol=1e-12)
    assert np.abs(expected).max() < np.abs(utilities(scores.mean(axis=1), "zscore")).max(), "items disagree, so a step is smaller"


def test_with_items_as_baseline_an_item_that_does_not_count_for_a_member_is_no_disadvantage():
    """The second item is hard: whoever it does not count for would seem to be better."""
    scores = np.array([[1.0, -9.0], [1.0, np.nan], [1.0, -9.0]])
    assert np.argmax(means(scores)) == 1
    assert utilities(*_with(scores)).tolist() == [0, 0, 0]
    better = np.array([[1.0, -9.0], [2.0, np.nan], [1.5, -8.0]])
    shaped = utilities(*_with(better))
    centred = better - np.nanmean(better, axis=0)
    compared = np.nanmean(centred, axis=1)
    assert np.allclose(shaped, (compared - compared.mean()) / (np.nanstd(centred) + 1e-8))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_with_items_as_baseline_a_member_without_a_finite_score_is_left_out(broken):
    scores = np.random.default_rng(2).standard_normal((5, 3))
    spoiled = np.insert(scores, 2, broken, axis=0)
    shaped = utilities(*_with(spoiled))
    assert shaped[2] == 0 and np.allclose(np.delete(shaped, 2), utilities(*_with(scores)))


def test_with_items_as_baseline_members_that_score_the_same_move_nothing():
    """Even if they differ on each item."""
    assert utilities(*_with(np.array([[0.1, 0.3], [0.3, 0.1]]))).tolist() == [0, 0]
    assert utilities(*_with(np.full((7, 3), -12.087))).tolist() == [0] * 7


def _with(scores: np.ndarray) -> tuple[np.ndarray, str, float]:
    """The arguments of `utilities`."""
    compared, spread = item_baseline(scores)
    return compared, "zscore", spread
