"""How long a step takes: from its work and the machine's rates, which are invented here, or measured without looking at them."""

from dataclasses import replace

import numpy as np
import pytest
from plain import EVERY_KIND

from es_lite.algorithm import formats
from es_lite.algorithm.noise import gaussian, rademacher
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.engine.base import Execution
from es_lite.planning import rates
from es_lite.planning.rates import Work, step_time

WORK = Work(
    flops=6e12,
    scoring_noise=4 * 10**9,
    update_noise=2 * 10**9,
    converted=8 * 10**9,
    size=10**9,
    pairs=4,
    rounded=0,
    redrawn=0,
    read_bytes=30 * 10**9,
    written_bytes=20 * 10**9,
    hidden=64,
    intermediate=128,
    rows=32,
)


def execution(workers: int = 1, threads: int = 1, direct: bool = False, compute: str = "fp32", device: str = "cpu") -> Execution:
    return Execution(
        streamed=direct,
        direct=direct,
        device=device,
        compute=compute,
        workers=workers,
        threads=threads,
        members=2,
        pass_samples=4,
        micro_batch=4,
        tile_members=1,
        prompt_members=1,
        kept=False,
        group=1,
    )


@pytest.fixture
def machine(monkeypatch):
    """Sets rates: 1 TFLOP/s a worker; for a thread, 1 G elements/s of noise (0.5 if rademacher), 2 ns per parameter to sum all
    pairs, and 8 G elements/s to convert; and a disk that must not be measured until it is set."""
    monkeypatch.setattr(rates, "scoring_rate", lambda work, execution, rank: 1e12)
    monkeypatch.setattr(rates, "noise_rate", lambda noise: 0.5e9 if noise is rademacher else 1e9)
    monkeypatch.setattr(rates, "sum_seconds", lambda noise, pairs: 2e-9)
    monkeypatch.setattr(rates, "conversion_rate", lambda: 8e9)
    monkeypatch.setattr(rates, "device_noise_rate", lambda noise, device: 16e9)
    monkeypatch.setattr(rates, "disk_rates", lambda folder: pytest.fail("the disk was measured"))

    def disk(read: float, write: float) -> None:
        monkeypatch.setattr(rates, "disk_rates", lambda folder: (read, write))

    return disk


@pytest.mark.parametrize(
    ("workers", "threads", "score", "update"),
    [(1, 1, 6 + 4 + 1, 2), (2, 1, 3 + 2 + 0.5, 1), (2, 4, 3 + 0.5 + 0.125, 0.25)],  # threads are in a worker's FLOP/s already
)
def test_computation_noise_and_conversion_are_divided_among_workers(machine, tmp_path, workers, threads, score, update):
    found = step_time(WORK, execution(workers, threads), gaussian, tmp_path)
    assert (found.score_seconds, found.update_seconds) == pytest.approx((score, update))
    assert found.step_seconds == pytest.approx(score + update)
    assert found.rates == "scoring 1000 GFLOP/s per worker, noise 1000 M elements/s per thread"


def test_a_kind_is_drawn_at_its_own_rate_and_weights_are_rounded_with_bits_drawn_for_gaussian_noise(machine, tmp_path):
    """The bits that round come from Philox, whatever the kind."""
    found = step_time(replace(WORK, rounded=3 * 10**9), execution(), rademacher, tmp_path)
    assert (found.score_seconds, found.update_seconds) == pytest.approx((6 + 8 + 1, 2 + 3))


def test_the_rank_and_the_pairs_are_measured(monkeypatch, machine, tmp_path):
    """Corrections take their share of a product's time; the sum's does not grow with the pairs alone."""
    monkeypatch.setattr(rates, "scoring_rate", lambda work, execution, rank: 1e12 / rank)
    monkeypatch.setattr(rates, "sum_seconds", lambda noise, pairs: 1e-9 * pairs * noise.RANK)
    found = step_time(WORK, execution(), LowRank(3), tmp_path)
    assert (found.score_seconds, found.update_seconds) == pytest.approx((18 + 4 + 1, 12))


def test_a_device_draws_the_noise_of_scoring_at_a_rate_of_its_own(machine, tmp_path):
    found = step_time(WORK, execution(threads=2, device="torch"), gaussian, tmp_path)
    assert (found.score_seconds, found.update_seconds) == pytest.approx((6 + 0.25 + 0.5, 1))
    assert found.rates.endswith("noise 1000 M elements/s per thread and 16000 on the device")


def test_transfers_past_the_page_cache_happen_during_the_computation(machine, tmp_path):
    machine(30e9, 20e9)
    fast = step_time(WORK, execution(direct=True), gaussian, tmp_path)
    assert (fast.score_seconds, fast.update_seconds) == pytest.approx((11, 2))
    machine(1e9, 2e9)
    slow = step_time(WORK, execution(direct=True), gaussian, tmp_path)
    assert slow.step_seconds == pytest.approx(30 + 10)  # the disk alone
    assert slow.update_seconds == pytest.approx(2)
    assert "disk 1.0 GB/s read, 2.0 written: 40 s for transfers, 13 s for computation, at the same time" in slow.rates


