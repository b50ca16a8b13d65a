"""The run directory: one run's files, held by one process at a time, tied to one recipe."""

import fcntl
import os
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from es_lite import recipe as recipes
from es_lite.errors import UserError
from es_lite.recipe import Recipe
from es_lite.weights.store import remove_partial

CHANGEABLE = (
    *("run.iterations", "run.checkpoint_every", "run.checkpoint_dtype"),
    *("workers.count", "workers.threads", "workers.deadline", "workers.device"),
    *("memory.limit", "memory.residency", "eval.samples", "eval.best", "log."),
)
"""Keys that may differ on --resume: none changes what a step means (threads or a GPU may change a score's last bits)."""

LOCK_SECONDS = 5.0

BEFORE_THE_RECIPE = {"master", "weights", "lock", "recipe.toml.next"}
"""What a run that was killed at its very start leaves."""


class RunDirectory:
    """A locked run directory. A context manager: the lock goes with the process, however it ends."""

    def __init__(self, recipe: Recipe, resume: bool) -> None:
        """Opens or makes recipe.run.dir.

        Raises UserError where it cannot be written, is in use, holds something else, holds a run and `resume` is
        not set, or holds a run of another recipe. Nothing that was there is changed then.
        """
        self.path = Path(recipe.run.dir).expanduser()
        self.store = self.path / recipe.memory.folder
        self.journal = self.path / "journal.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint"
        self.best = self.path / "best"
        try:
            present = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
            foreign = "recipe.toml" not in present and not present <= BEFORE_THE_RECIPE
            if foreign or (self.path.exists() and not self.path.is_dir()):
                raise UserError(f"{self.path}: is there already and is not a run directory; choose another run.dir")
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (self.path / "lock").open("w")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another run.dir") from None
        self._hold()
        try:
            self._check(recipe, resume)
            if not self.journal.exists():
                shutil.rmtree(self.path / "tokenizer", ignore_errors=True)  # of a run that was refused before it began
                self.keep(recipe)
            self.store.mkdir(exist_ok=True)
        except OSError as error:
            self._lock.close()
            raise UserError(f"{self.store}: cannot be made ({error.strerror}); choose another run.dir") from None
        except BaseException:
            self._lock.close()
            raise
        remove_partial(self.store)
        for folder in (self.checkpoint, self.best):
            settle(folder)

    def _hold(self) -> None:
        """Takes the lock; waits a little, since the workers of a run that was just killed take a moment to go."""
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > until:
                    self._lock.close()
                    raise UserError(
                        f"{self.path}: in use by a live run; wait for it, stop it, or choose another run.dir"
                    ) from None
                time.sleep(0.1)

    @property
    def lock(self) -> int:
        """Descriptor of the lock. Whoever holds a copy of it keeps the directory in use."""
        return self._lock.fileno()

    def keep(self, recipe: Recipe) -> None:
        """Writes recipe.toml, once everything that was there has been found to agree with it."""
        _write_atomically(self.path / "recipe.toml", recipes.dumps(recipe))

    def _check(self, recipe: Recipe, resume: bool) -> None:
        if not self.journal.exists():
            if any(self.store.glob("*.safetensors")):
                raise UserError(
                    f"{self.store}: has layers, but there is no {self.journal}; restore it, or choose another run.dir"
                )
            return
        if not resume:
            raise UserError(f"{self.path}: holds a run already; go on with it by --resume, or choose another run.dir")
        changed = [
            line
            for line in recipes.differences(recipes.load(self.path / "recipe.toml"), recipe)
            if not line.startswith((*CHANGEABLE, "run.dir"))
        ]
        if changed:
            listing = "\n".join(f"  {line}" for line in changed)
            raise UserError(f"{self.path}: belongs to another recipe:\n{listing}\nSet these back, or choose another run.dir")

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.close()


def replace_folder(folder: Path, partial: Path) -> None:
    """Puts `partial` in the place of `folder`, so that a crash leaves the old or the new one whole (see `settle`)."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def settle(folder: Path) -> None:
    """Ends a replacement that a crash interrupted, and removes what an unfinished export left."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(folder.with_name(folder.name + ".next"), ignore_errors=True)


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".next")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
