"""The memory that a recipe takes, by part."""

import pytest

from es_lite import system
from es_lite.planning.needs import CUDA_BYTES, SHARED_BYTES, WORKER_BYTES
from es_lite.weights import working_copy

GIB = 2**30
PLENTY = 2**50
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


def test_a_single_member_takes_half_of_a_pairs_perturbed_layer(needs_of):
    pair, single = needs_of(), needs_of("es.antithetic=false")
    assert pair.perturbed(4) == 2 * single.perturbed(4)
    # The largest is a block until the rows of the embedding that samples use are more.
    block = max(layer.size for layer in pair.layout.blocks)
    assert single.perturbed(4) == 2 * block
    assert single.perturbed(100) == 2 * 100 * 256 * 1024
    assert single.perturbed(10**6) == 2 * 151936 * 1024


def test_fp32_takes_twice_what_bf16_does(needs_of, monkeypatch):
    bf16 = needs_of().perturbed(4)
    monkeypatch.setattr(system, "compute_dtype", lambda *_, **__: "fp32")
    assert needs_of().perturbed(4) == 2 * bf16


def test_streamed_weights_take_buffers_and_all_members_hidden_states(needs_of):
    needs = needs_of("memory.residency=streamed", "workers.count=2")
    parts = needs.streamed(PLENTY)
    assert set(parts.memory) == {
        *("coordinator", "worker", "window", "converted layer", "perturbed layer", "hidden states"),
        *("activations (2x)", "update buffers"),
    }
    assert parts.memory["worker"] == SHARED_BYTES + WORKER_BYTES
    assert parts.members == 17  # the population and, if σ is new, θ itself
    assert parts.memory["hidden states"] == parts.pass_samples * 17 * needs.item.hidden
    block = max(layer.size for layer in needs.layout.blocks)
    assert parts.memory["window"] == pytest.approx(3 * 4 * block, rel=0.01)
    assert parts.memory["converted layer"] == pytest.approx(2 * block, rel=0.01)


def test_nothing_is_converted_if_scoring_uses_what_is_stored(needs_of):
    for weights in ("bf16", "int8"):
        parts = needs_of("memory.master=none", f"memory.weights={weights}").streamed(PLENTY)
        assert "converted layer" not in parts.memory


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
