"""The memory that a recipe takes, by part."""

import pytest
from architectures import config_of

from es_lite import system
from es_lite.fitness.kinds import fitness_of
from es_lite.model.layout import Layout, skeleton
from es_lite.planning.needs import CUDA_BYTES, SHARED_BYTES, WORKER_BYTES, Needs
from es_lite.scoring.heads import VOCABULARY_BLOCK
from es_lite.weights import working_copy

GIB = 2**30
PLENTY = 2**50
LOW = "noise.kind=lowrank"
ON_THE_DEVICE = {"copied layers", "perturbed layer", "noise", "hidden states", "activations"}


def test_resident_weights_are_there_once_and_what_workers_need_once_for_each(needs_of):
    parts = needs_of("workers.count=3").resident(PLENTY)
    one = needs_of("workers.count=1").resident(PLENTY)
    assert set(parts.memory) == {"working copy", "coordinator", "shared by workers"} | {
        f"{name} (3x)" for name in ("workers", "perturbed layer", "hidden states", "activations", "update buffers")
    }
    for name, size in parts.memory.items():
        assert size == (3 * one.memory[name.replace("3x", "1x")] if "(3x)" in name else one.memory[name])
    assert parts.workers == 3 and parts.members == 2 and parts.gpu == {}


def test_the_working_copy_has_the_size_of_what_is_scored_from(needs_of):
    for weights in ("bf16", "int8"):
        needs = needs_of(f"memory.weights={weights}")
        assert needs.resident(PLENTY).memory["working copy"] == working_copy.size_bytes(needs.layout, weights)


# Scratch


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_noise_that_is_drawn_in_full_takes_a_perturbed_layer_for_each_member_of_a_pair(needs_of, kind):
    pair, single = needs_of(f"noise.kind={kind}"), needs_of(f"noise.kind={kind}", "es.antithetic=false")
    # The largest is a block until the rows of the embedding that samples use are more.
    block = max(layer.size for layer in pair.layout.blocks)
    for samples, elements in ((4, block), (100, 100 * 256 * 1024), (10**6, 151936 * 1024)):
        assert single.scratch(samples) == {"perturbed layer": 2 * elements}
        assert pair.scratch(samples) == {"perturbed layer": 2 * 2 * elements}


def test_low_rank_noise_takes_perturbed_rows_of_the_embedding_and_no_perturbed_layer(needs_of):
    pair, single = needs_of(LOW), needs_of(LOW, "es.antithetic=false")
    for samples, rows in ((4, 4 * 256), (100, 100 * 256), (10**6, 151936)):
        assert single.scratch(samples) == {"perturbed rows": 2 * rows * 1024}
        assert pair.scratch(samples) == {"perturbed rows": 2 * 2 * rows * 1024}
    assert needs_of(LOW, "noise.rank=64").scratch(4) == pair.scratch(4)


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_low_rank_noise_takes_a_layers_matrices_once_more_if_they_are_stored_in_another_type(
    needs_of, monkeypatch, weights, compute
):
    """For all members together, so a pair takes no more."""
    monkeypatch.setattr(system, "compute_dtype", lambda *_, **__: compute)
    pair, single = needs_of(LOW, f"memory.weights={weights}"), needs_of(LOW, f"memory.weights={weights}", "es.antithetic=false")
    matrices = max(sum(tensor.size for tensor in block.tensors if len(tensor.shape) == 2) for block in pair.layout.blocks)
    assert matrices > VOCABULARY_BLOCK * 1024
    for needs in (pair, single):
        expected = None if weights == compute else {"bf16": 2, "fp32": 4}[compute] * matrices
        assert needs.scratch(4).get("converted layer") == expected


def test_what_is_not_a_matrix_is_perturbed_in_scratch_under_low_rank_noise(needs_of, recipe_of):
    """A block of experts: of its tensors with three dimensions, and of no others."""
    recipe, config = recipe_of(LOW, "memory.weights=int8", "fitness.max_length=8"), config_of("mixtral", hidden_size=512)
    needs = Needs(recipe, fitness_of("logprob"), config, Layout.of(skeleton(config)))
    experts = 4 * 3 * 96 * 512
    assert experts > 300 * 512  # the embedding
    head = VOCABULARY_BLOCK * 512  # larger than the block's matrices
    assert needs.scratch(4) == {"perturbed rows": 2 * 2 * experts, "converted layer": 2 * head}


@pytest.mark.parametrize("noise", ["noise.kind=gaussian", LOW])
def test_fp32_takes_twice_what_bf16_does(needs_of, monkeypatch, noise):
    bf16 = needs_of(noise, "memory.weights=int8").scratch(4)
    monkeypatch.setattr(system, "compute_dtype", lambda *_, **__: "fp32")
    assert needs_of(noise, "memory.weights=int8").scratch(4) == {name: 2 * size for name, size in bf16.items()}


# Tiles


