"""The kinds of fitness, by the names that a recipe uses."""

import typing

import pytest

from es_lite.fitness.kinds import KNOWN, fitness_of
from es_lite.fitness.logprob import LogProb
from es_lite.fitness.reward import Reward
from es_lite.tables import FitnessTable


def test_a_kind_is_found_by_its_name():
    assert isinstance(fitness_of("logprob"), LogProb) and isinstance(fitness_of("reward"), Reward)
    assert all(fitness_of(name) is fitness and fitness.name == name for name, fitness in KNOWN.items())


def test_a_recipe_can_name_every_kind_and_no_other():
    assert set(typing.get_args(typing.get_type_hints(FitnessTable)["kind"])) == KNOWN.keys()


@pytest.mark.parametrize("kind", ["", "Logprob", "accuracy"])
def test_an_unknown_kind_is_refused_by_name_with_those_that_are_known(kind):
    with pytest.raises(
        ValueError, match=rf"fitness of the kind '{kind}', which this version .* does not know \(it knows logprob, reward\)"
    ):
        fitness_of(kind)
