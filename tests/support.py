"""What tests of the real command share: a tiny recipe, the command in this process or another, and ways to compare runs."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import tomli_w
from safetensors.numpy import load_file

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


PROMPTS = [{"prompt": f"Item {i}:{'abcdefghijkl'[: 1 + 7 * i % 12]}", "wanted": 150 * (i % 5)} for i in range(12)]

REWARD_FUNCTIONS = """
def near(completions, completion_ids, wanted, **_):
    return [len(text) / 10 - abs(sum(ids) - number) / 400 for text, ids, number in zip(completions, completion_ids, wanted)]

def even_format(completion_ids, **_):
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]
"""
"""Rewards that tell members apart, since they depend on each token."""

WRITER = {"eos_token_id": [0, *range(2, 257, 6)], "initializer_range": 0.3}
"""With so many end tokens that some of its completions end, after different numbers of tokens, and weights so large that it does
not only repeat the last token."""

NOISES: dict[str, dict[str, Any]] = {
    "gaussian": {"kind": "gaussian"},
    "rademacher": {"kind": "rademacher"},
    "lowrank 1": {"kind": "lowrank"},
    "lowrank 3": {"kind": "lowrank", "rank": 3},
}
"""The table `noise` of a recipe for every kind."""

SHARED_TILES = {"population": 10}
"""The table `es` with which two pairs of low-rank noise share a tile in the tiny recipe, and the fifth pair has one alone."""


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Finished(NamedTuple):
    """How the command ended, and what it printed."""

    code: int
    out: str
    err: str


def write_recipe(folder: Path, **tables: dict[str, Any]) -> Path:
    """Writes a tiny recipe and its text to `folder`; the keys of `tables` are added to the recipe's."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    document = {name: dict(table) for name, table in RECIPE.items()}
    document["data"]["path"] = str(text)
    for name, table in tables.items():
        document.setdefault(name, {}).update(table)
    recipe = folder / "tiny.toml"
    recipe.write_text(tomli_w.dumps(document))
    return recipe


def write_reward_recipe(folder: Path, **tables: dict[str, Any]) -> Path:
    """The same for rewards on what the model writes: with prompts, and a file of reward functions."""
    prompts, functions = folder / "prompts.jsonl", folder / "rewards.py"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    functions.write_text(REWARD_FUNCTIONS)
    document: dict[str, dict[str, Any]] = {
        "data": {"path": str(prompts)},
        "fitness": {"kind": "reward"},
        "reward": {"functions": [f"{functions}:near", f"{functions}:even_format"], "weights": [1.0, 0.5]},
        "generation": {"max_new_tokens": 6},
        "es": {"sigma": 0.1},
        "eval": {"every": 1, "samples": 2, "fraction": 0.2},
    }
    for name, table in tables.items():
        document.setdefault(name, {}).update(table)
    config = document.setdefault("model", {}).get("config", TINY)
    if config:
        document["model"]["config"] = config | WRITER
    return write_recipe(folder, **document)


FITNESSES: dict[str, Callable[..., Path]] = {"logprob": write_recipe, "reward": write_reward_recipe}
"""What writes a recipe, by the kind of fitness."""


def arguments(recipe: Path, run: Path, *overrides: str, resume: bool = False, rebuild: bool = False) -> list[str]:
    """The command line after `python -m es_lite.train`."""
    sets = [word for override in (f"run.dir={run}", *overrides) for word in ("--set", override)]
    return [str(recipe), *sets, *(["--resume"] if resume else []), *(["--rebuild"] if rebuild else [])]


def train(
    recipe: Path, run: Path, *overrides: str, resume: bool = False, rebuild: bool = False, seconds: float = 180
) -> Finished:
    """Runs the command to its end, which must come within `seconds`, in a process of its own."""
    with start(recipe, run, *overrides, resume=resume, rebuild=rebuild) as live:
        return live.finish(seconds)


def train_here(recipe: Path, run: Path, *overrides: str, resume: bool = False, rebuild: bool = False) -> Finished:
    """Runs the command to its end in this process, which saves the start of another."""
    from es_lite.train import main  # not above: it takes seconds, and most tests do without

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments(recipe, run, *overrides, resume=resume, rebuild=rebuild))
    return Finished(code, out.getvalue(), err.getvalue())


