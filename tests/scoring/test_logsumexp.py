"""The running log-sum-exp against torch's log_softmax in float64."""

import numpy as np
import pytest
import torch

from es_lite.algorithm.jit import Threads
from es_lite.scoring.logsumexp import RunningLogSumExp

TYPES = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
ONE = Threads(1)


def stored(logits: np.ndarray, bf16: bool) -> np.ndarray:
    """Logits in a format that models output: float32, or bfloat16 bits."""
    tensor = torch.from_numpy(logits.astype(np.float32))
    return tensor.to(torch.bfloat16).view(torch.uint16).numpy() if bf16 else tensor.numpy()


def reference(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Log-probabilities of the targets, computed in float64 from the same stored logits."""
    values = (logits.astype(np.uint32) << 16).view(np.float32) if logits.dtype == np.uint16 else logits
    log_softmax = torch.log_softmax(torch.from_numpy(values.astype(np.float64)), dim=-1)
    return log_softmax.gather(1, torch.from_numpy(targets.astype(np.int64))[:, None])[:, 0].numpy()


def running(logits: np.ndarray, targets: np.ndarray, block: int, threads: Threads = ONE) -> np.ndarray:
    state = RunningLogSumExp(targets)
    for first in range(0, logits.shape[1], block):
        state.update(np.ascontiguousarray(logits[:, first : first + block]), first, threads)
    return state.log_probabilities()


def case(tokens: int, width: int, deviation: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(width)
    logits = deviation * random.standard_normal((tokens, width), np.float32)
    targets = random.integers(0, width, tokens, dtype=np.int32)
    targets[0], targets[-1] = 0, width - 1
    return logits, targets


@TYPES
@pytest.mark.parametrize("width", [1, 2, 3, 64, 300, 1000, 2049])
@pytest.mark.parametrize("block", [1, 7, 64, 300, 2048])
def test_any_vocabulary_in_blocks_of_any_size(width, block, bf16):
    logits, targets = case(5, width, 3.0)
    logits = stored(logits, bf16)
    assert np.allclose(running(logits, targets, block), reference(logits, targets), rtol=0, atol=5e-6)


@TYPES
def test_a_vocabulary_of_many_blocks(bf16):
    logits, targets = case(8, 20_011, 4.0)
    logits = stored(logits, bf16)
    assert np.allclose(running(logits, targets, 2048), reference(logits, targets), rtol=0, atol=5e-6)


@TYPES
@pytest.mark.parametrize("value", [0.0, -3.7, 1e4, -1e4])
def test_equal_logits_share_the_probability(value, bf16):
    logits, targets = stored(np.full((3, 5000), value), bf16), np.array([0, 2048, 4999], np.int32)
    assert np.allclose(running(logits, targets, 2048), -np.log(5000), rtol=0, atol=2e-6)


@TYPES
@pytest.mark.parametrize("place", [0, 300, 2047, 2048, 4999])
def test_one_dominant_logit(place, bf16):
    logits = np.full((2, 5000), -1e4, np.float32)
    logits[:, place] = 1e4
    logits = stored(logits, bf16)
    result = running(logits, np.array([place, (place + 1) % 5000], np.int32), 2048)
    assert result[0] == 0
    assert result[1] == reference(logits, np.array([(place + 1) % 5000] * 2))[0]


@TYPES
@pytest.mark.parametrize("rising", [True, False])
def test_logits_from_minus_to_plus_ten_thousand(rising, bf16):
    logits = np.sort(np.random.default_rng(5).uniform(-1e4, 1e4, (4, 3000)), axis=1)
    logits = stored(logits if rising else logits[:, ::-1], bf16)
    targets = np.array([0, 1500, 2998, 2999], np.int32)
    assert np.allclose(running(logits, targets, 512), reference(logits, targets), rtol=1e-6, atol=1e-5)


@TYPES
@pytest.mark.parametrize("shift", [100.0, -1000.0, 1e4])
def test_logits_far_from_zero_that_are_close_to_one_another(shift, bf16):
    """Only differences to the greatest logit matter, and those are exact, however far from zero the logits are."""
    logits, targets = case(4, 3000, 2.0)
    logits = stored(logits + np.float32(shift), bf16)
    assert np.allclose(running(logits, targets, 512), reference(logits, targets), rtol=0, atol=2e-5)


def test_many_tiny_terms_are_not_lost():
    """One term of 1 and 4095 of e^-15: adding these to the 1 in float32, one after the other, would lose digits."""
    logits = np.full((1, 4096), -15.0, np.float32)
    logits[0, 0] = 0
    result = running(logits, np.zeros(1, np.int32), 2048)[0]
    assert result == pytest.approx(-np.log1p(4095 * np.exp(-15.0)), abs=2e-7)


@TYPES
@pytest.mark.parametrize("count", [2, 3])
def test_the_bits_do_not_depend_on_the_threads(count, bf16):
    logits, targets = case(333, 500, 4.0)
    logits = stored(logits, bf16)
    assert running(logits, targets, 200, Threads(count)).tobytes() == running(logits, targets, 200).tobytes()


@TYPES
def test_a_tokens_bits_do_not_depend_on_its_neighbours(bf16):
    logits, targets = case(20, 500, 4.0)
    logits = stored(logits, bf16)
    together = running(logits, targets, 200)
    for i in range(20):
        assert running(logits[i : i + 1], targets[i : i + 1], 200)[0] == together[i]


@TYPES
def test_the_logits_are_not_changed(bf16):
    logits, targets = case(3, 100, 1.0)
    logits = stored(logits, bf16)
    before = logits.copy()
    running(logits, targets, 100)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_count_as_their_arrays(compute):
    logits, targets = case(20, 500, 4.0)
    state = RunningLogSumExp(targets)
    state.update(torch.from_numpy(logits).to(compute), 0, ONE)
    assert state.log_probabilities().tobytes() == running(stored(logits, compute == torch.bfloat16), targets, 500).tobytes()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_not_finite_never_give_a_finite_score(broken):
    """Otherwise a model that overflowed could look like a good one."""
    for logits in (np.full((1, 300), broken, np.float32), np.where(np.arange(300) % 2, broken, 1.0)[None].astype(np.float32)):
        assert not np.isfinite(running(logits, np.zeros(1, np.int32), 128)[0])


def test_zero_tokens():
    assert running(np.zeros((0, 300), np.float32), np.zeros(0, np.int32), 128).shape == (0,)
