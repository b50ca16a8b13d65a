"""The journal: what was written is read, what a crash tore is dropped, and every other change to the file is refused."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from journals import documents_of, write_documents
from plain import KINDS

from es_lite.algorithm.noise.philox import VERSION
from es_lite.algorithm.record import Record
from es_lite.errors import RunError, UserError
from es_lite.runs.journal import Journal

HEADER = {"origin": {"path": "", "seed": 2**64 - 1}, "fingerprint": {"weights": 'é\n\r"}'}}
SCORES = [-1.5, None, -2.25, 1e-300]


def record(step: int, **noise) -> Record:
    """noise: `kind` and `rank`."""
    coefficients = np.random.default_rng(step).standard_normal(4).astype(np.float32)
    coefficients[step % 4] = 0
    return Record(step, 2**64 - 1, 0.1 / 3, bool(step % 2), float(np.float32(1e-5)), tuple(coefficients.tolist()), **noise)


def make(path: Path, steps: int) -> Journal:
    journal = Journal.create(path, HEADER)
    for step in range(steps):
        journal.append(record(step), SCORES)
    return journal


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "journal.jsonl"


def test_what_was_written_is_what_is_read(path):
    made = make(path, 5)
    opened = Journal.open(path)
    assert opened.records == made.records == [record(step) for step in range(5)]
    assert opened.scores == made.scores == [SCORES] * 5
    assert opened.header == made.header == {"format": "es_lite journal 1", "noise": VERSION, **HEADER}


def test_closing_and_opening_a_journal_between_steps_changes_no_byte(path, tmp_path):
    make(tmp_path / "whole.jsonl", 4)
    make(path, 2)
    for step in (2, 3):
        Journal.open(path).append(record(step), SCORES)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_file_is_as_documented(path):
    make(path, 2)
    check = 0
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
        body, _, tail = line.rpartition(b',"check":"')
        check = zlib.crc32(body, check)
        assert tail == f'{check:08x}"}}'.encode()
        document = json.loads(line)
        assert list(document)[-1] == "check"
        if number:
            assert " ".join(document) == "step seed sigma antithetic decay coefficients kind scores check"
            assert document["step"] == number - 1
            assert document["scores"] == SCORES


def test_every_kind_of_noise_is_read_as_it_was_written_and_only_low_rank_has_a_rank(path):
    """A record of another kind is what versions write, and read, that know no rank."""
    kinds = [{"kind": noise.NAME, "rank": noise.RANK} for noise in KINDS.values()]
    journal = Journal.create(path, HEADER)
    for step, noise in enumerate(kinds):
        journal.append(record(step, **noise), SCORES)
    found = Journal.open(path).records
    assert found == journal.records == [record(step, **noise) for step, noise in enumerate(kinds)]
    assert [each.noise for each in found] == list(KINDS.values())
    for document, noise in zip(documents_of(path)[1:], kinds, strict=True):
        rank = " rank" if noise["rank"] else ""
        assert " ".join(document) == f"step seed sigma antithetic decay coefficients kind{rank} scores"
        assert document["kind"] == noise["kind"] and document.get("rank", 0) == noise["rank"]


@pytest.mark.parametrize("rank", ["1", 0, -1, 1.5, 2.0, True, None, [1], {}])
def test_a_rank_that_is_none_is_refused_with_its_line(path, rank):
    header, first, second = made_documents(path, 2)
    before = write_documents(path, [header, first, second | {"kind": "lowrank", "rank": rank}])
    with pytest.raises(UserError) as error:
        Journal.open(path)
    assert str(error.value) == (
        f"{path}: line 3: noise of the kind 'lowrank' with rank {rank!r}: only 'lowrank' has a rank, a whole number of at least 1"
    )
    assert path.read_bytes() == before


def test_low_rank_noise_without_a_rank_and_a_rank_of_another_kind_are_refused_with_their_line(path):
    header, first = made_documents(path, 1)
    for change in ({"kind": "lowrank"}, {"kind": "gaussian", "rank": 2}, {"kind": "rademacher", "rank": 1}):
        write_documents(path, [header, first | change])
        with pytest.raises(UserError, match=f"{path}: line 2: .*'{change['kind']}'.*only 'lowrank' has a rank"):
            Journal.open(path)


def test_a_record_is_on_disk_when_append_returns(path, monkeypatch):
    journal, synced = make(path, 0), []
    fsync = os.fsync

    def watched(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    journal.append(record(0), SCORES)
    assert path.stat().st_size in synced


def test_a_last_line_torn_at_any_byte_is_dropped_and_written_again(path):
    make(path, 3)
    whole = path.read_bytes()
    last = whole.rfind(b"\n", 0, -1) + 1
    for size in range(last, len(whole)):
        path.write_bytes(whole[:size])
        journal = Journal.open(path)
        assert journal.records == [record(0), record(1)], size
        assert path.stat().st_size == size, "opening must not write"
        journal.append(record(2), SCORES)
        assert path.read_bytes() == whole, size


@pytest.mark.parametrize("garbage", [b"\0" * 4096, b"\xff\xfe", b"{" * 5000], ids=["zeros", "bytes", "long"])
def test_what_a_crash_left_after_the_last_line_is_dropped(path, garbage):
    make(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + garbage)
    journal = Journal.open(path)
    assert len(journal.records) == 2
    journal.append(record(2), SCORES)
    assert path.read_bytes()[: len(whole)] == whole
    assert Journal.open(path).records == [record(0), record(1), record(2)]


def refused(path: Path, lines: list[bytes], number: int) -> None:
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()
    with pytest.raises(UserError) as error:
        Journal.open(path)
    assert str(path) in str(error.value) and f"line {number} " in str(error.value)
    assert path.read_bytes() == before


@pytest.fixture
def lines(path) -> list[bytes]:
    make(path, 4)
    return path.read_bytes().splitlines(keepends=True)


def test_a_changed_byte_anywhere_is_found(path, lines):
    for number, line in enumerate(lines):
        for place in range(0, len(line) - 1, 7):
            changed = line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :]
            refused(path, [*lines[:number], changed, *lines[number + 1 :]], number + 1)


def test_a_changed_coefficient_is_found(path, lines):
    start = lines[2].index(b'"coefficients":[') + len(b'"coefficients":[')
    end = lines[2].index(b",", start)
    refused(path, [*lines[:2], lines[2][:start] + b"0.5" + lines[2][end:], *lines[3:]], 3)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_removed_line_is_found(path, lines, number):
    refused(path, lines[: number - 1] + lines[number:], number)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_swapped_lines_are_found(path, lines, number):
    lines[number - 1], lines[number] = lines[number], lines[number - 1]
    refused(path, lines, number)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_repeated_line_is_found(path, lines, number):
    refused(path, lines[:number] + lines[number - 1 :], number + 1)


def test_an_empty_line_is_found(path, lines):
    refused(path, [*lines[:3], b"\n", *lines[3:]], 4)


def test_a_lost_newline_is_found(path, lines):
    refused(path, [*lines[:2], lines[2][:-1], *lines[3:]], 3)


def test_a_cut_last_line_that_ends_in_a_newline_is_damage_not_a_tear(path, lines):
    refused(path, [*lines[:-1], lines[-1][:40] + b"\n"], 5)


def made_documents(path: Path, steps: int) -> list[dict]:
    """The objects of a good journal, without their checks."""
    make(path, steps)
    return documents_of(path)


def test_another_version_of_the_noise_is_refused_by_name(path):
    header, *records = made_documents(path, 1)
    write_documents(path, [header | {"noise": "philox4x32-10/table16/9"}, *records])
    with pytest.raises(UserError) as error:
        Journal.open(path)
    assert str(path) in str(error.value) and "philox4x32-10/table16/9" in str(error.value) and VERSION in str(error.value)


def test_another_format_is_refused(path):
    header, *records = made_documents(path, 1)
    write_documents(path, [header | {"format": "es_lite journal 2"}, *records])
    with pytest.raises(UserError, match="is not an 'es_lite journal 1'; another version of es_lite may have written it"):
        Journal.open(path)


@pytest.mark.parametrize("steps", [(0, 2), (0, 0), (1, 2)])
def test_steps_out_of_order_are_refused_even_if_the_checks_agree(path, steps):
    header, record = made_documents(path, 1)
    write_documents(path, [header, *(record | {"step": step} for step in steps)])
    line, expected = (2, 0) if steps[0] else (3, 1)
    found = steps[expected]
    with pytest.raises(UserError, match=f"{path}: line {line}: expected step {expected}, found {found}"):
        Journal.open(path)


def test_what_this_version_does_not_know_is_refused_by_name_if_it_may_change_a_step(path):
    """The lines' checks agree: it is another version of es_lite that wrote them."""
    header, first, second = made_documents(path, 2)
    for change, named in (
        ({"rotation": 3, "momentum": 0.9}, "the record has momentum, rotation, which this version of es_lite does not know"),
        ({"kind": "lattice"}, "noise of the kind 'lattice', which this version of es_lite does not know"),
    ):
        before = write_documents(path, [header, first, second | change])
        with pytest.raises(UserError) as error:
            Journal.open(path)
        assert f"{path}: line 3: " in str(error.value) and named in str(error.value)
        assert path.read_bytes() == before


