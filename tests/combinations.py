"""Runs in the combinations of noise, weights, master and settings, and the undisturbed runs that they are compared with.

For each noise, storage and settings, one undisturbed resident run of one worker is the reference: its journal, layer files and
exports are what all others must have, byte for byte.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import FITNESSES, NOISES, SHARED_TILES, TINY, train_here

STEPS = 14

STORAGES = [(weights, master) for weights in ("bf16", "int8") for master in ("fp32", "none")]
KINDS = ("lowrank 1", "gaussian", "rademacher")

Settings = dict[str, dict[str, Any]]

PLAIN: Settings = {"workers": {"compute": "bf16"}, "es": {"weight_decay": 0.5}}
"""The working copy, if it is bf16, is multiplied as it is under low-rank noise."""
CROWDED: Settings = {
    "workers": {"compute": "fp32"},
    "noise": {"shared": True},
    "es": {
        "antithetic": False,
        "scale": "nes",
        "alpha": "auto",
        "alpha_start": 1e-4,
        "baseline": "item",
        "anchor": 20.0,
        "groups": [{"pattern": "k_proj", "sigma": 0.0, "alpha": 0.0}, {"pattern": "mlp|norm", "sigma": 2.0, "alpha": 0.5}],
    },
}
"""Everything in a recipe that changes what noise does: a frozen group, another with factors, and so on."""

SETTINGS = {
    "plain": ("logprob", PLAIN),
    "crowded": ("logprob", CROWDED),
    "rewards": ("reward", PLAIN),
    "crowded rewards": ("reward", CROWDED),
}
"""A fitness, and tables of the recipe."""


SIGMAS: dict[str, dict[str, Any]] = {"logprob": {"sigma": "auto"}, "reward": {}}
"""Members that write must differ in what they write from the first step on."""


class Reference:
    """A noise, a storage and settings, a recipe with these, and the run to compare with."""

    def __init__(self, folder: Path, noise: str, weights: str, master: str, settings: str) -> None:
        fitness, tables = SETTINGS[settings]
        # Untied if there is no master: the embedding is then a layer that passes by itself, after the head.
        config = TINY | {"tie_word_embeddings": master == "fp32"}
        self.recipe = FITNESSES[fitness](
            folder,
            run={"iterations": STEPS, "checkpoint_every": 5, "checkpoint_dtype": "fp32"},
            model={"config": config},
            memory={"weights": weights, "master": master},
            eval={"every": 7, "samples": 4},
            es=SHARED_TILES | tables.get("es", {}) | SIGMAS[fitness],
            noise=NOISES[noise] | tables.get("noise", {}),
            workers=tables["workers"],
        )
        self.run = folder / "reference"
        assert train_here(self.recipe, self.run, "memory.residency=resident", "workers.count=1").code == 0


References = Callable[[str, str, str, str], Reference]


PLAIN_CASES = [(noise, *storage, "plain") for noise in KINDS for storage in STORAGES]
CROWDED_CASES = [(noise, *storage, "crowded") for noise, storage in zip(NOISES, STORAGES, strict=True)]
REWARDS_CASES = [(noise, *storage, "rewards") for noise, storage in zip(itertools.cycle(KINDS), STORAGES, strict=False)]
CROWDED_REWARDS_CASES = [(noise, *storage, "crowded rewards") for noise, storage in zip(NOISES, reversed(STORAGES), strict=True)]
FROZEN_CASES = [case for case in (*CROWDED_CASES, *CROWDED_REWARDS_CASES) if case[2] == "fp32"]
LONG_CASES = [
    *(case for case in PLAIN_CASES if case[:3] not in [rewards[:3] for rewards in REWARDS_CASES]),
    *REWARDS_CASES,
    *CROWDED_REWARDS_CASES[1:],
]
"""Quick tests have each storage with a kind of noise in turn, and rewards once, with all that a recipe can set; long ones the
rest."""


def references_of(*cases: tuple[str, ...]) -> Any:
    """A test for each of these references."""
    each = [pytest.param(*case, id="-".join(case), marks=[pytest.mark.long] if case in LONG_CASES else []) for case in cases]
    return pytest.mark.parametrize(("noise", "weights", "master", "settings"), each)


EVERY_REFERENCE = references_of(*PLAIN_CASES, *CROWDED_CASES, *REWARDS_CASES, *CROWDED_REWARDS_CASES)


def in_turn(*ways: tuple) -> list:
    """(noise, weights, master, *way, "plain") for every storage and way; each of these has other kinds of noise in turn."""
    found = []
    for s, storage in enumerate(STORAGES):
        for w, way in enumerate(ways):
            case = (KINDS[(s + w) % len(KINDS)], *storage, *way)
            found.append(pytest.param(*case, "plain", id="-".join(map(str, case))))
    return found


def rewards_in_turn(*ways: tuple) -> list:
    """(noise, weights, master, *way, "rewards") for every storage, with a way in turn; they are long."""
    cases = zip(REWARDS_CASES, itertools.cycle(ways), strict=False)
    each = [(*case[:3], *way, "rewards") for case, way in cases]
    return [pytest.param(*case, id="-".join(map(str, case)), marks=pytest.mark.long) for case in each]
