"""What a GPU runs, noise, scratch and the forward through it: on the CPU everywhere, on a GPU where there is one."""

import numpy as np
import pytest
import torch
from test_forward import BOTH, PLUS, Tiny, batch_of, config_of

from es_lite.algorithm import formats, kernels, noise, torch_noise
from es_lite.algorithm.jit import Threads
from es_lite.scoring.device import DeviceLogSumExp, DeviceScratch
from es_lite.scoring.forward import PerturbedModel
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.logsumexp import RunningLogSumExp
from es_lite.scoring.perturb import UNPERTURBED, Perturbation, Scratch
from es_lite.weights.layout import Tensor, skeleton
from es_lite.weights.stored import Part

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
DEVICES = pytest.mark.parametrize("device", [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=NO_GPU)], ids=str)
COMPUTE = pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32], ids=str)
STORAGE = pytest.mark.parametrize("storage", ["bf16", "int8"])
PLACE = {"seed": 0xFEDCBA9876543210, "step": 2**32 - 7, "pair": 4, "tensor": 290}


def part(shape: tuple[int, ...], storage: str, number: int = 0) -> Part:
    tensor = Tensor("matrix.weight", shape, number, 1.0, 1.0, 1.0)
    stored = Part.empty(tensor, 0, tensor.size, storage)
    stored.put(0.05 * np.random.default_rng(number).standard_normal(tensor.size, np.float32), Threads(1))
    return stored


def bits(values: torch.Tensor | np.ndarray) -> bytes:
    if isinstance(values, torch.Tensor):
        values = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).cpu().contiguous().numpy()
    return values.tobytes()


@DEVICES
@pytest.mark.parametrize("first", [0, 8, 8 * 100_003, 8 * (2**28 - 3)])
def test_the_noise_is_the_references(device, first):
    elements = torch.arange(first, first + 8 * 77, device=device)
    expected = noise.gaussian(**PLACE, start=first, count=8 * 77)
    assert bits(torch_noise.gaussian(elements, **PLACE)) == bits(expected)


@DEVICES
@COMPUTE
@pytest.mark.parametrize(("start", "length"), [(0, 8), (13, 5003), (2047, 1), (8, 4096)])
def test_perturbed_bfloat16_is_the_kernels(device, compute, start, length, monkeypatch):
    monkeypatch.setattr(torch_noise, "CHUNK", 1000)
    stored = part((length,), "bf16").data
    outs = [torch.empty(length, dtype=compute, device=device) for _ in range(2)]
    there = torch.from_numpy(stored).view(torch.bfloat16).to(device)
    torch_noise.perturb(outs, there, None, length, start, sigma=1.2345678e-3, **PLACE)
    expected = [np.empty(length, np.uint16 if compute == torch.bfloat16 else np.float32) for _ in range(2)]
    kernels.perturb(*expected, stored, sigma=1.2345678e-3, start=start, **PLACE)
    assert [bits(out) for out in outs] == [bits(out) for out in expected]


@DEVICES
@COMPUTE
@STORAGE
@pytest.mark.parametrize("width", [24, 27], ids=["counters-of-their-own", "counters-shared"])
@pytest.mark.parametrize("perturbation", [UNPERTURBED, PLUS, BOTH], ids=["theta", "plus", "both"])
def test_scratch_is_the_kernels(device, compute, storage, width, perturbation):
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


@DEVICES
@COMPUTE
def test_log_sum_exp(device, compute):
    """Against float64, where a token's logits lie far apart, too."""
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
    """All members folded, in several passes: the same scores as the kernels', one perturbation after the other."""
    tiny, batch = Tiny(config_of(name, tied)), batch_of()
    lanes = Lanes(1, 1)
    here = PerturbedModel(skeleton(tiny.config), tiny.layout, tiny.working, torch.float32, lanes, 2)
    there = PerturbedModel(skeleton(tiny.config), tiny.layout, tiny.working, torch.float32, lanes, 2, device)
    perturbations = [BOTH, UNPERTURBED, Perturbation(5, 1, 3, 0.01, (1, -1))]
    folded = there.score(perturbations, batch, 4)
    for perturbation, scores in zip(perturbations, folded, strict=True):
        (expected,) = here.score([perturbation], batch, 6)
        np.testing.assert_allclose(scores, expected, rtol=2e-6 if device.type == "cpu" else 1e-4)


def test_the_scale_of_each_row_counts():
    """The comparisons above would see a wrong row's scale: those of int8 rows differ."""
    matrix = part((50, 24), "int8", 3)
    assert len(set(matrix.scales.tolist())) == 50
    assert not np.array_equal(formats.as_float32(matrix.data, np.roll(matrix.scales, 1), 24), matrix.float32())
