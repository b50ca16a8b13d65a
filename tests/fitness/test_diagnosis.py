"""Advice about σ: if rounding swallows it, and if the perturbed models collapse."""

import contextlib
import math
from pathlib import Path

import numpy as np
import plain
import psutil
import pytest
from architectures import config_of
from plain import EVERY_KIND

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.algorithm.noise.place import Place
from es_lite.fitness import diagnosis
from es_lite.fitness.diagnosis import collapse_advice, examined_rows, rounding_advice, share_moved
from es_lite.fitness.kinds import fitness_of
from es_lite.model.layout import Factors, Layout, Tensor, skeleton
from es_lite.model.random_weights import Random
from es_lite.weights import store
from es_lite.weights.layer_file import FileReader, LayerFile
from es_lite.weights.store import Store

LOGPROB = fitness_of("logprob")
GROUPS = (Factors("k_proj", 0, 0), Factors("norm", 0.5, 1))
SEED = 2**64 - 3


def files_of(folder: Path, storage: str) -> list[LayerFile]:
    """The files of a random model at step 0; its rows have 64 or 96 elements."""
    folder.mkdir()
    model = skeleton(config_of("qwen3", tied=False))
    layout = Layout.of(model, GROUPS)
    theta_0, files = Random(model, layout, 1, Threads(1)), Store(folder, layout, storage).files
    for file in files:
        store.advance_layer(file, lambda: theta_0, [], 0, None, Threads(1))
    return files


def by_hand(files: list[LayerFile], noise: NoiseKind, sigma: float, whole: bool = False) -> float:
    """The share of the examined elements, or of all, that change, in plain numpy; a tensor counts by its size."""
    moved, perturbed = 0.0, 0
    for file in files:
        with contextlib.closing(FileReader(file)) as reader:
            for tensor in file.layer.tensors:
                if "k_proj" in tensor.name:
                    continue
                groups = [(0, tensor.size)] if whole else examined_rows(tensor)
                chosen = np.concatenate([np.arange(start, start + count) for start, count in groups])
                weights = plain.bf16(reader.part(tensor, 0, tensor.size).float32()[chosen])
                scale = np.float32(sigma * (0.5 if "norm" in tensor.name else 1))
                epsilon = noise.epsilon(Place(SEED, 0, 0, tensor.number), tensor.shape, 0, tensor.size)[chosen]
                moved += tensor.size * float(np.mean(plain.bf16(plain.float32(weights) + scale * epsilon) != weights))
                perturbed += tensor.size
    return moved / perturbed


@EVERY_KIND
@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8"])
def test_the_share_moved_is_that_of_the_examined_rows_of_each_tensor(tmp_path, monkeypatch, storage, noise):
    """Whatever they are stored as; here only some rows of all matrices are examined."""
    monkeypatch.setattr(diagnosis, "ROWS", 3)
    monkeypatch.setattr(diagnosis, "ELEMENTS", 1)
    files = files_of(tmp_path / "weights", storage)
    for sigma in (1e-5, 3e-5, 1e-4):
        expected = by_hand(files, noise, sigma)
        assert 0.001 < expected < 0.999 and expected != by_hand(files, noise, sigma, whole=True)
        assert share_moved(files, noise, sigma, SEED) == pytest.approx(expected, rel=1e-12)


@EVERY_KIND
def test_the_share_of_the_examined_rows_is_about_that_of_all_elements(tmp_path, noise):
    """Also of one matrix alone, of low-rank noise, whose elements in a row have the row's factors in common."""
    config = config_of("qwen3", tied=True, vocab_size=1200, hidden_size=1024, num_hidden_layers=1)
    layout = Layout.of(skeleton(config))
    (tmp_path / "master").mkdir()
    files = Store(tmp_path / "master", layout, "fp32").files[:1]  # the embedding
    source = Random(skeleton(config), layout, 1, Threads(1))
    store.advance_layer(files[0], lambda: source, [], 0, None, Threads(1))
    for sigma in (2e-5, 5e-5, 1e-4):
        exact = by_hand(files, noise, sigma, whole=True)
        assert 0.1 < exact < 0.95
        assert abs(share_moved(files, noise, sigma, SEED) - exact) < 0.04


