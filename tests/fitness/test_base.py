"""What graded answers are worth: the mean of the items that count."""

import math

import numpy as np
import pytest

from es_lite.fitness.base import Graded

NAN, INF = math.nan, math.inf


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 2.0, 4.5], 2.5),
        ([0.0], 0.0),
        ([1.0, NAN, 4.0], 2.5),  # an item that is not counted is not a 0
        ([NAN, NAN, -3.0], -3.0),
        ([NAN, 0.0, NAN], 0.0),
        ([NAN, NAN, NAN], NAN),
        ([-INF, -INF, -INF], -INF),  # a member whose logits were not numbers
        ([NAN, -INF, -INF], -INF),
    ],
)
def test_a_members_score_is_the_mean_of_what_counts(scores, expected):
    (found,) = Graded(np.array([scores])).means()
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_members_have_means_of_their_own():
    means = Graded(np.array([[1.0, 2.0], [NAN, 5.0], [NAN, NAN], [-INF, -INF]])).means()
    assert means.dtype == np.float64
    assert np.array_equal(means, [1.5, 5.0, NAN, -INF], equal_nan=True)


def test_what_one_member_has_not_counted_changes_no_other_members_mean():
    """But for the order in which it is summed: as with all items counted, to the last bits."""
    scores = np.random.default_rng(1).standard_normal((3, 1000))
    plain, scores = Graded(scores.copy()).means(), scores
    assert plain.tobytes() == scores.mean(axis=1).tobytes()
    scores[1, 7] = NAN
    assert Graded(scores).means()[[0, 2]] == pytest.approx(plain[[0, 2]], rel=1e-14)