@pytest.fixture
def products(monkeypatch) -> list[tuple]:
    """The shapes of what was multiplied."""
    found = []
    linear = rates.functional.linear
    monkeypatch.setattr(rates.functional, "linear", lambda a, b: found.append((tuple(a.shape), tuple(b.shape))) or linear(a, b))
    return found


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_machine_is_measured_at_the_models_own_width(products, compute, rank):
    assert rates.scoring_rate(WORK, execution(compute=compute), rank) > 0
    assert set(products) == {((32, 64), (128, 64)), ((32, 128), (64, 128))}


@pytest.mark.parametrize("rank", [0, 3])
def test_corrections_are_measured_if_the_noise_has_a_rank(monkeypatch, products, rank):
    """Of each of the three products, at its own shape; they are not counted as FLOP."""
    shapes = []
    add = rates.LowRankFactors.add

    def counted(self, y, projected, members, threads):
        shapes.append((tuple(self.right.shape), tuple(self.left.shape), tuple(projected.shape)))
        add(self, y, projected, members, threads)

    monkeypatch.setattr(rates.LowRankFactors, "add", counted)
    monkeypatch.setattr(rates, "_fastest", lambda work: work() or 2.0)
    assert rates.scoring_rate(WORK, execution(), rank) == 6 * 32 * 64 * 128 / 2
    wide, narrow = ((1, 64, 3), (1, 3, 128), (32, 3)), ((1, 128, 3), (1, 3, 64), (32, 3))
    assert shapes == ([wide, wide, narrow] if rank else [])
    assert len(products) == 3


def test_a_huge_model_is_measured_by_a_part_of_its_width(products):
    huge = replace(WORK, hidden=8192, intermediate=25600, rows=4096)
    assert rates.scoring_rate(huge, execution(), 0) > 0
    assert {rows for (rows, _), _ in products} == {rates.ROWS}
    assert max(height * width for _, (height, width) in products) <= rates.MATRIX


@pytest.fixture
def once(monkeypatch) -> None:
    """Everything is done once, and takes two seconds."""
    monkeypatch.setattr(rates, "_fastest", lambda work: [work()] and 2.0)


def results_of(monkeypatch, owner: object, name: str) -> list[tuple]:
    """(arguments, result) of each call of a function, which is done."""
    calls: list[tuple] = []
    function = getattr(owner, name)

    def noted(*args, **keys):
        calls.append((args, function(*args, **keys)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, noted)
    return calls


@pytest.mark.parametrize("noise", [gaussian, rademacher])
def test_the_rate_of_noise_that_is_drawn_in_full_counts_elements(once, monkeypatch, noise):
    perturbed, drawn = results_of(monkeypatch, noise, "perturb"), results_of(monkeypatch, noise, "epsilon_on_device")
    found, there = rates.noise_rate(noise), rates.device_noise_rate(noise, "torch")
    (out, minus, *_), _ = perturbed.pop()
    assert minus is None and found == out.size / 2
    assert there == drawn.pop()[1].numel() / 2


@pytest.mark.parametrize("rank", [1, 4])
def test_the_rate_of_low_rank_noise_counts_the_numbers_in_its_factors(once, monkeypatch, rank):
    here, there = results_of(monkeypatch, LowRank, "factors"), results_of(monkeypatch, LowRank, "factors_on_device")
    assert rates.noise_rate(LowRank(rank)) == sum(factor.size for factor in here.pop()[1]) / 2
    assert rates.device_noise_rate(LowRank(rank), "torch") == sum(factor.numel() for factor in there.pop()[1]) / 2


@EVERY_KIND
def test_the_seconds_of_a_sum_are_those_of_a_parameter_for_all_pairs(once, noise, monkeypatch):
    """At most eight pairs are summed to measure; others take as long."""
    sums = results_of(monkeypatch, LowRank if isinstance(noise, LowRank) else noise, "weighted_sum")
    for pairs in (1, 4, 8, 20):
        seconds = rates.sum_seconds(noise, pairs)
        out, _, numbers, _, shape = sums.pop()[0][-5:]
        assert numbers.tolist() == list(range(min(pairs, 8)))
        assert seconds == pytest.approx(2 / out.size * pairs / numbers.size)
        assert out.size == noise.block(shape) and out.any()


def test_conversion_is_measured_from_int8_to_bfloat16(once, monkeypatch):
    found = []
    monkeypatch.setattr(formats, "dequantise", lambda out, stored, **_: found.append((out.dtype, stored.dtype, out.size)))
    assert rates.conversion_rate() == found[0][2] / 2
    assert found == [(np.uint16, np.int8, found[0][2])]


@EVERY_KIND
def test_every_kind_can_be_measured(noise):
    assert rates.noise_rate(noise) > 0 and rates.device_noise_rate(noise, "torch") > 0
    assert rates.sum_seconds(noise, 3) > 0 and rates.conversion_rate() > 0


@pytest.mark.parametrize("folder", ["", "runs/not/there/yet"])
def test_the_disk_is_measured_where_the_run_will_be_and_nothing_is_left(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(rates, "DISK_BYTES", 2**25)
    assert min(rates.disk_rates(tmp_path / folder)) > 0
    assert list(tmp_path.iterdir()) == []
