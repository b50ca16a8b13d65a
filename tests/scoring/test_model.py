"""Scores of the perturbed model against Hugging Face's own forward of a model whose weights were perturbed in numpy."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, BOTH, COMMON, PLUS, Tiny, batch_of, close, config_of, of_kind
from plain import EVERY_KIND, KINDS
from transformers import AutoConfig

from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.model.layout import Factors
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation


@pytest.fixture(scope="module")
def qwen3() -> Tiny:
    return Tiny(config_of("qwen3"))


# Against Hugging Face


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_perturbed_model_scores_as_hugging_face_does_with_perturbed_weights(name, tied):
    tiny, batch = Tiny(config_of(name, tied)), batch_of()
    found = tiny.score(BOTH, batch)
    assert close(found, tiny.expected(BOTH, batch))
    unperturbed = tiny.score(UNPERTURBED, batch)
    assert close(unperturbed, tiny.expected(UNPERTURBED, batch))
    assert np.abs(found - unperturbed).max(axis=1).min() > 1e-2, "a perturbation this small would prove nothing"


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "phi", "mixtral"])
@EVERY_KIND
def test_every_kind_of_noise(name, noise):
    tiny, batch, both = Tiny(config_of(name)), batch_of(), of_kind(BOTH, noise)
    found = tiny.score(both, batch)
    assert close(found, tiny.expected(both, batch))
    assert np.abs(found - tiny.score(UNPERTURBED, batch)).max(axis=1).min() > 1e-2


TILES = {
    True: [((1,), 1, 2, 3), ((1, -1), 4, 3, 1), ((-1,), 4, 1, 3)],
    False: [((1, -1), 1, 3, 1), ((1, -1), 2, 2, 3), ((1,), 20, 2, 1)],
}
"""If tied and if not: the signs of each perturbation, the members of a tile, the samples of a micro-batch, and the rank."""


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_members_that_share_tiles_score_as_hugging_face_does_with_perturbed_weights(name, tied):
    """Several perturbations and θ in one call; the last tile has fewer members than the others."""
    tiny, batch = Tiny(config_of(name, tied)), batch_of([12, 9, 2])
    for signs, tile_members, micro_batch, rank in TILES[tied]:
        theta = of_kind(UNPERTURBED, LowRank(rank))
        pairs = [replace(of_kind(BOTH, LowRank(rank)), pair=pair, signs=signs) for pair in range(3)]
        model = tiny.model(micro_batch=micro_batch, tile_members=tile_members)
        found = model.log_probabilities([*pairs, theta], batch, micro_batch * -(-3 // micro_batch))
        expected = np.concatenate([tiny.expected(perturbation, batch) for perturbation in [*pairs, UNPERTURBED]])
        assert close(found, expected), (signs, tile_members, micro_batch, rank)


def test_perturbations_of_different_signs_and_kinds_in_one_call(qwen3):
    """They share no tile, and each has its own σ."""
    batch, low = batch_of(), of_kind(BOTH, LowRank(2))
    perturbations = [
        *(replace(low, pair=pair) for pair in range(3)),
        *(replace(low, pair=pair, sigma=0.02, signs=(-1,)) for pair in range(2)),
        replace(low, rank=1, signs=(-1,)),
        *(of_kind(PLUS, noise) for noise in KINDS.values()),
    ]
    found = qwen3.model(tile_members=4).log_probabilities(perturbations, batch, 6)
    assert close(found, np.concatenate([qwen3.expected(perturbation, batch) for perturbation in perturbations]))


@pytest.mark.parametrize("name", ["qwen3-sliding", "gemma2", "gemma3", "llama"])
def test_eager_attention(name):
    """Its masks are tensors, and Gemma 2 caps its attention only there."""
    tiny, batch = Tiny(config_of(name, attention="eager")), batch_of()
    assert close(tiny.score(BOTH, batch), tiny.expected(BOTH, batch))


def test_the_window_of_gemma3_matters():
    """Otherwise the comparison with Hugging Face would not show whether it is applied."""
    batch = batch_of()
    near, far = (Tiny(config_of("gemma3", sliding_window=window)).score(PLUS, batch) for window in (5, 50))
    assert np.abs(near - far)[0, :4].min() > 1e-4
    assert np.abs(near - far)[0, 4:].max() < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma3", "mpt"])
@pytest.mark.parametrize("perturbation", [PLUS, BOTH], ids=["one", "two"])
@pytest.mark.parametrize("lengths", [[2], [5], [4, 4], [4, 2], [5, 3], [8, 8, 3, 2], [3, 3, 2], [6] * 3])
def test_batches_of_every_shape(name, perturbation, lengths):
    """Some have as many samples as tokens, heads or members, so that one dimension could be taken for another."""
    tiny, batch = Tiny(config_of(name)), batch_of(lengths)
    for own in (perturbation, of_kind(perturbation, LowRank(1))):
        expected = tiny.expected(own, batch)
        for micro_batch in {1, 2, len(lengths)}:
            assert close(tiny.score(own, batch, micro_batch=micro_batch, tile_members=2), expected)


# bfloat16


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "gemma3", "gpt2"])
def test_scores_in_bf16_are_close_to_those_of_the_same_weights_in_float32(name):
    """The weights are rounded to bfloat16 in both, so what differs is the rounding of activations and logits, by 2^-9 of their
    size each time. Logits are about 3 here, and some twenty roundings add up: √20 · 3 · 2^-9 = 0.026 per token, less in the
    mean of a longer sample."""
    tiny, batch = Tiny(config_of(name)), batch_of()
    found = tiny.score(BOTH, batch, torch.bfloat16)
    for member, sign in enumerate(BOTH.signs):
        rounded = {name: weight.bfloat16().float() for name, weight in tiny.perturbed(BOTH, sign).items()}
        errors = np.abs(found[member] - tiny.hugging_face(rounded, batch))
        assert errors.max() < 0.05
        assert errors.mean() < 0.015
    assert np.abs(found - tiny.score(UNPERTURBED, batch, torch.bfloat16)).mean() > 0.05


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("rank", [1, 3])
def test_scores_of_low_rank_noise_in_bf16_are_close_to_those_in_float32(name, rank):
    """Matrices are not rounded, but products and their corrections are: as many roundings again as in the test above."""
    tiny, batch, both = Tiny(config_of(name)), batch_of(), of_kind(BOTH, LowRank(rank))
    for tile_members in (1, 2):
        found = tiny.score(both, batch, torch.bfloat16, tile_members=tile_members)
        errors = np.abs(found - tiny.expected(both, batch))
        assert errors.max() < 0.05
        assert errors.mean() < 0.015
        assert np.abs(found - tiny.score(UNPERTURBED, batch, torch.bfloat16)).mean() > 0.05


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2", "gemma3", "gpt2"])
def test_scores_in_bf16_are_hugging_faces_in_bf16(name):
    """One sample at a time, the operations are the same; only the log-softmax differs, float32 here and float64 there."""
    tiny, batch = Tiny(config_of(name)), batch_of()
    assert close(tiny.score(BOTH, batch, torch.bfloat16, micro_batch=1), tiny.expected(BOTH, batch, torch.bfloat16))


# What does not change a score


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("micro_batch", [1, 3, 6])
def test_micro_batches_of_any_size_agree(name, micro_batch):
    tiny, batch = Tiny(config_of(name)), batch_of()
    assert close(tiny.score(BOTH, batch, micro_batch=micro_batch), tiny.score(BOTH, batch, micro_batch=2))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma3"])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("noise", [KINDS["gaussian"], KINDS["lowrank 1"]], ids=["gaussian", "lowrank"])
def test_the_number_of_samples_in_a_pass_changes_no_bit(name, compute, micro_batch, noise):
    tiny, batch, both = Tiny(config_of(name)), batch_of(), of_kind(BOTH, noise)
    together = tiny.score(both, batch, compute, micro_batch=micro_batch, tile_members=2)
    for pass_samples in (2, 4, 100):
        divided = tiny.score(both, batch, compute, micro_batch=micro_batch, pass_samples=pass_samples, tile_members=2)
        assert divided.tobytes() == together.tobytes()


@EVERY_KIND
def test_members_together_and_alone_have_the_same_bits(qwen3, noise):
    """Unless they share a tile."""
    batch = batch_of()
    both = qwen3.score(of_kind(BOTH, noise), batch)
    for member, sign in enumerate((1, -1)):
        alone = replace(of_kind(BOTH, noise), signs=(sign,))
        assert qwen3.score(alone, batch).tobytes() == both[member : member + 1].tobytes()


def test_the_rows_are_the_members_of_all_perturbations_in_order(qwen3):
    batch = batch_of()
    other = Perturbation(seed=5, step=1, pair=3, sigma=0.01, signs=(-1,))
    found = qwen3.model().log_probabilities([UNPERTURBED, BOTH, other], batch, len(batch))
    assert (found.shape, found.dtype) == ((4, 6), np.float64)
    expected = [qwen3.score(perturbation, batch) for perturbation in (UNPERTURBED, BOTH, other)]
    assert found.tobytes() == np.concatenate(expected).tobytes()


@EVERY_KIND
def test_a_model_scores_the_same_again_after_another_perturbation(qwen3, noise):
    batch, model = batch_of(), qwen3.model(tile_members=2)
    first = model.log_probabilities([of_kind(BOTH, noise)], batch, 6)
    for other in (UNPERTURBED, PLUS, of_kind(PLUS, LowRank(2))):
        model.log_probabilities([other], batch_of([30, 2]), 6)
    assert model.log_probabilities([of_kind(BOTH, noise)], batch, 6).tobytes() == first.tobytes()


@EVERY_KIND
def test_scoring_changes_no_weight(qwen3, noise):
    before = {tensor.name: qwen3.working.part(tensor).data.copy() for tensor in qwen3.layout.tensors}
    qwen3.score(of_kind(BOTH, noise), batch_of(), torch.bfloat16, tile_members=2)
    assert all(np.array_equal(qwen3.working.part(tensor).data, before[tensor.name]) for tensor in qwen3.layout.tensors)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@EVERY_KIND
def test_threads_change_no_bit(qwen3, compute, noise):
    one, two = (qwen3.score(of_kind(BOTH, noise), batch_of(), compute, threads, tile_members=2) for threads in (1, 2))
    assert one.tobytes() == two.tobytes()


# Groups and shared noise


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@EVERY_KIND
def test_groups_have_their_own_sigma(name, noise):
    """A factor of 0 leaves a group's tensors unperturbed."""
    groups = [Factors("norm|ln_", 0, 0), Factors("emb|wte", 2.5, 1), Factors("mlp", 0, 0), Factors("", 0.5, 1)]
    tiny, batch, both = Tiny(config_of(name), groups), batch_of(), of_kind(BOTH, noise)
    found = tiny.score(both, batch, tile_members=2)
    assert close(found, tiny.expected(both, batch))
    assert not close(found, Tiny(config_of(name)).score(both, batch), 1e-3)


