"""Greedy decoding under perturbed weights, against Hugging Face's own `generate` with weights that were perturbed in numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, BOTH, Tiny, config_of, of_kind
from plain import EVERY_KIND, KINDS
from transformers import GenerationConfig

from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.errors import UserError
from es_lite.scoring.generate import Limits
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation

LENGTHS = [9, 7, 7, 3, 1]
NEW = 9
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
        config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=list(ends) or None, pad_token_id=0)
        written = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].numpy()
        for row in written:
            ending = np.flatnonzero(np.isin(row, ends))
            found.append(row[: ending[0] + 1] if ending.size else row)
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
