"""What runs on a device equals what the CPU's kernels make: perturbed tensors, log-sum-exp and scores.

The same code runs on the CPU everywhere, and on a GPU if there is one.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import BOTH, PLUS, Tiny, batch_of, bits, config_of, of_kind, part_of
from plain import EVERY_KIND

from es_lite.algorithm import formats
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.scoring.device import DeviceLogSumExp, DeviceScratch
from es_lite.scoring.logsumexp import RunningLogSumExp
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation
from es_lite.scoring.scratch import Scratch
from es_lite.weights.parts import Part

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
DEVICES = pytest.mark.parametrize("device", [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=NO_GPU)], ids=str)
COMPUTE = pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32], ids=str)
STORAGE = pytest.mark.parametrize("storage", ["bf16", "int8"])


@DEVICES
@COMPUTE
@STORAGE
@pytest.mark.parametrize("width", [24, 27], ids=["counters-of-their-own", "counters-shared"])
@pytest.mark.parametrize("perturbation", [UNPERTURBED, PLUS, BOTH], ids=["theta", "plus", "both"])
@EVERY_KIND
def test_perturbed_tensors_are_the_kernels(device, compute, storage, width, perturbation, noise):
    """Whole, in blocks and by rows; with widths that are and are not a multiple of the 8 elements of one noise counter."""
    perturbation = of_kind(perturbation, noise)
    matrix, vector = part_of((50, width), storage, 3), part_of((19,), storage, 4)
    here, there = Scratch(compute, Threads(1)), DeviceScratch(device, compute)
    ids = np.array([0, 3, 4, 49])
    block = Part(matrix.tensor, 10 * width, matrix.data[10 * width : 30 * width], matrix.scales)
    few = matrix.data.reshape(50, width)[ids], matrix.scales[ids] if matrix.scales.size else matrix.scales
    for _ in range(3):  # both staging buffers, and the first again
        parts = {"weight": matrix, "bias": vector}
        for mine, theirs in zip(here.tensors(perturbation, parts), there.tensors(perturbation, parts), strict=True):
            assert {name: bits(value) for name, value in mine.items()} == {name: bits(value) for name, value in theirs.items()}
        assert [*map(bits, here.block(perturbation, block))] == [*map(bits, there.block(perturbation, block))]
        rows = [scratch.rows(perturbation, matrix.tensor, ids, *few) for scratch in (here, there)]
        assert [*map(bits, rows[0])] == [*map(bits, rows[1])]


@DEVICES
@COMPUTE
@STORAGE
def test_what_members_share_and_keep_is_the_kernels(device, compute, storage):
    """Unperturbed matrices, whole and in blocks, factors, and small tensors; each in memory of its own."""
    matrix, vector = part_of((50, 24), storage, 3), part_of((19,), storage, 4)
    here, there = Scratch(compute, Threads(1)), DeviceScratch(device, compute)
    group = [replace(of_kind(BOTH, LowRank(3)), pair=pair) for pair in range(2)]
    parts = {"weight": matrix, "": Part(matrix.tensor, 10 * 24, matrix.data[10 * 24 : 30 * 24], matrix.scales)}
    base, factors = there.base(parts), there.factors(group, matrix.tensor)
    kept = [member["bias"] for perturbation in group for member in there.kept(perturbation, {"bias": vector})]
    for _ in range(2):  # both staging buffers
        there.tensors(group[1], {"weight": matrix, "bias": vector})
        there.kept(group[1], {"bias": vector})
    assert there.base(parts) is base, "copied once"
    assert {name: bits(value) for name, value in base.items()} == {name: bits(value) for name, value in here.base(parts).items()}
    assert base["weight"].shape == (50, 24) and base[""].shape == (20, 24)
    expected = here.factors(group, matrix.tensor)
    assert (bits(factors.left), bits(factors.right)) == (bits(expected.left), bits(expected.right))
    some, expected = (scratch.factors(group, matrix.tensor, 7, 20) for scratch in (there, here))
    assert (bits(some.left), bits(some.right)) == (bits(expected.left), bits(expected.right))
    alone = [member["bias"] for perturbation in group for member in here.kept(perturbation, {"bias": vector})]
    assert [*map(bits, kept)] == [*map(bits, alone)] and len({*map(bits, kept)}) == 4
    other = {"weight": part_of((50, 24), storage, 5)}
    assert bits(there.base(other)["weight"]) == bits(here.base(other)["weight"])
    assert there.factors(group, replace(matrix.tensor, sigma_factor=0.0)) is None


def test_the_scale_of_each_row_matters():
    """So the comparisons above would show if a row had another's scale."""
    matrix = part_of((50, 24), "int8", 3)
    assert len(set(matrix.scales.tolist())) == 50
    assert not np.array_equal(formats.as_float32(matrix.data, np.roll(matrix.scales, 1), 24), matrix.float32())


@DEVICES
@COMPUTE
def test_log_sum_exp(device, compute):
    """Against float64, with logits of a token that are far apart."""
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.standard_normal((13, 700), np.float32) * 30).to(compute)
    targets = random.integers(0, 700, 13).astype(np.int32)
    running = DeviceLogSumExp(targets, device)
    for first in range(0, 700, 256):
        running.update(logits[:, first : first + 256].to(device), first, Threads(1))
    expected = torch.log_softmax(logits.to(torch.float64), 1)[torch.arange(13), torch.from_numpy(targets.astype(np.int64))]
    np.testing.assert_allclose(running.log_probabilities(), expected.numpy(), rtol=1e-5, atol=2e-5)
    other = RunningLogSumExp(targets)
    other.update(logits.contiguous(), 0, Threads(1))
    np.testing.assert_allclose(running.log_probabilities(), other.log_probabilities(), rtol=1e-5, atol=2e-5)


@DEVICES
@pytest.mark.parametrize("name", ["qwen3", "llama-biases", "gemma2", "gpt2", "cohere", "mixtral"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_scores_are_the_cpus(device, name, tied):
    """All members together, in several passes, score as the kernels do it one perturbation after the other."""
    tiny, batch = Tiny(config_of(name, tied)), batch_of()
    here, there = tiny.model(micro_batch=2), tiny.model(micro_batch=2, device=device, tile_members=4)
    other = Perturbation(5, 1, 3, 0.01, (1, -1))
    low = [of_kind(perturbation, LowRank(2)) for perturbation in (BOTH, other, replace(other, pair=4))]
    perturbations = [BOTH, UNPERTURBED, other, *low]
    expected = np.concatenate([here.log_probabilities([perturbation], batch, 6) for perturbation in perturbations])
    found = there.log_probabilities(perturbations, batch, 4)
    assert found.shape == (11, 6)
    np.testing.assert_allclose(found, expected, rtol=2e-6 if device.type == "cpu" else 1e-4)
