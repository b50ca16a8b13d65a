"""How work is divided among hosts: everything once, in proportion to speed, whatever was answered before."""

import random

import numpy as np
import pytest

from es_lite.data.batch import Batch
from es_lite.hosts.sharing import Span, Work, divide, spans_of
from es_lite.scoring.perturbation import Perturbation

PAIRS = [Perturbation(pair=pair, sigma=0.1, signs=(1, -1)) for pair in range(5)]
THETA = Perturbation()


def batch(count: int) -> Batch:
    """Items of 3 tokens each, of which 2 are scored."""
    return Batch(np.arange(3 * count, dtype=np.int32).reshape(count, 3), np.full(count, 3, np.int32))


def test_spans_of_grains() -> None:
    assert spans_of([]) == []
    assert spans_of([0, 1, 2, 4, 6, 7]) == [Span(0, 3), Span(4, 5), Span(6, 8)]


@pytest.mark.parametrize(
    ("spans", "speeds", "parts"),
    [
        ([Span(0, 8)], [1.0], [[Span(0, 8)]]),
        ([Span(0, 8)], [1.0, 1.0], [[Span(0, 4)], [Span(4, 8)]]),
        ([Span(0, 8)], [3.0, 1.0], [[Span(0, 6)], [Span(6, 8)]]),
        ([Span(0, 2), Span(5, 8)], [2.0, 3.0], [[Span(0, 2)], [Span(5, 8)]]),
        ([Span(0, 2), Span(5, 8)], [3.0, 2.0], [[Span(0, 2), Span(5, 6)], [Span(6, 8)]]),
        ([Span(0, 1)], [1.0, 100.0], [[], [Span(0, 1)]]),
        ([], [1.0, 1.0], [[], []]),
    ],
)
def test_work_is_divided_by_speed(spans: list[Span], speeds: list[float], parts: list[list[Span]]) -> None:
    assert divide(spans, speeds) == parts


def test_every_grain_is_somebodys() -> None:
    numbers = random.Random(0)
    for _ in range(200):
        grains = sorted(numbers.sample(range(40), numbers.randint(1, 40)))
        parts = divide(spans_of(grains), [numbers.uniform(0.01, 10) for _ in range(numbers.randint(1, 9))])
        assert [grain for part in parts for span in part for grain in span.grains] == grains


def test_a_population_is_shared_by_perturbation() -> None:
    work = Work([*PAIRS, THETA], batch(6), micro_batch=4)
    assert work.grains == 6
    assert work.part(Span(1, 3)) == (PAIRS[1:3], 0, 6)
    assert work.size(Span(4, 6)) == 3 * 12  # members times tokens
    values = np.arange(11 * 6, dtype=np.float64).reshape(11, 6)
    work.answered(Span(4, 6), values[8:])
    work.answered(Span(0, 2), values[:4])
    assert work.missing([Span(0, 6)]) == [Span(2, 4)] and work.done == 4
    work.answered(Span(1, 4), np.concatenate([values[2:4] + 1000, values[4:8]]))  # a late host's; the first answer counts
    assert work.missing([Span(0, 6)]) == []
    assert work.values().tolist() == values.tolist()


def test_theta_alone_is_shared_by_micro_batches() -> None:
    work = Work([THETA], batch(10), micro_batch=4)
    assert work.grains == 3
    assert work.part(Span(1, 3)) == ([THETA], 4, 10)
    values = np.arange(10, dtype=np.float64)[None]
    work.answered(Span(1, 3), values[:, 4:])
    assert work.missing([Span(0, 3)]) == [Span(0, 1)]
    work.answered(Span(0, 1), values[:, :4])
    assert work.values().tolist() == values.tolist()
