"""Layers that pass through memory: what the doors get, what the files are then, what is read and written, and what goes wrong.

The reference is always the other way to the same weights: `store.bring_level` and a working copy.
"""

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from layers import ALONE, Arrays, bits_of, flip, layout_of, records, working_copy, written

from es_lite.algorithm.jit import Threads
from es_lite.errors import RunError, UserError
from es_lite.scoring.perturb import Weights
from es_lite.weights import store, stream
from es_lite.weights.layerfile import LayerFile
from es_lite.weights.layout import Layout
from es_lite.weights.stored import Part, dtype_of
from es_lite.weights.stream import Stream

STEPS = 3
BLOCK = 32
"""Rows of the head that are asked for at a time."""

COMBINATIONS = [("fp32", "bf16"), ("fp32", "int8"), ("bf16", "bf16"), ("int8", "int8")]
TYPES = pytest.mark.parametrize(("storage", "working"), COMBINATIONS, ids=map("-".join, COMBINATIONS))
MODELS = pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
ROWS = np.array([0, 3, 4, 77, 255, 256, 300], np.int64)


@pytest.fixture(autouse=True)
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head passes in several sections, whatever is stored."""
    monkeypatch.setattr(stream, "VOCABULARY_ROWS", 64)


def streamed(files: Sequence[LayerFile], layout: Layout, working: str, step: int = STEPS, direct: bool = False, progress=None):
    made = Stream(files, layout, working, Threads(2), direct, progress or (lambda parameters: None))
    made.target(records(step), step)
    return made


def seen(part: Part) -> tuple:
    """All that a door can use of a part, copied."""
    first, count = part.start // max(1, part.tensor.width), part.data.size // max(1, part.tensor.width)
    scales = part.scales[first : first + count] if part.scales.size else part.scales
    return part.tensor, part.start, part.data.dtype, part.data.tobytes(), scales.tobytes()


def asked(weights: Weights, layout: Layout, at: Callable[[str], None] = lambda layer: None) -> Iterator[tuple]:
    """What the doors ask for in a pass, in their order."""
    first, final = layout.layers[0], layout.layers[-1]
    with weights.passing():
        with weights.opened(first):
            for tensor in first.tensors:
                yield (
                    tuple(map(np.ndarray.tobytes, weights.rows(tensor, ROWS)))
                    if tensor.vocabulary
                    else seen(weights.part(tensor))
                )
        at(first.name)
        for layer in layout.blocks:
            with weights.opened(layer):
                yield from (seen(weights.part(tensor)) for tensor in layer.tensors)
                at(layer.name)
                yield from (seen(weights.part(tensor)) for tensor in layer.tensors[::-1])
        with weights.opened(final):
            yield from (seen(weights.part(tensor)) for tensor in final.tensors if not tensor.vocabulary)
            head = next(tensor for tensor in (*final.tensors, *first.tensors) if tensor.vocabulary)
            yield from (seen(block) for block in weights.blocks(head, BLOCK))
        at(final.name)


def resident(folder: Path, layout: Layout, storage: str, working: str, step: int) -> tuple[list[tuple], dict[str, bytes]]:
    """What a working copy gives at `step`, and the files then."""
    files, theta_0 = written(folder, layout, storage, step), Arrays(layout)
    with working_copy(layout, working) as copy:
        for file in files:
            store.bring_level(file, theta_0.open, [], step, copy, ALONE)
        return list(asked(copy, layout)), bits_of(files)


@MODELS
@TYPES
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_a_pass_gives_what_a_working_copy_gives_and_leaves_what_bring_level_leaves(tmp_path, name, storage, working, direct):
    """From files that stand at different steps, over several passes and targets."""
    layout = layout_of(name)
    files = written(tmp_path / "streamed", layout, storage)
    store.bring_level(files[1], Arrays(layout).open, records(2), 2, None, ALONE)
    weights = streamed(files, layout, working, STEPS, direct)
    assert len(stream.cut(files[0 if layout.tied else -1], layout)) > 1 or name == "gpt2"
    for step in (STEPS, STEPS + 1):
        wanted, wanted_files = resident(tmp_path / f"{step}", layout, storage, working, step)
        weights.target(records(step), step)
        for _ in range(2):
            assert list(asked(weights, layout)) == wanted
            assert bits_of(files) == wanted_files


class Traffic:
    """How often each byte of each file is read and written, by the file's first name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: Sequence[LayerFile]) -> None:
        self.read = {file.layer.name: np.zeros(file.size, int) for file in files}
        self.written = {file.layer.name: np.zeros(file.size, int) for file in files}
        reading, writing = os.preadv, os.pwrite

        def preadv(descriptor, buffers, position):
            got = reading(descriptor, buffers, position)
            self._count(self.read, descriptor, position, got)
            return got

        def pwrite(descriptor, data, position):
            done = writing(descriptor, data, position)
            self._count(self.written, descriptor, position, done)
            return done

        monkeypatch.setattr(os, "preadv", preadv)
        monkeypatch.setattr(os, "pwrite", pwrite)
        self._files = files

    def _count(self, counts: dict[str, np.ndarray], descriptor: int, position: int, size: int) -> None:
        found = os.fstat(descriptor)
        for file in self._files:
            for path in (file.path, file.path.with_name(file.path.name + ".next")):
                if path.exists() and os.path.samestat(path.stat(), found):
                    counts[file.layer.name][position : position + size] += 1


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("name", ["tied", "untied"])
@TYPES
def test_each_byte_is_read_once_and_written_once(tmp_path, monkeypatch, name, storage, working, direct):
    """But for the fronts, and the rows of the embedding; with nothing to apply, nothing is written, and of an embedding that is
    not the head, those rows alone are read."""
    layout = layout_of(name)
    files = written(tmp_path, layout, storage)
    weights = streamed(files, layout, working, STEPS, direct)
    (embedding,) = layout.layers[0].tensors
    width = embedding.width * dtype_of(embedding, storage).itemsize
    for step, moves in ((STEPS, 1), (STEPS, 0), (STEPS + 2, 1)):
        weights.target(records(step), step)
        with monkeypatch.context() as patch:
            traffic = Traffic(patch, files)
            list(asked(weights, layout))
        for file in files:
            once = np.full(file.size - file.front_bytes, int(moves or file is not files[0] or layout.tied))
            if file is files[0]:
                for row in ROWS:
                    once[row * width : (row + 1) * width] += 1
            assert np.array_equal(traffic.read[file.layer.name][file.front_bytes :], once)
            assert (traffic.written[file.layer.name] == moves).all()


