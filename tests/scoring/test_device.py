"""What runs on a device equals what the CPU's kernels make: perturbed tensors, log-sum-exp and scores.

The same code runs on the CPU everywhere, and on a GPU if there is one.
"""

import numpy as np
import pytest
import torch
from architectures import BOTH, PLUS, Tiny, batch_of, config_of

from es_lite.algorithm import formats
from es_lite.algorithm.jit import Threads
from es_lite.model.layout import Tensor
from es_lite.scoring.device import DeviceLogSumExp, DeviceScratch
from es_lite.scoring.logsumexp import RunningLogSumExp
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation
from es_lite.scoring.scratch import Scratch
from es_lite.weights.parts import Part

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
DEVICES = pytest.mark.parametrize("device", [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=NO_GPU)], ids=str)
COMPUTE = pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32], ids=str)
STORAGE = pytest.mark.parametrize("storage", ["bf16", "int8"])


def part(shape: tuple[int, ...], storage: str, number: int = 0) -> Part:
    """A whole tensor of random values."""
    tensor = Tensor("matrix.weight", shape, number, 1.0, 1.0, 1.0)
    stored = Part.empty(tensor, 0, tensor.size, storage)
    stored.put(0.05 * np.random.default_rng(number).standard_normal(tensor.size, np.float32), Threads(1))
    return stored


def bits(values: torch.Tensor) -> bytes:
    values = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
    return values.cpu().contiguous().numpy().tobytes()


@DEVICES
@COMPUTE
@STORAGE
@pytest.mark.parametrize("width", [24, 27], ids=["counters-of-their-own", "counters-shared"])
@pytest.mark.parametrize("perturbation", [UNPERTURBED, PLUS, BOTH], ids=["theta", "plus", "both"])
def test_perturbed_tensors_are_the_kernels(device, compute, storage, width, perturbation):
    """Whole, in blocks and by rows; with widths that are and are not a multiple of the 8 elements of one noise counter."""
    matrix, vector = part((50, width), storage, 3), part((19,), storage, 4)
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


def test_the_scale_of_each_row_matters():
    """So the comparisons above would show if a row had another's scale."""
    matrix = part((50, 24), "int8", 3)
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
@pytest.mark.parametrize("name", ["qwen3", "llama-biases", "gemma2", "gpt2", "cohere"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_scores_are_the_cpus(device, name, tied):
    """All members together, in several passes, score as the kernels do it one perturbation after the other."""
    tiny, batch = Tiny(config_of(name, tied)), batch_of()
    here, there = tiny.model(micro_batch=2), tiny.model(micro_batch=2, device=device)
    perturbations = [BOTH, UNPERTURBED, Perturbation(5, 1, 3, 0.01, (1, -1))]
    expected = np.concatenate([here.log_probabilities([perturbation], batch, 6) for perturbation in perturbations])
    found = there.log_probabilities(perturbations, batch, 4)
    assert found.shape == (5, 6)
    np.testing.assert_allclose(found, expected, rtol=2e-6 if device.type == "cpu" else 1e-4)
