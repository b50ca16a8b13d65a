"""A cluster of Ray: its nodes, and an actor on each. The only module that imports ray.

A call that fails because the host is gone raises HostLost; what the host itself raised is raised as it was.
"""

import contextlib
import logging
import os
import pickle
import re
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # an actor without a GPU keeps its CUDA_VISIBLE_DEVICES
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # else hosts yield to every other program
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # hosts have guards of their own, which lose less

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from es_lite import system
from es_lite.errors import RunError, UserError
from es_lite.hosts.host import Host

STORE_BYTES = 256 * 2**20
"""Of the object store of a cluster that is started here: only items pass through it, and those once."""

CONNECT_SECONDS, HEAD_SECONDS = 10.0, 30.0
"""How long an address may take to answer, and the head of a run under way."""


class HostLost(Exception):
    """The host is gone, or cannot be reached; the message says why."""


@dataclass(frozen=True)
class Node:
    id: str
    name: str
    """Of the machine."""
    cores: int
    gpus: int
    here: bool
    """It is the coordinator's machine."""


class Call:
    """A call under way."""

    def __init__(self, ref: ray.ObjectRef, sent: int) -> None:
        self._ref = ref
        self.traffic = sent
        """Bytes of the arguments and, when it is done, of the answer."""

    def result(self, timeout_seconds: float | None = None) -> Any:
        """Waits for it. Raises HostLost, TimeoutError, or what the host raised."""
        try:
            value = ray.get(self._ref, timeout=timeout_seconds)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError from None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise HostLost(_telling_line(error)) from None
        self.traffic += len(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
        return value


class Actor:
    """A `Host` on another node, or on this one."""

    def __init__(self, node: Node, gpus: int, run_dir: Path | None, fresh: bool) -> None:
        remote: Any = ray.remote  # whose types do not know of groups
        decorate = remote(concurrency_groups={"watch": 1})
        place = NodeAffinitySchedulingStrategy(node.id, soft=False)
        options = decorate(Host).options(num_cpus=node.cores, num_gpus=gpus, scheduling_strategy=place, max_restarts=0)
        self._handle = options.remote(node.cores, run_dir, fresh)

    def call(self, method: str, *arguments: Any) -> Call:
        sent = sum(len(pickle.dumps(a, pickle.HIGHEST_PROTOCOL)) for a in arguments if not isinstance(a, ray.ObjectRef))
        return Call(getattr(self._handle, method).remote(*arguments), sent)

    def watch(self, method: str) -> Call:
        """Of a method that answers whatever else the host is doing."""
        return Call(getattr(self._handle, method).options(concurrency_group="watch").remote(), 0)

    def kill(self) -> None:
        with contextlib.suppress(Exception):  # it may be gone
            ray.kill(self._handle)


class Cluster:
    """A context manager: the cluster, if it was started here, or the connection to it, ends."""

    def __init__(self, address: str) -> None:
        """address: see `workers.address`. Raises UserError if there is no cluster, or if it is of another version."""
        if address.startswith("ray://"):
            raise UserError(
                f"workers.address = {address!r}: the command runs on a machine of the cluster; run it there, with "
                'workers.address = "auto"'
            )
        if address not in ("local", "auto"):
            _reach(address)
        on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray sets its own, which would end the run in mid-step
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address == "local":
                ray.init("local", num_cpus=system.cores(), object_store_memory=STORE_BYTES, include_dashboard=False, **quiet)
            else:
                ray.init(address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            ray.shutdown()
            raise UserError(f"workers.address = {address!r}: {_refusal(error)}") from None
        signal.signal(signal.SIGTERM, on_sigterm)
        self._here = ray.get_runtime_context().get_node_id()
        self._head: str = ray.get_runtime_context().gcs_address
        self._gone = False

    def nodes(self) -> list[Node]:
        """Those that are alive. Raises RunError if the head is gone; Ray would wait a minute and then end the process."""
        try:
            _connect(self._head, HEAD_SECONDS)
        except OSError as error:
            self._gone = True
            raise RunError(
                f"Ray's head, {self._head}, is gone ({error}); no step is lost: start it again, and add --resume"
            ) from None
        found = []
        for node in ray.nodes():
            resources = node["Resources"]
            if node["Alive"] and resources.get("CPU", 0) >= 1:
                here = node["NodeID"] == self._here
                gpus = int(resources.get("GPU", 0))
                found.append(Node(node["NodeID"], node["NodeManagerHostname"], int(resources["CPU"]), gpus, here))
        return found

    @staticmethod
    def pids() -> list[int]:
        """This process, and those of a cluster that was started here, but not its hosts."""
        found = [os.getpid()]
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                own = [p.pid for p in child.children() if not "".join(p.cmdline()[:1]).startswith(f"ray::{Host.__name__}")]
                found += [child.pid, *own]
        return found

    @staticmethod
    def share(value: Any) -> Any:
        """A reference to a value that many calls take as an argument: it is sent to each machine once."""
        return ray.put(value)

    @staticmethod
    def wait(calls: Sequence[Call], timeout_seconds: float) -> list[Call]:
        """Those of the calls that are done; waits until one is."""
        refs = {call._ref: call for call in calls}
        done, _ = ray.wait(list(refs), num_returns=1, timeout=timeout_seconds)
        if done:  # and whatever else is done by now
            done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        return [refs[ref] for ref in done]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._gone:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raises UserError if nobody listens there; Ray would try for minutes."""
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(
            f'workers.address = {address!r}: expected "local", "auto" or the HOST:PORT that `ray start --head` has said'
        )
    try:
        _connect(address, CONNECT_SECONDS)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(
            f"workers.address = {address!r}: nobody can be reached there ({error}); start a cluster with `ray start --head`, "
            "and let its port through the firewall"
        ) from None


def _connect(address: str, timeout_seconds: float) -> None:
    """Raises OSError, OverflowError or UnicodeError if nobody listens there."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout_seconds).close()


def _refusal(error: Exception) -> str:
    words = " ".join(str(error).split())
    if "ersion mismatch" in words:
        return f"the cluster has other versions of Ray or Python than this machine: {words}"
    return (
        f"there is no cluster of Ray that can be joined ({words[:200]}). If it has a token, this machine needs it too, in "
        "~/.ray/auth_token or RAY_AUTH_TOKEN, and RAY_AUTH_MODE=token. If there is none, start one with `ray start --head`, "
        'or set it to "local"'
    )


def _telling_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]  # in the actor, at the end of a traceback
    return raised[-1] if raised else lines[0]
