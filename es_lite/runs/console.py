"""Progress bars on a terminal, lines in a log, and Ctrl-C."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from tqdm import tqdm

from es_lite.quantities import duration

SAME_SIGNAL_SECONDS = 0.3
"""A second signal this soon counts as the first one: `timeout` and some shells signal a process and then its group."""

SILENCE_SECONDS = 20.0
"""In a log, progress is printed only after this long without a line."""


class Console:
    """Progress and messages of a run, on standard error and output. A context manager that restores the signals.

    A first Ctrl-C or SIGTERM sets `stopping`: the run ends after this step. A second raises KeyboardInterrupt at once.
    """

    def __init__(self, steps: int, done: int) -> None:
        self.stopping = False
        self._steps = steps
        self._first_signal = 0.0
        self._printed = time.monotonic()
        self._live = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, disable=not self._live)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._print(text, sys.stdout)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", sys.stderr)

    @contextlib.contextmanager
    def progress(self, what: str, members: int = 0, expected_seconds: float = 0.0) -> Iterator[Callable[[float], None]]:
        """Shows the progress of work; yields a function to be called with the share that is done, 0 … 1.

        members: show how many of these are done; 0: show percent. expected_seconds: the expected duration, used while the share
        is too small to extrapolate from; 0: unknown.
        """
        count, unit = (members, "member") if members else (100, "%")
        began = time.monotonic()
        disable = not self._live
        with tqdm(total=count, desc=what, unit=unit, leave=False, position=1, dynamic_ncols=True, disable=disable) as bar:

            def show(share: float) -> None:
                if self._live:
                    bar.update(int(share * count) - bar.n)
                elif time.monotonic() - self._printed > SILENCE_SECONDS:
                    elapsed = time.monotonic() - began
                    left = elapsed / share - elapsed if share > 0.02 else max(0.0, expected_seconds - elapsed)
                    tail = f", about {duration(left)} left" if left else ""
                    part = f"{int(share * members)} of {members} members" if members else f"{share:.0%}"
                    self.say(f"{what}: {part} done in {duration(elapsed)}{tail}")

            yield show

    def show_step(self, metrics: dict[str, Any]) -> None:
        """Shows a finished step."""
        evaluation = metrics.get("eval_score")
        rate = metrics["tokens_per_second"]
        figures = [
            f"score {metrics['score_mean']:.4f} ± {metrics['score_std']:.4f}",
            *_written(metrics, ""),
            *([f"eval {evaluation:.4f}"] if evaluation is not None else []),
            *_written(metrics, "eval_"),
            f"{metrics['step_seconds']:.1f} s (update {metrics['update_seconds']:.1f})",
            f"{rate:.{0 if rate >= 10 else 1}f} tokens/s",
            f"{metrics['pss_gib']:.2f} GiB",
        ]
        if self._live:
            self._bar.set_postfix_str(" | ".join(figures))
            self._bar.update()
        if not self._live or evaluation is not None:
            self.say(f"step {metrics['step']}/{self._steps} | {' | '.join(figures)}")

    def show_evaluation(self, metrics: dict[str, Any]) -> None:
        """Shows an evaluation before the first step, or one that a crash prevented."""
        figures = [f"eval {metrics['eval_score']:.4f}", *_written(metrics, "eval_")]
        self.say(f"step {metrics['step']}/{self._steps} | {' | '.join(figures)}")

    def __enter__(self) -> "Console":
        self._before = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _print(self, text: str, file: Any) -> None:
        self._printed = time.monotonic()
        if self._live:
            self._bar.write(text, file=file)
        else:
            print(text, file=file, flush=True)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stopping and now - self._first_signal > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        if self.stopping:
            return
        self.stopping, self._first_signal = True, now
        # Straight to the descriptor: a handler may interrupt a print, which cannot be entered twice.
        os.write(2, b"\nstopping after this step; press Ctrl-C again to stop now (--resume then repeats this step)\n")


def _written(metrics: dict[str, Any], prefix: str) -> list[str]:
    """What is said of the text that models wrote, if they did."""
    found = []
    for name, form in (("accuracy", "right {:.0%}"), ("format", "format {:.0%}"), ("length", "{:.0f} characters")):
        if metrics.get(prefix + name) is not None:
            found.append(form.format(metrics[prefix + name]))
    if metrics.get(prefix + "cut"):
        found.append(f"{metrics[prefix + 'cut']:.0%} cut off")
    return found