@TYPES
def test_progress_tells_of_every_matrix(tmp_path, storage, working):
    layout, told = layout_of("tied"), []
    files = written(tmp_path, layout, storage)
    list(asked(streamed(files, layout, working, progress=told.append), layout))
    assert sum(told) == sum(tensor.size for file in files for tensor in file.matrices)


@TYPES
def test_three_buffers_go_round(tmp_path, monkeypatch, storage, working):
    """Of the largest section's size, whatever the passes, and never more sections in memory than that."""
    layout, made = layout_of("untied"), []
    files = written(tmp_path, layout, storage)
    original, filling = stream._Buffer, stream._fill
    held: Counter[int] = Counter()
    monkeypatch.setattr(stream, "_Buffer", lambda size: made.append(original(size)) or made[-1])

    def fill(descriptor, view, section, file):
        held[id(view.obj)] += 1
        filling(descriptor, view, section, file)

    monkeypatch.setattr(stream, "_fill", fill)
    weights = streamed(files, layout, working)
    for step in (1, 2, 2, STEPS):
        weights.target(records(step), step)
        list(asked(weights, layout))
    assert len(made) == stream.BUFFERS == 3 == len(held)
    assert {buffer.array.size for buffer in made} == {stream.buffer_bytes(files, layout)}
    assert all(section.high - section.low <= made[0].array.size for file in files for section in stream.cut(file, layout))
    assert sum(held.values()) > 3 * len(made), "they did go round"


def test_no_thread_and_no_descriptor_is_left(tmp_path):
    layout = layout_of("untied")
    files = written(tmp_path, layout, "int8")
    weights = streamed(files, layout, "int8")
    list(asked(weights, layout))
    threads, descriptors = threading.active_count(), len(os.listdir("/dev/fd"))
    weights.target(records(STEPS + 1), STEPS + 1)
    list(asked(weights, layout))
    assert (threading.active_count(), len(os.listdir("/dev/fd"))) == (threads, descriptors)


@pytest.mark.parametrize("layer", ["embedding", "block-000", "block-001", "final"])
@TYPES
def test_a_pass_that_is_cut_short_leaves_every_layer_whole(tmp_path, storage, working, layer):
    """By an error of whoever scores; the next pass does the rest."""
    layout = layout_of("untied")
    wanted, wanted_files = resident(tmp_path / "there", layout, storage, working, STEPS)
    files = written(tmp_path / "here", layout, storage)
    before = bits_of(files)
    weights = streamed(files, layout, working)

    def at(name: str) -> None:
        if name == layer:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(asked(weights, layout, at))
    after = bits_of(files)
    assert all(after[name] in (before[name], wanted_files[name]) for name in after)
    assert after.keys() == before.keys()
    assert list(asked(weights, layout)) == wanted
    assert bits_of(files) == wanted_files


