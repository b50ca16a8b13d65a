"""Gaussian noise as it is defined: the table of quantiles, pinned elements, and the statistics of what is drawn.

It does not depend on the tensor's shape.
"""

import hashlib
import math

import numpy as np
import pytest
from plain import same_bits

from es_lite.algorithm.noise import gaussian, philox
from es_lite.algorithm.noise.place import Place

PLACE = Place(seed=0x0123456789ABCDEF, step=3, pair=5, tensor=7)


def test_the_table_is_the_one_that_existing_runs_were_made_with():
    table = gaussian.table()
    assert table.shape == (65536,) and table.dtype == np.dtype("<i2")
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    assert digest == "1ea009ce409dac97d6bd609266910f809c5fb912f78e16bd89145b08174d6fc5" == gaussian.TABLE_SHA256


def test_a_machine_that_computes_another_table_is_refused(monkeypatch):
    class Unusual:
        def inv_cdf(self, p: float) -> float:
            return 0.0

    monkeypatch.setattr(gaussian, "NormalDist", Unusual)
    with pytest.raises(RuntimeError, match="inv_cdf is unusual"):
        gaussian.table.__wrapped__()


def test_the_table_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        gaussian.table()[0] = 1


def test_an_entry_is_the_normal_quantile_rounded_to_the_quantum():
    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    table = gaussian.table().tolist()
    for u in range(32768):  # symmetry covers the other half, for which 1 - cdf would lose digits
        p = (u + 0.5) / 65536
        assert cdf((table[u] - 0.5) / 4096) <= p <= cdf((table[u] + 0.5) / 4096), u


def test_the_table_is_odd_and_never_falls():
    table = gaussian.table().astype(np.int64)
    assert np.array_equal(table, -table[::-1])
    assert (np.diff(table) >= 0).all()


def test_an_element_is_the_table_entry_of_its_lane():
    lanes = philox.lanes(PLACE, 16, 8).tolist()
    assert gaussian.epsilon(PLACE, (), 16, 8).tolist() == [gaussian.table()[lane] / 4096 for lane in lanes]


def test_some_elements_are_pinned():
    """If any of these changes, philox.VERSION must change."""
    quanta = gaussian.epsilon(Place(0, 0, 0, 0), (), 0, 8) * 4096
    assert quanta.astype(int).tolist() == [5479, -1048, 3049, 4823, 1836, 2581, 4402, 1096]


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 63, 1001])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_the_noise_of_a_slice_is_a_slice_of_all_noise(start, count):
    whole = gaussian.epsilon(PLACE, (), 0, 2048)
    part = gaussian.epsilon(PLACE, (), start, count)
    assert part.dtype == np.float32
    assert np.array_equal(part, whole[start : start + count])


def test_places_that_differ_in_anything_have_uncorrelated_noise():
    places = [PLACE]
    places += [PLACE._replace(**{name: value}) for name, old in PLACE._asdict().items() for value in (old + 1, old ^ 2**31)]
    places.append(PLACE._replace(seed=PLACE.seed ^ 2**63))
    places.append(PLACE._replace(pair=PLACE.tensor, tensor=PLACE.pair))
    places.append(PLACE._replace(step=PLACE.pair, pair=PLACE.step))
    drawn = [gaussian.epsilon(place, (), 0, 20000) for place in places]
    correlations = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 5 / math.sqrt(20000)


def test_elements_are_multiples_of_the_quantum():
    values = gaussian.epsilon(PLACE, (), 0, 4096).astype(np.float64) * 4096
    assert np.array_equal(values, np.round(values))


def test_the_moments_are_the_normal_distributions():
    count = 2**20
    values = gaussian.epsilon(PLACE, (), 0, count).astype(np.float64)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(values**power) - moment) < 4 * math.sqrt(variance / count), power
    for lag in (1, 2, 3, 8, 2048):
        assert abs(np.mean(values[:-lag] * values[lag:])) < 4 / math.sqrt(count), lag


def test_the_shape_makes_no_difference():
    same = [gaussian.epsilon(PLACE, shape, 13, 100).tolist() for shape in ((), (200,), (20, 10), (2, 10, 10))]
    assert same == 4 * [gaussian.epsilon(PLACE, (), 13, 100).tolist()]


@pytest.mark.parametrize("start", [0, 1, 8, 13, 2047, 1_000_003])
@pytest.mark.parametrize("length", [1, 7, 2047, 2048, 2049, 5003])
def test_fill(start, length):
    out = np.empty(length, np.float32)
    gaussian.fill(out, PLACE, 0.02, start=start)
    assert same_bits(out, np.float32(0.02) * gaussian.epsilon(PLACE, (), start, length))


def test_fill_by_one_is_the_noise_itself_at_the_extremes_of_every_coordinate():
    out = np.empty(3001, np.float32)
    for seed in (0, 2**64 - 1):
        for other in (0, 2**31, 2**32 - 1):
            place = Place(seed, other, other, other)
            gaussian.fill(out, place, 1.0, start=2**33 + 5)
            assert same_bits(out, gaussian.epsilon(place, (), 2**33 + 5, 3001))
