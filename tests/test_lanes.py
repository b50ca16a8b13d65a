"""Lanes: work side by side, each with its own; and the same scores however many there are and wherever the weights come from."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from layers import ALONE, COMBINATIONS, Arrays, bits_of, config_of, layout_of, records, working_copy, written

from es_lite.data import Batch
from es_lite.scoring import doors
from es_lite.scoring.forward import PerturbedModel
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.perturb import UNPERTURBED, Perturbation, Weights
from es_lite.weights import conveyor, store, stream
from es_lite.weights.layout import skeleton

STEPS = 2
PERTURBATIONS = (
    Perturbation(seed=2**64 - 3, step=7, pair=0, sigma=0.02, signs=(1, -1)),
    Perturbation(seed=2**64 - 3, step=7, pair=1, sigma=0.02, signs=(1, -1)),
    Perturbation(seed=5, step=8, pair=2, sigma=0.01, signs=(-1,)),
    UNPERTURBED,
)
TYPES = pytest.mark.parametrize(("storage", "working"), COMBINATIONS, ids=map("-".join, COMBINATIONS))
COUNTS = pytest.mark.parametrize("count", [1, 2, 3])


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lanes set torch's threads. And small blocks, so that the head is many."""
    monkeypatch.setattr(conveyor, "VOCABULARY_ROWS", 64)
    monkeypatch.setattr(doors, "VOCABULARY_BLOCK", 32)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def batch() -> Batch:
    lengths = np.array([20, 20, 17, 9, 4, 2], np.int32)
    tokens = np.zeros((6, 20), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = np.random.default_rng(length).integers(0, 300, length)
    return Batch(tokens, lengths)


def scores(
    weights: Weights, name: str, compute: torch.dtype, lanes: int, groups: Sequence[Sequence[Perturbation]], samples: int
) -> list[bytes]:
    """Of each perturbation, the bits; each group of them passes together, `samples` at a time."""
    model = PerturbedModel(skeleton(config_of(name)), layout_of(name), weights, compute, Lanes(lanes, 1), 2)
    found = [values for group in groups for values in model.score(group, batch(), samples)]
    assert [values.shape for values in found] == [(p.members, 6) for group in groups for p in group]
    assert all(np.isfinite(values).all() and values.dtype == np.float64 for values in found)
    return [values.tobytes() for values in found]


@COUNTS
def test_everything_is_done_when_run_returns(count):
    lanes, done = Lanes(count, 1), np.zeros(50, int)

    def work(index: int, lane: int) -> None:
        done[index] += 1

    lanes.run([lambda lane, index=index: work(index, lane) for index in range(50)])
    lanes.run([])
    assert (done == 1).all()


@COUNTS
def test_nothing_shares_its_lane(count):
    """As many at once as there are lanes: a barrier lets none go on before."""
    lanes, together, busy = Lanes(count, 1), threading.Barrier(count), set()
    guard = threading.Lock()

    def work(lane: int) -> None:
        with guard:
            assert lane not in busy and 0 <= lane < count
            busy.add(lane)
        together.wait(20)
        with guard:
            busy.remove(lane)
        together.wait(20)

    lanes.run([work] * (4 * count))


@COUNTS
def test_a_lane_computes_as_its_caller_does(count):
    """With its threads of torch, and without a graph."""
    found = []
    with torch.inference_mode():
        Lanes(count, 2).run([lambda lane: found.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))] * 6)
    assert found == [(2, True)] * 6


@COUNTS
def test_what_is_raised_in_a_lane_is_raised_and_the_lanes_go_on(count):
    lanes, done = Lanes(count, 1), []

    def fail(lane: int) -> None:
        raise ValueError("in a lane")

    for _ in range(3):
        with pytest.raises(ValueError, match="in a lane"):
            lanes.run([fail] * 4)
    lanes.run([done.append] * 10)
    assert len(done) == 10


def test_the_kernels_threads_of_all_lanes():
    assert (Lanes(1, 2).threads.count, Lanes(1, 2).all_threads.count) == (2, 2)
    assert (Lanes(3, 2).threads.count, Lanes(3, 2).all_threads.count) == (2, 6)


@pytest.mark.parametrize(("name", "compute"), [("tied", torch.bfloat16), ("untied", torch.float32), ("gpt2", torch.bfloat16)])
@TYPES
def test_a_stream_with_lanes_scores_as_a_working_copy_does(tmp_path: Path, name, storage, working, compute):
    """All perturbations in one pass or in passes of two samples, against one perturbation after the other: the same bits. The
    files are brought level on the way."""
    layout, one_by_one = layout_of(name), [[p] for p in PERTURBATIONS]
    there = written(tmp_path / "there", layout, storage, STEPS)
    with working_copy(layout, working) as copy:
        for file in there:
            store.bring_level(file, Arrays(layout).open, [], STEPS, copy, ALONE)
        wanted = scores(copy, name, compute, 1, one_by_one, 6)
        assert scores(copy, name, compute, 2, [PERTURBATIONS], 4) == wanted
    assert len(set(wanted)) == len(wanted)
    for lanes, samples in ((2, 6), (2, 2)):
        folder = tmp_path / f"{lanes}-{samples}"
        files = written(folder, layout, storage)
        weights = stream.Stream(files, layout, working, Lanes(lanes, 1).all_threads, False, lambda parameters: None)
        weights.target(records(STEPS), STEPS)
        assert scores(weights, name, compute, lanes, [PERTURBATIONS], samples) == wanted
        assert bits_of(files) == bits_of(there)


@TYPES
def test_a_stream_scores_at_one_step_after_the_other(tmp_path: Path, storage, working):
    """A group of perturbations at a time, between which the target moves on; each is as if it were the only one."""
    layout = layout_of("tied")
    files = written(tmp_path / "here", layout, storage)
    weights = stream.Stream(files, layout, working, ALONE, False, lambda parameters: None)
    model = PerturbedModel(skeleton(config_of("tied")), layout, weights, torch.bfloat16, Lanes(2, 1), 2)
    for step in range(3):
        weights.target(records(step)[max(0, step - 1) :], step)
        found = [values.tobytes() for values in model.score(PERTURBATIONS[:2], batch(), 6)]
        with working_copy(layout, working) as copy:
            for file in written(tmp_path / f"{step}", layout, storage, step):
                store.bring_level(file, Arrays(layout).open, [], step, copy, ALONE)
            assert scores(copy, "tied", torch.bfloat16, 1, [PERTURBATIONS[:2]], 6) == found
