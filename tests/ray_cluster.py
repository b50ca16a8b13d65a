"""A cluster of Ray whose nodes are all on this machine, for tests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def _processes(node: Any) -> list[psutil.Process]:
    """Those of a node, its hosts and their workers among them."""
    own = [psutil.Process(info.process.pid) for kind in node.all_processes.values() for info in kind]
    return [*own, *(child for process in own for child in process.children(recursive=True))]


def _is_host(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith("ray::Host")
    except (psutil.Error, IndexError):
        return False
