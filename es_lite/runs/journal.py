"""The journal: the append-only file from which, with θ₀, the weights of every step can be computed.

One JSON object a line. Line 1 is the header: the model's fingerprint, the noise's version, whatever the
records need to be read. Each further line is the record of a step, in order. The last key of every line is
"check": the CRC-32, as 8 hex digits, of the line up to it, continued from the line before, so that no
line can be changed, lost or moved unnoticed. A line without its newline at the end of the file was torn by a
crash: it is dropped, and its step is done again.
"""

import errno
import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from es_lite.algorithm import noise
from es_lite.algorithm.record import Record
from es_lite.errors import RunError, UserError

FORMAT = "es_lite journal 1"


class Journal:
    """An open journal. `header` and `records` are what the file holds; `append` adds a record, durably."""

    def __init__(self, path: Path, header: dict[str, Any], records: list[Record], check: int, size: int) -> None:
        self.path = path
        self.scores: list[list[float | None]] = []
        """Of the steps in `records`, as `append` was given them."""
        self.header = header
        self.records = records
        self._check = check
        self._size = size

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> "Journal":
        """A new journal with this header, which is on disk when this returns."""
        partial = path.with_name(path.name + ".next")
        journal = cls(partial, {"format": FORMAT, "noise": noise.VERSION, **header}, [], 0, 0)
        try:
            partial.unlink(missing_ok=True)
            journal._append(journal.header)
            partial.replace(path)
            _sync_directory(path.parent)
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror})") from None
        journal.path = path
        return journal

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """The journal at `path`, a torn last line left out (and overwritten by the next record).

        Raises UserError where it is missing, not a journal of this version, or broken before its end.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); a run directory has a journal") from None
        whole = data[: data.rfind(b"\n") + 1]
        check, lines = 0, []
        for number, line in enumerate(whole.splitlines(keepends=True), start=1):
            try:
                document, check = _parse(line, check)
            except ValueError as error:
                raise UserError(
                    f"{path}: line {number} is damaged ({error}); every line before a journal's end counts: "
                    "restore the file from a copy"
                ) from None
            lines.append(document)
        if not lines or lines[0].get("format") != FORMAT:
            raise UserError(f"{path}: is not an {FORMAT!r}; it may be of another version of es_lite")
        if lines[0]["noise"] != noise.VERSION:
            raise UserError(f"{path}: its noise is {lines[0]['noise']!r}, this version makes {noise.VERSION!r}")
        records = []
        for number, document in enumerate(lines[1:]):
            if document.get("step") != number:
                raise UserError(f"{path}: line {number + 2} should be step {number}; restore the file from a copy")
            document["coefficients"] = tuple(document["coefficients"])
            records.append(Record(**{key: document[key] for key in Record.__dataclass_fields__}))
        journal = cls(path, lines[0], records, check, len(whole))
        journal.scores = [document["scores"] for document in lines[1:]]
        return journal

    def append(self, record: Record, scores: list[float | None]) -> None:
        """Adds the record of the next step; it is on disk when this returns. scores are kept for the reader.

        Raises RunError where it cannot be written; the journal is then as it was.
        """
        assert record.step == len(self.records)
        self._append({**asdict(record), "scores": scores})
        self.records.append(record)
        self.scores.append(scores)

    def _append(self, document: dict[str, Any]) -> None:
        body = json.dumps(document, separators=(",", ":"))[:-1].encode()
        check = zlib.crc32(body, self._check)
        line = body + f',"check":"{check:08x}"}}\n'.encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | (0 if self._size else os.O_CREAT), 0o644)
            try:
                os.ftruncate(descriptor, self._size)
                if os.pwrite(descriptor, line, self._size) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, self._size)
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); no weight has changed") from None
        self._check, self._size = check, self._size + len(line)


def _parse(line: bytes, check: int) -> tuple[dict[str, Any], int]:
    """The object of a line, without its check, and the check; ValueError where they do not agree."""
    body, mark, tail = line.rpartition(b',"check":"')
    if not mark or len(tail) != 11:
        raise ValueError("it has no check")
    check = zlib.crc32(body, check)
    if tail != f'{check:08x}"}}\n'.encode():
        raise ValueError("its check does not agree")
    return json.loads(body + b"}"), check


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
