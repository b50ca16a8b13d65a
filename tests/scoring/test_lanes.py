"""Lanes: concurrent calls, each with a lane to itself; neither their number nor where weights come from changes a score."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import batch_of
from layers import ALONE, TYPES, Arrays, bits_of, config_of, layout_of, records, working_copy, written

from es_lite.model.layout import skeleton
from es_lite.scoring import heads
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation
from es_lite.scoring.weights import Weights
from es_lite.weights import conveyor, store
from es_lite.weights.stream import Stream

STEPS = 2
PERTURBATIONS = (
    Perturbation(seed=2**64 - 3, step=7, pair=0, sigma=0.02, signs=(1, -1)),
    Perturbation(seed=2**64 - 3, step=7, pair=1, sigma=0.02, signs=(1, -1)),
    Perturbation(seed=5, step=8, pair=2, sigma=0.01, signs=(-1,)),
    UNPERTURBED,
)
COUNTS = pytest.mark.parametrize("count", [1, 2, 3])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head takes many sections and blocks."""
    monkeypatch.setattr(conveyor, "VOCABULARY_ROWS", 64)
    monkeypatch.setattr(heads, "VOCABULARY_BLOCK", 32)


def scores(
    weights: Weights, name: str, compute: torch.dtype, lanes: int, groups: Sequence[Sequence[Perturbation]], samples: int
) -> list[bytes]:
    """The bits of each member's scores; the perturbations of a group pass together, `samples` samples at a time."""
    model = PerturbedModel(skeleton(config_of(name)), layout_of(name), weights, compute, Lanes(lanes, 1), 2)
    batch = batch_of()
    found = [model.log_probabilities(group, batch, samples) for group in groups]
    assert [values.shape for values in found] == [(sum(p.members for p in group), 6) for group in groups]
    assert all(np.isfinite(values).all() and values.dtype == np.float64 for values in found)
    return [row.tobytes() for values in found for row in values]


@COUNTS
def test_everything_is_done_when_run_returns(count):
    lanes, done = Lanes(count, 1), np.zeros(50, int)

    def work(index: int, lane: int) -> None:
        done[index] += 1

    lanes.run([lambda lane, index=index: work(index, lane) for index in range(50)])
    lanes.run([])
    assert (done == 1).all()


@COUNTS
def test_no_two_calls_share_a_lane(count):
    """As many run at once as there are lanes: a barrier holds each until the others have arrived."""
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
    """With as many threads of torch, and in inference mode."""
    found = []
    with torch.inference_mode():
        Lanes(count, 2).run([lambda lane: found.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))] * 6)
    assert found == [(2, True)] * 6


@COUNTS
def test_an_exception_in_a_lane_is_raised_and_the_lanes_stay_usable(count):
    lanes, done = Lanes(count, 1), []

    def fail(lane: int) -> None:
        raise ValueError("in a lane")

    for _ in range(3):
        with pytest.raises(ValueError, match="in a lane"):
            lanes.run([fail] * 4)
    lanes.run([done.append] * 10)
    assert len(done) == 10


def test_threads_for_kernels_of_one_lane_and_of_all():
    assert (Lanes(1, 2).threads.count, Lanes(1, 2).all_threads.count) == (2, 2)
    assert (Lanes(3, 2).threads.count, Lanes(3, 2).all_threads.count) == (2, 6)


@pytest.mark.parametrize(("name", "compute"), [("tied", torch.bfloat16), ("untied", torch.float32), ("gpt2", torch.bfloat16)])
@TYPES
def test_a_stream_with_lanes_scores_as_a_working_copy_does(tmp_path: Path, name, storage, working, compute):
    """All perturbations together, in one pass or in passes of two samples, have the same bits as one perturbation after the
    other. The pass brings the files to the current step."""
    layout, one_by_one = layout_of(name), [[p] for p in PERTURBATIONS]
    there = written(tmp_path / "there", layout, storage, STEPS)
    with working_copy(layout, working) as copy:
        for file in there:
            store.advance_layer(file, Arrays(layout).open, [], STEPS, copy, ALONE)
        expected = scores(copy, name, compute, 1, one_by_one, 6)
        assert scores(copy, name, compute, 2, [PERTURBATIONS], 4) == expected
    assert len(set(expected)) == len(expected) == 6
    for lanes, samples in ((2, 6), (2, 2)):
        files = written(tmp_path / f"{lanes}-{samples}", layout, storage)
        stream = Stream(files, layout, working, Lanes(lanes, 1).all_threads, False)
        stream.advance(records(STEPS), STEPS)
        assert scores(stream, name, compute, lanes, [PERTURBATIONS], samples) == expected
        assert bits_of(files) == bits_of(there)


@TYPES
def test_a_stream_scores_at_one_step_after_the_other(tmp_path: Path, storage, working):
    """Between groups of perturbations the stream advances; each group scores as if it were the only one."""
    layout = layout_of("tied")
    files = written(tmp_path / "here", layout, storage)
    stream = Stream(files, layout, working, ALONE, False)
    model = PerturbedModel(skeleton(config_of("tied")), layout, stream, torch.bfloat16, Lanes(2, 1), 2)
    for step in range(3):
        stream.advance(records(step)[max(0, step - 1) :], step)
        found = [row.tobytes() for row in model.log_probabilities(PERTURBATIONS[:2], batch_of(), 6)]
        with working_copy(layout, working) as copy:
            for file in written(tmp_path / f"{step}", layout, storage, step):
                store.advance_layer(file, Arrays(layout).open, [], step, copy, ALONE)
            assert scores(copy, "tied", torch.bfloat16, 1, [PERTURBATIONS[:2]], 6) == found
