"""The hosts of a run: one on each node of the cluster, started, watched, replaced and left out."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from es_lite.algorithm.record import Record
from es_lite.errors import RunError, UserError
from es_lite.hosts.cluster import Actor, Cluster, HostLost, Node
from es_lite.hosts.host import HostSetup, Report, Status
from es_lite.hosts.remote_host import RemoteHost
from es_lite.quantities import count

ATTEMPTS = 3
"""Hosts that a node may cost in a row before it is left out."""

OPENING_SECONDS = 300.0
"""How long a run waits, at first, for all nodes to say whether they can take part."""

TELLING_SECONDS = 20.0
"""After so long, the run says which hosts it waits for."""

CLOSING_SECONDS = 5.0

LOOK_SECONDS = 5.0
"""Time between two looks for nodes that have joined."""

TICK_SECONDS = 0.1


class Hosts:
    """Those that take part, or may yet."""

    def __init__(
        self, cluster: Cluster, setup: HostSetup, run_dir: Path, warn: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        """See `RayEngine`."""
        self._cluster, self._run_dir = cluster, run_dir
        self._warn, self._say = warn, say
        self._workers = setup.recipe.workers
        self._setup = cluster.share(setup)
        self._hosts: dict[str, RemoteHost] = {}
        """By node."""
        self._lost: Counter[str] = Counter()
        """How many hosts each node has cost since it last scored anything."""
        self._left_out: set[str] = set()
        """Nodes."""
        self._reasons: list[str] = []
        """Why nodes were left out."""
        self._looked = 0.0
        self._records: list[Record] = []

    @property
    def ready(self) -> list[RemoteHost]:
        """Those that get work."""
        return [host for host in self._hosts.values() if host.ready]

    @property
    def opened(self) -> list[RemoteHost]:
        """Those that get records."""
        return [host for host in self._hosts.values() if host.report]

    @property
    def here(self) -> RemoteHost:
        """This machine's."""
        return next(host for host in self._hosts.values() if host.node.here)

    def wait_for(self, least: int) -> None:
        """Starts a host on each node, and waits until all have opened. Raises UserError if too few can take part."""
        self._look_for_nodes()
        began, told = time.monotonic(), False
        while late := [host.name for host in self._hosts.values() if not host.report]:
            self._take_in()
            if time.monotonic() > began + OPENING_SECONDS:
                self._warn(f"not ready after {OPENING_SECONDS:.0f} s: {', '.join(late)}; they may join later")
                break
            if time.monotonic() > began + TELLING_SECONDS and not told:
                self._say(f"waiting for {', '.join(late)}: still opening the model, or another program has the cores")
                told = True
            time.sleep(TICK_SECONDS)
        opened = self.opened
        if len(opened) < least:
            reasons = "".join(f"\n  {reason}" for reason in self._reasons)
            raise UserError(f"workers.hosts = {least}: only {count(len(opened), 'host')} can take part{reasons}")
        if not any(host.node.here for host in opened):
            raise UserError(
                "this machine's host is not ready: another program may use the cluster's cores, or Ray was started here without "
                f"CPUs{''.join(f'; {reason}' for reason in self._reasons)}"
            )

    @property
    def waiting(self) -> list[RemoteHost]:
        """Those that have caught up, and do not get work yet."""
        return [host for host in self.opened if host.level and not host.ready]

    def admit(self, host: RemoteHost) -> None:
        """From now on, it gets work."""
        assert host.report is not None
        host.ready = True
        self._say(f"{host.name} takes part: {host.report.plan}")

    def send(self, records: Sequence[Record]) -> None:
        """New records, which all hosts apply while the caller goes on."""
        self._records += records
        for host in self.opened:
            host.send(self._records)

    def tend(self) -> None:
        """Starts hosts on new nodes, and parts with those that are lost. To be called often."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._look_for_nodes()
        self._take_in()
        for host in self.opened:
            try:
                level, status = host.settled(), host.look()
            except (HostLost, UserError, RunError) as error:
                self.failed(host, error)
                continue
            for warning in status.warnings if status else ():
                self._warn(f"{host.name}: {warning}")
            if status and status.shortage and not host.node.here:
                self.lose(host, status.shortage)
                continue
            host.level = host.level or level

    def failed(self, host: RemoteHost, error: Exception) -> None:
        """Handles what a call to a host raised: a UserError or RunError of this machine's own host ends the run."""
        if host.node.here and not isinstance(error, HostLost):
            raise error
        self.lose(host, str(error))

    def lose(self, host: RemoteHost, why: str, fresh: bool = False) -> None:
        """Ends a host, and starts another on its node, if it has not cost too many. fresh: its files are not to be trusted.

        Raises RunError if it was this machine's and cannot be replaced.
        """
        if self._hosts.get(host.node.id) is not host:  # another of its calls has failed before
            return
        host.actor.kill()
        del self._hosts[host.node.id]
        self._lost[host.node.id] = 1 if host.scored and not fresh else self._lost[host.node.id] + 1
        alive = {node.id for node in self._cluster.nodes()}
        if host.node.id not in alive:
            self._warn(f"{host.name} is lost, with its node")
        elif self._lost[host.node.id] < ATTEMPTS:
            self._warn(f"{host.name} is lost and started again: {why}")
            self._start(host.node, fresh)
        else:
            self._leave_out(host.node, f"{host.name} is lost and left out, after {ATTEMPTS} attempts: {why}")
        if host.node.here and host.node.id not in self._hosts:
            raise RunError(f"this machine's host is lost: {why}; no step is lost: add --resume")

    def statuses(self) -> list[tuple[RemoteHost, Status]]:
        """The last of each host."""
        return [(host, host.status) for host in self.ready if host.status]

    def close(self) -> None:
        """Ends all hosts. They leave their folders tidy, if that does not take long."""
        calls = [host.actor.watch("close") for host in self.opened]
        until = time.monotonic() + CLOSING_SECONDS
        for call in calls:
            with contextlib.suppress(Exception):
                call.result(max(0.0, until - time.monotonic()))
        for host in self._hosts.values():
            host.actor.kill()

    def _look_for_nodes(self) -> None:
        """Starts a host on each node that has none."""
        self._looked = time.monotonic()
        for node in self._cluster.nodes():
            if node.id not in self._hosts and node.id not in self._left_out:
                self._start(node)

    def _start(self, node: Node, fresh: bool = False) -> None:
        gpus = 1 if self._workers.device == "cuda" else 0
        if node.gpus < gpus:
            self._leave_out(node, f'host {node.name} is left out: workers.device = "cuda", and the cluster knows no GPU there')
            return
        actor = Actor(node, gpus, self._run_dir if node.here else None, fresh)
        self._hosts[node.id] = RemoteHost(node, actor, actor.call("open", self._setup))

    def _take_in(self) -> None:
        """Hosts that have opened get the records so far."""
        for host in [host for host in self._hosts.values() if not host.report]:
            if not Cluster.wait([host.opening], 0.0):
                continue
            try:
                report = host.opening.result()
                self._compare(host, report)
            except HostLost as error:
                self.lose(host, str(error))
                continue
            except (UserError, RunError) as error:
                if host.node.here:
                    raise
                host.actor.kill()
                del self._hosts[host.node.id]
                self._leave_out(host.node, f"{host.name} is left out: {error}")
                continue
            host.report = report
            host.send(self._records)

    def _compare(self, host: RemoteHost, report: Report) -> None:
        """Raises UserError if a host runs other code; warns if its scores may differ in the last bits."""
        own = Report.of_here()
        if report.versions["es_lite"] != own.versions["es_lite"]:
            theirs, ours = report.versions["es_lite"], own.versions["es_lite"]
            raise UserError(f"it has es_lite {theirs}, this machine {ours}; install the same version on both")
        other = [f"{name} {v} (here {own.versions[name]})" for name, v in report.versions.items() if v != own.versions[name]]
        if report.capability != own.capability and self._workers.device == "cpu":
            other.append(f"a CPU that computes with {report.capability} (here {own.capability})")
        if other:
            self._warn(
                f"{host.name} has {', '.join(other)}: who scores a member may change the last bits of its score; weights stay "
                "the same everywhere"
            )

    def _leave_out(self, node: Node, why: str) -> None:
        self._left_out.add(node.id)
        self._reasons.append(why)
        self._warn(why)