def finished_run(recipe: Path, run: Path, *overrides: str, seconds: float = 180) -> Path:
    """Runs the command to its end, which must be a success and come within `seconds`. Returns `run`."""
    finished = train(recipe, run, *overrides, seconds=seconds)
    assert finished.code == 0, finished.err
    return run


def replayed(run: Path, out: Path, *options: str) -> dict[str, np.ndarray]:
    """The tensors that the replay command writes in fp32."""
    from es_lite.replay import main

    assert main([str(run), "--out", str(out), "--dtype", "fp32", *options]) == 0
    return load_file(out / "model.safetensors")


class Live:
    """The command while it runs, in a process group of its own."""

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
        """Fails if the run ends, or the time is over, before the condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.err}"
            assert time.monotonic() < end, f"waited {seconds} s; {self.err}"
            time.sleep(0.002)

    def workers(self) -> list[psutil.Process]:
        return [process for process in group(self.process.pid) if _is_worker(process)]

    def graders(self) -> list[psutil.Process]:
        """They are no members of its process group."""
        return [child for child in psutil.Process(self.process.pid).children() if _is_grader(child)]

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
    """Runs the command in the background; whatever is left of its process group when the block ends is killed.

    log: where its output goes, a path without a suffix; next to `run` by default. prefix: words that go before the command.
    code: what Python runs instead of the module.
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
    """A real memory cgroup, below the one of this process; skips the test if it cannot be made."""
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
    while folder.exists():  # its processes take a moment to end
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
    """Command lines of the processes that are still in a group when it should be empty.

    A worker that was being started needs a moment before it notices that its coordinator is gone.
    """
    end = time.monotonic() + seconds
    while (processes := group(leader)) and time.monotonic() < end:
        time.sleep(0.05)
    return [process.cmdline() for process in processes]


def outlived(processes: Sequence[psutil.Process], seconds: float = 30) -> list[psutil.Process]:
    """Those of the processes that still run when they should be gone; they may take a moment."""
    end = time.monotonic() + seconds
    while (alive := [process for process in processes if _runs(process)]) and time.monotonic() < end:
        time.sleep(0.05)
    return alive


def records(run: Path) -> int:
    """How many complete records the journal has."""
    try:
        return max(0, (run / "journal.jsonl").read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return 0


def digest(run: Path) -> dict[str, str]:
    """SHA-256 of the journal and of each layer file, by path."""
    layers = [path for folder in ("master", "weights") for path in _files(run / folder)]
    return {str(path.relative_to(run)): _sha256(path.read_bytes()) for path in (run / "journal.jsonl", *layers)}


def export_digest(run: Path) -> dict[str, str]:
    """SHA-256 of all files of checkpoint/ and best/, except the model card, which quotes run.dir, by path."""
    files = [path for folder in ("checkpoint", "best") for path in _files(run / folder) if path.name != "README.md"]
    return {str(path.relative_to(run)): _sha256(path.read_bytes()) for path in files}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by path: to show that nothing was touched."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in _files(folder)}


def leftovers(run: Path) -> list[Path]:
    """Files and folders of unfinished replacements."""
    return [path for path in run.rglob("*") if path.suffix in (".next", ".old")]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(run: Path) -> dict[str, np.ndarray]:
    """The tensors of a run with an fp32 master, as its layer files hold them."""
    return {name: values for path in _files(run / "master") for name, values in load_file(path).items()}


def assert_same_run(run: Path, reference: Path) -> None:
    """Journal, layer files and exports are the same, byte for byte, and `run` is tidy."""
    assert digest(run) == digest(reference)
    assert export_digest(run) == export_digest(reference)
    assert leftovers(run) == []


def samples(run: Path) -> list[dict[str, Any]]:
    """What the model wrote in evaluations, if there were any."""
    path = run / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_same_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    """Both hold the same float32 tensors."""
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert values.dtype == right[name].dtype == np.float32
        assert values.tobytes() == right[name].tobytes(), name


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _alive_in(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_grader(process: psutil.Process) -> bool:
    try:
        return any("grader.main" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _is_worker(process: psutil.Process) -> bool:
    """Whether it was forked from the process that is kept for that."""
    try:
        parent = process.parent()
        return parent is not None and any("multiprocessing.forkserver" in word for word in parent.cmdline())
    except psutil.NoSuchProcess:
        return False
