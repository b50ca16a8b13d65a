"""Hosts that are lost: each once, however many calls to it fail; and who takes over what a lost one had."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from es_lite.hosts.cluster import HostLost, Node
from es_lite.hosts.engine import RayEngine
from es_lite.hosts.membership import Hosts
from es_lite.hosts.sharing import Span, Work
from es_lite.scoring.perturbation import Perturbation

NODE = Node("n", "far", 2, 0, here=False)


def test_a_host_of_which_several_calls_fail_is_lost_once() -> None:
    warnings: list[str] = []
    cluster = SimpleNamespace(nodes=lambda: [NODE], share=lambda setup: setup)
    hosts = Hosts(cluster, SimpleNamespace(recipe=SimpleNamespace(workers=None)), None, warnings.append, None)  # type: ignore[arg-type]
    started: list[Any] = []

    def host() -> Any:
        actor = SimpleNamespace(killed=0)
        actor.kill = lambda: setattr(actor, "killed", actor.killed + 1)
        return SimpleNamespace(node=NODE, actor=actor, name="far", scored=False, ready=True, report=None)

    def start(node: Node, fresh: bool) -> None:
        hosts._hosts[node.id] = host()
        started.append(hosts._hosts[node.id])

    hosts._start = start  # type: ignore[method-assign]
    first = hosts._hosts["n"] = host()
    for _ in range(3):  # it had three spans
        hosts.failed(first, HostLost("it died"))
    assert warnings == ["far is lost and started again: it died"]
    assert first.actor.killed == 1 and len(started) == 1 and started[0].actor.killed == 0


def test_what_a_late_host_has_is_handed_out_again_if_the_one_that_took_it_over_is_lost() -> None:
    work = Work([Perturbation(pair=pair, sigma=0.1, signs=(1, -1)) for pair in range(4)], [0, 1], micro_batch=1)  # type: ignore[arg-type]
    late = SimpleNamespace(work=work, spans=[Span(0, 2)], taken_over=True)
    busy = SimpleNamespace(work=work, spans=[Span(2, 4)], taken_over=False)
    given: list[list[Span]] = []
    idle = SimpleNamespace(task=None, speed=1.0, node=NODE, start=lambda work, spans, speed: given.append(spans))
    others = [SimpleNamespace(task=task, speed=1.0, node=NODE) for task in (late, busy)]
    engine = SimpleNamespace(_hosts=SimpleNamespace(ready=[idle, *others]))
    RayEngine._hand_out(engine, work, [Span(0, 4)])  # type: ignore[arg-type]
    assert given == [[Span(0, 2)]]