@pytest.mark.parametrize("key", ["seed", "coefficients", "scores"])
def test_a_record_that_lacks_something_is_refused_by_name(path, key):
    header, first, second = made_documents(path, 2)
    del second[key]
    write_documents(path, [header, first, second])
    with pytest.raises(UserError, match=f"{path}: line 3: .*{key}"):
        Journal.open(path)


def test_a_record_without_a_key_that_has_a_default_is_read(path):
    """As records are that an earlier version of es_lite wrote, before there was such a key."""
    header, first = made_documents(path, 1)
    del first["kind"]
    write_documents(path, [header, first])
    assert Journal.open(path).records == [record(0)]


def test_what_this_version_does_not_know_is_ignored_if_it_is_information_about_the_run(path):
    header, *records = made_documents(path, 2)
    write_documents(path, [header | {"weather": "fair"}, *records])
    assert Journal.open(path).records == [record(0), record(1)]
    assert Journal.open(path).header["weather"] == "fair"


def test_a_file_that_is_no_journal_is_refused(path):
    path.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        Journal.open(path)


def test_a_missing_journal_is_refused_by_name(path):
    with pytest.raises(UserError, match=str(path)):
        Journal.open(path)


def no_space(*_):
    raise OSError(28, "No space left on device")


def half(descriptor, data, offset, pwrite=os.pwrite):
    """Writes half of a line, as a disk does that is full after that: the other half fails."""
    if data[:1] != b"{":
        no_space()
    return pwrite(descriptor, data[: len(data) // 2], offset)


@pytest.mark.parametrize(
    ("call", "failing"), [("pwrite", half), ("pwrite", no_space), ("fsync", no_space)], ids=["half", "none", "fsync"]
)
def test_an_append_that_fails_leaves_the_journal_as_it_was(path, monkeypatch, call, failing):
    journal = make(path, 2)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(RunError) as error:
            journal.append(record(2), SCORES)
    assert str(path) in str(error.value) and "No space left on device" in str(error.value)
    assert path.read_bytes() == before
    assert journal.records == [record(0), record(1)]
    journal.append(record(2), SCORES)  # there is room again
    assert Journal.open(path).records == [record(step) for step in range(3)]


def test_a_line_that_the_system_writes_in_pieces_is_whole(path, tmp_path, monkeypatch):
    make(tmp_path / "whole.jsonl", 2)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:100], offset))
    make(path, 2)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_new_journal_appears_with_its_whole_header_or_not_at_all(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        with pytest.raises(RunError):
            Journal.create(path, HEADER)
    assert not path.exists()
    Journal.create(path, HEADER)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert Journal.open(path).header["origin"] == HEADER["origin"]


def test_a_journal_that_was_removed_is_not_created_again_without_its_beginning(path):
    journal = make(path, 2)
    path.unlink()
    with pytest.raises(RunError, match=str(path)):
        journal.append(record(2), SCORES)
    assert not path.exists()


def test_a_journal_that_cannot_be_created_is_an_error_of_the_run(tmp_path):
    with pytest.raises(RunError, match="no-such-folder"):
        Journal.create(tmp_path / "no-such-folder" / "journal.jsonl", HEADER)


def test_only_the_next_step_can_be_appended(path):
    with pytest.raises(AssertionError):
        make(path, 2).append(record(3), SCORES)
