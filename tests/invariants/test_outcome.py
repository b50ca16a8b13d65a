"""What a finished run leaves: metrics, exports, and a directory that is not run again by mistake."""

import json
from pathlib import Path

import pytest
from support import assert_same_bits, contents, metrics, tensors, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer

METRICS = (
    "step score_mean score_std score_best eval_score sigma alpha tokens tokens_per_second step_seconds score_seconds "
    "update_seconds pss_gib peak_pss_gib read_gib written_gib workers signal tied gain_expected drift_rms"
)


def test_metrics_have_the_documented_names_and_one_line_per_step(reference: Path) -> None:
    first, *steps = metrics(reference)
    assert (first["step"], first["eval_score"] is not None) == (0, True)
    assert [line["step"] for line in steps] == list(range(1, 101))
    for line in steps:
        assert " ".join(line) == METRICS


def test_evaluations_are_done_before_the_first_step_and_after_the_last(reference: Path) -> None:
    assert [line["step"] for line in metrics(reference) if line["eval_score"] is not None] == list(range(0, 101, 10))


@pytest.mark.slow
def test_the_last_step_is_evaluated_and_exported_even_if_it_is_not_due(three_steps: Path) -> None:
    assert [line["step"] for line in metrics(three_steps) if line["eval_score"] is not None] == [0, 2, 3]
    assert json.loads((three_steps / "checkpoint/es_lite.json").read_text())["step"] == 3


def test_exports_load_with_transformers(reference: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference / "checkpoint")
    assert_same_bits({name: p.detach().numpy() for name, p in model.named_parameters()}, tensors(reference))
    tokenizer = AutoTokenizer.from_pretrained(reference / "checkpoint")
    assert tokenizer.decode(tokenizer("the quick brown fox")["input_ids"]) == "the quick brown fox"
    assert AutoModelForCausalLM.from_pretrained(reference / "best") is not None


def test_exports_have_a_model_card(reference: Path) -> None:
    card = (reference / "checkpoint/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "100 steps, started from random weights" in card
    assert "[es]" in card


def test_a_finished_run_is_not_run_again(recipe: Path, reference: Path) -> None:
    before = contents(reference)
    finished = train_here(recipe, reference)
    assert finished.code == 2
    assert f"{reference}: holds a run already; add --resume to continue it" in finished.err
    assert contents(reference) == before
