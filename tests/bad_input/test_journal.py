"""Journals that are damaged, of another model, of another version of es_lite, or not journals at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
from journals import documents_of, write_documents
from refusals import STEPS, refused_untouched
from support import RECIPE, TINY, finished_run, write_recipe

from es_lite.algorithm.jit import Threads
from es_lite.model.origin import Origin
from es_lite.recipe import Recipe
from es_lite.runs.journal import Journal


@pytest.mark.parametrize(
    ("override", "words"), [("run.seed=1", "different values"), ("model.config.hidden_size=64", "other names or shapes")]
)
def test_the_journal_of_another_model_is_refused(recipe: Path, run: Path, override: str, words: str) -> None:
    document = (
        {**RECIPE, "run": {"seed": 1}} if "seed" in override else {**RECIPE, "model": {"config": TINY | {"hidden_size": 64}}}
    )
    other = write_recipe(run.parent, **document)
    journal = run / "journal.jsonl"
    journal.unlink()
    origin = Origin.of_recipe(Recipe.load(other))
    skeleton, layout = origin.skeleton()
    Journal.create(journal, origin.header(layout, origin.source(skeleton, layout, Threads(1))))
    message = refused_untouched(recipe, run)
    assert f"{journal}: this is the journal of another model" in message and words in message


@pytest.mark.parametrize(
    ("noise", "words"), [({"kind": "rademacher"}, "'rademacher'"), ({"kind": "lowrank", "rank": 2}, "'lowrank' of rank 2")]
)
def test_a_journal_with_another_kind_of_noise_is_refused(recipe: Path, run: Path, noise: dict, words: str) -> None:
    """As the recipe is the run's, the journal must be another run's."""
    journal = run / "journal.jsonl"
    header, *records = documents_of(journal)
    write_documents(journal, [header, records[0], *(record | noise for record in records[1:])])
    message = refused_untouched(recipe, run)
    assert f"{journal}: this is the journal of another run (its noise is {words} in step 2, the recipe's 'gaussian')" in message


def one_bit_flipped(lines: list[bytes]) -> None:
    lines[2] = lines[2].replace(b'"sigma":0.02', b'"sigma":0.03')


def line_lost(lines: list[bytes]) -> None:
    del lines[2]


def lines_swapped(lines: list[bytes]) -> None:
    lines[2], lines[3] = lines[3], lines[2]


def zeros_in_the_middle(lines: list[bytes]) -> None:
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"


def line_torn_in_the_middle(lines: list[bytes]) -> None:
    lines[2] = lines[2][:40]


@pytest.mark.parametrize(
    "damage",
    [one_bit_flipped, line_lost, lines_swapped, zeros_in_the_middle, line_torn_in_the_middle],
    ids=lambda function: function.__name__,
)
def test_a_journal_with_a_broken_middle_is_refused(recipe: Path, run: Path, damage: Callable[[list[bytes]], None]) -> None:
    journal = run / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    damage(lines)
    journal.write_bytes(b"".join(lines))
    message = refused_untouched(recipe, run, f"run.iterations={STEPS + 5}")
    assert f"{journal}: line 3 is damaged" in message
    assert "restore the file" in message


@pytest.mark.parametrize("content", [b"not a journal\n", b"", b'{"format":"es_lite', b"\x7fELF\0\n"])
def test_something_else_in_the_journals_place_is_refused(recipe: Path, run: Path, content: bytes) -> None:
    (run / "journal.jsonl").write_bytes(content)
    assert f"{run}/journal.jsonl: " in refused_untouched(recipe, run)


def unknown_key_of_the_origin(documents: list[dict]) -> str:
    documents[0]["origin"]["rotation"] = 3
    return "its origin has rotation, which this version of es_lite does not know"


def unknown_key_of_a_record(documents: list[dict]) -> str:
    documents[3]["momentum"] = 0.9
    return "line 4: the record has momentum, which this version of es_lite does not know"


def unknown_kind_of_noise(documents: list[dict]) -> str:
    documents[3]["kind"] = "lattice"
    return "line 4: noise of the kind 'lattice', which this version of es_lite does not know"


def rank_that_is_none(documents: list[dict]) -> str:
    documents[3] |= {"kind": "lowrank", "rank": "4"}
    return "line 4: noise of the kind 'lowrank' with rank '4': only 'lowrank' has a rank, a whole number of at least 1"


def rank_of_another_kind(documents: list[dict]) -> str:
    documents[3]["rank"] = 4
    return "line 4: noise of the kind 'gaussian' with rank 4: only 'lowrank' has a rank"


def another_version_of_the_noise(documents: list[dict]) -> str:
    documents[0]["noise"] = "philox4x32-10/table16/9"
    return "its noise is 'philox4x32-10/table16/9', but this version of es_lite makes"


@pytest.mark.parametrize(
    "change",
    [
        unknown_key_of_the_origin,
        unknown_key_of_a_record,
        unknown_kind_of_noise,
        rank_that_is_none,
        rank_of_another_kind,
        another_version_of_the_noise,
    ],
    ids=lambda function: function.__name__,
)
def test_the_journal_of_another_version_is_refused_by_what_is_unknown(
    recipe: Path, run: Path, change: Callable[[list[dict]], str]
) -> None:
    journal = run / "journal.jsonl"
    documents = documents_of(journal)
    named = change(documents)
    write_documents(journal, documents)
    assert f"{journal}: {named}" in refused_untouched(recipe, run)


def test_what_another_version_found_of_a_step_is_refused(tmp_path: Path) -> None:
    """α is to be found from it."""
    recipe = write_recipe(tmp_path, es={"alpha": "auto"}, run={"iterations": STEPS})
    run = finished_run(recipe, tmp_path / "run")
    documents = documents_of(run / "journal.jsonl")
    del documents[2]["estimate"]["gain"]
    write_documents(run / "journal.jsonl", documents)
    assert "step 2 of the run's journal: another version of es_lite" in refused_untouched(recipe, run)
