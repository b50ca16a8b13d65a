"""σ from the first steps: where a perturbation costs a given share of the spread."""

import pytest

from es_lite.algorithm.sigma_search import CLOSE, FURTHEST, SHARE, STEPS, UNCERTAIN, SigmaSearch


def searched(right: float, start: float = 1e-3, least: float = 0.0) -> tuple[SigmaSearch, list[float]]:
    """A search in which the share is SHARE at σ = right, in proportion to σ; and the σ that it tries."""
    search, tried = SigmaSearch(start, least), []
    while not search.found:
        tried.append(search.sigma)
        search.add(SHARE * search.sigma / right * 0.3, 0.01, 0.3)
    return search, tried


@pytest.mark.parametrize("right", [1e-5, 3e-4, 1e-3, 2e-3, 0.02, 0.5])
def test_it_finds_the_share(right):
    search, tried = searched(right)
    assert right / CLOSE <= search.sigma <= right * CLOSE
    assert len(tried) <= 6


def test_a_sigma_that_is_right_is_kept():
    search, tried = searched(1.2e-3)
    assert search.sigma == 1e-3 and tried == [1e-3]
    assert search.words().startswith('es.sigma = "auto": 0.001, at which a perturbation costs 42% of the spread of the scores')


def test_it_is_not_smaller_than_rounding_allows():
    search, _ = searched(1e-5, least=2e-4)
    assert search.sigma == 2e-4
    assert search.words().endswith("a smaller one would be lost in bf16; held from now on")
    assert searched(1e-5, start=1e-4, least=2e-4)[1] == [2e-4]


def test_scores_that_are_all_equal_ask_for_a_larger_one():
    search = SigmaSearch(1e-3, 0.0)
    for step in range(STEPS):
        assert search.sigma == pytest.approx(1e-3 * FURTHEST**step) and not search.found
        search.add(0.0, 0.0, 0.0)
    assert search.found and "all members scored the same" in search.words()


@pytest.mark.parametrize("cost", [0.5, -0.5], ids=["as large as its error", "below 0"])
def test_costs_that_are_chance_find_nothing_and_it_is_said(cost: float):
    search = SigmaSearch(1e-3, 0.0)
    for _ in range(STEPS):
        search.add(cost, 0.5, 1.0)
    assert search.found and search.sigma == 1e-3 and "could not be told from chance" in search.words()


def test_perturbations_that_cost_nothing_ask_for_a_larger_one():
    search = SigmaSearch(1e-3, 0.0)
    search.add(-0.1, 0.0, 0.3)
    assert search.sigma == pytest.approx(FURTHEST * 1e-3)


@pytest.mark.parametrize("shares", [[100.0, 1e-6], [1e-6, 100.0], [1e-6], [100.0]], ids=str)
def test_it_ends(shares: list[float]):
    """Whatever the shares."""
    search, steps = SigmaSearch(1e-3, 0.0), 0
    while not search.found:
        search.add(shares[steps % len(shares)], 0.0, 1.0)
        steps += 1
    assert steps <= STEPS


def test_a_share_that_jumps_is_searched_for_between_what_was_too_small_and_too_large():
    """Scores that do not change at all below σ = 0.01, and collapse above."""
    search = SigmaSearch(1e-3, 0.0)
    while not search.found:
        search.add(*((0.0, 0.0, 0.0) if search.sigma < 0.01 else (8.0, 0.0, 1.0)))
    assert 0.01 <= search.sigma <= 0.016 and search.share == 8


def test_what_came_closest_is_kept_in_the_end():
    search, shares = SigmaSearch(1e-3, 0.0), iter([0.01, 0.03, 0.02, 0.03, 0.1, 0.02, 0.01, 0.04])
    tried = []
    while not search.found:
        tried.append(search.sigma)
        search.add(next(shares), 0.0, 1.0)
    assert len(tried) == STEPS and search.sigma == tried[4] and search.share == 0.1


@pytest.mark.parametrize(("last", "best"), [(0.9, 2), (2.0, 1)], ids=["the larger", "the smaller"])
def test_between_a_sigma_too_small_and_one_too_large_that_are_close_the_better_is_kept(last: float, best: int):
    """What came closest before, but outside of the two, does not count: if shares are exact, the right one lies between them."""
    search, tried = SigmaSearch(1e-3, 0.0), []
    for share in (0.8, 0.25, last):
        tried.append(search.sigma)
        search.add(share, 0.0, 1.0)
    assert tried == pytest.approx([1e-3, 1e-3 / 1.6, 1e-3 / 1.6**0.5])
    assert search.found and search.sigma == tried[best] and search.share == (0.25, last)[best - 1]


def test_a_share_that_may_be_right_by_chance_is_not_believed():
    """As with rewards, few of which are earned: σ rises until its cost is seen, and ends below what was too large."""
    search = SigmaSearch(1e-3, 0.0)
    search.add(SHARE, 1.1 * SHARE, 1.0)
    assert not search.found and search.sigma == UNCERTAIN * 1e-3
    search.add(SHARE, 1.1 * SHARE, 1.0)
    assert not search.found and search.sigma == UNCERTAIN**2 * 1e-3
    search.add(4 * SHARE, 1.1 * SHARE, 1.0)
    assert not search.found and search.sigma == pytest.approx(2**0.5 * UNCERTAIN * 1e-3)
    search.add(1.2 * SHARE, 1.1 * SHARE, 1.0)
    assert search.found and search.sigma == pytest.approx(2**0.5 * UNCERTAIN * 1e-3)
