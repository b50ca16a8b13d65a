"""The plan: what fits, what is refused and how, what "auto" becomes, and what people are told."""

import dataclasses

import pytest
from support import ROOT

from es_lite import plan
from es_lite.algorithm.noise.lowrank import BLOCK_ROWS, LowRank
from es_lite.errors import UserError
from es_lite.planning.rates import StepTime
from es_lite.system import MemoryLimit

GIB = 2**30
RECIPE = str(ROOT / "recipes" / "qwen3_0p5b_cpu.toml")
EXPECTED = StepTime(score_seconds=25.0, update_seconds=5.0, rates="the rates of the test")


def test_workers_on_auto_are_as_many_as_fit(planned, machine):
    resident = "memory.residency=resident"
    least = sum(planned(resident, "workers.count=1").memory.values())
    most = sum(planned(resident, "workers.count=8").memory.values())
    for limit, expected in ((most, 8), (most - 1, 7), (least, 1), (least - 1, 1)):
        machine(memory=limit)
        assert planned(resident).execution.workers == expected
        streamed = limit < least  # residency "auto": what does not fit is streamed
        assert planned().execution.streamed == streamed
        if not streamed:
            assert planned().execution.workers == expected


def test_there_are_no_more_workers_than_tasks(planned, machine):
    machine(cores=64)
    assert planned("es.population=6").execution.workers == 3
    assert planned("es.population=6", "es.antithetic=false").execution.workers == 6
    # Perturbations that share a tile are one task.
    shared = planned("noise.kind=lowrank", "fitness.max_length=64", "fitness.micro_batch=1", "es.population=10").execution
    assert (shared.tile_members, shared.group, shared.workers) == (4, 2, 3)
    assert (planned().execution.tile_members, planned().execution.group) == (1, 1)


def test_workers_have_as_many_threads_as_the_recipe_says(planned):
    execution = planned("workers.threads=4").execution
    assert (execution.workers, execution.threads) == (2, 4)


def test_many_samples_go_in_passes_of_whole_micro_batches(planned):
    few, many = planned("fitness.samples=8"), planned("fitness.samples=5000")
    assert (few.passes, few.execution.pass_samples) == (1, 16)  # eval.samples = 16 are more than 8
    assert many.passes > 1
    assert many.execution.pass_samples % 4 == 0
    assert (many.passes - 1) * many.execution.pass_samples < 5000 <= many.passes * many.execution.pass_samples


def test_layers_pass_the_page_cache_by_only_if_it_has_no_room_for_them(planned, machine):
    streamed = "memory.residency=streamed"
    used = sum(planned(streamed).memory.values())
    stored = planned(streamed).work.written_bytes
    for limit, direct in ((used + stored, False), (used + stored - 1, True)):
        machine(memory=limit)
        assert planned(streamed).execution.direct == direct
    assert not planned("memory.residency=resident").execution.direct


def test_what_does_not_fit_is_said_in_numbers(planned):
    fits = planned()
    assert fits.shortfall() is None
    short = dataclasses.replace(fits, limit=MemoryLimit(2**30, "memory.limit of the recipe"))
    assert "GiB of memory, 1.00 are available (memory.limit of the recipe)" in short.shortfall()
    full = dataclasses.replace(fits, free_disk=2**30)
    assert "GiB of disk, 1.00 are free" in full.shortfall()


@pytest.mark.parametrize(
    ("residency", "remedy"),
    [
        ("resident", 'Set memory.residency = "streamed"'),
        ("streamed", 'Set noise.kind = "lowrank" (no perturbed layer) or es.antithetic to false'),
    ],
)
def test_what_to_change_depends_on_the_residency(planned, residency, remedy):
    short = dataclasses.replace(planned(f"memory.residency={residency}"), limit=MemoryLimit(1, "the test"))
    assert remedy in short.shortfall() and "lower workers.count" in short.shortfall()


