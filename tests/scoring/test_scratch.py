"""Perturbed tensors: the same bits whole, by rows, by blocks and with any number of threads, and those of numpy; and what
members share under low-rank noise: matrices as they are or converted, and factors."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import BOTH, Tiny, bits, config_of, of_kind, part_of
from plain import EVERY_KIND

from es_lite.algorithm import formats
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation
from es_lite.scoring.scratch import Scratch
from es_lite.weights.parts import Part

COMPUTE = pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)


def scratch_bits(tiny: Tiny, perturbation: Perturbation, compute: torch.dtype, threads: int) -> dict[str, list[bytes]]:
    """Bits of each tensor for each member, by name; rows and blocks are compared on the way."""
    scratch = Scratch(compute, Threads(threads))
    found = {}
    for tensor in tiny.layout.tensors:
        part = tiny.working.part(tensor)
        whole = [member["x"].clone() for member in scratch.tensors(perturbation, {"x": part})]
        if len(tensor.shape) == 2:
            rows = np.arange(tensor.shape[0])
            by_rows = scratch.rows(perturbation, tensor, rows, *tiny.working.rows(tensor, rows))
            assert all(torch.equal(a, b) for a, b in zip(whole, by_rows, strict=True))
            block = Part(tensor, 3 * tensor.width, part.data[3 * tensor.width : 9 * tensor.width], part.scales)
            assert all(torch.equal(a[3:9], b) for a, b in zip(whole, scratch.block(perturbation, block), strict=True))
        found[tensor.name] = [*map(bits, whole)]
    return found


@COMPUTE
@EVERY_KIND
def test_threads_rows_and_blocks_make_the_same_tensors(compute, noise):
    tiny = Tiny(config_of("qwen3", vocab_size=3001))  # an embedding large enough to be divided among threads
    both = of_kind(BOTH, noise)
    one = scratch_bits(tiny, both, compute, 1)
    assert one == scratch_bits(tiny, both, compute, 2)
    for member, sign in enumerate(both.signs):
        for name, expected in tiny.perturbed(both, sign).items():
            assert one[name][member] == bits(expected.to(compute))


@COMPUTE
@EVERY_KIND
def test_what_is_kept_has_the_same_bits_and_outlives_the_next_calls(compute, noise):
    scratch, both = Scratch(compute, Threads(1)), of_kind(BOTH, noise)
    parts = {"matrix": part_of((50, 24), "int8"), "vector": part_of((50,), "bf16", 4)}
    kept = scratch.kept(both, parts)
    expected = [{name: bits(value) for name, value in member.items()} for member in scratch.tensors(both, parts)]
    for perturbation in (UNPERTURBED, replace(both, pair=9)):
        scratch.tensors(perturbation, parts)
        scratch.kept(perturbation, parts)
        scratch.base(dict(parts))
    assert [{name: bits(value) for name, value in member.items()} for member in kept] == expected
    assert expected[0] != expected[1]


# What members share


def test_the_base_is_the_stored_weights_themselves_if_they_have_the_compute_type():
    """No byte of them is copied, and nothing else is held."""
    part, scratch = part_of((50, 24), "bf16"), Scratch(torch.bfloat16, Threads(1))
    base = scratch.base({"weight": part})["weight"]
    assert (base.shape, base.dtype, base.data_ptr()) == ((50, 24), torch.bfloat16, part.data.ctypes.data)
    rows = Part(part.tensor, 5 * 24, part.data[5 * 24 : 9 * 24])
    assert torch.equal(scratch.base({"": rows})[""], base[5:9])
    assert scratch.base({"": rows})[""].data_ptr() == rows.data.ctypes.data
    assert scratch._base_buffer.size == 0


@pytest.mark.parametrize(("storage", "compute"), [("bf16", torch.float32), ("int8", torch.float32), ("int8", torch.bfloat16)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_base_is_converted_once_for_all_calls_with_the_same_parts(monkeypatch, storage, compute, threads):
    """Also of rows within a tensor, with the scales of these rows. Its memory is another than that of what is perturbed."""
    part, scratch, converted = part_of((400, 200), storage), Scratch(compute, Threads(threads)), []
    expected = torch.from_numpy(part.float32()).to(compute).view(400, 200)
    dequantise = formats.dequantise

    def counted(out, stored, **keys):
        converted.append(out.size)
        dequantise(out, stored, **keys)

    monkeypatch.setattr(formats, "dequantise", counted)
    parts = {"all": part, "rows": Part(part.tensor, 5 * 200, part.data[5 * 200 : 9 * 200], part.scales)}
    low = of_kind(BOTH, LowRank(1))
    for _ in range(2):
        base = scratch.base(parts)
        assert torch.equal(base["all"], expected) and torch.equal(base["rows"], expected[5:9])
        scratch.tensors(low, parts)
        scratch.factors([low], part.tensor)
        assert torch.equal(base["all"], expected) and torch.equal(base["rows"], expected[5:9])
    assert sum(converted) == part.data.size + 4 * 200
    other = {"all": part_of((400, 200), storage, 8)}
    assert torch.equal(scratch.base(other)["all"].flatten(), torch.from_numpy(other["all"].float32()).to(compute))
    assert torch.equal(scratch.base(parts)["all"], expected), "converted again after others"


@COMPUTE
@pytest.mark.parametrize("rank", [1, 4])
def test_factors_are_those_of_the_noise_with_a_scaled_by_sigma_over_the_root_of_the_rank(compute, rank):
    """Of all rows of A, or some; a pair's first sign is not in them."""
    tensor, scratch = part_of((50, 24), "bf16", sigma_factor=0.25).tensor, Scratch(compute, Threads(1))
    group = [replace(of_kind(BOTH, LowRank(rank)), pair=pair, signs=(-1,)) for pair in (0, 5)]
    for first, rows in ((0, None), (7, 20), (49, 1), (0, 0)):
        factors = scratch.factors(group, tensor, first, rows)
        for p, perturbation in enumerate(group):
            drawn = gaussian.epsilon(perturbation.place_of(tensor), (), 0, 74 * rank).reshape(74, rank)
            left = drawn[first : 50 if rows is None else first + rows]
            scale = np.float32(perturbation.sigma * 0.25) * np.float32(1 / math.sqrt(rank))
            assert bits(factors.left[p]) == bits(torch.from_numpy(left * scale).to(compute).T)
            assert bits(factors.right[p]) == bits(torch.from_numpy(drawn[50:]).to(compute))


def test_a_frozen_matrix_has_no_factors():
    scratch, low = Scratch(torch.float32, Threads(1)), of_kind(BOTH, LowRank(1))
    assert scratch.factors([low], part_of((50, 24), "bf16", sigma_factor=0.0).tensor) is None
    assert scratch.factors([replace(low, sigma=0.0)], part_of((50, 24), "bf16").tensor) is None
    assert scratch.factors([low], part_of((50, 24), "bf16").tensor) is not None
