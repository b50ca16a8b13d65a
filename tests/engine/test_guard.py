"""If memory is short the pool shrinks, or the run ends after a step or before it begins; the kernel kills nothing."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import TINY, Finished, digest, finished_run, records, start, train, train_here, v1_cgroup, write_recipe

from es_lite import system
from es_lite.engine import local
from es_lite.engine.guard import Guard
from es_lite.system import MemoryLimit

MIB = 2**20
HOG = """
import sys, time
held = bytearray(int(sys.argv[1]))
held[::4096] = b"x" * len(held[::4096])
print(1, flush=True)
time.sleep(600)
"""


class Pressure:
    """Replaces the guard: from the journal's `after` records on memory is short or critical, until measured `times` times."""

    reason = "7 MiB left of 100 (a test)"

    def __init__(self, run: Path, level: str, after: int = 2, times: int = 1) -> None:
        self._run, self._level, self._after, self._left = run, level, after, times

    @property
    def short(self) -> bool:
        return self._left > 0 and records(self._run) >= self._after

    @property
    def critical(self) -> bool:
        return self.short and self._level == "critical"

    def measure(self) -> None:
        self._left -= 1

    def killed(self) -> bool:
        return False

    def __enter__(self) -> "Pressure":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Group:
    """A real memory cgroup, v1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def limit(self, size: int) -> None:
        (self.folder / "memory.limit_in_bytes").write_text(str(size))

    def left(self) -> int:
        usage = int((self.folder / "memory.usage_in_bytes").read_text())
        cache = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        files = int(cache["total_inactive_file"]) + int(cache["total_active_file"])
        return int((self.folder / "memory.limit_in_bytes").read_text()) - usage + files

    def kills(self) -> int:
        words = (self.folder / "memory.oom_control").read_text().split()
        return int(words[words.index("oom_kill") + 1])

    def command(self, *command: str) -> list[str]:
        """The command line that runs `command` in the group."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.folder), *command]

    @contextmanager
    def hog(self, size: int) -> Iterator[None]:
        """Another process of the group holds `size` bytes."""
        process = subprocess.Popen(self.command(sys.executable, "-c", HOG, str(size)), stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == b"1\n"
        try:
            yield
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def group() -> Iterator[Group]:
    with v1_cgroup() as folder:
        yield Group(folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), run={"iterations": 6}, workers={"count": 3})


