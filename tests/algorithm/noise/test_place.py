"""Places in the noise: the words of the key and the reserved numbers."""

import pytest

from es_lite.algorithm.noise.place import INITIALISATION, ROUNDING, Place


@pytest.mark.parametrize(
    ("seed", "key"),
    [(0, (0, 0)), (0x0123456789ABCDEF, (0x89ABCDEF, 0x01234567)), (2**64 - 1, (2**32 - 1, 2**32 - 1)), (2**32, (0, 1))],
)
def test_the_key_is_the_seed_low_word_first(seed, key):
    assert Place(seed, 3, 5, 7).key == key


def test_the_reserved_numbers_are_the_greatest_words():
    """Bits of every run depend on these, and no step or pair of a run reaches them."""
    assert INITIALISATION == ROUNDING == 0xFFFFFFFF


def test_the_order_is_seed_step_pair_tensor():
    assert Place(1, 2, 3, 4)._asdict() == {"seed": 1, "step": 2, "pair": 3, "tensor": 4}
