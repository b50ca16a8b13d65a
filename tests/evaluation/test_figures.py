"""Figures: means with errors, what is averaged, and the KL divergence."""

import numpy as np
import pytest

from es_lite.evaluation.figures import Figure, columns, kl
from es_lite.fitness.base import GradedCompletion


def test_a_mean_and_its_standard_error_leave_out_what_is_not_counted():
    figure = Figure.of(np.array([1.0, np.nan, 2.0, 6.0]))
    assert figure == Figure(3.0, pytest.approx(np.sqrt(7.0 / 3)))  # variance (4 + 1 + 9) / 2 = 7, of three values
    assert Figure.of(np.array([2.0])) == Figure(2.0, None)
    assert Figure.of(np.array([np.nan, np.nan])) is None


def sample(score, completion, cut=False, **rewards):
    return GradedCompletion("p", completion, rewards, score, cut)


def test_what_is_averaged():
    samples = [
        sample(0.5, "four", math_answer=1.0, math_strict=0.0, my_format=1.0),
        sample(None, "", True, math_answer=None, math_strict=None, my_format=0.5),
        sample(0.0, "ab", math_answer=0.0, math_strict=0.0, my_format=1.0),
    ]
    found = columns(samples, ["math_answer", "math_strict", "my_format"])
    nan = np.nan
    expected = {
        "reward": [0.5, nan, 0.0],
        "functions.math_answer": [1, nan, 0],
        "functions.math_strict": [0, nan, 0],
        "functions.my_format": [1, 0.5, 1],
        "accuracy": [1, nan, 0],
        "accuracy_strict": [0, nan, 0],
        "format": [1, 0, 1],
        "length": [4, 0, 2],
        "cut": [0, 1, 0],
    }
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_without_a_function_that_says_right_or_format_there_is_no_such_figure():
    assert list(columns([sample(1.0, "a", conciseness=1.0)], ["conciseness"])) == [
        *("reward", "functions.conciseness", "length", "cut")
    ]


def test_the_kl_divergence_is_the_papers_estimator_averaged_over_tokens():
    own, base = [np.log([0.5, 0.25]), np.log([0.5])], [np.log([0.25, 0.5]), np.log([0.5])]
    # d = -log 2 and log 2: e^d - d - 1 is 1/2 + log 2 - 1 and 2 - log 2 - 1, whose mean is 1/4
    assert kl(own, base) == pytest.approx([0.25, 0.0], abs=1e-15)
    assert kl(own, own).tolist() == [0.0, 0.0]
    tiny = kl([np.array([-1.0])], [np.array([-1.0 - 1e-6])])
    assert tiny == pytest.approx([5e-13], rel=1e-3), "not lost in rounding"