@pytest.mark.parametrize(
    ("tokens", "overrides", "expected"),
    [
        (256, (), 1),  # enough rows from one member
        (255, (), 2),
        (64, (), 4),
        (63, (), 6),  # whole pairs
        (16, (), 8),  # half of the population
        (16, ("es.population=18",), 8),
        (16, ("es.population=4",), 2),
        (16, ("es.population=2",), 1),
        (64, ("es.antithetic=false",), 4),
        (63, ("es.antithetic=false",), 5),
        (16, ("es.antithetic=false", "es.population=11"), 5),
        (16, ("es.antithetic=false", "es.population=2"), 1),
        (64, ("fitness.micro_batch=2",), 2),
        (64, ("fitness.micro_batch=4",), 1),
        (64, ("fitness.micro_batch=4", "fitness.samples=2"), 2),  # no more rows than there are samples
        (64, ("noise.rank=8",), 4),
        (64, ("noise.rank=auto", "noise.kind=gaussian"), 1),
        (64, ("noise.rank=auto", "noise.kind=rademacher"), 1),
    ],
)
def test_members_share_a_tile_until_it_has_enough_rows(needs_of, machine, tokens, overrides, expected):
    """On any machine, however the recipe uses it: the bits of a product depend on how many rows it has."""
    recipe = (LOW, "fitness.micro_batch=1", f"fitness.max_length={tokens}", *overrides)
    pair = 1 if "es.antithetic=false" in overrides else 2
    for cores, memory, gpu, uses in (
        (8, 64 * GIB, 0, ()),
        (1, GIB, 0, ("workers.count=1",)),
        (64, 64 * GIB, 0, ("workers.count=5", "workers.threads=3")),
        (8, 64 * GIB, 0, ("memory.residency=streamed", "memory.weights=int8")),
        (8, 64 * GIB, 40 * GIB, ("workers.device=cuda",)),
        (8, 64 * GIB, 0, ("memory.limit=4 GiB", "memory.master=none", "workers.compute=fp32")),
    ):
        machine(cores, memory, gpu)
        needs = needs_of(*recipe, *uses)
        assert needs.tile_members == expected
        assert needs.group == max(1, expected // pair)


def test_a_tile_takes_the_activations_of_all_its_members_and_their_hidden_states(needs_of):
    short = ("fitness.micro_batch=1", "fitness.max_length=64")
    alone, four = needs_of(*short).resident(PLENTY), needs_of(LOW, *short).resident(PLENTY)
    name = f"activations ({four.workers}x)"
    each = alone.memory[f"activations ({alone.workers}x)"] // alone.workers
    assert four.memory[name] == four.workers * 4 * each
    hidden = needs_of(*short).item.hidden
    assert (alone.members, four.members) == (2, 4)
    assert four.memory[f"hidden states ({four.workers}x)"] == four.workers * four.pass_samples * 4 * hidden
    lanes = needs_of(LOW, *short, "memory.residency=streamed", "workers.count=2").streamed(PLENTY)
    assert lanes.memory["activations (2x)"] == 2 * 4 * each


@pytest.mark.parametrize(
    ("overrides", "workers", "lanes"),
    [
        (("fitness.max_length=64", "fitness.samples=1"), 4, 4),  # 16 members, 4 in a tile
        (("fitness.max_length=64", "fitness.samples=3"), 4, 12),
        (("fitness.max_length=64", "fitness.samples=1", "es.population=10"), 3, 2),  # the last group has one pair
        (("fitness.max_length=16", "fitness.samples=1"), 2, 2),
        (("fitness.max_length=256", "fitness.samples=1"), 8, 16),  # one member
        (("fitness.max_length=64", "fitness.samples=1", "noise.kind=gaussian"), 8, 2),  # the members of a pair
    ],
)
def test_there_are_no_more_workers_and_lanes_than_tiles(needs_of, machine, overrides, workers, lanes):
    """Lanes share a layer for all members; those of a kind that is drawn in full, for a pair."""
    machine(cores=64)
    needs = needs_of(LOW, "fitness.micro_batch=1", *overrides)
    assert needs.resident(PLENTY).workers == workers
    assert needs.streamed(PLENTY).workers == lanes


# Streamed, and with a device


def test_streamed_weights_take_buffers_and_all_members_hidden_states(needs_of):
    needs = needs_of("memory.residency=streamed", "workers.count=2")
    parts = needs.streamed(PLENTY)
    assert set(parts.memory) == {
        *("coordinator", "worker", "window", "rounded layer", "perturbed layer", "hidden states"),
        *("activations (2x)", "update buffers"),
    }
    assert parts.memory["worker"] == SHARED_BYTES + WORKER_BYTES
    assert parts.members == 17  # the population and, if σ is new, θ itself
    assert parts.memory["hidden states"] == parts.pass_samples * 17 * needs.item.hidden
    block = max(layer.size for layer in needs.layout.blocks)
    assert parts.memory["window"] == pytest.approx(3 * 4 * block, rel=0.01)
    assert parts.memory["rounded layer"] == pytest.approx(2 * block, rel=0.01)


def test_nothing_is_rounded_if_scoring_uses_what_is_stored(needs_of):
    for weights in ("bf16", "int8"):
        parts = needs_of("memory.master=none", f"memory.weights={weights}").streamed(PLENTY)
        assert "rounded layer" not in parts.memory


def test_the_parts_of_low_rank_noise(needs_of):
    """Of a working copy and of a stream: both convert int8."""
    needs = needs_of(LOW, "memory.weights=int8", "workers.count=2")
    resident, streamed = needs.resident(PLENTY).memory, needs.streamed(PLENTY).memory
    scratch = {"perturbed rows", "converted layer"}
    assert set(resident) == {"working copy", "coordinator", "shared by workers"} | {
        f"{name} (2x)" for name in ("workers", *scratch, "hidden states", "activations", "update buffers")
    }
    assert set(streamed) == scratch | {
        *("coordinator", "worker", "window", "rounded layer", "hidden states", "activations (2x)", "update buffers")
    }
    for name, size in needs.scratch(16).items():
        assert (resident[f"{name} (2x)"], streamed[name]) == (2 * size, size)


def test_less_memory_means_more_passes_of_similar_size(needs_of):
    needs = needs_of("fitness.samples=100", "fitness.micro_batch=4", "memory.residency=streamed")
    all_at_once = needs.streamed(PLENTY)
    assert all_at_once.pass_samples == 100
    limit = sum(all_at_once.memory.values())
    two = needs.streamed(limit - 1)
    assert two.pass_samples == 52 and sum(two.memory.values()) < limit
    assert needs.streamed(0).pass_samples == 4  # never less than a micro-batch, even if it does not fit


def test_an_evaluation_may_have_more_samples_than_a_step(needs_of):
    assert needs_of("fitness.samples=8", "eval.every=1", "eval.samples=40").streamed(PLENTY).pass_samples == 40
    assert needs_of("fitness.samples=8", "eval.every=0", "eval.samples=40").streamed(PLENTY).pass_samples == 8


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_with_device_torch_everything_is_in_host_memory(needs_of, machine, residency):
    """The GPU's code on the CPU takes what the GPU would, of the host's memory, without driver and libraries."""
    machine(gpu=PLENTY)
    torch, cuda = (getattr(needs_of(f"workers.device={device}"), residency)(PLENTY) for device in ("torch", "cuda"))
    assert torch.gpu == {}
    assert set(torch.memory) >= ON_THE_DEVICE
    assert set(cuda.gpu) == ON_THE_DEVICE | {"driver"} and not ON_THE_DEVICE & set(cuda.memory)
    on_gpu = {name: size for name, size in cuda.gpu.items() if name != "driver"}
    on_host = {name: size for name, size in cuda.memory.items() if name != "GPU's libraries (2x)"}
    assert torch.memory == on_host | on_gpu
    assert (cuda.gpu["driver"], cuda.memory["GPU's libraries (2x)"]) == (CUDA_BYTES, 2 * CUDA_BYTES)  # coordinator and worker
    assert (torch.workers, torch.members, torch.pass_samples) == (1, 17, 16)


def test_with_a_device_the_resident_copy_stays_and_the_window_if_streamed(needs_of):
    needs = needs_of("workers.device=torch")
    resident, streamed = needs.resident(PLENTY), needs.streamed(PLENTY)
    assert "working copy" in resident.memory and "window" not in resident.memory
    assert "window" in streamed.memory and "working copy" not in streamed.memory
    assert streamed.memory["pinned buffers"] == 2 * 2 * max(layer.size for layer in needs.layout.blocks)


def test_passes_on_a_device_are_as_large_as_its_memory_allows(needs_of, machine):
    overrides = ("workers.device=cuda", "fitness.samples=100", "fitness.micro_batch=4")
    machine(gpu=PLENTY)
    most = needs_of(*overrides).resident(PLENTY)
    assert most.pass_samples == 100
    machine(gpu=sum(most.gpu.values()) - 1)
    fewer = needs_of(*overrides).resident(PLENTY)
    assert fewer.pass_samples == 52
    assert fewer.memory == most.memory  # the host's does not depend on it
    # On "torch" the host's memory is the bound.
    host = needs_of("workers.device=torch", *overrides[1:])
    assert host.resident(PLENTY).pass_samples == 100
    assert host.resident(sum(host.resident(PLENTY).memory.values()) - 1).pass_samples == 52


def test_with_a_device_the_update_uses_all_cores(needs_of, machine):
    machine(cores=12)
    assert (needs_of("workers.device=torch").threads, needs_of().threads) == (12, 1)
    assert needs_of("workers.device=torch", "workers.threads=3").threads == 3
