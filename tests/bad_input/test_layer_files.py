"""Layer files that are damaged, truncated, of another layer, or ahead of the journal."""

import os
import re
import shutil
from pathlib import Path

import pytest
from layers import flip
from refusals import STEPS, refused_untouched
from support import digest, train_here

REMEDY = "; add --resume --rebuild"


def test_a_master_ahead_of_the_journal_is_refused(recipe: Path, run: Path) -> None:
    journal = run / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-2]))
    message = refused_untouched(recipe, run)
    assert f"{run}/master: a layer is at step {STEPS}, but {journal} ends at step {STEPS - 2}" in message
    assert f"remove {run}/master" in message


@pytest.mark.parametrize("size", [0, 20, 30000])
def test_a_truncated_file_is_named_with_what_to_do(recipe: Path, run: Path, size: int) -> None:
    file = run / "master/block-000.safetensors"
    whole = file.stat().st_size
    os.truncate(file, size)
    assert f"{file}: has {size:,} bytes, but block-000 takes {whole:,}{REMEDY}" in refused_untouched(recipe, run)


def test_the_file_of_another_layer_is_named_with_what_to_do(recipe: Path, run: Path) -> None:
    file = run / "master/embedding.safetensors"
    shutil.copy(run / "master/block-000.safetensors", file)
    assert re.search(rf"{file}: has [0-9,]+ bytes, but embedding takes [0-9,]+{REMEDY}", refused_untouched(recipe, run))


def test_the_file_of_another_layer_of_the_same_size_is_named_with_what_to_do(recipe: Path, run: Path) -> None:
    file = run / "master/block-000.safetensors"
    shutil.copy(run / "master/block-001.safetensors", file)
    expected = f"{file}: it has block-001 in fp32, but not the tensors of this model's block-000 in fp32{REMEDY}"
    assert expected in refused_untouched(recipe, run)


@pytest.mark.parametrize("at", [0, 8, 20])
def test_a_file_with_a_broken_header_is_named_with_what_to_do(recipe: Path, run: Path, at: int) -> None:
    """at: the byte that changes, of the header's length or of the header."""
    file = run / "master/block-000.safetensors"
    flip(file, at, bit=2)
    assert f"{file}: its header is damaged, or of another version{REMEDY}" in refused_untouched(recipe, run)


def test_a_bit_that_changed_is_found_and_with_rebuild_the_run_continues(recipe: Path, run: Path, reference: Path) -> None:
    file, other = run / "master/block-000.safetensors", run / "master/final.safetensors"
    flip(file, file.stat().st_size - 5, bit=2)
    assert f"{file}: its checksum does not match: its contents have changed{REMEDY}" in refused_untouched(recipe, run)
    os.truncate(other, 20)
    finished = train_here(recipe, run, resume=True, rebuild=True)
    assert finished.code == 0, finished.err
    for damaged in (file, other):
        assert f"removed, to be made again from θ₀ and the journal: {damaged}" in finished.out
    assert finished.out.count("removed") == 2
    assert digest(run) == digest(reference)
