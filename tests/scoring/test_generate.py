"""Greedy decoding under perturbed weights, against Hugging Face's own `generate` with weights that were perturbed in numpy."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, BOTH, Tiny, config_of, of_kind
from plain import EVERY_KIND, KINDS
from transformers import GenerationConfig

from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.errors import UserError
from es_lite.scoring.generate import Limits
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation

LENGTHS = [9, 7, 7, 3, 1]
NEW = 9
RANK_1 = LowRank(1)
STRONG = replace(BOTH, sigma=0.1)
"""Perturbed so strongly that every member writes something else."""

REFUSED = {"mpt": "does not know what belongs", "lfm2": "a state other than", "jamba": "a state other than"}
"""Positions that are biases of attention, a convolution, a state space: what the message says."""


def prompts_of(lengths: list[int] = LENGTHS) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.integers(1, 300, length).astype(np.int32) for length in lengths]


def expected(tiny: Tiny, perturbation: Perturbation, prompts: list[np.ndarray], ends: tuple[int, ...], new: int = NEW) -> list:
    """What Hugging Face's `generate` writes, for each member, each prompt alone in a padded batch of all."""
    found = []
    for sign in perturbation.signs:
        model = tiny.hugging_face_model(tiny.perturbed(perturbation, sign))
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - prompt.size :] = torch.from_numpy(prompt)
            mask[row, width - prompt.size :] = 1
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=new, eos_token_id=list(ends) or [-1], pad_token_id=0
        )
        written = model.generate(ids, attention_mask=mask)[:, width:].numpy()
        for row in written:
            places = np.flatnonzero(np.isin(row, ends))
            found.append(row[: places[0] + 1] if places.size else row)
    return found


def same(found: np.ndarray, wanted: list) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found.ravel(), wanted, strict=True))


def some_ends(tiny: Tiny, prompts: list[np.ndarray]) -> tuple[int, ...]:
    """Tokens that end some sequences early, at different times."""
    free = tiny.model(micro_batch=2).generate([STRONG], prompts, Limits((), NEW), 2)
    return tuple(int(free[member, prompt][place]) for member, prompt, place in ((0, 0, 2), (0, 3, 5), (1, 2, 7)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_writes_what_hugging_face_generates_with_perturbed_weights(name, tied):
    tiny, prompts = Tiny(config_of(name, tied)), prompts_of()
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            tiny.model().generate([STRONG], prompts, Limits((), NEW), 2)
        return
    ends = some_ends(tiny, prompts)
    for perturbation in (STRONG, of_kind(STRONG, LowRank(1)), UNPERTURBED):
        found = tiny.model(micro_batch=2, tile_members=2).generate([perturbation], prompts, Limits(ends, NEW), 2)
        assert same(found, expected(tiny, perturbation, prompts, ends)), perturbation
    assert len({tuple(row) for row in found.ravel()}) > 1


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2", "phi", "mixtral"])
@EVERY_KIND
def test_every_kind_of_noise(name, noise):
    tiny, prompts = Tiny(config_of(name)), prompts_of([6, 4, 2])
    perturbation = of_kind(STRONG, noise)
    found = tiny.model(micro_batch=2, tile_members=2).generate([perturbation], prompts, Limits((), NEW), 2)
    assert same(found, expected(tiny, perturbation, prompts, ()))


def many(noise: NoiseKind = RANK_1, pairs: int = 5) -> list[Perturbation]:
    return [replace(of_kind(STRONG, noise), pair=pair) for pair in range(pairs)]


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "phi"])  # two have biases, one of the head too
def test_members_that_share_a_tile_write_what_they_would_write_alone(name):
    """Their sequences end at different times, so that members have different numbers of rows."""
    tiny, prompts = Tiny(config_of(name)), prompts_of([6, 5, 5, 3, 2, 1, 1])
    free = tiny.model(micro_batch=4, tile_members=4).generate(many(), prompts, Limits((), 24), 4)
    ends = tuple({int(free[member, prompt][place]) for member, prompt, place in ((0, 0, 1), (3, 2, 4), (5, 1, 9), (8, 6, 14))})
    found = tiny.model(micro_batch=4, tile_members=4, prompt_members=2).generate(many(), prompts, Limits(ends, 24), 4)
    assert len({row.size for row in found.ravel()}) > 4, "all ended together"
    for pair, perturbation in enumerate(many()):
        alone = tiny.model(micro_batch=1).generate([perturbation], prompts, Limits(ends, 24), 1)
        assert same(found[2 * pair : 2 * pair + 2], list(alone.ravel()))
    first = expected(tiny, many()[0], prompts, ends, 24)
    assert same(found[:2], first)


# The same bits


