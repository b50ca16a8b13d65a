"""What the person at the terminal sees: bars on a terminal, a line a step without one; Ctrl-C once and twice."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from tqdm import tqdm

SAME_SIGNAL_SECONDS = 0.3
"""A second signal so soon is the first one again: `timeout` and some shells signal a process and then its group."""


class Console:
    """Progress and messages of a run, on standard error and output. A context manager that restores the signals.

    `stopping` is set by a first Ctrl-C or SIGTERM: the run ends at the step's end. A second raises
    KeyboardInterrupt at once.
    """

    def __init__(self, steps: int, done: int) -> None:
        self.stopping = False
        self._first = 0.0
        self._live = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, disable=not self._live)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        if self._live:
            self._bar.write(f"warning: {text}", file=sys.stderr)
        else:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def tasks(self, what: str, count: int) -> Callable[[int], None]:
        """A bar below the main one for `count` tasks; call the result as each is done."""
        if not self._live:
            return lambda index: None
        bar = tqdm(total=count, desc=what, leave=False, position=1, dynamic_ncols=True)

        def done(_: int) -> None:
            bar.update()
            if bar.n == count:
                bar.close()

        return done

    @contextlib.contextmanager
    def parameters(self, what: str, count: int) -> Iterator[Callable[[int], None]]:
        """A bar below the main one for `count` parameters that pass; call what it gives with how many more have."""
        with tqdm(
            total=count,
            desc=what,
            leave=False,
            position=1,
            dynamic_ncols=True,
            unit="",
            unit_scale=True,
            disable=not self._live,
        ) as bar:
            yield bar.update

    def step(self, metrics: dict[str, Any], steps: int) -> None:
        """A finished step (or the evaluation before the first)."""
        evaluation = metrics.get("eval_score")
        tail = f" | eval {evaluation:.4f}" if evaluation is not None else ""
        if metrics["step"] and "score_mean" in metrics:
            text = (
                f"step {metrics['step']}/{steps} | score {metrics['score_mean']:.4f} ± {metrics['score_std']:.4f}{tail} | "
                f"{metrics['step_seconds']:.1f} s (update {metrics['update_seconds']:.1f}) | "
                f"{metrics['tokens_per_second']:.{0 if metrics['tokens_per_second'] >= 10 else 1}f} tokens/s | "
                f"{metrics['pss_gib']:.2f} GiB"
            )
        else:
            text = f"step {metrics['step']}/{steps}{tail}"
        if not self._live:
            print(text, flush=True)
            return
        if evaluation is not None:
            self._bar.write(text, file=sys.stdout)
        self._bar.set_postfix_str(text.split(" | ", 1)[-1])
        if "score_mean" in metrics:
            self._bar.update()

    def __enter__(self) -> "Console":
        self._before = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stopping and now - self._first > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        if self.stopping:
            return
        self.stopping, self._first = True, now
        # Straight to the descriptor: a handler may interrupt a print, which cannot be entered twice.
        os.write(2, b"\nstopping at the end of this step; once more stops at once (nothing is lost)\n")