@pytest.fixture(scope="module")
def reference(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(recipe, tmp_path_factory.mktemp("reference") / "run")


def under(pressure: Pressure, recipe: Path, run: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Finished:
    """Runs the command with `pressure` in place of the guard."""
    monkeypatch.setattr(local, "Guard", lambda *_: pressure)
    return train_here(recipe, run, *overrides)


@pytest.mark.parametrize("level", [pytest.param("short", marks=pytest.mark.long), "critical"])
def test_the_pool_shrinks_and_no_bit_changes(recipe, reference, tmp_path, monkeypatch, level):
    """Short: a worker is stopped after its task. Critical: at once, and another does its task."""
    finished = under(Pressure(tmp_path / "run", level, times=2), recipe, tmp_path / "run", monkeypatch)
    assert finished.code == 0
    assert finished.err.count("was stopped to free memory: 7 MiB left of 100 (a test)") == 2
    assert "2 workers left" in finished.err and "1 worker left" in finished.err
    assert digest(tmp_path / "run") == digest(reference)


@pytest.mark.parametrize(
    ("level", "words"),
    [
        ("short", "stopped after step 3, because memory is short"),
        pytest.param("critical", "too little memory for one worker", marks=pytest.mark.long),
    ],
)
def test_with_one_worker_the_run_ends_itself_and_can_be_resumed(recipe, reference, tmp_path, monkeypatch, level, words):
    run = tmp_path / "run"
    pressure = Pressure(run, level, after=3 if level == "short" else 2, times=1000)
    finished = under(pressure, recipe, run, monkeypatch, "workers.count=1")
    assert finished.code == 1
    assert words in finished.err and "7 MiB left" in finished.err
    assert "nothing is lost: run it again (train: with --resume) with a lower workers.count" in finished.err
    assert train(recipe, run, resume=True).code == 0
    assert digest(run) == digest(reference)


@pytest.mark.long
def test_a_worker_that_the_kernel_killed_for_memory_is_not_replaced(recipe, reference, tmp_path):
    """Three workers, one killed while the kernel's count of such kills has risen: two do the rest."""
    code = (
        "import sys; from es_lite import train, system; kills = iter(range(10**6)); "
        "system.oom_kills = lambda: next(kills); sys.exit(train.main(sys.argv[1:]))"
    )
    with start(recipe, tmp_path / "run", code=code) as live:
        live.wait_for_records(2)
        live.workers()[0].kill()
        finished = live.finish()
    assert finished.code == 0, finished.err
    assert "was killed by the kernel for memory; 2 workers left" in finished.err
    assert digest(tmp_path / "run") == digest(reference)


@pytest.mark.parametrize(
    ("left", "short", "critical"), [(1000, False, False), (100, False, False), (47, True, False), (15, True, True)]
)
def test_the_nearest_limit_decides(monkeypatch, left, short, critical):
    """`left` MiB below a cgroup's limit of 1 GiB, on a machine that has plenty."""
    nearest = MemoryLimit(left * MIB, "cgroup x")
    monkeypatch.setattr(system, "cgroup_usage", lambda *_: [(nearest, 1024 * MIB - left * MIB)])
    guard = Guard(0, lambda: 0)
    guard.measure()
    assert (guard.short, guard.critical) == (short, critical)
    if short:
        assert guard.reason == f"{left} MiB left of 1024 (cgroup x)"


def test_the_recipes_own_limit_counts_what_the_processes_use(monkeypatch):
    monkeypatch.setattr(system, "cgroup_usage", lambda *_: [])
    guard = Guard(1000 * MIB, lambda: 980 * MIB)
    guard.measure()
    assert guard.short and not guard.critical and guard.reason == "20 MiB left of 1000 (memory.limit of the recipe)"


def test_it_measures_while_its_block_runs(monkeypatch):
    measured = threading.Event()
    monkeypatch.setattr(Guard, "measure", lambda self: measured.set())
    with Guard(0, lambda: 0):
        assert measured.wait(30)


@pytest.mark.slow
def test_under_a_real_limit_the_pool_shrinks_if_another_process_takes_memory(recipe, tmp_path, group: Group):
    """Too little is left: workers are stopped until the others have room, and the kernel kills none."""
    long = ("run.iterations=100000", "log.tensorboard=false")
    group.limit(2000 * MIB)
    with start(recipe, tmp_path / "run", *long, prefix=group.command()) as live:
        live.wait_for_records(20)
        with group.hog(group.left() - 40 * MIB):
            live.wait_until(lambda: "was stopped to free memory" in live.err)
            reached = live.records()
            live.wait_for_records(reached + 20)
        live.process.terminate()
        assert live.finish().code == 0
    assert group.kills() == 0


@pytest.mark.long
@pytest.mark.slow
def test_under_a_real_limit_what_does_not_fit_resident_is_streamed(tmp_path, group: Group):
    """160 million parameters in a gigabyte for everything: the same journal as resident, with room enough."""
    config = TINY | {"vocab_size": 40_000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 10}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
    recipe = write_recipe(tmp_path, model={"config": config}, workers={"count": 1}, run={"iterations": 2})
    group.limit(1230 * MIB)
    with start(recipe, tmp_path / "small", prefix=group.command()) as live:
        finished = live.finish()
    assert finished.code == 0, finished.err
    assert "streamed past the page cache" in finished.out
    assert group.kills() == 0
    large = finished_run(recipe, tmp_path / "large")
    assert (tmp_path / "small/journal.jsonl").read_bytes() == (large / "journal.jsonl").read_bytes()


@pytest.mark.slow
def test_under_a_limit_below_the_smallest_plan_nothing_is_made(recipe, tmp_path, group: Group):
    group.limit(600 * MIB)
    with start(recipe, tmp_path / "run", "workers.count=1", prefix=group.command()) as live:
        finished = live.finish()
    assert finished.code == 2
    assert "does not fit: needs" in finished.err and f"cgroup {group.folder}" in finished.err
    assert not (tmp_path / "run").exists() and group.kills() == 0
