"""A user's Python file that teaches transformers an architecture, or a part of one, before a model is built.

It runs once in every process that builds the model, and only if its contents are those that the run began with: a journal names a
file, and a file that is not the run's own must not run.
"""

import hashlib
import sys

from es_lite.errors import UserError
from es_lite.files import expanded
from es_lite.python_file import run_once


def digest_of(path: str) -> str:
    """SHA-256 of the file. Raises UserError if it cannot be read."""
    try:
        return hashlib.sha256(expanded(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"model.code = {path!r}: cannot be read ({error.strerror}); expected a Python file") from None


def run(path: str, digest: str) -> None:
    """Runs the file, unless this process has already. Raises UserError if its SHA-256 is not `digest`, or if it fails."""
    name = f"es_lite model.code {digest}"
    if name in sys.modules:
        return
    if digest_of(path) != digest:
        raise UserError(f"model.code = {path!r}: has changed since the run began; restore the file that it began with")
    file = expanded(path).resolve()
    if file.suffix != ".py":
        raise UserError(f"model.code = {path!r}: expected a Python file, whose name ends in .py")
    try:
        run_once(file, name)
    except (Exception, SystemExit) as error:
        raise UserError(f"model.code = {path!r}: fails ({type(error).__name__}: {error})") from None
