"""The journal: the append-only file from which, with θ₀, the weights of every step can be computed.

One JSON object per line. Line 1 is the header: the model's fingerprint, the noise's version, whatever is needed to
read the records. Each further line is the record of a step, in order. The last key of every line is
"check": the CRC-32, as 8 hex digits, of the line up to it, continued from the line before, so no
line can be changed, lost or moved unnoticed. A line without its newline at the end of the file was torn by a
crash: it is dropped, and its step is done again. docs/journal.md is the specification.
"""

import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from es_lite.algorithm.noise.kinds import NoiseKind, kind_of
from es_lite.algorithm.noise.philox import VERSION
from es_lite.algorithm.record import Record
from es_lite.errors import RunError, UserError
from es_lite.files import open_file, write_durably, write_fully

FORMAT = "es_lite journal 1"

OTHER_KEYS = {"scores", "estimate"}
"""Of a step's line: what its update does not need."""


class Journal:
    """An open journal. `header` and `records` are what the file holds; `append` adds a record, durably."""

    def __init__(self, path: Path, header: dict[str, Any], records: list[Record], check: int, size: int) -> None:
        self.path = path
        self.scores: list[list[float | None]] = []
        """The members' scores of each step; None if not finite."""
        self.estimates: list[dict[str, Any] | None] = []
        """What α or σ was found from in each step; None if neither was "auto"."""
        self.header = header
        self.records = records
        self._check = check
        self._size = size

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> "Journal":
        """A new journal with this header, which is on disk when this returns. Raises RunError if it cannot be written."""
        header = {"format": FORMAT, "noise": VERSION, **header}
        line, check = _line(header, 0)
        try:
            write_durably(path, line.decode())
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror})") from None
        return cls(path, header, [], check, len(line))

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """The journal at `path`, without a torn last line (which the next record overwrites).

        Raises UserError if it is missing, not a journal of this version, damaged before its end, or has records that this
        version cannot apply.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); expected the journal of a run") from None
        whole = data[: data.rfind(b"\n") + 1]
        check, lines = 0, []
        for number, line in enumerate(whole.splitlines(keepends=True), start=1):
            try:
                document, check = _parse(line, check)
            except ValueError as error:
                raise UserError(
                    f"{path}: line {number} is damaged ({error}); every line of a journal is needed: restore the file from a copy"
                ) from None
            lines.append(document)
        if not lines or lines[0].get("format") != FORMAT:
            raise UserError(f"{path}: is not an {FORMAT!r}; another version of es_lite may have written it")
        if lines[0].get("noise") != VERSION:
            raise UserError(f"{path}: its noise is {lines[0].get('noise')!r}, but this version of es_lite makes {VERSION!r}")
        records = []
        for number, document in enumerate(lines[1:]):
            try:
                records.append(_record(document, number))
            except ValueError as error:
                raise UserError(f"{path}: line {number + 2}: {error}") from None
        journal = cls(path, lines[0], records, check, len(whole))
        journal.scores = [document["scores"] for document in lines[1:]]
        journal.estimates = [document.get("estimate") for document in lines[1:]]
        return journal

    def check_noise(self, noise: NoiseKind) -> None:
        """Raises UserError if a step's noise is of another kind or rank."""
        for record in self.records:
            if (record.kind, record.rank) != (noise.NAME, noise.RANK):
                raise UserError(
                    f"{self.path}: this is the journal of another run (its noise is {_words(record.noise)} in step "
                    f"{record.step + 1}, the recipe's {_words(noise)}); restore the run's own journal"
                )

    def until(self, step: int | None) -> list[Record]:
        """The records of the first `step` steps; None: of all. Raises UserError if there are fewer."""
        if step is not None and not 0 <= step <= len(self.records):
            raise UserError(f"--step {step}: {self.path} has steps 0 to {len(self.records)}")
        return self.records[:step]

    def append(self, record: Record, scores: list[float | None], estimate: dict[str, Any] | None = None) -> None:
        """Adds the record of the next step; it is on disk when this returns. scores: for people and for metrics.
        estimate: for the α and σ of the steps after it.

        Raises RunError if it cannot be written; the journal is then as it was.
        """
        assert record.step == len(self.records)
        document = asdict(record)
        if not record.rank:
            del document["rank"]  # versions that know no rank can read the other kinds
        if not record.anchor:
            del document["anchor"]
        self._append({**document, "scores": scores, **({"estimate": estimate} if estimate else {})})
        self.records.append(record)
        self.scores.append(scores)
        self.estimates.append(estimate)

    def _append(self, document: dict[str, Any]) -> None:
        line, check = _line(document, self._check)
        try:
            descriptor = open_file(self.path, os.O_WRONLY)
            try:
                os.ftruncate(descriptor, self._size)
                write_fully(descriptor, memoryview(line), self._size)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, self._size)
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); no weight has changed") from None
        self._check, self._size = check, self._size + len(line)


def _words(noise: NoiseKind) -> str:
    return f"{noise.NAME!r} of rank {noise.RANK}" if noise.RANK else repr(noise.NAME)


def _line(document: dict[str, Any], check: int) -> tuple[bytes, int]:
    """The line of an object, and its check, continued from `check`."""
    body = json.dumps(document, separators=(",", ":"))[:-1].encode()
    check = zlib.crc32(body, check)
    return body + f',"check":"{check:08x}"}}\n'.encode(), check


def _record(document: dict[str, Any], step: int) -> Record:
    """The record in a line's object. Raises ValueError, in words, if this version cannot apply it."""
    if document.get("step") != step:
        raise ValueError(f"expected step {step}, found {document.get('step')}; restore the file from a copy")
    if unknown := document.keys() - Record.__dataclass_fields__.keys() - OTHER_KEYS:
        raise ValueError(
            f"the record has {', '.join(sorted(unknown))}, which this version of es_lite does not know and which may change what "
            "the step does; use the version that wrote it"
        )
    fields = {name: value for name, value in document.items() if name not in OTHER_KEYS}
    try:
        _ = document["scores"]
        record = Record(**fields | {"coefficients": tuple(document["coefficients"])})
        kind_of(record.kind, record.rank)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the record is incomplete ({error}); restore the file from a copy") from None
    return record


def _parse(line: bytes, check: int) -> tuple[dict[str, Any], int]:
    """The object of a line, without its check, and the check. Raises ValueError if they do not agree."""
    body, mark, tail = line.rpartition(b',"check":"')
    if not mark or len(tail) != 11:
        raise ValueError("it has no check")
    check = zlib.crc32(body, check)
    if tail != f'{check:08x}"}}\n'.encode():
        raise ValueError("its check does not match")
    return json.loads(body + b"}"), check
