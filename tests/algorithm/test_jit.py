"""How work is divided among threads."""

import numpy as np
import pytest

from es_lite.algorithm.jit import Threads


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 99, 100, 199, 200, 201, 699, 700, 1000, 1001])
def test_threads_cover_each_element_once(count, size):
    times = np.zeros(size, int)
    Threads(count).each(size, lambda low, high: np.add.at(times, np.arange(low, high), 1), least=100)
    assert (times == 1).all()


def test_an_exception_in_a_thread_reaches_the_caller():
    def work(low, high):
        if low:
            raise RuntimeError("in the second part")

    with pytest.raises(RuntimeError, match="in the second part"):
        Threads(2).each(1000, work, least=10)
