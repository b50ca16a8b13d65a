"""The pool of worker processes: hands out tasks, replaces workers that die or hang, and repeats their tasks.

If memory is short it shrinks instead: a worker is stopped after its task, or immediately if the kernel might kill one.
"""

import multiprocessing
import os
import signal
import socket
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from typing import Any, cast

from es_lite.engine import worker
from es_lite.engine.base import Progress
from es_lite.engine.guard import Guard
from es_lite.engine.messages import Answer, Done, Failed, Ready, Task, Working
from es_lite.engine.worker import Setup
from es_lite.errors import RunError, UserError

ATTEMPTS = 3
"""Workers that one task may cost before the run is stopped."""

SHORTEST_DEADLINE_SECONDS = 600.0

TICK_SECONDS = 0.2
"""How often the guard is consulted and progress reported."""

SMALLER = 'run it again (train: with --resume) with a lower workers.count, or memory.residency = "streamed"'


@dataclass
class _Handle:
    """One worker process, and the task it has, if any."""

    process: ForkServerProcess
    connection: Connection
    task: int | None = None
    """Index of the task."""
    share: float = 0.0
    """How much of the task is done, 0 … 1."""
    since: float = 0.0
    """When it was started, or got its task (time.monotonic)."""
    ready: bool = False
    """It has started: from then on the deadline applies."""


