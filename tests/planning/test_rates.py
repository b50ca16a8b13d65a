"""How long a step takes: from its work and the machine's rates, which are invented here, or measured without looking at them."""

import pytest

from es_lite.engine.base import Execution
from es_lite.planning import rates
from es_lite.planning.rates import Work, estimate

WORK = Work(
    flops=6e12,
    scoring_noise=4 * 10**9,
    update_noise=2 * 10**9,
    read_bytes=30 * 10**9,
    written_bytes=20 * 10**9,
    hidden=64,
    intermediate=128,
    rows=32,
)


def execution(workers: int = 1, threads: int = 1, direct: bool = False, compute: str = "fp32") -> Execution:
    return Execution(
        streamed=direct,
        direct=direct,
        device="cpu",
        compute=compute,
        workers=workers,
        threads=threads,
        members=2,
        pass_samples=4,
        micro_batch=4,
    )


@pytest.fixture
def machine(monkeypatch):
    """Sets the rates: 1 TFLOP/s a worker, 1 G elements/s a thread, and a disk that must not be measured until it is set."""
    monkeypatch.setattr(rates, "scoring_rate", lambda work, execution: 1e12)
    monkeypatch.setattr(rates, "noise_rate", lambda noise: 1e9)
    monkeypatch.setattr(rates, "disk_rates", lambda folder: pytest.fail("the disk was measured"))

    def disk(read: float, write: float) -> None:
        monkeypatch.setattr(rates, "disk_rates", lambda folder: (read, write))

    return disk


@pytest.mark.parametrize(
    ("workers", "threads", "score", "update"),
    [(1, 1, 6 + 4, 2), (2, 1, 3 + 2, 1), (2, 4, 3 + 0.5, 0.25)],  # threads are in a worker's FLOP/s already
)
def test_computation_and_noise_are_divided_among_workers(machine, tmp_path, workers, threads, score, update):
    found = estimate(WORK, execution(workers, threads), "gaussian", tmp_path)
    assert (found.score_seconds, found.update_seconds) == pytest.approx((score, update))
    assert found.step_seconds == pytest.approx(score + update)
    assert found.rates == "scoring 1000 GFLOP/s per worker, noise 1000 M elements/s per thread"


def test_transfers_past_the_page_cache_happen_during_the_computation(machine, tmp_path):
    machine(30e9, 20e9)
    fast = estimate(WORK, execution(direct=True), "gaussian", tmp_path)
    assert (fast.score_seconds, fast.update_seconds) == pytest.approx((10, 2))
    machine(1e9, 2e9)
    slow = estimate(WORK, execution(direct=True), "gaussian", tmp_path)
    assert slow.step_seconds == pytest.approx(30 + 10)  # the disk alone
    assert slow.update_seconds == pytest.approx(2)
    assert "disk 1.0 GB/s read, 2.0 written: 40 s for transfers, 12 s for computation, at the same time" in slow.rates


def test_the_machine_is_measured_at_the_models_own_width(monkeypatch):
    shapes = []
    linear = rates.functional.linear
    monkeypatch.setattr(rates.functional, "linear", lambda a, b: shapes.append((tuple(a.shape), tuple(b.shape))) or linear(a, b))
    for compute in ("fp32", "bf16"):
        assert rates.scoring_rate(WORK, execution(compute=compute)) > 0
    assert set(shapes) == {((32, 64), (128, 64)), ((32, 128), (64, 128))}


def test_a_huge_model_is_measured_by_a_part_of_its_width(monkeypatch):
    largest = []
    linear = rates.functional.linear
    monkeypatch.setattr(rates.functional, "linear", lambda a, b: largest.append((len(a), b.numel())) or linear(a, b))
    huge = Work(**(vars(WORK) | {"hidden": 8192, "intermediate": 25600, "rows": 4096}))
    assert rates.scoring_rate(huge, execution()) > 0
    assert {rows for rows, _ in largest} == {rates.ROWS} and max(size for _, size in largest) <= rates.MATRIX


def test_noise_is_measured():
    assert rates.noise_rate("gaussian") > 0


@pytest.mark.parametrize("folder", ["", "runs/not/there/yet"])
def test_the_disk_is_measured_where_the_run_will_be_and_nothing_is_left(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(rates, "DISK_BYTES", 2**25)
    assert min(rates.disk_rates(tmp_path / folder)) > 0
    assert list(tmp_path.iterdir()) == []
