import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from es_lite.algorithm import noise
from es_lite.algorithm.record import Record
from es_lite.errors import RunError, UserError
from es_lite.runs.journal import Journal

HEADER = {"origin": {"path": "", "seed": 2**64 - 1}, "fingerprint": {"weights": 'é\n\r"}'}}
SCORES = [-1.5, None, -2.25, 1e-300]


def record(step: int) -> Record:
    coefficients = np.random.default_rng(step).standard_normal(4).astype(np.float32)
    coefficients[step % 4] = 0
    return Record(step, 2**64 - 1, 0.1 / 3, bool(step % 2), float(np.float32(1e-5)), tuple(coefficients.tolist()))


def make(path: Path, steps: int) -> Journal:
    journal = Journal.create(path, HEADER)
    for step in range(steps):
        journal.append(record(step), SCORES)
    return journal


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "journal.jsonl"


def test_what_was_written_is_read(path):
    made = make(path, 5)
    opened = Journal.open(path)
    assert opened.records == made.records == [record(step) for step in range(5)]
    assert opened.header == made.header == {"format": "es_lite journal 1", "noise": noise.VERSION, **HEADER}


def test_an_opened_journal_goes_on_as_if_it_had_never_been_closed(path, tmp_path):
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
            assert document["step"] == number - 1
            assert document["scores"] == SCORES


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
def test_a_line_that_is_there_twice_is_found(path, lines, number):
    refused(path, lines[:number] + lines[number - 1 :], number + 1)


def test_an_empty_line_is_found(path, lines):
    refused(path, [*lines[:3], b"\n", *lines[3:]], 4)


def test_a_lost_newline_is_found(path, lines):
    refused(path, [*lines[:2], lines[2][:-1], *lines[3:]], 3)


def test_a_cut_last_line_that_ends_in_a_newline_is_damage_not_a_tear(path, lines):
    refused(path, [*lines[:-1], lines[-1][:40] + b"\n"], 5)


def rechecked(documents: list[dict]) -> bytes:
    out, check = b"", 0
    for document in documents:
        body = json.dumps(document, separators=(",", ":"))[:-1].encode()
        check = zlib.crc32(body, check)
        out += body + f',"check":"{check:08x}"}}\n'.encode()
    return out


def test_another_version_of_the_noise_is_refused_by_name(path):
    path.write_bytes(rechecked([{"format": "es_lite journal 1", "noise": "philox4x32-10/table16/9", **HEADER}]))
    with pytest.raises(UserError) as error:
        Journal.open(path)
    assert str(path) in str(error.value) and "philox4x32-10/table16/9" in str(error.value) and noise.VERSION in str(error.value)


def test_another_format_is_refused(path):
    path.write_bytes(rechecked([{"format": "es_lite journal 2", "noise": noise.VERSION}]))
    with pytest.raises(UserError, match="another version"):
        Journal.open(path)


def test_steps_out_of_order_are_refused_even_with_good_checks(path):
    made = make(path, 1)
    document = json.loads(path.read_bytes().splitlines()[1])
    document.pop("check")
    path.write_bytes(rechecked([made.header, document, document | {"step": 2}]))
    with pytest.raises(UserError, match="line 3 should be step 1"):
        Journal.open(path)


def test_a_file_that_is_no_journal_is_refused(path):
    path.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        Journal.open(path)


def test_a_missing_journal_is_refused_by_name(path):
    with pytest.raises(UserError, match=str(path)):
        Journal.open(path)


def no_space(*_):
    raise OSError(28, "No space left on device")


def short(descriptor, data, offset, pwrite=os.pwrite):
    return pwrite(descriptor, data[: len(data) // 2], offset)


@pytest.mark.parametrize(
    ("call", "failing"), [("pwrite", short), ("pwrite", no_space), ("fsync", no_space)], ids=["short", "none", "fsync"]
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
    journal.append(record(2), SCORES)  # once there is room again
    assert Journal.open(path).records == [record(step) for step in range(3)]


def test_a_new_journal_appears_with_its_whole_header_or_not_at_all(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", short)
        with pytest.raises(RunError):
            Journal.create(path, HEADER)
    assert not path.exists()
    Journal.create(path, HEADER)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert Journal.open(path).header["origin"] == HEADER["origin"]


def test_a_journal_that_was_removed_is_not_begun_anew_in_the_middle(path):
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
