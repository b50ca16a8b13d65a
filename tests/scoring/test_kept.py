"""Scratch of a generation: the same tensors kept or made each time, and what is kept is made once and stays what it was."""

from typing import Any

import numpy as np
import pytest
import torch
from architectures import BOTH, PLUS, bits, of_kind, part_of

from es_lite.algorithm.formats import Storage
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.scoring.device import DeviceScratch
from es_lite.scoring.kept import KeptScratch
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation
from es_lite.scoring.scratch import Scratch
from es_lite.weights.parts import Part

LOW = of_kind(BOTH, LowRank(2))
KINDS = {
    "kernels": lambda compute: Scratch(compute, Threads(1)),
    "device": lambda compute: DeviceScratch(torch.device("cpu"), compute),
}
KIND = pytest.mark.parametrize("kind", KINDS)
WHOLE = pytest.mark.parametrize("whole", [True, False], ids=["whole", "small"])


def parts_of(storage: Storage = "bf16") -> dict[str, Part]:
    """A matrix and a vector."""
    return {"matrix": part_of((20, 16), storage, 3), "vector": part_of((16,), storage, 4)}


def block_of(matrix: Part, first: int = 4) -> Part:
    """Eight of its rows."""
    width = matrix.tensor.width
    return Part(matrix.tensor, first * width, matrix.data[first * width : (first + 8) * width], matrix.scales)


def everything(scratch: Any, perturbation: Perturbation, storage: Storage) -> dict[str, list[bytes]]:
    """The bits of all that a scratch makes, read before the next call, as nothing need be valid for longer."""
    parts = parts_of(storage)
    matrix, vector = parts["matrix"], {"vector": parts["vector"]}
    found = {
        "tensors": [bits(each) for own in scratch.tensors(perturbation, parts) for each in own.values()],
        "kept": [bits(each) for own in scratch.kept(perturbation, parts) for each in own.values()],
        "vectors": [bits(own["vector"]) for own in scratch.kept(perturbation, vector)],
        "base": [bits(each) for each in scratch.base(parts).values()],
        "block": [bits(own) for own in scratch.block(perturbation, block_of(matrix))],
        "next block": [bits(own) for own in scratch.block(perturbation, block_of(matrix, 12))],
    }
    rows, width = np.array([0, 7, 19]), matrix.tensor.width
    stored = matrix.data.reshape(-1, width)[rows]
    scales = matrix.scales[rows] if matrix.scales.size else matrix.scales
    found["rows"] = [bits(own) for own in scratch.rows(perturbation, matrix.tensor, rows, stored, scales)]
    if perturbation.factored:
        for first, count in ((0, None), (4, 8), (0, 0)):
            factors = scratch.factors([perturbation], matrix.tensor, first, count)
            found[f"factors {first} {count}"] = [bits(factors.right), bits(factors.left)] if factors else []
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the methods of scratch that were called, by others than itself."""
    found: list[str] = []
    for kind in (Scratch, DeviceScratch):
        for name in ("tensors", "kept", "base", "own_base", "factors", "block"):
            method = getattr(kind, name)

            def recorded(self: Any, *args: Any, method: Any = method, name: str = name) -> Any:
                found.append(name)
                return method(self, *args)

            monkeypatch.setattr(kind, name, recorded)
    return found


# The same tensors


@KIND
@WHOLE
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_kept_or_not_the_tensors_are_the_same(kind, whole, compute, storage):
    """When they are made, and when they are asked for again after those of other perturbations."""
    kept, perturbations = KeptScratch(KINDS[kind](compute), whole), [BOTH, LOW, PLUS, UNPERTURBED]
    expected = [everything(KINDS[kind](compute), perturbation, storage) for perturbation in perturbations]
    assert len({tuple(found["tensors"]) for found in expected}) == 4
    for _ in range(2):
        assert [everything(kept, perturbation, storage) for perturbation in perturbations] == expected


@KIND
def test_what_is_kept_is_not_overwritten(kind):
    """Unlike what scratch itself makes."""
    kept, parts = KeptScratch(KINDS[kind](torch.float32), True), parts_of()
    held = [kept.tensors(BOTH, parts)[0]["matrix"], kept.base(parts)["matrix"], kept.block(BOTH, block_of(parts["matrix"]))[1]]
    before = [bits(tensor) for tensor in held]
    everything(kept, LOW, "int8")
    everything(kept, PLUS, "bf16")
    assert [bits(tensor) for tensor in held] == before


# What is made once


@KIND
def test_everything_is_made_once_if_whole(kind, calls):
    kept, parts = KeptScratch(KINDS[kind](torch.float32), True), parts_of()
    for _ in range(3):
        kept.tensors(BOTH, dict(parts))  # a new dict each time, as proxies make
        kept.kept(BOTH, dict(parts))
        kept.base(dict(parts))
        kept.block(BOTH, block_of(parts["matrix"]))
        kept.factors([LOW], parts["matrix"].tensor)
    names = [name for name in calls if name != "base"]  # which a device's own_base calls
    assert names == ["kept", "kept", "own_base", "kept", "factors"]


@KIND
def test_only_vectors_and_factors_are_made_once_if_not(kind, calls):
    kept, parts = KeptScratch(KINDS[kind](torch.float32), False), parts_of()
    for _ in range(2):
        kept.tensors(BOTH, parts)
        kept.kept(BOTH, parts)
        kept.base(parts)
        kept.block(BOTH, block_of(parts["matrix"]))
    assert calls == 2 * ["tensors", "kept", "base", "block"]
    calls.clear()
    for _ in range(3):
        kept.kept(BOTH, {"vector": parts["vector"]})
        kept.factors([LOW], parts["matrix"].tensor)
    assert calls == ["kept", "factors"]


@KIND
@WHOLE
def test_other_perturbations_tensors_and_rows_are_made_for_themselves(kind, whole, calls):
    kept, parts = KeptScratch(KINDS[kind](torch.float32), whole), parts_of()
    matrix, vector = parts["matrix"].tensor, {"vector": parts["vector"]}
    other = {"vector": part_of((16,), "bf16", 5)}
    for _ in range(2):
        for perturbation, part in ((BOTH, vector), (PLUS, vector), (BOTH, other)):
            kept.kept(perturbation, part)
        for perturbations, first, rows in (([LOW], 0, None), ([LOW, LOW], 0, None), ([LOW], 4, 8), ([LOW], 4, 0)):
            kept.factors(perturbations, matrix, first, rows)
    assert calls == 3 * ["kept"] + 4 * ["factors"]


@KIND
@WHOLE
def test_that_a_matrix_is_not_perturbed_is_known_too(kind, whole, calls):
    kept, frozen = KeptScratch(KINDS[kind](torch.float32), whole), part_of((8, 8), "bf16", 3, sigma_factor=0.0).tensor
    assert kept.factors([LOW], frozen) is None and kept.factors([LOW], frozen) is None
    assert calls == ["factors"]
