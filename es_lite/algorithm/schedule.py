"""Schedules of α and σ."""


def decayed(value: float, factor: float, every: int, step: int) -> float:
    """`value` at step `step` (from 0) if it is multiplied by `factor` every `every` steps; every = 0 is off."""
    return value * factor ** (step // every) if every else value
