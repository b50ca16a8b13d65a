"""The engine of this machine cuts work into tasks; here a pool does them in this process, in any order and, if asked, twice."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import IN_EVERY_STORAGE, TYPES, flip, records
from support import TINY
from torch.nn import functional

from es_lite import system
from es_lite.algorithm.formats import Storage
from es_lite.data.batch import Batch
from es_lite.engine import local
from es_lite.engine.base import Execution
from es_lite.engine.local import LocalEngine
from es_lite.engine.messages import Advance, AdvanceSections, Check, Finish, Task
from es_lite.engine.worker import Setup, Worker
from es_lite.errors import DamagedFile
from es_lite.model.origin import Origin
from es_lite.recipe import Recipe
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation
from es_lite.tables import MemoryTable
from es_lite.weights import store
from es_lite.weights.store import Store
from es_lite.weights.working_copy import size_bytes

PAIRS = [Perturbation(7, 0, pair, 0.02, (1, -1)) for pair in range(3)]
LOW = [Perturbation(7, 0, pair, 0.02, (1, -1), "lowrank", 2) for pair in range(5)]
MEMBERS, PASS_ITEMS, MICRO_BATCH = 6, 4, 2
"""As planned: hidden states of this many members for this many items are in memory together."""


class InThisProcess:
    """Replaces the pool.

    Attributes:
        maps: the tasks of each `map` that had any.
    """

    shortage = ""

    def __init__(self, setup: Setup, working_copy: int | None, workers: int, twice: bool) -> None:
        """twice: each task is done twice, as if its worker had died when it was done but had not answered."""
        self.setup = setup
        self.working_copy = working_copy
        self.maps: list[list[Any]] = []
        self.pids = range(workers)
        self._workers = [Worker(setup, working_copy, lambda share: None) for _ in self.pids]
        self._times = 2 if twice else 1
        self._random = random.Random(1)

    def map(self, tasks: Sequence[Task], patience_seconds: float, progress: Callable[[float], None]) -> list[Any]:
        self.maps += [list(tasks)] if tasks else []
        values: list[Any] = [None] * len(tasks)
        order = self._times * list(range(len(tasks)))
        self._random.shuffle(order)
        for done, index in enumerate(order, start=1):
            values[index] = self._random.choice(self._workers).do(tasks[index])
            progress(done / len(order))
        return values

    def files(self) -> dict[str, bytes]:
        """The layers' files."""
        return {path.name: path.read_bytes() for path in self.setup.folder.glob("*.safetensors")}

    def copy(self) -> bytes:
        """The working copy."""
        assert self.working_copy is not None
        return os.pread(self.working_copy, size_bytes(self.setup.layout, self.setup.weights), 0)

    def store(self) -> Store:
        return Store(self.setup.folder, self.setup.layout, self.setup.origin.storage)

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        """The working copy is the engine's to close."""


