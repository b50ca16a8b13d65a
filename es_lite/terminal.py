"""The terminal, or the file, that commands print to, and from which they are stopped."""

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from es_lite.errors import RunError, UserError

AGAIN_SECONDS = 0.05
"""Until a KeyboardInterrupt that Python dropped is raised again."""


def accept_any_text() -> None:
    """Characters that standard output or error cannot encode, as in an ASCII locale, are printed as question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # it is closed
                stream.reconfigure(errors="replace")


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that temporary files are removed. To be entered by the main thread.

    Python drops an exception that is raised in a function which C called, such as those that load compiled code; a
    KeyboardInterrupt is then raised once more, a moment later.
    """

    def raise_again(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        else:
            hook(dropped)

    handlers = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGALRM)}
    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def exit_code_of(command: Callable[[], None], stopped: str = "stopped") -> int:
    """Runs a command and returns its exit code. What was wrong, or `stopped` if the user stopped it, goes to standard error."""
    try:
        with stoppable():
            command()
    except (UserError, RunError) as error:
        print(f"es_lite: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"es_lite: {stopped}", file=sys.stderr)
        return 130
    return 0
