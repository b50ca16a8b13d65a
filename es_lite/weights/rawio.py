"""Positioned reads and writes that are done whole, past the page cache where that is asked for."""

import errno
import os
from pathlib import Path

from es_lite.errors import UserError

ALIGNMENT = 4096
"""Offsets and sizes of direct reads and writes are multiples of it."""

READ_BYTES = 16 * 2**20
"""Bytes asked of the disk at a time."""

REMEDY = "add --rebuild to --resume: θ₀ and the journal make it again"
"""What to do about a layer's file that cannot be read."""


def open_file(path: Path, flags: int, direct: bool) -> int:
    """A descriptor; direct: it goes past the page cache, where the system and the file system know how."""
    flags |= os.O_CLOEXEC
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without it says
                raise
    return os.open(path, flags, 0o644)


def write_fully(descriptor: int, view: memoryview, position: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def read_fully(descriptor: int, view: memoryview, position: int, size: int, path: Path) -> None:
    """The `size` bytes from `position` on into `view`; where that has more room, bytes beyond them may follow.

    Raises UserError where the file cannot be read, or ends before.
    """
    done = 0
    while done < size:
        try:
            got = os.preadv(descriptor, [view[done : done + READ_BYTES]], position + done)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
        if got == 0:
            raise UserError(f"{path}: ends too soon; {REMEDY}")
        done += got


def read_aligned(descriptor: int, view: memoryview, position: int, size: int, path: Path) -> None:
    """`read_fully` from an aligned position, in aligned pieces; `view` has room for the next multiple of ALIGNMENT."""
    read_fully(descriptor, view[: -(-size // ALIGNMENT) * ALIGNMENT], position, size, path)