@EVERY_KIND
def test_if_every_group_is_frozen_nothing_is_perturbed(noise):
    tiny, batch = Tiny(config_of("qwen3"), [Factors("", 0, 0)]), batch_of()
    unperturbed = tiny.score(of_kind(UNPERTURBED, noise), batch)
    assert tiny.score(of_kind(BOTH, noise), batch).tobytes() == np.concatenate([unperturbed, unperturbed]).tobytes()


@EVERY_KIND
def test_shared_noise(noise):
    tiny, batch, both = Tiny(config_of("qwen3"), shared=True), batch_of(), of_kind(BOTH, noise)
    found = tiny.score(both, batch, tile_members=2)
    assert close(found, tiny.expected(both, batch))
    assert not close(found, Tiny(config_of("qwen3")).score(both, batch), 1e-3)


# Progress


@pytest.mark.parametrize("device", [None, torch.device("cpu")], ids=["kernels", "device"])
@pytest.mark.parametrize(("name", "tied"), [("qwen3", True), ("qwen3", False), ("gpt2", True), ("mixtral", True)])
@pytest.mark.parametrize("noise", [KINDS["gaussian"], KINDS["lowrank 1"]], ids=["gaussian", "lowrank"])
def test_progress_is_told_rising_shares(name, tied, device, noise):
    """From 0 to 1 in each call, by at most a layer at a time, for half of the perturbations or in one of two passes; an untied
    embedding's matrix is never used whole, so its share is missing."""
    shares: list[float] = []
    tiny, batch, both, plus = Tiny(config_of(name, tied)), batch_of(), of_kind(BOTH, noise), of_kind(PLUS, noise)
    model = tiny.model(device=device, progress=shares.append, tile_members=4)
    unused = 0 if tied else tiny.layout.layers[0].size
    most = max(layer.size for layer in tiny.layout.layers) / tiny.layout.size / 2
    for perturbations, pass_samples in (([both, both, both, UNPERTURBED], 6), ([plus], 3)):
        shares.clear()
        model.log_probabilities(perturbations, batch, pass_samples)
        assert len(shares) > len(tiny.layout.layers)
        assert all(0 < after - before < 1.001 * most for before, after in itertools.pairwise([0.0, *shares]))
        assert shares[-1] == pytest.approx(1 - unused / tiny.layout.size, rel=1e-12)


