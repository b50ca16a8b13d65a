"""What the tests of the real command share: a tiny recipe, the command in the foreground and the background, digests."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import tomli_w

from es_lite import system

ROOT = Path(__file__).resolve().parents[1]

TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(60))

TINY = {
    "model_type": "qwen3",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}

RECIPE: dict[str, dict[str, Any]] = {
    "run": {"iterations": 3},
    "model": {"config": TINY},
    "data": {"tokenizer": "bpe", "vocab_size": 257},
    "fitness": {"samples": 4, "max_length": 32, "micro_batch": 2},
    "es": {"population": 4, "antithetic": True, "sigma": 2e-2, "alpha": 2e-2},
    "workers": {"count": 2, "threads": 1},
    "log": {"tensorboard": False},
}


class Finished(NamedTuple):
    code: int
    out: str
    err: str


def write_recipe(folder: Path, **tables: dict[str, Any]) -> Path:
    """A tiny recipe and its text in `folder`; `tables` adds to the recipe's tables."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    document = {name: dict(table) for name, table in RECIPE.items()}
    document["data"]["path"] = str(text)
    for name, table in tables.items():
        document.setdefault(name, {}).update(table)
    recipe = folder / "tiny.toml"
    recipe.write_text(tomli_w.dumps(document))
    return recipe


def arguments(recipe: Path, run: Path, *overrides: str, resume: bool = False, rebuild: bool = False) -> list[str]:
    """The command line after `python -m es_lite.train`."""
    sets = [word for override in (f"run.dir={run}", *overrides) for word in ("--set", override)]
    return [str(recipe), *sets, *(["--resume"] if resume else []), *(["--rebuild"] if rebuild else [])]


def train(recipe: Path, run: Path, *overrides: str, resume: bool = False, rebuild: bool = False) -> Finished:
    """Runs the command to its end."""
    with start(recipe, run, *overrides, resume=resume, rebuild=rebuild) as live:
        return live.finish()


class Live:
    """The command under way, in a process group of its own."""

    def __init__(self, process: subprocess.Popen, run: Path, log: Path) -> None:
        self.process = process
        self.run = run
        self._log = log

    @property
    def out(self) -> str:
        return self._log.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        return self._log.with_suffix(".err").read_text()

    def records(self) -> int:
        return records(self.run)

    def wait_for_records(self, count: int) -> None:
        self.wait_until(lambda: self.records() >= count)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Raises AssertionError where the run ends, or the time, before the condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.err}"
            assert time.monotonic() < end, f"waited {seconds} s; {self.err}"
            time.sleep(0.002)

    def workers(self) -> list[psutil.Process]:
        return [process for process in group(self.process.pid) if _is_worker(process)]

    def finish(self, seconds: float = 180) -> Finished:
        self.process.wait(seconds)
        return Finished(self.process.returncode, self.out, self.err)


@contextmanager
def start(
    recipe: Path,
    run: Path,
    *overrides: str,
    resume: bool = False,
    rebuild: bool = False,
    log: Path | None = None,
    prefix: Sequence[str] = (),
    code: str = "",
) -> Iterator[Live]:
    """Runs the command in the background; what is left of its process group at the block's end is killed.

    log: where its output goes, without a suffix; else beside `run`. prefix: words before the command; code: what Python runs
    instead of the module.
    """
    log = log or run.with_name(run.name + ".log")
    program = ["-c", code] if code else ["-m", "es_lite.train"]
    command = [*prefix, sys.executable, *program, *arguments(recipe, run, *overrides, resume=resume, rebuild=rebuild)]
    with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, start_new_session=True)
    try:
        yield Live(process, run, log)
    finally:
        if group(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def v1_cgroup() -> Iterator[Path]:
    """A real memory cgroup of one's own, under this process's; skips the test where there can be none."""
    own = next((f for f in system.cgroup_folders("memory") if (f / "memory.limit_in_bytes").exists()), None)
    if own is None:
        pytest.skip("no v1 memory cgroup is mounted")
    folder = own / f"es_lite-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make a cgroup: {error}")
    yield folder
    end = time.monotonic() + 20
    while folder.exists():  # its processes take a moment to go
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def group(leader: int) -> list[psutil.Process]:
    """The live processes of the process group of `leader`."""
    return [process for process in psutil.process_iter() if _alive_in(process, leader)]


def left(leader: int, seconds: float = 30) -> list[list[str]]:
    """Command lines of the processes of a group that are still there when it should be empty.

    A worker that was just being started first has to get so far as to see that its coordinator is gone.
    """
    end = time.monotonic() + seconds
    while (processes := group(leader)) and time.monotonic() < end:
        time.sleep(0.05)
    return [process.cmdline() for process in processes]


def records(run: Path) -> int:
    """Complete records in the journal."""
    try:
        return max(0, (run / "journal.jsonl").read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return 0


def digest(run: Path) -> dict[str, str]:
    """SHA-256 of the journal and of each of the layers' files."""
    layers = [path for folder in ("master", "weights") for path in _files(run / folder)]
    return {str(path.relative_to(run)): _sha256(path.read_bytes()) for path in (run / "journal.jsonl", *layers)}


def export_digest(run: Path) -> dict[str, str]:
    """SHA-256 of all files of checkpoint/ and best/ but the model card, which quotes the recipe, run.dir included."""
    files = [path for folder in ("checkpoint", "best") for path in _files(run / folder) if path.name != "README.md"]
    return {str(path.relative_to(run)): _sha256(path.read_bytes()) for path in files}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, to see that nothing was touched."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in _files(folder)}


def leftovers(run: Path) -> list[Path]:
    """Files and folders of unfinished replacements."""
    return [path for path in run.rglob("*") if path.suffix in (".next", ".old", ".partial")]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _alive_in(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _is_worker(process: psutil.Process) -> bool:
    """Forked from the process that is kept for it."""
    try:
        parent = process.parent()
        return parent is not None and any("multiprocessing.forkserver" in word for word in parent.cmdline())
    except psutil.NoSuchProcess:
        return False


def finished_run(recipe: Path, run: Path, *overrides: str) -> Path:
    """`run`, after the command went through to its end."""
    finished = train(recipe, run, *overrides)
    assert finished.code == 0, finished.err
    return run