@pytest.mark.parametrize("layer", [0, 1, 2, -1])
@pytest.mark.parametrize("name", ["tied", "untied"])
@TYPES
def test_a_damaged_layer_ends_the_pass_and_the_others_stay_whole(tmp_path, name, layer, storage, working):
    layout = layout_of(name)
    wanted, wanted_files = resident(tmp_path / "there", layout, storage, working, STEPS)
    files = written(tmp_path / "here", layout, storage)
    damaged = files[layer]
    position = damaged.size - 5  # a matrix's, or of a tied model's last layer the norm's
    flip(damaged.path, position)
    before = bits_of(files)
    weights = streamed(files, layout, working)
    with pytest.raises(UserError, match=f"{damaged.path}: its checksum does not agree"):
        list(asked(weights, layout))
    after = bits_of(files)
    assert after.keys() == before.keys()
    assert after[damaged.path.name] == before[damaged.path.name]
    for file in files:
        if file is not damaged:
            store.check(file)
            assert after[file.path.name] in (before[file.path.name], wanted_files[file.path.name])
    flip(damaged.path, position)
    assert list(asked(weights, layout)) == wanted
    assert bits_of(files) == wanted_files


@pytest.mark.parametrize(("name", "layer"), [("tied", 0), ("tied", 1), ("tied", -1), ("untied", 2), ("untied", -1)])
def test_damage_is_found_where_nothing_is_applied_too(tmp_path, name, layer):
    """In whatever is read whole: all but the embedding of a model that has another head."""
    layout = layout_of(name)
    files = written(tmp_path, layout, "int8")
    flip(files[layer].path, files[layer].size - 5)
    with pytest.raises(UserError, match=f"{files[layer].path}: its checksum does not agree"):
        list(asked(streamed(files, layout, "int8", 0), layout))


def failing(monkeypatch: pytest.MonkeyPatch, file: LayerFile, fails: Callable[[int], bool], short: int = 0) -> None:
    """A disk that is full when `file` is written where fails(position); before, it takes `short` bytes of that."""
    write = os.pwrite

    def pwrite(descriptor, data, position):
        partial = file.path.with_name(file.path.name + ".next")
        if partial.exists() and os.path.samestat(partial.stat(), os.fstat(descriptor)):
            if position and position == short:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if fails(position):
                if not short:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                data = data[:short]
        return write(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)


def refused(call: Callable[[], object]) -> BaseException | None:
    """What `call` raises; it is given up where it never ends."""
    raised: list[BaseException | None] = [None]

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised[0] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "the pass hangs"
    return raised[0]


@pytest.mark.parametrize("place", ["matrices", "front", "middle of the front"])
@pytest.mark.parametrize(("name", "layer"), [("tied", 0), ("tied", 1), ("untied", 0), ("untied", 3), ("untied", -1)])
def test_a_full_disk_ends_the_pass_and_leaves_every_layer_whole(tmp_path, monkeypatch, name, place, layer):
    """The error names the layer; its file is as it was, what was half written is gone, and the next pass does the rest."""
    layout = layout_of(name)
    wanted, wanted_files = resident(tmp_path / "there", layout, "bf16", "bf16", STEPS)
    files = written(tmp_path / "here", layout, "bf16")
    full, before = files[layer], bits_of(files)
    weights = streamed(files, layout, "bf16")
    with monkeypatch.context() as patch:
        failing(
            patch, full, lambda position: (position > 0) == (place == "matrices"), 512 if place == "middle of the front" else 0
        )
        error = refused(lambda: list(asked(weights, layout)))
    assert isinstance(error, RunError) and f"{full.path}: cannot be written" in str(error)
    after = bits_of(files)
    assert after.keys() == before.keys()
    assert after[full.path.name] == before[full.path.name]
    assert all(after[name] in (before[name], wanted_files[name]) for name in after)
    assert list(asked(weights, layout)) == wanted
    assert bits_of(files) == wanted_files


@TYPES
def test_a_disk_that_is_found_full_late_leaves_nothing_half_written(tmp_path, monkeypatch, storage, working):
    """The write of one layer fails when the next ones are waiting to be written."""
    layout = layout_of("tied")
    wanted, wanted_files = resident(tmp_path / "there", layout, storage, working, STEPS)
    files = written(tmp_path / "here", layout, storage)
    before, descriptors, passed = bits_of(files), len(os.listdir("/dev/fd")), threading.Semaphore(0)
    weights = streamed(files, layout, working, progress=lambda parameters: passed.release())

    def fails(position: int) -> bool:
        return passed.acquire(timeout=20) and passed.acquire(timeout=20)

    with monkeypatch.context() as patch:
        failing(patch, files[1], fails)
        error = refused(lambda: list(asked(weights, layout)))
    assert isinstance(error, RunError) and str(files[1].path) in str(error)
    after = bits_of(files)
    assert after.keys() == before.keys() and len(os.listdir("/dev/fd")) == descriptors
    assert all(after[name] in (before[name], wanted_files[name]) for name in after)
    assert list(asked(weights, layout)) == wanted
    assert bits_of(files) == wanted_files
