"""From what models wrote to figures: means with standard errors over prompts, differences, and the KL divergence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from es_lite.fitness.base import GradedCompletion
from es_lite.fitness.functions import role

STRICT = "math_strict"
"""The reward function that says whether an answer is right and in the form that was asked for."""


@dataclass(frozen=True)
class Figure:
    """A mean with its standard error."""

    mean: float
    error: float | None
    """None if there are fewer than two values."""

    @classmethod
    def of(cls, values: np.ndarray) -> "Figure | None":
        """values: float64 [n], NaN where there is none. None if all are."""
        values = values[~np.isnan(values)]
        if not values.size:
            return None
        error = float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else None
        return cls(float(values.mean()), error)


def columns(samples: Sequence[GradedCompletion], functions: Sequence[str]) -> dict[str, np.ndarray]:
    """What is averaged, each float64 [prompts], NaN where it is not counted.

    reward; functions.NAME; accuracy, accuracy_strict (GSM8K's strict match, where accuracy is the flexible extraction) and
    format: 1 where a function says so, else 0, only if there is such a function; length in characters; cut, 1 where there was no
    end.
    """
    found = {"reward": _numbers([sample.score for sample in samples])}
    found |= {f"functions.{name}": _numbers([sample.rewards[name] for sample in samples]) for name in functions}
    for what in ("right", "format"):
        which = [name for name in functions if role(name) == what]
        if which:
            found["accuracy" if what == "right" else "format"] = _reached(found[f"functions.{which[0]}"])
            if what == "right" and STRICT in functions:
                found["accuracy_strict"] = _reached(found[f"functions.{STRICT}"])
    found["length"] = _numbers([len(sample.completion) for sample in samples])
    found["cut"] = _numbers([sample.cut for sample in samples])
    return found


def kl(own: Sequence[np.ndarray], base: Sequence[np.ndarray]) -> np.ndarray:
    """The KL divergence of a model from a base model, on what the model wrote, in nats a token: float64 [completions].

    own, base: the log-probabilities that each model gives to each completion's tokens, the end token included, float64 [tokens].
    The estimator is that of the paper (Evolution Strategies at Scale, arXiv 2509.24372), e^d - d - 1 with
    d = log p_base - log p: never negative, and 0 only if both give a token the same probability. A completion's value is the mean
    over its tokens; the figure that is reported is the mean of these over the prompts. The paper samples 20 completions of each
    prompt, of which the estimate's mean is the divergence; here it is the greedy completion alone, so compare it between models
    that were evaluated in this way, not with the paper's.
    """
    differences = [there - here for here, there in zip(own, base, strict=True)]
    return np.array([float(np.mean(np.expm1(d) - d)) for d in differences])


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _reached(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), np.nan, values >= 1)
