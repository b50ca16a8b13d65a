"""The engine of several machines: hosts on Ray, each with a whole `LocalEngine`.

A step sends perturbations and the number of its items to hosts, gets scores back, and sends one record to all. The faster a host
has been, the more it scores; what a late or lost host was to score, others score. A host joins at any time: it catches up from
the journal. The coordinator's machine always has a host, on the run directory's own files.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from es_lite import system
from es_lite.algorithm.record import Record
from es_lite.engine.base import Progress
from es_lite.errors import RunError, UserError
from es_lite.fitness.base import Items
from es_lite.hosts.cluster import Cluster, HostLost
from es_lite.hosts.host import HostSetup
from es_lite.hosts.membership import TICK_SECONDS, Hosts
from es_lite.hosts.remote_host import RemoteHost
from es_lite.hosts.sharing import Span, Work, divide, spans_of
from es_lite.scoring.perturbation import Perturbation

LATE_SHARE, LATE_SECONDS = 0.5, 2.0
"""A host is late if it takes longer than expected by this share, and by these seconds: idle hosts then score its part too."""

CATCHING_UP, CATCHING_UP_SECONDS = 1.0, 30.0
"""At first, other hosts may take so many times as long again as this machine's, and so many seconds, to catch up."""


class RayEngine:
    """See `Engine`."""

    def __init__(
        self, setup: HostSetup, micro_batch: int, run_dir: Path, warn: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        """micro_batch: see `Execution`. warn: called for each host that is lost or left out; say: for each that takes part.

        Raises UserError if there is no cluster, if fewer than workers.hosts hosts can take part, or if this machine cannot.
        """
        workers = setup.recipe.workers
        self._micro_batch = micro_batch
        self._store = run_dir / setup.recipe.memory.folder
        self._verify_every = setup.recipe.run.verify_every
        self._step = 0
        with ExitStack() as opened:
            self._cluster = opened.enter_context(Cluster(workers.address))
            self._hosts = Hosts(self._cluster, setup, run_dir, warn, say)
            opened.callback(self._hosts.close)
            self._hosts.wait_for(workers.hosts)
            self._opened = opened.pop_all()

    @property
    def workers(self) -> int:
        return sum(status.workers for _, status in self._hosts.statuses())

    @property
    def shortage(self) -> str:
        return next((status.shortage for host, status in self._hosts.statuses() if host.node.here), "")

    def score(self, perturbations: Sequence[Perturbation], items: Items, progress: Progress) -> np.ndarray:
        work = Work(perturbations, items, self._micro_batch)
        whole = Span(0, work.grains)
        self._admit()
        while missing := work.missing([whole]):
            self._hosts.tend()
            if self._hosts.here in self._hosts.waiting:  # it was started again; others wait for the next step
                self._hosts.admit(self._hosts.here)
            self._hand_out(work, missing)
            self._collect(work)
            progress(self._done(work))
        return work.values()

    def advance(self, records: Sequence[Record], progress: Progress) -> None:
        """Waits for this machine's host alone; the others apply records before they take their next work. The first time, those
        that begin with it are waited for, if they are not much slower."""
        self._hosts.send(records)
        self._step += len(records)
        began, first = time.monotonic(), not self._hosts.ready
        while not (here := self._hosts.here).level or here.advancing:
            self._hosts.tend()
            progress(here.status.share if here.status else 0.0)
            if here.advancing:
                Cluster.wait(here.advancing[-1:], TICK_SECONDS)
            elif not here.level:  # it is being started again
                time.sleep(TICK_SECONDS)
        until = time.monotonic() + CATCHING_UP * (time.monotonic() - began) + CATCHING_UP_SECONDS
        while first and len(self._hosts.waiting) < len(self._hosts.opened) and time.monotonic() < until:
            self._hosts.tend()
            time.sleep(TICK_SECONDS)
        if self._verify_every and not first and self._step % self._verify_every == 0:
            self._verified(self._hosts.ready)

    def check(self, progress: Progress) -> None:
        """This machine's; other hosts have done so when they opened."""
        try:
            self._hosts.here.actor.call("check").result()
        except HostLost as error:
            raise RunError(f"this machine's host is lost: {error}; no step is lost: add --resume") from None

    def memory(self) -> tuple[int, int]:
        """Of the machine on which it is most."""
        own = system.pss_bytes(self._cluster.pids())
        sizes = [(status.pss, status.peak_pss, host.node.here) for host, status in self._hosts.statuses()]
        return max(((now + own * here, peak + own * here) for now, peak, here in sizes), default=(own, own))

    def traffic(self) -> tuple[int, int]:
        """Of all hosts, as they have last said."""
        found = [status for _, status in self._hosts.statuses()]
        return sum(status.read for status in found), sum(status.written for status in found)

    def network(self) -> int:
        hosts = self._hosts.ready
        most = max((host.traffic for host in hosts), default=0)
        for host in hosts:
            host.traffic = 0
        return most

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _admit(self) -> None:
        """Those that have caught up get work, if their weights are this machine's."""
        if waiting := self._hosts.waiting:
            for host in self._verified(waiting) if self._verify_every else waiting:
                self._hosts.admit(host)

    def _hand_out(self, work: Work, missing: Sequence[Span]) -> None:
        """Gives idle hosts what nobody scores yet or, if there is nothing, what a late host scores."""
        idle = [host for host in self._hosts.ready if not host.task]
        tasks = [host.task for host in self._hosts.ready if host.task and host.task.work is work]
        taken = {grain for task in tasks if not task.taken_over for span in task.spans for grain in span.grains}
        spans = spans_of(grain for span in missing for grain in span.grains if grain not in taken)
        if idle and not spans:
            late = [task for task in tasks if not task.taken_over and task.late_seconds > _allowance(task.expected_seconds)]
            if late:
                latest = max(late, key=lambda task: task.late_seconds)
                latest.taken_over = True
                spans = work.missing(latest.spans)
        if not idle or not spans:
            return
        known = [host.speed / host.node.cores for host in self._hosts.ready if host.speed]
        of_a_core = sum(known) / len(known) if known else 1.0
        speeds = [host.speed or of_a_core * host.node.cores for host in idle]
        for host, part, speed in zip(idle, divide(spans, speeds), speeds, strict=True):
            if part:
                host.start(work, part, speed if known else None)

    def _collect(self, work: Work) -> None:
        """Takes the answers that are there; waits a little for the first."""
        calls = {call: host for host in self._hosts.ready if host.task for _, call in host.task.calls}
        if not calls:
            time.sleep(TICK_SECONDS)
            return
        for call in Cluster.wait(list(calls), TICK_SECONDS):
            host = calls[call]
            try:
                if host.task:
                    host.answered(call)
            except (HostLost, UserError, RunError) as error:
                self._hosts.failed(host, error)

    def _done(self, work: Work) -> float:
        """The share of the work that is done, with what hosts say of theirs."""
        under_way = 0.0
        for host in self._hosts.ready:
            if host.task and host.task.work is work and host.status:
                under_way += host.status.share * sum(map(len, host.task.spans))
        return min(1.0, (work.done + under_way) / work.grains)

    def _verified(self, hosts: Sequence[RemoteHost]) -> list[RemoteHost]:
        """Those whose weights are this machine's; the others start anew.

        Raises RunError if it is this machine's weights that differ from those of most.
        """
        asked = {host.actor.call("checksums"): host for host in {*hosts, self._hosts.here}}
        found: dict[RemoteHost, tuple[str, ...]] = {}
        while calls := [call for call, host in asked.items() if host in self._hosts.opened and host not in found]:
            self._hosts.tend()
            for call in Cluster.wait(calls, TICK_SECONDS):
                try:
                    found[asked[call]] = tuple(call.result())
                except (HostLost, UserError, RunError) as error:
                    self._hosts.failed(asked[call], error)
        here = found.get(self._hosts.here)
        if here is None:  # it was lost meanwhile
            return []
        counts = Counter(found.values())
        most = max(counts.values())
        if most > counts[here]:
            raise RunError(
                f"step {self._step}: the weights of this machine are not those of {most} other hosts, so its memory or its disk "
                f"may be faulty; remove {self._store} and add --resume, which makes it again from θ₀ and the journal"
            )
        for host, checksums in found.items():
            if checksums != here:
                layer = next(i for i, pair in enumerate(zip(checksums, here, strict=True)) if pair[0] != pair[1])
                why = f"at step {self._step}, layer {layer} of its weights differs from this machine's"
                self._hosts.lose(host, why, fresh=True)
        return [host for host in hosts if found.get(host) == here]


def _allowance(expected_seconds: float) -> float:
    return max(LATE_SECONDS, LATE_SHARE * expected_seconds)
