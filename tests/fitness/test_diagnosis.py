"""Advice about σ: if rounding swallows it, and if the perturbed models collapse."""

import math
from pathlib import Path

import numpy as np
import plain
import psutil
import pytest
from architectures import config_of

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.kinds import kind_of
from es_lite.algorithm.noise.place import Place
from es_lite.fitness import diagnosis
from es_lite.fitness.diagnosis import collapse_advice, rounding_advice, share_moved
from es_lite.fitness.kinds import fitness_of
from es_lite.model.layout import Factors, Layout, skeleton
from es_lite.model.source import Random
from es_lite.weights import store
from es_lite.weights.layer_file import FileReader, LayerFile
from es_lite.weights.store import Store

GAUSSIAN = kind_of("gaussian")
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


def by_hand(files: list[LayerFile], sigma: float, sampled: int) -> float:
    """The share of the sampled elements that change, in plain numpy; a tensor counts by its size."""
    moved, perturbed = 0.0, 0
    for file in files:
        reader = FileReader(file)
        for tensor in file.layer.tensors:
            if "k_proj" in tensor.name:
                continue
            values = reader.part(tensor, 0, tensor.size).float32()[:sampled]
            weights = plain.bf16(values.copy())
            scale = np.float32(sigma * (0.5 if "norm" in tensor.name else 1))
            epsilon = gaussian.epsilon(Place(SEED, 0, 0, tensor.number), 0, weights.size)
            moved += tensor.size * float(np.mean(plain.bf16(plain.float32(weights) + scale * epsilon) != weights))
            perturbed += tensor.size
        reader.close()
    return moved / perturbed


@pytest.mark.parametrize("sampled", [50, 1000, 4096], ids=["less than a row", "not whole rows", "as it is"])
@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8"])
def test_the_share_moved_is_that_of_the_first_elements_of_each_tensor(tmp_path, monkeypatch, storage, sampled):
    """Whatever they are stored as, and wherever in a row the first elements end."""
    monkeypatch.setattr(diagnosis, "SAMPLED", sampled)
    files = files_of(tmp_path / "weights", storage)
    for sigma in (1e-5, 1e-4, 1e-3):
        expected = by_hand(files, sigma, sampled)
        assert 0.001 < expected < 0.999
        assert share_moved(files, GAUSSIAN, sigma, SEED) == pytest.approx(expected, rel=1e-12)


def test_a_large_sigma_moves_everything_and_a_tiny_one_next_to_nothing(tmp_path):
    files = files_of(tmp_path / "master", "fp32")
    shares = [share_moved(files, GAUSSIAN, sigma, SEED) for sigma in (1e-9, 1e-6, 1e-4, 1e-2, 10.0)]
    assert shares == sorted(shares)
    assert shares[0] < 1e-3 and shares[-1] > 0.99


def test_if_everything_is_frozen_nothing_moves(tmp_path):
    layout = Layout.of(model := skeleton(config_of("qwen3")), [Factors("", 0, 0)])
    files = Store(tmp_path, layout, "fp32").files
    for file in files:
        store.advance_layer(file, lambda: Random(model, layout, 1, Threads(1)), [], 0, None, Threads(1))
    assert share_moved(files, GAUSSIAN, 1.0, SEED) == 0


def test_reading_the_weights_leaves_no_file_open(tmp_path):
    share_moved(files_of(tmp_path / "master", "fp32"), GAUSSIAN, 1e-3, SEED)
    assert not [file for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))]


# What is said


def test_advice_if_most_perturbations_are_rounded_away():
    assert rounding_advice(0.5, 1e-3) is None
    assert rounding_advice(1.0, 1e-3) is None
    advice = rounding_advice(0.07, 1e-5)
    assert advice.startswith("es.sigma = 1e-05 changes only 7% of the bf16 weights")
    assert "raise es.sigma" in advice and 'workers.compute = "fp32"' in advice


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