def prepare() -> None:
    """Starts the process that workers are forked from, which imports what they need while the caller continues.

    SIGINT is blocked meanwhile, so Ctrl-C cannot end the new process before it ignores it. UserError: the folder for temporary
    files has so long a name that no socket fits in it.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["es_lite.engine.preload"])
    resource_tracker.ensure_running()  # else the call below would start it, which unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    except OSError as error:
        if error.errno is not None:
            raise
        # The one failure without a number: "AF_UNIX path too long", about 70 characters of folder.
        folder = tempfile.gettempdir()
        raise UserError(
            f"{folder}: its name is too long for a folder of sockets; set TMPDIR to a shorter one, e.g. /tmp"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Pool:
    """`count` worker processes. A context manager: none is left when it ends, however it ends."""

    def __init__(
        self,
        setup: Setup,
        working_copy: int | None,
        lock: int,
        count: int,
        deadline_seconds: float,
        warn: Callable[[str], None],
        guard: Guard,
    ) -> None:
        """working_copy: its descriptor, None if there is none; lock: the run directory's descriptor.

        deadline_seconds: after which a task counts as hung; 0: `patience_seconds` of `map` decides.
        """
        self._setup = setup
        self._working_copy = working_copy
        self._lock = lock
        self._failed_starts = 0
        self._deadline = deadline_seconds
        self._warn = warn
        self._guard = guard
        self._context = multiprocessing.get_context("forkserver")
        self._workers: list[_Handle] = []
        try:
            self._workers.extend(self._start() for _ in range(count))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process IDs of the workers."""
        return [pid for handle in self._workers if (pid := handle.process.pid) is not None]

    @property
    def shortage(self) -> str:
        """Why the run should end although nothing has failed: memory is short even for one worker; "" if it is not."""
        short = self._guard.short and len(self._workers) == 1
        return f"memory is short: {self._guard.reason}; nothing is lost: {SMALLER}" if short else ""

    def map(self, tasks: Sequence[Task], patience_seconds: float, progress: Progress) -> list[Any]:
        """The tasks' values, in order.

        patience_seconds: more than a task takes on the slowest machine; after that (or SHORTEST_DEADLINE_SECONDS, if that is
        longer) a worker counts as hung.

        Raises a worker's UserError or RunError; RunError if a task costs ATTEMPTS workers or memory is too short for one worker.
        """
        waiting = deque(range(len(tasks)))
        values: list[Any] = [None] * len(tasks)
        lost = [0] * len(tasks)
        finished = 0
        while finished < len(tasks):
            waiting.extendleft(self._make_room())
            for handle in self._workers:
                if handle.ready and handle.task is None and waiting:
                    self._give(handle, waiting.popleft(), tasks)
            for handle in self._wait(self._deadline or max(SHORTEST_DEADLINE_SECONDS, patience_seconds)):
                answer = self._receive(handle)
                if isinstance(answer, Working):
                    handle.share = answer.share
                    continue
                index, handle.task, handle.share = handle.task, None, 0.0
                if isinstance(answer, Ready):
                    handle.ready, self._failed_starts = True, 0
                elif isinstance(answer, Failed):
                    raise answer.error
                elif isinstance(answer, Done):
                    assert index is not None
                    values[index] = answer.value
                    finished += 1
                elif self._guard.killed() and len(self._workers) > 1:
                    self._stop(handle, "was killed by the kernel for memory")
                    waiting.extendleft([] if index is None else [index])
                elif index is not None:
                    lost[index] += 1
                    self._replace(handle, f"{tasks[index].name} task", lost[index])
                    waiting.appendleft(index)
                else:
                    self._failed_starts += 1
                    self._replace(handle, "start", self._failed_starts)
            progress((finished + sum(handle.share for handle in self._workers)) / len(tasks))
        return values

    def close(self) -> None:
        """Kills all workers; their tasks can be repeated."""
        for handle in self._workers:
            handle.process.kill()
        for handle in self._workers:
            handle.process.join()
            handle.connection.close()
        self._workers.clear()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_room(self) -> list[int]:
        """Stops a worker if memory is short: one without a task or, if memory is critical, any. Returns the tasks lost."""
        if not self._guard.short:
            return []
        if len(self._workers) == 1:
            if self._guard.critical:
                raise RunError(f"there is too little memory for one worker: {self._guard.reason}; nothing is lost: {SMALLER}")
            return []
        idle = [handle for handle in self._workers if handle.task is None]
        if not idle and not self._guard.critical:
            return []
        handle = idle[0] if idle else max(self._workers, key=lambda handle: handle.since)
        self._stop(handle, f"was stopped to free memory: {self._guard.reason}")
        self._guard.measure()
        return [] if handle.task is None else [handle.task]

    def _stop(self, handle: _Handle, why: str) -> None:
        self._end(handle)
        self._workers.remove(handle)
        left = len(self._workers)
        self._warn(f"worker {handle.process.pid} {why}; {left} worker{'s' * (left > 1)} left")

    def _end(self, handle: _Handle) -> None:
        handle.process.kill()
        handle.process.join()
        handle.connection.close()

    def _start(self) -> _Handle:
        prepare()  # does nothing if that process is running
        ours, theirs = self._context.Pipe()
        working_copy = None if self._working_copy is None else _Descriptor(self._working_copy)
        process = self._context.Process(
            target=worker.main,
            args=(theirs, self._setup, working_copy, _Descriptor(self._lock)),
            daemon=True,
        )
        process.start()
        theirs.close()
        # A suspended worker (SIGSTOP) does not read: without a timeout, sending it a large task would block for ever.
        with socket.socket(fileno=os.dup(ours.fileno())) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SHORTEST_DEADLINE_SECONDS), 0))
        return _Handle(cast(ForkServerProcess, process), ours, since=time.monotonic())

    def _give(self, handle: _Handle, index: int, tasks: Sequence[Task]) -> None:
        handle.task, handle.since = index, time.monotonic()
        try:
            handle.connection.send(tasks[index])
        except OSError:
            handle.process.kill()  # if it is not dead already; `_wait` will notice

    def _wait(self, deadline: float) -> list[_Handle]:
        """Workers that have sent something, died or hung, after TICK_SECONDS at the latest."""
        busy = [handle for handle in self._workers if handle.task is not None or not handle.ready]
        ends = {h.process.pid: h.since + (deadline if h.ready else SHORTEST_DEADLINE_SECONDS) for h in busy}
        events = wait(
            [handle.connection for handle in busy] + [handle.process.sentinel for handle in busy],
            timeout=min(TICK_SECONDS, max(0.0, min(ends.values()) - time.monotonic())),
        )
        for handle in busy:
            if time.monotonic() > ends[handle.process.pid] and handle.connection not in events:
                self._warn(f"worker {handle.process.pid} exceeded its deadline and is replaced")
                handle.process.kill()
                handle.process.join()
                events.append(handle.process.sentinel)
        return [handle for handle in busy if handle.connection in events or handle.process.sentinel in events]

    def _receive(self, handle: _Handle) -> Answer | None:
        """What the worker sent; None if it died before."""
        try:
            return handle.connection.recv() if handle.connection.poll() else None
        except (EOFError, OSError):
            return None

    def _replace(self, handle: _Handle, what: str, lost: int) -> None:
        self._end(handle)
        code = handle.process.exitcode
        if lost >= ATTEMPTS:
            raise RunError(
                f"{lost} workers in a row died at the same {what} (the last with exit code {code}; -9: killed, by the kernel for "
                "memory or at its deadline); run it again (train: with --resume) with a lower workers.count or a longer "
                "workers.deadline"
            )
        self._warn(f"worker {handle.process.pid} died (exit code {code}); a new one repeats its {what}")
        new = self._start()
        handle.process, handle.connection, handle.ready, handle.since = new.process, new.connection, False, new.since


class _Descriptor:
    """A file descriptor that is duplicated into a new process when it is pickled."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple:
        return _same, (DupFd(self.number),)


def _same(descriptor: Any) -> Any:
    return descriptor