@pytest.fixture
def engine_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes engines, each with its pool, as context managers."""

    @contextmanager
    def make(
        name: str,
        workers: int,
        storage: Storage = "fp32",
        weights: Storage = "bf16",
        streamed: bool = False,
        twice: bool = False,
        tile_members: int = 1,
        compute: str = "fp32",
    ) -> Iterator[tuple[LocalEngine, InThisProcess]]:
        origin = Origin("", TINY, seed=5, groups=(), nes=False, shared_noise=False, storage=storage)
        _, layout = origin.skeleton()
        execution = Execution(
            streamed=streamed,
            direct=False,
            device="cpu",
            compute=compute,
            workers=workers,
            threads=1,
            members=MEMBERS,
            pass_samples=PASS_ITEMS,
            micro_batch=MICRO_BATCH,
            tile_members=tile_members,
            prompt_members=tile_members,
            kept=False,
            group=max(1, tile_members // 2),
        )
        pools = []

        def pool(setup: Setup, copy: int | None, lock: int, count: int, *_: object) -> InThisProcess:
            pools.append(InThisProcess(setup, copy, count, twice))
            return pools[0]

        monkeypatch.setattr(local, "Pool", pool)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        recipe = Recipe(memory=MemoryTable(weights="int8" if weights == "int8" else "bf16"))
        with (tmp_path / "lock").open("w") as lock:
            files = Store(folder, layout, storage)
            with LocalEngine(recipe, origin, layout, files, execution, lock, pytest.fail) as engine:
                yield engine, pools[0]

    return make


def ignore(share: float) -> None:
    pass


def items(count: int) -> Batch:
    """Samples of different lengths."""
    lengths = np.arange(count + 4, 4, -1, dtype=np.int32)
    tokens = np.random.default_rng(2).integers(1, 257, (count, count + 4)).astype(np.int32)
    tokens[np.arange(count + 4) >= lengths[:, None]] = 0
    return Batch(tokens, lengths)


@TYPES
def test_layers_that_several_workers_share_get_the_same_bits_as_with_one(
    storage: Storage, working: Storage, engine_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From θ₀ and from files, with tasks in any order and repeated; the vocabulary's matrix, too, has several sections."""
    monkeypatch.setattr(store, "SECTION_BYTES", 4096)
    history = records(4)
    with (
        engine_of("one", 1, storage, working) as (one, alone),
        engine_of("five", 5, storage, working, twice=True) as (five, together),
    ):
        for steps in (history[:2], history[2:]):
            shares: list[float] = []
            one.advance(steps, ignore)
            five.advance(steps, shares.append)
            assert shares == sorted(shares) and shares[-1] == 1
            assert together.files() == alone.files() and together.copy() == alone.copy()
    assert alone.store().steps() == [4] * 4
    assert all(isinstance(task, Advance) for tasks in alone.maps for task in tasks)
    # Two rounds for each advance: all sections once, with a check of the old file if there is one, and only then the tasks that
    # complete the divided layers.
    for checks, tasks, finishes in zip((0, 1), together.maps[::2], together.maps[1::2], strict=True):
        layers = together.setup.layout.layers
        divided = [layer for layer in layers if layer.size > together.setup.layout.size // 5]
        assert len(divided) == 3 and sorted(task.layer for task in finishes) == [layer.index for layer in divided]
        assert all(isinstance(task, Finish) for task in finishes)
        for layer in layers:
            own = [task for task in tasks if task.layer == layer.index]
            if layer not in divided:
                assert [type(task) for task in own] == [Advance]
                continue
            ranges = [task for task in own if isinstance(task, AdvanceSections)]
            assert len(ranges) > 1 and [type(task) for task in own[: -len(ranges)]] == [Check] * checks
            sections = [number for task in ranges for number in range(task.low, task.high)]
            assert sections == list(range(store.section_count(together.store().files[layer.index])))


@IN_EVERY_STORAGE
def test_damage_in_a_layer_that_workers_share_is_found(storage: Storage, engine_of) -> None:
    working = "bf16" if storage == "fp32" else storage
    with engine_of("five", 5, storage, working) as (engine, _):
        engine.advance(records(1), ignore)
    with engine_of("five", 5, storage, working) as (engine, pool):
        path = pool.setup.folder / "block-001.safetensors"
        flip(path, path.stat().st_size - 3)
        damaged = path.read_bytes()
        with pytest.raises(DamagedFile, match=r"block-001\.safetensors: its checksum does not match"):
            engine.advance(records(2), ignore)
        assert Check(2) in pool.maps[-1]
    assert path.read_bytes() == damaged


def test_resident_layers_are_brought_to_the_end_from_wherever_each_stands(engine_of) -> None:
    with engine_of("one", 1) as (engine, expected):
        engine.advance(records(3), ignore)
        copy = expected.copy()
    with engine_of("other", 1) as (engine, pool):
        engine.advance(records(1), ignore)
        (pool.setup.folder / "block-000.safetensors").unlink()
    with engine_of("other", 2) as (engine, pool):
        assert pool.store().steps() == [1, 0, 1, 1]
        engine.advance(records(3), ignore)
        assert pool.files() == expected.files() and pool.copy() == copy


def test_the_items_of_one_perturbation_are_divided_among_all_workers(engine_of) -> None:
    """In whole micro-batches; those of a population are not, and no score's bits depend on it."""
    with engine_of("one", 1) as (one, _), engine_of("three", 3) as (three, pool):
        for engine in (one, three):
            engine.advance([], ignore)
        pool.maps.clear()
        for perturbations in ([UNPERTURBED], PAIRS[:1], PAIRS):
            scores = three.score(perturbations, items(9), ignore)
            assert scores.shape == (sum(p.members for p in perturbations), 9) and scores.dtype == np.float64
            assert scores.tobytes() == one.score(perturbations, items(9), ignore).tobytes()
        assert [[len(task.items) for task in tasks] for tasks in pool.maps] == [[4, 4, 1], [4, 4, 1], [9, 9, 9]]


def test_perturbations_that_share_a_tile_are_one_task(engine_of) -> None:
    """In order; the last task has what is left. If there is one perturbation, its items are divided among all workers."""
    with engine_of("layers", 3, tile_members=4) as (engine, pool):
        engine.advance([], ignore)
        pool.maps.clear()
        for perturbations in (LOW, [*LOW, UNPERTURBED], LOW[:1], LOW[:2]):
            scores = engine.score(perturbations, items(9), ignore)
            assert scores.shape == (sum(p.members for p in perturbations), 9)
        found = [[(list(task.perturbations), len(task.items)) for task in tasks] for tasks in pool.maps]
    first, second = (LOW[:2], 9), (LOW[2:4], 9)
    assert found == [
        [first, second, (LOW[4:], 9)],
        [first, second, ([LOW[4], UNPERTURBED], 9)],
        [(LOW[:1], 4), (LOW[:1], 4), (LOW[:1], 1)],
        [first],
    ]


@pytest.mark.parametrize("tile_members", [1, 4])
@pytest.mark.parametrize(("storage", "weights", "compute"), [("fp32", "bf16", "fp32"), ("int8", "int8", "bf16")])
def test_low_rank_scores_have_the_same_bits_however_the_machine_is_used(
    engine_of, monkeypatch: pytest.MonkeyPatch, storage: Storage, weights: Storage, compute: str, tile_members: int
) -> None:
    """One worker or two, one lane or two, resident or streamed; after a step, with θ or without. Five pairs are no multiple of
    the two that share a tile. The bits of a large product may depend on how many rows it has; those of these products do."""
    linear = functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, *args: linear(x, *args) * (1 + x[..., 0].numel() / 256))
    found: dict[str, list[bytes]] = {}
    ways = {"one": (1, False), "two": (2, False), "streamed": (1, True), "lanes": (2, True)}
    for name, (workers, streamed) in ways.items():
        options = {"streamed": streamed, "tile_members": tile_members, "compute": compute}
        with engine_of(name, workers, storage, weights, **options) as (engine, _):
            engine.advance(records(1), ignore)
            scores = [engine.score(some, items(5), ignore) for some in ([*LOW, UNPERTURBED], LOW, LOW[:1])]
            assert [values.shape for values in scores] == [(11, 5), (10, 5), (2, 5)]
            assert scores[0][:10].tobytes() == scores[1].tobytes()
            assert len({row.tobytes() for row in scores[0]}) == 11, "every member has scores of its own"
            assert (scores[2].tobytes() == scores[1][:2].tobytes()) == (tile_members == 1), "a pair has other products alone"
            found[name] = [values.tobytes() for values in scores]
    assert all(values == found["one"] for values in found.values())