def test_a_gpu_that_is_too_small_is_said_in_numbers(planned, machine):
    machine(gpu=2 * GIB)
    short = planned("workers.device=cuda")
    assert f"needs {sum(short.gpu.values()) / GIB:.2f} GiB of GPU memory, 2.00 are available (a GPU)" in short.shortfall()
    machine(gpu=40 * GIB)
    assert planned("workers.device=cuda").shortfall() is None


def test_a_gpu_that_is_not_there_is_refused(planned):
    with pytest.raises(UserError, match=r'workers\.device = "cuda": torch finds no GPU here'):
        planned("workers.device=cuda")


def test_items_that_are_too_long_for_the_model_are_refused(planned):
    planned("fitness.max_length=32768")
    with pytest.raises(UserError, match=r"fitness\.max_length = 32769: the model's max_position_embeddings is 32768"):
        planned("fitness.max_length=32769")


def test_an_exports_disk_is_counted_if_it_is_on(planned):
    off = planned("run.checkpoint_every=0", "eval.every=0")
    assert set(off.disk) == {"master"}
    assert set(planned().disk) == {"master", "checkpoint", "best"}
    assert set(planned("memory.master=none").disk) == {"weights", "checkpoint", "best"}
    bf16, fp32 = planned(), planned("run.checkpoint_dtype=fp32")
    assert bf16.export_bytes == 2 * bf16.layout.size and fp32.export_bytes == 2 * bf16.export_bytes
    assert bf16.disk["checkpoint"] == bf16.disk["best"] == 2 * bf16.export_bytes  # the old one stays until the new one is there


def test_the_layers_disk_includes_those_that_are_being_replaced(planned):
    one, four = (planned("memory.residency=resident", f"workers.count={count}") for count in (1, 4))
    largest = max(layer.size for layer in one.layout.layers) * 4
    assert four.disk["master"] - one.disk["master"] == pytest.approx(3 * largest, rel=1e-3)
    assert one.work.written_bytes == pytest.approx(4 * one.layout.size, rel=1e-3)
    assert planned("memory.residency=streamed").disk["master"] == one.disk["master"]


