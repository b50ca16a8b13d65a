"""A host as the coordinator sees it: what it was sent, what it is doing, how fast it has been."""

import time
from dataclasses import dataclass, field

from es_lite.algorithm.record import Record
from es_lite.hosts.cluster import Actor, Call, Cluster, HostLost, Node
from es_lite.hosts.host import Report, Status
from es_lite.hosts.sharing import Span, Work

STATUS_SECONDS = 1.0

SILENT_SECONDS = 60.0
"""A host that does not even say what it is doing is hung, or cut off. Its workers have a deadline of their own."""

NEW = 0.5
"""The weight of a new measurement of a host's speed."""


@dataclass(eq=False)
class Task:
    """Spans that a host was asked to score."""

    work: Work
    calls: list[tuple[Span, Call]]
    """Those that were not answered yet."""
    size: float
    """What is scored: members times tokens."""
    began: float
    expected_seconds: float
    """Infinite if nothing is known."""
    taken_over: bool = False
    """It was late, and others score it too."""

    @property
    def spans(self) -> list[Span]:
        return [span for span, _ in self.calls]

    @property
    def late_seconds(self) -> float:
        return time.monotonic() - self.began - self.expected_seconds


@dataclass(eq=False)
class RemoteHost:
    """One node's host, from the moment it is started."""

    node: Node
    actor: Actor
    opening: Call
    report: Report | None = None
    """When it has opened."""
    sent: int = -1
    """How many records it was sent; -1: it was not called yet. The first call makes its layers' files, even without records."""
    advancing: list[Call] = field(default_factory=list)
    level: bool = False
    """It has caught up once."""
    ready: bool = False
    """It gets work."""
    task: Task | None = None
    scored: bool = False
    """It has answered something."""
    speed: float = 0.0
    """Members times tokens per second; 0: not known yet."""
    traffic: int = 0
    """Bytes that have passed between it and the coordinator since that was last asked."""
    status: Status | None = None
    asked: Call | None = None
    """For its status."""
    asked_at: float = -STATUS_SECONDS

    @property
    def name(self) -> str:
        return f"host {self.node.name} ({self.node.id[:6]})"

    def send(self, records: list[Record]) -> None:
        """Sends those of all the run's records that it lacks; it applies them while the caller goes on."""
        if self.sent < len(records):
            self.advancing.append(self.actor.call("advance", records[max(0, self.sent) :]))
            self.sent = len(records)

    def settled(self) -> bool:
        """Whether all records that it was sent are applied. Raises as `Call.result`."""
        while self.advancing:
            if not Cluster.wait(self.advancing[:1], 0.0):
                return False
            call = self.advancing[0]
            call.result()
            self.traffic += call.traffic
            self.advancing.pop(0)
        return True

    def start(self, work: Work, spans: list[Span], speed: float | None) -> None:
        """Gives it spans to score. speed: what is expected, None if nothing is known."""
        size = 0.0
        calls = []
        for span in spans:
            perturbations, low, high = work.part(span)
            calls.append((span, self.actor.call("score", perturbations, work.items.number, low, high)))
            size += work.size(span)
        expected = size / speed if speed else float("inf")
        self.task = Task(work, calls, size, time.monotonic(), expected)

    def answered(self, call: Call) -> None:
        """One of its task's calls is done. Raises as `Call.result`."""
        assert self.task is not None
        span = next(span for span, other in self.task.calls if other is call)
        self.task.work.answered(span, call.result())
        self.traffic += call.traffic
        self.task.calls.remove((span, call))
        self.scored = True
        if not self.task.calls:
            speed = self.task.size / max(1e-6, time.monotonic() - self.task.began)
            self.speed = speed if not self.speed else self.speed + NEW * (speed - self.speed)
            self.task = None

    def look(self) -> Status | None:
        """Its status, if there is a new one; asks for the next from time to time. Raises HostLost."""
        if self.asked is None and time.monotonic() - self.asked_at > STATUS_SECONDS:
            self.asked, self.asked_at = self.actor.watch("status"), time.monotonic()
        if self.asked is None:
            return None
        if not Cluster.wait([self.asked], 0.0):
            if time.monotonic() - self.asked_at > SILENT_SECONDS:
                raise HostLost(f"it has said nothing for {SILENT_SECONDS:.0f} s")
            return None
        call, self.asked = self.asked, None
        self.status = call.result()
        self.traffic += call.traffic
        return self.status