def test_streamed_layers_are_advanced_by_the_next_score_alone(engine_of) -> None:
    history = records(4)
    with engine_of("resident", 1) as (resident, expected), engine_of("streamed", 2, streamed=True) as (engine, pool):
        resident.advance(history[:2], ignore)
        engine.advance(history[:2], ignore)  # there is nothing yet that could pass
        assert pool.store().steps() == [2] * 4 and pool.files() == expected.files()
        for step in (2, 3):
            resident.advance(history[step : step + 1], ignore)
            engine.advance(history[step : step + 1], ignore)
            assert pool.store().steps() == [step] * 4
            scores = engine.score(PAIRS, items(5), ignore)
            assert scores.tobytes() == resident.score(PAIRS, items(5), ignore).tobytes()
            assert pool.store().steps() == [step + 1] * 4 and pool.files() == expected.files()
        engine.score(PAIRS, items(5), ignore)
        made, *scored = pool.maps
        assert all(isinstance(task, Advance) for task in made)
        assert [([record.step for record in task.records], task.step) for (task,) in scored[1:]] == [([3], 4), ([], 4)]
    (pool.setup.folder / "final.safetensors").unlink()
    with engine_of("streamed", 1, streamed=True) as (engine, pool):
        engine.advance(history, ignore)
        assert [task.layer for (task,) in pool.maps] == [3]
        assert pool.files() == expected.files()


def test_a_pass_has_as_many_items_as_memory_has_room_for_with_that_many_members(engine_of) -> None:
    populations = ([UNPERTURBED], PAIRS, [*PAIRS, UNPERTURBED], 9 * PAIRS)
    with engine_of("streamed", 1, streamed=True) as (engine, pool):
        engine.advance([], ignore)
        pool.maps.clear()
        for perturbations in populations:
            engine.score(perturbations, items(5), ignore)
        passes = [task.pass_items for (task,) in pool.maps]
    assert passes == [MEMBERS * PASS_ITEMS, PASS_ITEMS, MICRO_BATCH, MICRO_BATCH]  # whole micro-batches, and at least one


def test_files_that_have_not_been_read_are_checked_once(engine_of) -> None:
    with engine_of("layers", 1) as (engine, pool):
        engine.advance(records(1), ignore)
        pool.maps.clear()
        engine.check(ignore)
        assert pool.maps == []  # resident ones have all been read, or made
    with engine_of("layers", 2, streamed=True) as (engine, pool):
        engine.advance(records(1), ignore)
        engine.check(ignore)
        engine.check(ignore)
        assert pool.maps == [[Check(layer) for layer in range(4)]]
    path = pool.setup.folder / "final.safetensors"
    flip(path, path.stat().st_size - 1)
    with engine_of("layers", 2, streamed=True) as (engine, pool):
        engine.advance(records(1), ignore)
        with pytest.raises(DamagedFile, match=r"final\.safetensors"):
            engine.check(ignore)


def test_the_workers_are_as_planned(engine_of) -> None:
    """Lanes of one process if the weights are streamed."""
    with engine_of("resident", 3) as (engine, pool):
        assert (engine.workers, len(pool.pids)) == (3, 3)
    with engine_of("streamed", 3, streamed=True) as (engine, pool):
        assert (engine.workers, len(pool.pids)) == (1, 1)
        assert pool.working_copy is None


def test_what_drawing_weights_leaves_in_a_process_is_returned_to_the_system(
    engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At half a billion parameters, it is half of a worker's memory; but not in every step, as it takes time."""
    with engine_of("run", 2) as (engine, _):
        trimmed = []
        monkeypatch.setattr(system, "trim_memory", lambda: trimmed.append(True))
        engine.advance([], ignore)
        assert len(trimmed) >= 4, "for each layer"
        trimmed.clear()
        engine.advance(records(1), ignore)
        assert not trimmed