def test_the_work_of_a_step(planned):
    plan = planned("memory.residency=streamed")
    size, population, samples, length = plan.layout.size, 16, 8, 256
    assert plan.tokens == population * samples * (length - 1)
    assert plan.work.flops == 2 * size * plan.tokens  # tied: the embedding is multiplied as the head
    assert plan.work.scoring_noise == size * population // 2 * plan.passes
    assert plan.work.update_noise == size * population // 2
    assert (plan.work.size, plan.work.pairs, plan.work.rounded, plan.work.converted) == (size, population // 2, 0, 0)
    assert plan.work.read_bytes == plan.passes * plan.work.written_bytes
    assert planned("memory.master=none").work.rounded == size
    anchored = planned("es.anchor=1.0").work
    assert (anchored.redrawn, anchored.read_bytes, plan.work.redrawn) == (size, plan.work.read_bytes, 0)
    untied = planned("model.config=qwen3-8b")
    assert untied.work.flops == 2 * (untied.layout.size - untied.layout.layers[0].size) * untied.tokens


def drawn(plan, rank: int, blocks: bool = False) -> int:
    """Factors of every matrix, B once for every BLOCK_ROWS rows or just once, and vectors."""
    times = {t: -(-t.shape[0] // BLOCK_ROWS) if blocks else 1 for t in plan.layout.tensors if len(t.shape) == 2}
    vectors = sum(t.size for t in plan.layout.tensors if len(t.shape) == 1)
    return vectors + sum(rank * (t.shape[0] + times[t] * t.shape[1]) for t in times)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_work_of_low_rank_noise_is_what_is_drawn_not_the_elements_it_perturbs(planned, rank):
    overrides = ("noise.kind=lowrank", f"noise.rank={rank}", "memory.residency=streamed")
    plan, full = planned(*overrides), planned("memory.residency=streamed")
    assert plan.noise == LowRank(rank)
    assert plan.work.scoring_noise == drawn(plan, rank) * 8 * plan.passes < full.work.scoring_noise / 100
    assert plan.work.update_noise == drawn(plan, rank, blocks=True) * 8 < full.work.update_noise / 10
    rest = {"scoring_noise": 0, "update_noise": 0}
    assert dataclasses.replace(plan.work, **rest) == dataclasses.replace(full.work, **rest)
    passes = planned(*overrides, "fitness.samples=5000", "eval.every=0")
    assert passes.passes > 1 and passes.work.scoring_noise == drawn(plan, rank) * 8 * passes.passes


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_the_work_of_full_noise_is_every_element(planned, kind):
    plan = planned(f"noise.kind={kind}")
    assert (kind, 0) == (plan.noise.NAME, plan.noise.RANK)
    assert plan.work.scoring_noise == plan.layout.size * 8 * plan.passes
    assert plan.work.update_noise == plan.layout.size * 8


def test_low_rank_noise_converts_the_weights_if_they_are_stored_in_another_type(planned):
    """Once for all members as they stream, else once for each task."""
    low, int8 = "noise.kind=lowrank", "memory.weights=int8"
    size = planned(low).layout.size
    assert planned(low).work.converted == planned(int8).work.converted == 0
    streamed = planned(low, int8, "memory.residency=streamed")
    assert streamed.work.converted == size * streamed.passes
    assert planned(low, int8, "memory.residency=resident").work.converted == 8 * size
    shared = planned(low, int8, "memory.residency=resident", "fitness.max_length=64", "fitness.micro_batch=1")
    assert shared.execution.group == 2 and shared.work.converted == 4 * size * shared.passes


# Ranks


def test_a_rank_that_the_smallest_matrix_does_not_allow_is_refused(planned):
    """Which it is, is said; one that is frozen has no noise."""
    assert planned("noise.kind=lowrank", "noise.rank=512").noise == LowRank(512)
    with pytest.raises(UserError) as error:
        planned("noise.kind=lowrank", "noise.rank=513")
    assert str(error.value) == (
        "noise.rank = 513: model.layers.0.self_attn.k_proj.weight is 512 x 1024, so its noise has a rank of at most 512; "
        "lower noise.rank, or freeze this tensor with es.groups"
    )
    frozen = 'es.groups=[{pattern="k_proj|v_proj", sigma=0, alpha=0}]'
    assert planned("noise.kind=lowrank", "noise.rank=513", frozen).noise == LowRank(513)
    with pytest.raises(UserError, match=r"noise\.rank = 1025: model\.embed_tokens\.weight is 151936 x 1024, .* at most 1024"):
        planned("noise.kind=lowrank", "noise.rank=1025", frozen)


def test_low_rank_noise_needs_a_matrix_that_is_perturbed(planned):
    frozen = 'es.groups=[{pattern="proj|embed", sigma=0, alpha=0}]'
    assert planned(frozen).noise.NAME == "gaussian"
    with pytest.raises(UserError, match=r'noise\.kind = "lowrank": the model has no matrix that is perturbed .*"gaussian"'):
        planned("noise.kind=lowrank", frozen)


# What people are told


def test_the_summary_says_whether_it_fits_how_long_it_takes_and_what_is_there_at_the_end(planned):
    plan = planned()
    memory, disk = sum(plan.memory.values()) / GIB, sum(plan.disk.values()) / GIB
    assert plan.summary(EXPECTED, 40).splitlines() == [
        "533,126,144 parameters in 26 layers",
        f"fits: needs {memory:.2f} of 64.00 GiB of memory and {disk:.2f} of 100.00 GiB of disk",
        "a step takes about 30 s on this machine, 40 steps about 20 min",
        "at the end:",
        "  runs/qwen3_0p5b_cpu/checkpoint: the model after the last step, a Hugging Face folder, 0.99 GiB in bf16",
        "  runs/qwen3_0p5b_cpu/best: the model that scored best on held-out text, if one beats the start, likewise",
    ]


def test_the_summary_of_what_does_not_fit(planned, machine):
    machine(memory=GIB // 2)
    assert planned().summary(EXPECTED, 1).splitlines()[1].startswith("does not fit: needs ")
    assert planned().summary(EXPECTED, 1).splitlines()[2].endswith(", 1 step about 30 s")


def test_the_summary_names_the_budget(planned):
    line = planned("run.minutes=90").summary(EXPECTED, 1000).splitlines()[2]
    assert line.endswith("1,000 steps about 8 h 20 min (run.minutes ends it after 90 min)")


def test_without_exports_the_summary_says_how_to_make_the_model(planned):
    none = planned("run.checkpoint_every=0", "eval.best=false", "run.dir=runs/mine", "run.checkpoint_dtype=fp32")
    assert none.summary(EXPECTED, 1).splitlines()[3:] == [
        "at the end:",
        "  runs/mine/journal.jsonl: from it, `es-lite replay runs/mine --out DIR` makes the model (1.99 GiB in fp32)",
    ]


def test_the_summary_names_the_gpus_memory(planned, machine):
    machine(gpu=40 * GIB)
    plan = planned("workers.device=cuda")
    assert f", {sum(plan.gpu.values()) / GIB:.2f} of 40.00 GiB of GPU memory and " in plan.summary(EXPECTED, 1)
    assert "\nGPU, GiB\n" in plan.details(EXPECTED)


@pytest.mark.parametrize(
    ("overrides", "how"),
    [
        (["workers.count=2"], "resident, 2 workers with 1 thread each, compute bf16, 1 pass of 16 samples"),
        (
            ["memory.residency=streamed", "workers.threads=2"],
            "streamed, 4 lanes with 2 threads each, compute bf16, 1 pass of 16 samples",
        ),
        (["workers.device=torch"], "resident, on torch, 1 lane with 8 threads each, compute bf16, 1 pass of 16 samples"),
    ],
)
def test_the_details_say_how_the_machine_is_used(planned, overrides, how):
    assert planned(*overrides).details(EXPECTED).splitlines()[0] == how


def test_the_details_add_up(planned):
    plan = planned()
    lines = plan.details(EXPECTED).splitlines()
    for name, parts in (("memory, all processes, GiB", plan.memory), ("disk, GiB", plan.disk)):
        at = lines.index(name) + 1
        table = [line.rsplit(maxsplit=1) for line in lines[at : at + len(parts)]]
        assert [(part.strip(), float(size)) for part, size in table] == [
            (part, round(size / GIB, 2)) for part, size in parts.items()
        ]
        assert lines[at + len(parts)].split()[:2] == ["total", f"{sum(parts.values()) / GIB:.2f}"]
    assert lines[-1] == "estimated from the rates of the test"


def test_the_command_prints_the_summary_before_the_details(capsys, monkeypatch):
    monkeypatch.setattr(plan, "step_time", lambda *_: EXPECTED)
    assert plan.main([RECIPE]) == 0
    summary, details = capsys.readouterr().out.split("\n\n")
    assert summary.splitlines()[0] == "533,126,144 parameters in 26 layers"
    assert "100 steps about 50 min" in summary and "at the end:" in summary
    assert "memory, all processes, GiB" in details and "memory, all processes, GiB" not in summary


def test_the_command_refuses_what_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr(plan, "step_time", lambda *_: EXPECTED)
    assert plan.main([RECIPE, "--set", "memory.limit=1 GiB"]) == 2
    output = capsys.readouterr()
    assert "does not fit: needs " in output.out
    assert output.err.startswith(f"es_lite: {RECIPE}: does not fit: needs ")


def test_the_command_measures_the_machine(capsys):
    assert plan.main([RECIPE]) == 0
    output = capsys.readouterr().out
    assert "533,126,144 parameters" in output and "a step takes about" in output and "GFLOP/s per worker" in output
