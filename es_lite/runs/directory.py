"""The run directory: one run's files, held by one process at a time, tied to one recipe."""

import hashlib
import secrets
import shutil
import sys
from typing import IO

from es_lite.errors import UserError
from es_lite.files import expanded, finish_replacement, remove_unfinished, take_lock, write_durably
from es_lite.recipe import Recipe

CHANGEABLE = (
    *("run.dir", "run.iterations", "run.minutes", "run.checkpoint_every", "run.checkpoint_dtype"),
    *("workers.count", "workers.threads", "workers.deadline", "workers.device"),
    *("workers.engine", "workers.address", "workers.hosts", "workers.host_dir", "run.verify_every"),
    *("memory.limit", "memory.residency", "eval.samples", "eval.best", "log.tensorboard", "reward.seconds"),
    "data.bos",  # whether it changes the samples is seen by their fingerprint
)
"""Keys that may differ on --resume: none changes what a step means (threads or a GPU may change a score's last bits)."""

LOCK_SECONDS = 5.0

BEFORE_THE_RECIPE = {"master", "weights", "lock", "recipe.toml.next"}
"""What a run may leave if it is killed before it writes its recipe."""


class RunDirectory:
    """A locked run directory. A context manager: the lock ends with the process, however it ends."""

    def __init__(self, recipe: Recipe, resume: bool) -> None:
        """Opens or creates recipe.run.dir.

        Raises UserError if it cannot be written, is in use, holds something else, holds a run and `resume` is
        not set, or holds a run of another recipe. Nothing is changed then.
        """
        self.path = expanded(recipe.run.dir)
        self.store = self.path / recipe.memory.folder
        self.journal = self.path / "journal.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint"
        self.best = self.path / "best"
        self.tokenizer = self.path / "tokenizer"
        try:
            present = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
            marks = ({"recipe.toml", "lock"}, {"recipe.toml", "journal.jsonl"}, {"journal.jsonl", self.store.name})
            ours = any(present >= both for both in marks)  # a lost recipe ends no run
            foreign = not ours and not present <= BEFORE_THE_RECIPE
            if foreign or (self.path.exists() and not self.path.is_dir()):
                raise UserError(f"{self.path}: exists and is not a run directory; choose another run.dir")
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock: IO[str] = (self.path / "lock").open("w")
            """Held by this process, and by workers for as long as they live."""
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another run.dir") from None
        self._hold()
        try:
            self._check(recipe, resume)
            if not self.journal.exists():
                shutil.rmtree(self.tokenizer, ignore_errors=True)  # of a run that was refused before it began
                self.keep(recipe)
            self.store.mkdir(exist_ok=True)
            remove_unfinished(self.store)
            for folder in (self.checkpoint, self.best, self.tokenizer):
                finish_replacement(folder)
        except OSError as error:
            self.lock.close()
            raise UserError(f"{self.store}: cannot be written ({error.strerror}); choose another run.dir") from None
        except BaseException:
            self.lock.close()
            raise

    def _hold(self) -> None:
        """Takes the lock; waits a little, since the workers of a run that was just killed take a moment to end."""
        try:
            take_lock(self.lock, LOCK_SECONDS)
        except BlockingIOError:
            self.lock.close()
            raise UserError(f"{self.path}: in use by another run; wait for it, stop it, or choose another run.dir") from None
        except OSError as error:
            print(
                f"warning: {self.path}: this file system has no locks ({error.strerror}), so nothing keeps a second run "
                "out of this folder: do not start one",
                file=sys.stderr,
            )

    def name(self) -> str:
        """A name that no other run has, not even a copy of this directory; it stays the same. Raises UserError."""
        path = self.path / "id"
        try:
            if not path.exists():
                write_durably(path, secrets.token_hex(16))
            mine = f"{path.read_text(encoding='utf-8')} {self.path.resolve()}"
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        return f"{self.path.resolve().name}-{hashlib.sha256(mine.encode(errors='surrogateescape')).hexdigest()[:12]}"

    def keep(self, recipe: Recipe) -> None:
        """Writes recipe.toml; to be called only when everything in the directory agrees with it."""
        path = self.path / "recipe.toml"
        try:
            write_durably(path, recipe.dumps())
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None

    def _check(self, recipe: Recipe, resume: bool) -> None:
        if not self.journal.exists():
            if any(self.store.glob("*.safetensors")):
                raise UserError(
                    f"{self.store}: has layer files, but there is no {self.journal}; restore it, or choose another run.dir"
                )
            return
        if not resume:
            raise UserError(f"{self.path}: holds a run already; add --resume to continue it, or choose another run.dir")
        try:
            kept = Recipe.load(self.path / "recipe.toml")
        except UserError as error:
            print(f"warning: the run goes on, but whether it began with this recipe cannot be checked: {error}", file=sys.stderr)
            return
        changed = [line for line in kept.changes(recipe) if line.partition(":")[0] not in CHANGEABLE]
        if changed:
            listing = "\n".join(f"  {line}" for line in changed)
            raise UserError(f"{self.path}: belongs to another recipe:\n{listing}\nSet these back, or choose another run.dir")

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.close()
