"""Progress with the time that is left, on standard error: standard output has results alone."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from es_lite.quantities import duration

SILENCE_SECONDS = 20.0
"""In a log, progress is printed at most this often."""


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """Shows the progress of work, as a bar on a terminal; yields a function to be called with the share that is done, 0 … 1."""
    live, began = sys.stderr.isatty(), time.monotonic()
    printed = began
    with tqdm(total=100, desc=what, unit="%", leave=False, dynamic_ncols=True, disable=not live) as bar:

        def show(share: float) -> None:
            nonlocal printed
            now = time.monotonic()
            if live:
                bar.update(int(100 * share) - bar.n)
            elif now - printed > SILENCE_SECONDS:
                printed, elapsed = now, now - began
                left = f", about {duration(elapsed / share - elapsed)} left" if share > 0.02 else ""
                print(f"{what}: {share:.0%} done in {duration(elapsed)}{left}", file=sys.stderr, flush=True)

        yield show


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
