import hashlib
import math

import numpy as np
import pytest

from es_lite.algorithm import noise

PLACE = {"seed": 0x0123456789ABCDEF, "step": 3, "pair": 5, "tensor": 7}


def words(*values: str) -> list[int]:
    return [int(value, 16) for value in values]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, tests/kat_vectors, philox4x32 10
        (words("0", "0", "0", "0"), words("0", "0"), words("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8")),
        (words(*["ffffffff"] * 4), words(*["ffffffff"] * 2), words("408f276d", "41c83b0e", "a20bc7c6", "6d5451fd")),
        (
            words("243f6a88", "85a308d3", "13198a2e", "03707344"),
            words("a4093822", "299f31d0"),
            words("d16cfe09", "94fdcceb", "5001e420", "24126ea1"),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert noise.philox4x32(tuple(counter), tuple(key)).tolist() == [expected]


def test_philox_of_an_array_of_counters_is_philox_of_each():
    many = noise.philox4x32((np.arange(20), 7, np.arange(20) * 3, 2**32 - 1), (1, 2))
    assert many.dtype == np.uint32
    for i, row in enumerate(many):
        assert np.array_equal(noise.philox4x32((i, 7, 3 * i, 2**32 - 1), (1, 2))[0], row)


def test_the_key_is_the_seed_low_word_first():
    assert noise.key(0x0123456789ABCDEF) == (0x89ABCDEF, 0x01234567)
    assert noise.key(2**64 - 1) == (2**32 - 1, 2**32 - 1)


def test_the_table_is_the_one_that_journals_were_written_with():
    table = noise.table()
    assert table.shape == (65536,) and table.dtype == np.dtype("<i2")
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    assert digest == "1ea009ce409dac97d6bd609266910f809c5fb912f78e16bd89145b08174d6fc5" == noise.TABLE_SHA256
    assert noise.VERSION == "philox4x32-10/table16/1"


def test_the_table_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        noise.table()[0] = 1


def test_an_entry_is_the_normal_quantile_rounded_to_the_quantum():
    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    table = noise.table().tolist()
    for u in range(32768):  # the other half by symmetry: there 1 - cdf would lose digits
        p = (u + 0.5) / 65536
        assert cdf((table[u] - 0.5) / 4096) <= p <= cdf((table[u] + 0.5) / 4096), u


def test_the_table_is_odd_and_rises():
    table = noise.table().astype(np.int64)
    assert np.array_equal(table, -table[::-1])
    assert (np.diff(table) >= 0).all()


def test_a_lane_is_looked_up_low_half_first():
    four = noise.philox4x32((2, PLACE["tensor"], PLACE["pair"], PLACE["step"]), noise.key(PLACE["seed"]))[0].tolist()
    lanes = [half for word in four for half in (word & 0xFFFF, word >> 16)]
    assert noise.gaussian(**PLACE, start=16, count=8).tolist() == [noise.table()[lane] / 4096 for lane in lanes]


def test_some_elements_are_pinned():
    """A change of any of these is another noise.VERSION."""
    assert (noise.gaussian(0, 0, 0, 0, 0, 8) * 4096).astype(int).tolist() == [5479, -1048, 3049, 4823, 1836, 2581, 4402, 1096]


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 63, 1001])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_a_slice_is_the_slice_of_the_whole(start, count):
    whole = noise.gaussian(**PLACE, start=0, count=2048)
    part = noise.gaussian(**PLACE, start=start, count=count)
    assert part.dtype == np.float32
    assert np.array_equal(part, whole[start : start + count])


def test_each_coordinate_gives_other_noise():
    places = [PLACE] + [PLACE | {name: value} for name in PLACE for value in (PLACE[name] + 1, PLACE[name] ^ 2**31)]
    places.append(PLACE | {"seed": PLACE["seed"] ^ 2**63})
    places.append(PLACE | {"pair": PLACE["tensor"], "tensor": PLACE["pair"]})
    places.append(PLACE | {"step": PLACE["pair"], "pair": PLACE["step"]})
    drawn = [noise.gaussian(**place, start=0, count=20000) for place in places]
    correlations = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 5 / math.sqrt(20000)


def test_values_are_multiples_of_the_quantum():
    values = noise.gaussian(**PLACE, start=0, count=4096).astype(np.float64) * 4096
    assert np.array_equal(values, np.round(values))


def test_moments_are_the_normal_distributions():
    count = 2**20
    values = noise.gaussian(**PLACE, start=0, count=count).astype(np.float64)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(values**power) - moment) < 4 * math.sqrt(variance / count), power
    for lag in (1, 2, 3, 8, 2048):
        assert abs(np.mean(values[:-lag] * values[lag:])) < 4 / math.sqrt(count), lag