@pytest.mark.parametrize(
    ("shape", "each", "first", "last"),
    [
        ((1000, 40), 16, 0, 984),
        ((1000, 4000), 16, 0, 984),
        ((5000, 1), 512, 0, 4488),
        ((20, 50, 100), 16, 0, 984),
        ((129, 64), 16, 0, 113),
        ((128, 64), 128, 0, 0),
        ((7, 9), 7, 0, 0),
        ((100_000,), 1, 0, 0),
        ((), 1, 0, 0),
    ],
    ids=str,
)
def test_rows_are_examined_from_the_first_to_the_last_of_a_tensor(shape, each, first, last):
    """each, first, last: rows of a group, and the rows that the first and last group begin with."""
    tensor = Tensor("any", shape, 0, 1.0, 1.0, 1.0)
    groups = examined_rows(tensor)
    assert {count for _, count in groups} == {each * tensor.width}
    starts = [start for start, _ in groups]
    assert (starts[0], starts[-1]) == (first * tensor.width, last * tensor.width)
    assert all(start % tensor.width == 0 for start in starts)
    gaps = np.diff(starts)
    assert (gaps >= each * tensor.width).all() and (gaps.size == 0 or gaps.max() - gaps.min() <= tensor.width)


@pytest.mark.parametrize("noise", [gaussian, LowRank(1)], ids=["gaussian", "lowrank"])
def test_a_large_sigma_moves_everything_and_a_tiny_one_next_to_nothing(tmp_path, noise):
    files = files_of(tmp_path / "master", "fp32")
    shares = [share_moved(files, noise, sigma, SEED) for sigma in (1e-9, 1e-6, 1e-4, 1e-2, 10.0)]
    assert shares == sorted(shares)
    assert shares[0] < 1e-3 and shares[-1] > 0.99


def test_if_everything_is_frozen_nothing_moves(tmp_path):
    layout = Layout.of(model := skeleton(config_of("qwen3")), [Factors("", 0, 0)])
    files = Store(tmp_path, layout, "fp32").files
    for file in files:
        store.advance_layer(file, lambda: Random(model, layout, 1, Threads(1)), [], 0, None, Threads(1))
    assert share_moved(files, gaussian, 1.0, SEED) == 0


def test_reading_the_weights_leaves_no_file_open(tmp_path):
    share_moved(files_of(tmp_path / "master", "fp32"), gaussian, 1e-3, SEED)
    assert not [file for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))]


# What is said


def test_advice_if_most_perturbations_are_rounded_away():
    assert rounding_advice(0.5, 1e-3) is None
    assert rounding_advice(1.0, 1e-3) is None
    advice = rounding_advice(0.07, 1e-5)
    assert advice.startswith("es.sigma = 1e-05 is too small for bf16, in which only 7% of the perturbed weights would differ")
    assert "raise es.sigma" in advice and "lower" not in advice and 'workers.compute = "fp32"' in advice


def test_no_advice_if_members_score_about_as_the_unperturbed_model():
    for scores in ([-3.1, -3.2], [-3.5, -3.5], [-2.0, -2.0], [-3.2, np.nan]):
        assert collapse_advice(LOGPROB, -3.0, np.array(scores), 1e-3) is None


@pytest.mark.parametrize(
    ("scores", "lost"), [([-3.4, -3.8], "0.60"), ([-9.0, np.nan, -np.inf], "6.00"), ([np.nan, -np.inf], "inf")]
)
def test_advice_if_the_members_collapse(scores, lost):
    """Scores that are not finite are left out; if there is no other, everything is lost."""
    advice = collapse_advice(LOGPROB, -3.0, np.array(scores), 0.25)
    assert advice.startswith(
        f"es.sigma = 0.25 is too large: perturbed models score {lost} nats below the unperturbed one (-3.00)"
    )
    assert advice.endswith("until the difference is below 0.1")


def test_the_loss_that_is_tolerated_is_the_fitnesss():
    class Coarse(type(LOGPROB)):
        unit = "points"
        largest_loss = 5.0

    scores = np.array([-9.0, -7.5])
    assert collapse_advice(Coarse(), -4.0, scores, 0.25) is None
    advice = collapse_advice(Coarse(), -3.0, scores, 0.25)
    assert "score 5.25 points below" in advice and advice.endswith("below 1")


@pytest.mark.parametrize("centre", [math.nan, math.inf, -math.inf])
def test_advice_if_the_unperturbed_model_is_broken(centre):
    advice = collapse_advice(LOGPROB, centre, np.array([-3.0, -3.0]), 1e-3)
    assert "the unperturbed model's own score is not finite" in advice
