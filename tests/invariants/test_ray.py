"""A run on several hosts ends with the journal and the weights of the same run on one machine, whatever happens to hosts."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import Nodes, head, nodes
from support import (
    FITNESSES,
    ROOT,
    TINY,
    Live,
    assert_same_bits,
    assert_same_run,
    digest,
    finished_run,
    leftovers,
    metrics,
    records,
    replayed,
    start,
    tensors,
    train,
    write_recipe,
)

pytestmark = pytest.mark.slow


def on(address: str, folder: Path, *overrides: str) -> tuple[str, ...]:
    """What is set for a run on a cluster."""
    return (
        "workers.engine=ray",
        f"workers.address={address}",
        f"workers.host_dir={folder / 'hosts'}",
        "workers.count=1",
        *overrides,
    )


def layer_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("fitness", ["logprob", pytest.param("reward", marks=pytest.mark.long)])
def test_three_hosts(fitness: str, tmp_path: Path) -> None:
    tables = {"run": {"iterations": 6}, "es": {"population": 8}, "eval": {"every": 2, "samples": 4}}
    recipe = FITNESSES[fitness](tmp_path, **tables)
    reference, run = finished_run(recipe, tmp_path / "reference"), tmp_path / "run"
    with nodes(3) as cluster:
        finished = train(recipe, run, *on(cluster.address, tmp_path, "workers.hosts=3", "run.verify_every=2"))
    assert finished.code == 0, finished.err
    assert finished.err.count("warning") == 0, finished.err
    assert finished.out.count(" takes part: ") == 3
    assert_same_run(run, reference)
    others = sorted((tmp_path / "hosts").glob("run-*/*/master"))
    assert len(others) == 2
    assert all(layer_files(folder) == layer_files(run / "master") for folder in others)
    steps = [line for line in metrics(run) if line["step"]]
    assert all(0 < line["network_kib"] < 100 for line in steps)
    assert {line["workers"] for line in steps[2:]} == {3}


@pytest.mark.long
def test_hosts_come_and_go(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, run={"iterations": 5000}, es={"population": 8}, eval={"every": 50, "samples": 4})
    run = tmp_path / "run"
    with nodes(2) as cluster, start(recipe, run, *on(cluster.address, tmp_path, "run.verify_every=0")) as live:
        live.wait_for_records(5)
        (other,) = (host for host in cluster.hosts() if any("/hosts/run-" in file.path for file in host.open_files()))
        other.suspend()  # as if its network were gone
        live.wait_for_records(live.records() + 20)
        other.resume()
        for host in cluster.hosts():  # this machine's, too
            host.kill()
        waits_for(live, "is lost and started again", 2)
        waits_for(live, "takes part", 4)
        cluster.add()
        waits_for(live, "takes part", 5)
        cluster.kill(cluster.others[0])
        waits_for(live, "is lost, with its node", 1)
        assert_stops(live)
    steps = records(run)  # as many as the kills left time for
    assert digest(run) == digest(finished_run(recipe, tmp_path / "reference", f"run.iterations={steps}", seconds=900))


@pytest.mark.long
def test_a_node_is_killed_at_random_moments(tmp_path: Path) -> None:
    moments, kills = random.Random(3), 20
    recipe = write_recipe(tmp_path, run={"iterations": 5000}, es={"population": 8})
    run = tmp_path / "run"
    with nodes(3) as cluster, start(recipe, run, *on(cluster.address, tmp_path, "run.verify_every=25")) as live:
        live.wait_for_records(1)
        for kill in range(kills):
            time.sleep(moments.uniform(0, 3))
            lost = live.err.count("is lost")
            live.wait_until(lambda: bool(with_hosts(cluster)))
            cluster.kill(moments.choice(with_hosts(cluster)))
            waits_for(live, "is lost", lost + 1)
            cluster.add()
            if kill % 5 == 4:
                waits_for(live, "takes part", live.out.count("takes part") + 1)
        assert_stops(live)
    steps = records(run)  # as many as the kills left time for
    assert digest(run) == digest(finished_run(recipe, tmp_path / "reference", f"run.iterations={steps}", seconds=900))


@pytest.mark.long
def test_a_coordinator_that_was_killed_and_a_host_whose_weights_are_others(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, run={"iterations": 5000}, es={"population": 8}), tmp_path / "run"
    with nodes(2) as cluster:
        settings = on(cluster.address, tmp_path, "workers.hosts=2", "run.verify_every=5")
        with start(recipe, run, *settings) as live:
            live.wait_for_records(12)
            live.process.send_signal(signal.SIGKILL)
            live.process.wait()
        (folder,) = (tmp_path / "hosts").glob("run-*/0/master")
        other = finished_run(recipe, tmp_path / "other", "run.seed=1", f"run.iterations={records(run)}")
        shutil.copy(other / "master/block-001.safetensors", folder)  # another model's, and complete
        with start(recipe, run, *settings, resume=True) as live:
            waits_for(live, "of its weights differs from this machine's", 1)
            waits_for(live, "takes part", 2)
            live.wait_for_records(live.records() + 5)
            assert_stops(live)
    steps = records(run)
    assert layer_files(folder) == layer_files(run / "master")
    last = f"run.iterations={steps + 2}"
    resumed = train(recipe, run, last, resume=True)  # and goes on without Ray
    assert resumed.code == 0 and records(run) == steps + 2
    reference = finished_run(recipe, tmp_path / "reference", last, seconds=900)
    assert digest(run) == digest(reference) and leftovers(run) == []


@pytest.mark.long
def test_hosts_of_other_capability_score_in_their_own_way_and_have_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(TINY))
    relative = {"config": os.path.relpath(config, ROOT)}
    recipe = write_recipe(tmp_path, run={"iterations": 8}, es={"population": 8}, workers={"compute": "fp32"}, model=relative)
    monkeypatch.chdir(tmp_path)  # the nodes' working directory, which is not the command's
    with nodes(1) as cluster:
        cluster.add(ATEN_CPU_CAPABILITY="default")
        streamed = "memory.residency=streamed"
        finished = train(recipe, run, *on(cluster.address, tmp_path, "workers.hosts=2", "run.verify_every=1", streamed))
    assert finished.code == 0, finished.err
    assert "a CPU that computes with DEFAULT" in finished.err and "weights stay the same everywhere" in finished.err
    assert "differs from this machine's" not in finished.err
    monkeypatch.chdir(ROOT)
    assert_same_bits(replayed(run, tmp_path / "replayed"), tensors(run))


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_stopping_and_going_on(name: str, tmp_path: Path) -> None:
    """With a cluster that the command itself starts."""
    recipe = write_recipe(tmp_path, run={"iterations": 300}, es={"population": 8})
    reference, run = finished_run(recipe, tmp_path / "reference", "run.iterations=40"), tmp_path / "run"
    with start(recipe, run, "workers.engine=ray") as live:
        live.wait_for_records(3)
        number = signal.Signals[name]
        os.killpg(live.process.pid, number) if name == "SIGINT" else live.process.send_signal(number)  # as a terminal, as Docker
        stopped = live.finish()
    assert stopped.code == 0, stopped.err
    assert "add --resume to continue" in stopped.out and 3 <= records(run) < 40
    assert train(recipe, run, "workers.engine=ray", "run.iterations=40", resume=True).code == 0
    assert digest(run) == digest(reference)


@pytest.mark.long
def test_a_head_that_dies_ends_the_command_which_goes_on_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # whether or not there is a token in the home folder
    recipe, run = write_recipe(tmp_path, run={"iterations": 5000}, es={"population": 8}), tmp_path / "run"
    with contextlib.ExitStack() as power:
        address = power.enter_context(head())
        with start(recipe, run, *on(address, tmp_path)) as live:
            live.wait_for_records(5)
            power.close()
            ended = live.finish()
    assert ended.code == 1 and "--resume" in ended.err, ended
    last = f"run.iterations={records(run) + 3}"
    with head() as address:
        resumed = train(recipe, run, *on(address, tmp_path), last, resume=True)
    assert resumed.code == 0, resumed.err
    assert digest(run) == digest(finished_run(recipe, tmp_path / "reference", last))


def with_hosts(cluster: Nodes) -> list[Any]:
    """The nodes, without the first, on which a host was started."""
    return [node for node in cluster.others if cluster.hosts(node)]


def assert_stops(live: Live) -> None:
    live.process.send_signal(signal.SIGINT)
    assert live.finish().code == 0, live.err


def waits_for(live: Live, words: str, times: int) -> None:
    live.wait_until(lambda: (live.out + live.err).count(words) >= times)
