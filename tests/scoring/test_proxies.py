"""Proxies: which rows of the embedding are perturbed, and when members share a block's products or take turns."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, BOTH, PLUS, Tiny, batch_of, close, config_of, of_kind
from torch.nn import functional
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.model.layout import Factors, skeleton
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import Perturbation
from es_lite.scoring.proxies import Proxy
from es_lite.scoring.tiles import Tile

LOW = of_kind(BOTH, LowRank(2))
TURNS = {
    "lfm2": {"block-000"},
    "mixtral": {"block-000", "block-001"},
    "qwen3_moe": {"block-000", "block-001"},
    "gpt_oss": {"block-000", "block-001"},
    "deepseek_v3": {"block-001"},
    "jamba": {"block-000", "block-001"},
}
"""Blocks with a convolution, a state-space model or experts: members take turns there."""


@pytest.fixture
def ways(monkeypatch) -> dict[str, list[str]]:
    """The layers that were run in each way, by its name, in order."""
    found: dict[str, list[str]] = {"_full": [], "_together": [], "_one_by_one": [], "_each_member": []}
    for way in found:
        method = getattr(Proxy, way)

        def recorded(self, *args, method=method, way=way):
            found[way].append(self.wrapped.layer.name)
            return method(self, *args)

        monkeypatch.setattr(Proxy, way, recorded)
    return found


# The embedding


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("token", [0, 250, 299])
def test_a_padding_token_is_a_token_like_any_other(name, token):
    """Whatever its id: only the used rows of the embedding are made, and its row need not be among them."""
    tiny, batch = Tiny(config_of(name, pad_token_id=token)), batch_of([6, 3])
    assert close(tiny.score(BOTH, batch), tiny.expected(BOTH, batch))


def test_only_the_rows_of_the_embedding_that_a_batch_uses_are_asked_for(monkeypatch):
    tiny, batch, asked = Tiny(config_of("qwen3", tied=False)), batch_of([6, 3]), []
    rows_of = tiny.working.rows

    def rows(tensor, rows):
        asked.append((tensor.name, rows.tolist()))
        return rows_of(tensor, rows)

    monkeypatch.setattr(tiny.working, "rows", rows)
    for perturbation in (BOTH, LOW):
        tiny.score(perturbation, batch, tile_members=2)
        assert asked.pop() == ("model.embed_tokens.weight", sorted(set(batch.tokens.ravel().tolist())))
    assert asked == []


# Members together, or in turns


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_members_share_the_products_of_all_blocks_but_those_that_mix_rows(ways, name):
    """A block in which they take turns scores the same, but no faster than one member after the other: no score shows it."""
    tiny, turns = Tiny(config_of(name)), TURNS.get(name, set())
    tiny.score(LOW, batch_of([5, 3, 2]), tile_members=2)
    blocks = {layer.name for layer in tiny.layout.blocks}
    assert set(ways["_together"]) & blocks == blocks - turns
    assert set(ways["_one_by_one"]) == turns
    assert ways["_full"] == []
    tiny.score(BOTH, batch_of([5, 3, 2]), tile_members=2)
    assert blocks <= set(ways["_full"])


def test_a_tile_of_several_members_is_one_product(monkeypatch):
    """Of the unperturbed weights: as many as there are matrices in the blocks, and one for the head."""
    tiny, rows = Tiny(config_of("qwen3")), []
    linear = functional.linear

    def counted(x, weight, bias=None):
        rows.append(x[..., 0].numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(functional, "linear", counted)
    model = tiny.model(tile_members=4, micro_batch=2)
    model.log_probabilities([LOW, Perturbation(5, 1, 3, 0.01, (1, -1), "lowrank", 2)], batch_of([6, 4]), 2)
    assert rows == [4 * 2 * 6] * 14 + [4 * (5 + 3)]


def transposed(self, x):
    """The MLP with time before batch, so that rows of members are not together."""
    x = x.transpose(0, 1)
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)).transpose(0, 1)


def repeated(self, x):
    """The MLP on more rows than there are."""
    return self.down_proj(self.act_fn(self.gate_proj(torch.cat([x, x[:1]]))) * self.up_proj(torch.cat([x, x[:1]])))[: len(x)]


def reading(self, x):
    """The MLP, with a product of its own."""
    return self.down_proj(self.act_fn(functional.linear(x, self.gate_proj.weight, self.gate_proj.bias)) * self.up_proj(x))


@pytest.mark.parametrize("forward", [transposed, repeated, reading])
@pytest.mark.parametrize("device", [None, torch.device("cpu")], ids=["kernels", "device"])
@pytest.mark.parametrize("longest", [11, 12], ids=["", "as many tokens as rows"])
def test_members_take_turns_if_a_block_turns_out_to_mix_rows(monkeypatch, forward: Callable, longest: int, device):
    """Blocks that look as if members could share their products. What was computed before that was found out is not used."""
    cut, apart = [], Tile.apart
    monkeypatch.setattr(Tile, "apart", lambda tile: cut.append(len(tile.members)) or apart(tile))
    tiny, batch = Tiny(config_of("qwen3")), batch_of([longest, 9, 2])
    others = [Perturbation(5, 1, pair, 0.01, (1, -1), "lowrank", 2) for pair in range(2)]
    expected = [tiny.expected(perturbation, batch) for perturbation in (LOW, *others)]  # of the plain MLP
    monkeypatch.setattr(Qwen3MLP, "forward", forward)
    found = tiny.model(tile_members=4, device=device).log_probabilities([LOW, *others], batch, 3)
    assert close(found, np.concatenate(expected))
    assert cut[:2] == [4, 2] and len(cut) >= 4, "a tile of each group, in each block"


@pytest.mark.parametrize("noise", [LowRank(1), LowRank(3)], ids=["rank 1", "rank 3"])
def test_a_frozen_matrix_is_multiplied_as_it_is(noise):
    """Together with others that are perturbed, in blocks that members share and in blocks where they take turns."""
    groups = [Factors("q_proj|down_proj|experts.down|norm", 0, 0)]
    for name in ("qwen3", "mixtral"):
        tiny, batch, low = Tiny(config_of(name), groups), batch_of([7, 3]), of_kind(BOTH, noise)
        assert close(tiny.score(low, batch, tile_members=2), tiny.expected(low, batch))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mixtral"])
def test_lanes_change_no_bit(name, compute):
    """Each has its own copy of the block, with operands of its own."""
    tiny, batch, scores = Tiny(config_of(name)), batch_of(), []
    perturbations = [LOW, of_kind(PLUS, LowRank(1)), BOTH]
    for lanes in (1, 3):
        model = PerturbedModel(skeleton(tiny.config), tiny.layout, tiny.working, compute, Lanes(lanes, 1), 2, 2)
        scores.append(model.log_probabilities(perturbations, batch, 6).tobytes())
    assert scores[0] == scores[1]
