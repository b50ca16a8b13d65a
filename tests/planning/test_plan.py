"""The plan: parameter counts of the paper's sizes, what fits, what is refused and how."""

import dataclasses
from pathlib import Path

import pytest

from es_lite import plan
from es_lite import recipe as recipes
from es_lite.runs.origin import Origin
from es_lite.system import MemoryLimit
from es_lite.weights.source import SIZES

ROOT = Path(__file__).parent.parent


def by_hand(size: dict) -> int:
    """Parameters of a Qwen3, from the table of its sizes."""
    hidden, heads, kv, head = size["hidden_size"], size["num_attention_heads"], size["num_key_value_heads"], size["head_dim"]
    attention = 2 * hidden * heads * head + 2 * hidden * kv * head + 2 * head
    block = attention + 3 * hidden * size["intermediate_size"] + 2 * hidden
    embeddings = (1 if size["tie_word_embeddings"] else 2) * size["vocab_size"] * hidden
    return size["num_hidden_layers"] * block + embeddings + hidden


@pytest.mark.parametrize("name", SIZES)
def test_the_papers_sizes_have_their_parameters_and_layers(name):
    _, layout = Origin("", name, 0, (), False, False).skeleton()
    assert layout.size == by_hand(SIZES[name])
    assert len(layout.layers) == SIZES[name]["num_hidden_layers"] + 2
    assert [t.name for t in layout.layers[-1].tensors] == (
        ["model.norm.weight"] if SIZES[name]["tie_word_embeddings"] else ["model.norm.weight", "lm_head.weight"]
    )


def planned(*overrides: str) -> plan.Plan:
    recipe = recipes.load(ROOT / "recipes" / "qwen3_0p5b_cpu.toml", overrides)
    model, layout = Origin.of_recipe(recipe).skeleton()
    return plan.make(recipe, model.config, layout)


def test_workers_on_auto_are_as_many_as_fit(monkeypatch):
    monkeypatch.setattr(plan.system, "cores", lambda: 8)
    resident = "memory.residency=resident"
    least = sum(planned(resident, "workers.count=1").memory.values())
    most = sum(planned(resident, "workers.count=8").memory.values())
    for limit, expected in ((most, 8), (most - 1, 7), (least, 1), (least - 1, 1)):
        monkeypatch.setattr(plan.system, "memory_limit", lambda _, held, limit=limit: MemoryLimit(limit, "the test"))
        assert planned(resident).workers == expected
        streamed = limit < least  # left to "auto", what does not fit is streamed
        assert planned().streamed == streamed
        if not streamed:
            assert planned().workers == expected


def test_no_more_workers_than_tasks(monkeypatch):
    monkeypatch.setattr(plan.system, "cores", lambda: 64)
    assert planned("es.population=6").workers == 3
    assert planned("es.population=6", "es.antithetic=false").workers == 6


def test_many_samples_go_in_passes_of_whole_micro_batches():
    few, many = planned("fitness.samples=8"), planned("fitness.samples=5000")
    assert (few.passes, few.pass_samples) == (1, 16)  # eval.samples = 16 are more than 8
    assert many.passes > 1
    assert many.pass_samples % 4 == 0
    assert (many.passes - 1) * many.pass_samples < 5000 <= many.passes * many.pass_samples


def test_what_does_not_fit_is_said_in_numbers():
    fits = planned()
    assert plan.shortfall(fits) is None
    short = dataclasses.replace(fits, limit=MemoryLimit(2**30, "memory.limit of the recipe"))
    assert "of memory, there are 1.00 (memory.limit of the recipe)" in plan.shortfall(short)
    full = dataclasses.replace(fits, free_disk=2**30)
    assert "of disk, there are 1.00 free" in plan.shortfall(full)


def test_the_command_prints_the_plan_and_the_refusal(capsys):
    recipe = str(ROOT / "recipes" / "qwen3_0p5b_cpu.toml")
    assert plan.main([recipe]) == 0
    output = capsys.readouterr().out
    assert "533,126,144 parameters" in output and "a step takes about" in output
    assert plan.main([recipe, "--set", "memory.limit=1 GiB"]) == 2
    assert "does not fit" in capsys.readouterr().err


def test_an_exports_disk_is_counted_where_it_is_on():
    off = planned("run.checkpoint_every=0", "eval.every=0")
    assert set(off.disk) == {"master"}
    assert set(planned().disk) == {"master", "checkpoint", "best"}
