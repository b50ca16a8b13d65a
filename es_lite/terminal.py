"""The terminal, or the file, that commands print to."""

import contextlib
import io
import sys


def accept_any_text() -> None:
    """Characters that standard output or error cannot encode, as in an ASCII locale, are printed as question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # it is closed
                stream.reconfigure(errors="replace")
