"""Complete reads and writes, optionally bypassing the page cache, and safe replacement of files and folders.

No file is changed under its own name: a new version is written next to the old one (its name plus ".next") and renamed over it,
so a crash leaves one of the two, complete.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from es_lite.errors import UserError

ALIGNMENT = 4096
"""Direct reads and writes need memory, offsets and sizes that are multiples of this."""

READ_BYTES = 16 * 2**20
"""Largest single read request."""

NEXT, OLD = ".next", ".old"


def expanded(path: str | Path) -> Path:
    """`path` with a ~ or ~USER at its beginning replaced by that user's home. Raises UserError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {str(error).rstrip('.').lower()}; write the folder out") from None


class TruncatedFile(OSError):
    """A file ends before what should be in it."""


def open_file(path: Path, flags: int, direct: bool = False) -> int:
    """A file descriptor. direct: bypass the page cache if the file system supports it."""
    flags |= os.O_CLOEXEC
    if direct and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # no direct access on this file system; any other error recurs below
            return os.open(path, flags | os.O_DIRECT, 0o644)
    return os.open(path, flags, 0o644)


def write_fully(descriptor: int, view: memoryview, position: int) -> None:
    """Writes all of `view` at `position`. Raises OSError."""
    while view:
        written = os.pwrite(descriptor, view, position)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view, position = view[written:], position + written


def read_fully(descriptor: int, view: memoryview, position: int, size: int) -> None:
    """Reads `size` bytes at `position` into the beginning of `view`; bytes beyond them may be overwritten too.

    Raises OSError, TruncatedFile if the file ends too soon.
    """
    done = 0
    while done < size:
        got = os.preadv(descriptor, [view[done : done + READ_BYTES]], position + done)
        if got == 0:
            raise TruncatedFile(None, "the file is truncated")
        done += got


def take_lock(file: IO[str], patience_seconds: float) -> None:
    """Makes this process, and those that it forks, the only ones that hold `file`, until all of them have closed it.

    Raises BlockingIOError if others hold it for longer than that, another OSError if the file system has no locks.
    """
    until = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if time.monotonic() >= until:
                raise BlockingIOError(error.errno, error.strerror) from None
        time.sleep(0.1)


def view_of(array: Any) -> memoryview:
    """The bytes of a contiguous array or buffer; `Any`, since numpy's stubs for Python 3.11 do not declare arrays as buffers."""
    return memoryview(array).cast("B")


def aligned(size: int) -> int:
    """`size` rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def next_to(path: Path) -> Path:
    """Where the new version of `path` is written."""
    return path.with_name(path.name + NEXT)


class Spare:
    """A file that this process has replaced, at most one, kept to be written over.

    Allocating disk blocks and pages of the page cache for a new file, and freeing those of the old one, takes several times as
    long as copying the bytes. `remove_unfinished` removes it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"spare-{os.getpid()}{NEXT}"

    def take(self, path: Path, size: int) -> bool:
        """Renames the file to `path` if it has this size, else removes it. Whether it was renamed. Raises OSError."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return False
        # If a replacement failed after `keep`, this is another name of a file that is in use.
        if status.st_size != size or status.st_nlink > 1:
            self._path.unlink()
            return False
        self._path.rename(path)
        return True

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def keep(self, path: Path) -> None:
        """Gives the file `path`, which the caller replaces next, a second name, where the file system allows it."""
        self.remove()
        with contextlib.suppress(OSError):
            self._path.hardlink_to(path)


class NewFile:
    """A new version of the file `path`, written next to it: `commit` puts it in place, `discard` removes it.

    As a context manager, it discards when the block raises; otherwise it commits what the block has not committed or closed. All
    methods raise OSError.
    """

    def __init__(self, path: Path, direct: bool = False, keep: bool = False) -> None:
        """direct: bypass the page cache if possible; memory to write must then be aligned.

        keep: continue a new version that another process has begun.
        """
        self._path = path
        self._size = 0
        self._descriptor = open_file(next_to(path), os.O_RDWR | os.O_CREAT | (0 if keep else os.O_TRUNC), direct)

    @property
    def descriptor(self) -> int:
        return self._descriptor

    def append(self, data: bytes | memoryview) -> None:
        view = view_of(data)
        self.write(view, self._size)
        self._size += len(view)

    def write(self, view: memoryview, position: int) -> None:
        write_fully(self._descriptor, view, position)

    def commit(self, size: int | None = None, durable: bool = False) -> None:
        """Replaces the old file. size: truncate or extend the new one to this; durable: wait until it is on disk."""
        if size is not None:
            os.ftruncate(self._descriptor, size)
        if durable:
            os.fsync(self._descriptor)
        self.close()
        next_to(self._path).replace(self._path)
        if durable:
            _sync(self._path.parent)

    def discard(self) -> None:
        """Removes the new version."""
        self.close()
        next_to(self._path).unlink(missing_ok=True)

    def close(self) -> None:
        """Leaves the new version where it is, for another process to continue."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> "NewFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.discard()
        elif self._descriptor >= 0:
            self.commit()


def write_durably(path: Path, text: str) -> None:
    """Replaces the file `path` and waits until it is on disk. Raises OSError; the old file is then unchanged."""
    with NewFile(path) as new:
        new.append(text.encode())
        new.commit(durable=True)


def beside(folder: Path) -> tuple[Path, Path]:
    """Where `new_folder` fills the new folder, and where the old one is meanwhile."""
    return next_to(folder), folder.with_name(folder.name + OLD)


@contextlib.contextmanager
def new_folder(folder: Path, durable: bool = False) -> Iterator[Path]:
    """Yields an empty folder to fill, which replaces `folder` if the block succeeds and is removed if it raises.

    A crash between the renames leaves a state that `finish_replacement` repairs.
    """
    partial, old = beside(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if durable:
            for file in partial.iterdir():
                _sync(file)
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def finish_replacement(folder: Path) -> None:
    """Completes or undoes a replacement of `folder` that a crash interrupted."""
    partial, old = beside(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (old, partial):
        shutil.rmtree(left, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Removes incomplete new files, and spare ones, that processes have left in `folder`."""
    for path in folder.glob("*" + NEXT):
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