# Dimensions of the same size


FALCON = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "alibi": True}
ONE_HEAD = {**COMMON, "num_attention_heads": 1, "num_key_value_heads": 1}
BLOOM = {"vocab_size": 300, "hidden_size": 64, "n_layer": 2, "n_head": 8}
COINCIDENCES = {
    "as many tokens as heads": ("falcon", FALCON, [8, 5, 3]),
    "as many tokens as rows": ("falcon", FALCON, [6, 5, 3]),
    "one head, and as many tokens as it is wide": ("llama", ONE_HEAD, [64, 30]),
    "as many tokens as a head is wide": ("llama", COMMON, [16, 9, 2]),
    "bloom, as many tokens as heads": ("bloom", BLOOM, [8, 5, 3]),
}


@pytest.mark.parametrize("case", COINCIDENCES)
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_dimensions_of_the_same_size_are_told_apart(case, micro_batch):
    kind, keys, lengths = COINCIDENCES[case]
    tiny, batch = Tiny(AutoConfig.for_model(kind, **keys)), batch_of(lengths)
    for perturbation in (BOTH, replace(BOTH, kind="lowrank", rank=1)):
        found = tiny.score(perturbation, batch, micro_batch=micro_batch, tile_members=2)
        assert close(found, tiny.expected(perturbation, batch))
