"""A cluster of Ray whose nodes are all on this machine, for tests."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest


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
        processes = [psutil.Process(p.process.pid) for kind in node.all_processes.values() for p in kind]
        for process in [child for parent in processes for child in parent.children(recursive=True)] + processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def hosts(self) -> list[psutil.Process]:
        """The processes of the run's hosts, on all nodes."""
        return [p for p in psutil.process_iter() if _is_host(p)]


QUIET: dict[str, Any] = {"object_store_memory": 100 * 2**20, "include_dashboard": False, "dashboard_agent_listen_port": 0}


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """A cluster of so many nodes with a core each; skips the test if Ray is not installed."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **QUIET})
    found = Nodes(cluster)
    try:
        for _ in range(count - 1):
            found.add()
        yield found
    finally:
        cluster.shutdown()
        end = time.monotonic() + 30
        while found.hosts() and time.monotonic() < end:
            time.sleep(0.1)
        for process in found.hosts():
            os.kill(process.pid, signal.SIGKILL)


def _is_host(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith("ray::Host")
    except (psutil.Error, IndexError):
        return False
