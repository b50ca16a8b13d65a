"""The pool of worker processes: hands out tasks, replaces workers that die or hang, and does their work again.

Where memory is short it shrinks instead: a worker leaves after its task, or at once where the kernel might end it. What
it was doing is done again by another.
"""

import multiprocessing
import os
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from typing import Any, cast

from es_lite.errors import RunError
from es_lite.workers import worker
from es_lite.workers.guard import Guard
from es_lite.workers.worker import Done, Failed, Progress, Ready, Setup, Task

ATTEMPTS = 3
"""Workers that one task may cost before the run is stopped."""

SHORTEST_DEADLINE_SECONDS = 600.0

LOOK_SECONDS = 0.2
"""How often the guard is heeded while workers are at work."""

SMALLER = 'add --resume, with workers.count, fitness.micro_batch or fitness.max_length lower, or memory.residency = "streamed"'


@dataclass
class _Seat:
    """One worker process, and the task it has (its index), if any."""

    process: ForkServerProcess
    connection: Connection
    task: int | None = None
    since: float = 0.0
    """When it was started, or got its task (time.monotonic)."""
    ready: bool = False
    """It has loaded what it needs: from then on the deadline counts."""


def prepare() -> None:
    """Starts the process that workers are forked from, which imports what they need while the caller goes on.

    It is deaf to Ctrl-C from its first moment, not only from its own first line.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["es_lite.workers.preload"])
    resource_tracker.ensure_running()  # or the next call would run it, which unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Pool:
    """`count` worker processes. A context manager: none is left when it ends, however it ends."""

    def __init__(
        self,
        setup: Setup,
        descriptor: int | None,
        lock: int,
        count: int,
        deadline_seconds: float,
        warn: Callable[[str], None],
        guard: Guard,
    ) -> None:
        """descriptor: the working copy's, None where there is none; lock: the run directory's.

        deadline_seconds: after which a task counts as hung; 0: what `map` is told.
        """
        self._setup = setup
        self._descriptor = descriptor
        self._lock = lock
        self._stillborn = 0
        self._deadline = deadline_seconds
        self._warn = warn
        self._guard = guard
        self._context = multiprocessing.get_context("forkserver")
        self._seats: list[_Seat] = []
        try:
            self._seats.extend(self._start() for _ in range(count))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process numbers of the workers."""
        return [pid for seat in self._seats if (pid := seat.process.pid) is not None]

    @property
    def cramped(self) -> str:
        """Why the run had better end at this step: memory is short though there is one worker alone; "" where it is not."""
        return self._guard.reason if self._guard.short and len(self._seats) == 1 else ""

    def map(
        self,
        tasks: Sequence[Task],
        patience_seconds: float,
        done: Callable[[int], None],
        progress: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """The tasks' values, in order.

        patience_seconds: what no task can take on the slowest machine; past it (or past SHORTEST_DEADLINE_SECONDS,
        if that is longer) a worker counts as hung. done: is told the index of each task as it is finished;
        progress: the parameters that have passed through a streamed one, as they do.

        Raises UserError or RunError as a worker found it, or RunError where a task costs ATTEMPTS workers, or where memory is
        too short for one worker.
        """
        waiting = deque(range(len(tasks)))
        values: list[Any] = [None] * len(tasks)
        lost = [0] * len(tasks)
        left = len(tasks)
        while left:
            waiting.extendleft(self._make_room())
            for seat in self._seats:
                if seat.ready and seat.task is None and waiting:
                    self._give(seat, waiting.popleft(), tasks)
            for seat in self._heard(self._deadline or max(SHORTEST_DEADLINE_SECONDS, patience_seconds)):
                answer = self._answer(seat)
                if isinstance(answer, Progress):
                    if progress:
                        progress(answer.parameters)
                    continue
                index, seat.task = seat.task, None
                if isinstance(answer, Ready):
                    seat.ready, self._stillborn = True, 0
                elif isinstance(answer, Failed):
                    raise answer.error
                elif isinstance(answer, Done):
                    assert index is not None
                    values[index] = answer.value
                    left -= 1
                    done(index)
                elif self._guard.killed() and len(self._seats) > 1:
                    self._dismiss(seat, "was ended by the kernel for memory")
                    waiting.extendleft([] if index is None else [index])
                elif index is not None:
                    lost[index] += 1
                    self._replace(seat, f"{type(tasks[index]).__name__.lower()} task", lost[index])
                    waiting.appendleft(index)
                else:
                    self._stillborn += 1
                    self._replace(seat, "start", self._stillborn)
        return values

    def _make_room(self) -> list[int]:
        """Lets a worker go where memory is short: one without a task, or where it is critical, any. The tasks that were lost."""
        if not self._guard.short:
            return []
        if len(self._seats) == 1:
            if self._guard.critical:
                raise RunError(f"memory is too short for one worker: {self._guard.reason}; nothing is lost: {SMALLER}")
            return []
        idle = [seat for seat in self._seats if seat.task is None]
        if not idle and not self._guard.critical:
            return []
        seat = idle[0] if idle else max(self._seats, key=lambda seat: seat.since)
        self._dismiss(seat, f"is let go, memory is short: {self._guard.reason}")
        self._guard.look()
        return [] if seat.task is None else [seat.task]

    def _dismiss(self, seat: _Seat, why: str) -> None:
        self._end(seat)
        self._seats.remove(seat)
        left = len(self._seats)
        self._warn(f"worker {seat.process.pid} {why}; {left} worker{'s' * (left > 1)} left")

    def _end(self, seat: _Seat) -> None:
        seat.process.kill()
        seat.process.join()
        seat.connection.close()

    def close(self) -> None:
        """Ends all workers at once; whatever they were doing can be done again."""
        for seat in self._seats:
            seat.process.kill()
        for seat in self._seats:
            seat.process.join()
            seat.connection.close()
        self._seats.clear()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> _Seat:
        prepare()  # if it is not there, or no longer
        ours, theirs = self._context.Pipe()
        descriptor = None if self._descriptor is None else _Descriptor(self._descriptor)
        process = self._context.Process(
            target=worker.main,
            args=(theirs, self._setup, descriptor, _Descriptor(self._lock)),
            daemon=True,
        )
        process.start()
        theirs.close()
        # A stopped worker does not read: without a bound, sending it a large task would block for ever.
        with socket.socket(fileno=os.dup(ours.fileno())) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SHORTEST_DEADLINE_SECONDS), 0))
        return _Seat(cast(ForkServerProcess, process), ours, since=time.monotonic())

    def _give(self, seat: _Seat, index: int, tasks: Sequence[Task]) -> None:
        seat.task, seat.since = index, time.monotonic()
        try:
            seat.connection.send(tasks[index])
        except OSError:
            seat.process.kill()  # if it is not dead already; its sentinel says so next

    def _heard(self, deadline: float) -> list[_Seat]:
        """Seats that said they are ready, answered their task, died, or hung."""
        heeded = [seat for seat in self._seats if seat.task is not None or not seat.ready]
        ends = {seat.process.pid: seat.since + (deadline if seat.ready else SHORTEST_DEADLINE_SECONDS) for seat in heeded}
        events = wait(
            [seat.connection for seat in heeded] + [seat.process.sentinel for seat in heeded],
            timeout=min(LOOK_SECONDS, max(0.0, min(ends.values()) - time.monotonic())),
        )
        for seat in heeded:
            if time.monotonic() > ends[seat.process.pid] and seat.connection not in events:
                self._warn(f"worker {seat.process.pid} did not answer within its deadline; it is replaced")
                seat.process.kill()
                seat.process.join()
                events.append(seat.process.sentinel)
        return [seat for seat in heeded if seat.connection in events or seat.process.sentinel in events]

    def _answer(self, seat: _Seat) -> Ready | Progress | Done | Failed | None:
        """What the worker sent; None where it died before."""
        try:
            return seat.connection.recv() if seat.connection.poll() else None
        except (EOFError, OSError):
            return None

    def _replace(self, seat: _Seat, what: str, lost: int) -> None:
        self._end(seat)
        code = seat.process.exitcode
        if lost >= ATTEMPTS:
            raise RunError(
                f"{lost} workers died in turn at the same {what} (the last with exit code {code}; -9 is often the kernel "
                "ending a process for memory: set workers.count or fitness.micro_batch lower)"
            )
        self._warn(f"worker {seat.process.pid} died (exit code {code}); a new one repeats its {what}")
        new = self._start()
        seat.process, seat.connection, seat.ready, seat.since = new.process, new.connection, False, new.since


class _Descriptor:
    """A file descriptor that travels to a new process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple:
        return _same, (DupFd(self.number),)


def _same(descriptor: Any) -> Any:
    return descriptor
