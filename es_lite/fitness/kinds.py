"""The kinds of fitness by name. A kind is one file that has the operations of `Fitness`."""

from es_lite.fitness.base import Fitness
from es_lite.fitness.logprob import LogProb

KNOWN: dict[str, Fitness] = {LogProb.name: LogProb()}


def fitness_of(kind: str) -> Fitness:
    """Raises ValueError, naming the kind, if this version does not know it."""
    if kind not in KNOWN:
        raise ValueError(
            f"fitness of the kind {kind!r}, which this version of es_lite does not know (it knows {', '.join(KNOWN)})"
        )
    return KNOWN[kind]
