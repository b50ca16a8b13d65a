"""α and σ of each step: given, with their decays, or found; which steps score θ itself; what the journal has to keep."""

import dataclasses
import json
from typing import Any

import pytest

from es_lite.algorithm.estimate import Estimate
from es_lite.errors import UserError
from es_lite.recipe import Recipe
from es_lite.runs.tuning import Tuning, alpha_of


def recipe(iterations: int = 100, **es: Any) -> Recipe:
    whole = Recipe()
    return dataclasses.replace(
        whole,
        run=dataclasses.replace(whole.run, iterations=iterations),
        es=dataclasses.replace(whole.es, **{"population": 16, "antithetic": True} | es),
    )


def never() -> float:
    raise AssertionError("nothing has to be found")


def found(sigma: float, step: int = 0) -> Estimate:
    """Of a model whose curvature is 100, so that a perturbation of σ = 0.005 costs half of a spread of σ."""
    return Estimate(
        slope=1.0 + 0.1 * (step % 3),
        gain=0.4,
        seen=sigma**2,
        agreed=0.4 * sigma**2,
        scatter=4 * sigma**2,
        squares=0.125,
        pairs=8,
        curvature=100.0 + step,
        curvature_error=5.0,
        centre=-3.0 + 0.01 * step,
    )


def test_given_values_follow_their_decays():
    keys = {"alpha": 0.5, "alpha_decay": 0.5, "alpha_decay_every": 2, "sigma": 0.25, "sigma_decay": 0.1, "sigma_decay_every": 3}
    tuning = Tuning(recipe(**keys), never, [])
    assert [tuning.sigma(step) for step in range(4)] == pytest.approx([0.25, 0.25, 0.25, 0.025])
    assert [tuning.alpha(step, 0.25, Estimate()) for step in range(4)] == [0.5, 0.5, 0.25, 0.25]
    assert tuning.document(Estimate(), 0.5) is None and tuning.news() is None
    assert not any(tuning.repeats(step) for step in range(100)), "the items of each step are its own"


@pytest.mark.parametrize("keys", [{"alpha": "auto"}, {"sigma": "auto"}, {"alpha": "auto", "sigma": "auto"}], ids=str)
def test_what_is_found_follows_from_what_the_journal_keeps(keys):
    """As JSON, at every step."""
    whole, history = Tuning(recipe(**keys), lambda: 1e-4, []), []
    for step in range(60):
        again = Tuning(recipe(**keys), lambda: 1e-4, json.loads(json.dumps(history)))
        assert (again.sigma(step), again.probes(step), again.searching) == (
            whole.sigma(step),
            whole.probes(step),
            whole.searching,
        )
        sigma = whole.sigma(step)
        of_step = (
            found(sigma, step) if whole.probes(step) else dataclasses.replace(found(sigma, step), curvature=None, centre=None)
        )
        alpha = whole.alpha(step, sigma, of_step)
        assert again.alpha(step, sigma, of_step) == alpha
        assert again.gain_expected(alpha) == whole.gain_expected(alpha)
        history.append((sigma, whole.document(of_step, alpha)))
    assert alpha_of(recipe(**keys).es, 59, history[-1][1]) == alpha


@pytest.mark.parametrize("changed", [{"gain": None}, {"warmth": 1.0}], ids=["one less", "one more"])
def test_what_another_version_has_found_is_not_taken_for_this_ones(changed: dict[str, Any]):
    kept = dataclasses.asdict(found(0.01)) | {"alpha": 0.1}
    other = {name: value for name, value in (kept | changed).items() if value is not None}
    with pytest.raises(UserError, match=r"step 2 of the run's journal: another version of .* start another run"):
        Tuning(recipe(alpha="auto"), never, [(0.01, kept), (0.01, other)])


def test_a_run_that_is_to_be_longer_goes_on_from_the_steps_that_were_made():
    """α rises again to what it was before the last part."""
    tuning, history = Tuning(recipe(alpha="auto"), never, []), []
    little = dataclasses.replace(found(0.01), slope=0.1, gain=0.04)
    for step in range(100):
        of_step = found(0.01) if step < 50 else little
        history.append((0.01, tuning.document(of_step, tuning.alpha(step, 0.01, of_step))))
    longer = Tuning(recipe(1000, alpha="auto"), never, history)
    assert longer.alpha(100, 0.01, little) > 5 * history[-1][1]["alpha"]
    shorter = Tuning(recipe(50, alpha="auto"), never, history)
    assert shorter.alpha(100, 0.01, little) == 0


def test_sigma_is_found_said_once_and_held():
    tuning = Tuning(recipe(sigma="auto"), lambda: 1e-4, [])
    news = []
    for step in range(10):
        sigma = tuning.sigma(step)
        tuning.alpha(step, sigma, found(sigma))
        news.append(tuning.news())
    assert tuning.sigma(10) == pytest.approx(0.005, rel=0.5) and not tuning.searching
    (said,) = filter(None, news)
    assert said.startswith('es.sigma = "auto": 0.00')


def test_theta_is_scored_often_at_first_and_then_for_less_than_a_hundredth_of_the_members():
    tuning = Tuning(recipe(1000), never, [])
    probes = [tuning.probes(step) for step in range(1000)]
    assert probes[:4] == [True] * 4
    assert sum(probes) < 0.01 * 1000 * 16


def test_theta_is_scored_again_with_a_sigma_that_is_new_when_the_search_ends():
    """Scores so noisy that no σ comes close: the search ends with one that it tried before the last."""
    tuning = Tuning(recipe(1000, sigma="auto", alpha="auto"), lambda: 1e-4, [])
    step = 0
    while tuning.searching:
        sigma = tuning.sigma(step)
        tuning.alpha(step, sigma, dataclasses.replace(found(sigma), curvature=1.0 if step % 2 else 1e6))
        step += 1
    assert tuning.sigma(step) != sigma and step == 4
    repeats = []
    for young in range(step, step + 8):
        assert tuning.probes(young)
        repeats.append(tuning.repeats(young))
        tuning.alpha(young, tuning.sigma(young), found(tuning.sigma(young)))
    assert repeats == [False, True, False, False] * 2


@pytest.mark.parametrize(("population", "every"), [(16, 16), (32, 8), (64, 4), (250, 4), (1000, 4)])
def test_most_steps_have_new_items_however_many_members_there_are(population, every):
    tuning = Tuning(recipe(1000, population=population, alpha="auto"), never, [])
    for step in range(20):
        tuning.alpha(step, 1e-3, found(1e-3, step))
    assert [step for step in range(200, 200 + 2 * every) if tuning.repeats(step)] == [
        step for step in range(200, 200 + 2 * every) if step % every == 1
    ]


def test_a_step_that_repeats_the_items_of_another_follows_one_that_scored_theta():
    tuning = Tuning(recipe(1000, alpha="auto"), never, [])
    for step in range(1000):
        if tuning.repeats(step):
            assert step > 0 and tuning.probes(step - 1) and tuning.probes(step) and not tuning.repeats(step - 1)
    assert 60 < sum(map(tuning.repeats, range(1000))) < 80


def test_an_alpha_of_which_nothing_is_known_is_none():
    """Of a run whose recipe was lost, and which goes on with another."""
    assert alpha_of(recipe(alpha="auto").es, 3, None) is None
    assert alpha_of(recipe(alpha=0.5).es, 3, None) == 0.5
