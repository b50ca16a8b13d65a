"""One grader process, as the coordinator sees it: started, asked, heard, killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from es_lite.errors import RunError
from es_lite.fitness import grader

SEND_SECONDS = 120.0
"""A grader reads a request at once, unless somebody has suspended it."""


class GraderProcess:
    """A process that runs `grader.main`. It is the leader of a session, so that what it starts can be killed with it.

    On Linux it dies with the thread that made it.
    """

    def __init__(self, functions: Sequence[str], seconds: float) -> None:
        """functions: names for `functions.load`. seconds: until it must be ready."""
        self.socket, theirs = socket.socketpair()  # readable when `receive` has something
        number = theirs.fileno()
        # Not `-m`: with the coordinator's search path it finds this package, and the user's modules, where the coordinator does.
        code = f"import sys; sys.path[:] = {sys.path!r}; from es_lite.fitness import grader; "
        code += f"grader.main({number}, {os.getpid()}, {list(functions)!r})"
        environment = os.environ | {"PYTHONHASHSEED": "0"}  # sets have the same order in every grader
        environment.setdefault("OMP_NUM_THREADS", "1")  # the cores are busy with other graders
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[number],
                start_new_session=True,
            )
        except OSError as error:
            self.socket.close()
            raise RunError(f"a process that grades completions cannot be started ({error.strerror})") from None
        finally:
            theirs.close()
        self._received = b""
        self.ready = False
        """It has loaded the functions."""
        self.allow(seconds)

    @property
    def pid(self) -> int:
        return self._process.pid

    def allow(self, seconds: float) -> None:
        """It counts as hung unless it answers within `seconds` from now."""
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds

    def send(self, request: dict[str, Any]) -> bool:
        """False if it is dead."""
        self.socket.settimeout(SEND_SECONDS)
        try:
            self.socket.sendall(grader.encode(request))
        except OSError:
            return False
        return True

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The answers that have arrived, and whether it is alive. Call it only when there is something to read."""
        try:
            chunk = self.socket.recv(2**20)
        except OSError:
            chunk = b""
        *lines, self._received = (self._received + chunk).split(b"\n")
        return [grader.decode(line) for line in lines], bool(chunk)

    def end(self) -> int:
        """Kills it, with what it has started. Returns its exit code: its own if it had ended before, else -9."""
        if self._process.returncode is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # not Linux: it has ended
                self._process.kill()
            self._process.wait()
            self.socket.close()
        return self._process.returncode
