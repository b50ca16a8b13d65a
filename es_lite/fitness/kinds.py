"""The kinds of fitness by name. A kind is a class with the methods of `Fitness`."""

from es_lite.fitness.base import Fitness
from es_lite.fitness.logprob import LogProb
from es_lite.fitness.reward import Reward

KNOWN: dict[str, Fitness] = {LogProb.name: LogProb(), Reward.name: Reward()}


def fitness_of(kind: str) -> Fitness:
    """The fitness of this kind. Raises ValueError if this version does not know it."""
    if kind not in KNOWN:
        raise ValueError(
            f"fitness of the kind {kind!r}, which this version of es_lite does not know (it knows {', '.join(KNOWN)})"
        )
    return KNOWN[kind]
