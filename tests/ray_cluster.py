"""A cluster of Ray whose nodes are all on this machine, for tests."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import outlived


class Nodes:
    """The cluster. Its first node, the head, is where the command runs."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.others: list[Any] = []
        """The nodes that were added, without the head."""

    @property
    def address(self) -> str:
        return self._cluster.address

    def add(self, **environment: str) -> Any:
        """A node with one core."""
        node = self._cluster.add_node(num_cpus=1, env_vars=environment or None, **QUIET)
        self.others.append(node)
        return node

    def kill(self, node: Any) -> None:
        """All processes of a node, as if its machine lost power."""
        self.others.remove(node)
        for process in _processes(node):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def hosts(self, *nodes: Any) -> list[psutil.Process]:
        """The processes of the run's hosts, on these nodes or on all of this cluster."""
        return [p for node in nodes or (self._cluster.head_node, *self.others) for p in _processes(node) if _is_host(p)]

    def end(self) -> None:
        left = [process for node in (self._cluster.head_node, *self.others) for process in _processes(node)]
        self._cluster.shutdown()
        for process in outlived(left):
            process.kill()


QUIET: dict[str, Any] = {"object_store_memory": 100 * 2**20, "include_dashboard": False, "dashboard_agent_listen_port": 0}


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """A cluster of so many nodes with a core each; skips the test if Ray is not installed."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **QUIET})
    found = Nodes(cluster)
    try:
        for _ in range(count - 1):
            found.add()
        yield found
    finally:
        found.end()


@contextmanager
def head(port: int = 0) -> Iterator[str]:
    """The address of a head, with one core, that `ray start` has started; killed at the end, as if its machine lost power."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    quiet = "--include-dashboard=false", "--dashboard-agent-listen-port=0", "--object-store-memory=100000000", "--block"
    ray = Path(sys.executable).with_name("ray")
    command = [ray, "start", "--head", f"--port={address.rpartition(':')[2]}", "--num-cpus=1", *quiet]
    started = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while not _listens(address):
            assert time.monotonic() < until and started.poll() is None
            time.sleep(0.1)
        yield address
    finally:
        left = [*started.children(recursive=True), started]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        started.wait()
        assert not outlived(left)


def _listens(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def _processes(node: Any) -> list[psutil.Process]:
    """Those of a node, its hosts and their workers among them."""
    own = [psutil.Process(info.process.pid) for kind in node.all_processes.values() for info in kind]
    return [*own, *(child for process in own for child in process.children(recursive=True))]


def _is_host(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith("ray::Host")
    except (psutil.Error, IndexError):
        return False
