"""What tests of bad input share: the message of a command that is refused, and runs to be damaged."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import contents, train_here

STEPS = 12
"""Of the finished run that tests damage copies of."""


def message_of(err: str) -> str:
    """The message on standard error, which has nothing else."""
    assert err.startswith("es_lite: ")
    assert err.count("es_lite: ") == 1 and "Traceback" not in err
    return err


def refused(recipe: Path, run: Path, *overrides: str, resume: bool = False) -> str:
    """The message of the command, which ends with exit code 2."""
    finished = train_here(recipe, run, *overrides, resume=resume)
    assert finished.code == 2, finished.err
    return message_of(finished.err)


def refused_untouched(recipe: Path, run: Path, *overrides: str) -> str:
    """The message of the command with --resume, which ends with exit code 2 and leaves every byte of the run directory."""
    before = contents(run)
    message = refused(recipe, run, *overrides, resume=True)
    assert contents(run) == before
    return message


def copy_of(run: Path, place: Path) -> Path:
    """A copy of a run, as if it had been made where it is."""
    shutil.copytree(run, place)
    recipe = place / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(run), str(place)))
    return place


@contextmanager
def disk(point: Path, size: str) -> Iterator[Path]:
    """A file system of its own, mounted at `point`, of a size such as "64k"; skips the test if mounting is not allowed."""
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)]
    made = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
    if made is None or made.returncode:
        pytest.skip(f"needs to mount a file system: {made.stderr.strip() if made else 'no mount command'}")
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


def remount(point: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(point)], check=True)


def fill(disk: Path, leaving: int) -> None:
    """Takes all the disk's space but `leaving` KiB."""
    state = os.statvfs(disk)
    (disk / "filler").write_bytes(b"0" * (state.f_bavail * state.f_frsize - leaving * 1024))