@pytest.mark.parametrize("noise", [KINDS["gaussian"], LowRank(2)], ids=["gaussian", "lowrank"])
@pytest.mark.parametrize("compute", [pytest.param(torch.float32, marks=pytest.mark.long), torch.bfloat16], ids=["fp32", "bf16"])
def test_kept_weights_and_passes_change_nothing(noise, compute):
    """In bfloat16, equal logits are common, so that other last bits would soon give other tokens."""
    tiny, prompts = Tiny(config_of("qwen3")), prompts_of([9, 8, 4, 4, 3, 2, 1])
    found = [
        tiny.model(compute, micro_batch=2, tile_members=4, keep_weights=keep).generate(
            many(noise), prompts, Limits((5, 17, 90), 30), pass_prompts
        )
        for keep, pass_prompts in ((False, 2), (True, 2), (False, 8), (True, 4))
    ]
    for other in found[1:]:
        assert same(other, list(found[0].ravel()))


def test_logits_that_are_not_numbers_end_a_sequence():
    tiny, prompts = Tiny(config_of("qwen3")), prompts_of([4, 2])
    broken = replace(STRONG, sigma=3e38)
    found = tiny.model().generate([STRONG, broken], prompts, Limits((), 3), 3)
    assert all(row is not None for row in found[:2].ravel())
    assert all(row is None for row in found[2:].ravel())


def test_an_end_token_at_once_and_a_limit_of_one_token():
    tiny, prompts = Tiny(config_of("qwen3")), prompts_of([4, 2])
    first = tiny.model().generate([UNPERTURBED], prompts, Limits((), 1), 3)
    assert [row.size for row in first.ravel()] == [1, 1]
    ends = tuple(int(row[0]) for row in first.ravel())
    assert same(tiny.model().generate([UNPERTURBED], prompts, Limits(ends, 8), 3), list(first.ravel()))


def test_ended_sequences_leave_their_tile(monkeypatch):
    """The products become smaller once an eighth of the rows has ended, and always have a multiple of 8 rows."""
    tiny, prompts = Tiny(config_of("qwen3")), prompts_of([3] * 30)
    free = tiny.model(micro_batch=30).generate([UNPERTURBED], prompts, Limits((), 12), 30)[0]
    ends = tuple(int(free[prompt][place]) for prompt, place in zip(range(0, 30, 2), [1, 3, 5, 7, 9] * 3, strict=True))
    rows, model = [], tiny.model(micro_batch=30)
    next_tokens = model._next_tokens

    def counted(tiles, tokens, seen, positions):
        rows.append(len(tokens))
        return next_tokens(tiles, tokens, seen, positions)

    monkeypatch.setattr(model, "_next_tokens", counted)
    sizes = [row.size for row in model.generate([UNPERTURBED], prompts, Limits(ends, 12), 30)[0]]
    assert rows[0] == 30
    assert len(rows) == max(sizes)
    for step, (before, now) in enumerate(itertools.pairwise(rows), start=1):
        writing = sum(size > step for size in sizes)
        fewest = -(-writing // 8) * 8
        assert now == (fewest if (before - writing) * 8 >= before and fewest < before else before)
    assert len(set(rows)) > 2


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("noise", [KINDS["gaussian"], KINDS["rademacher"], LowRank(1)], ids=["gaussian", "rademacher", "lowrank"])
def test_on_a_device(name, noise):
    """Its code runs on the CPU, with torch operations only."""
    tiny, prompts = Tiny(config_of(name)), prompts_of([6, 4, 2])
    perturbations = [UNPERTURBED, *many(noise, pairs=2)]
    found = tiny.model(micro_batch=2, tile_members=4, device=torch.device("cpu")).generate(
        perturbations, prompts, Limits((), NEW), 4
    )
    wanted = [row for perturbation in perturbations for row in expected(tiny, perturbation, prompts, ())]
    assert same(found, wanted)


def test_progress_reaches_the_end_and_never_goes_back():
    shares: list[float] = []
    tiny = Tiny(config_of("qwen3"))
    tiny.model(progress=shares.append).generate([STRONG], prompts_of([4, 2]), Limits((), 5), 3)
    assert shares == sorted(shares)
    assert 0.99 < shares[-1] <= 1


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_members_take_turns_in_modules_that_cannot_be_shared(name):
    """Learned positions and experts are perturbed in scratch, for one member of a shared tile after the other."""
    tiny, prompts = Tiny(config_of(name)), prompts_of([5, 3, 2])
    found = tiny.model(micro_batch=3, tile_members=4).generate(many(pairs=2), prompts, Limits((7, 100, 200), NEW), 3)
    wanted = [row for perturbation in many(pairs=2) for row in expected(tiny, perturbation, prompts, (7, 100, 200))]
    assert same(found, wanted)
