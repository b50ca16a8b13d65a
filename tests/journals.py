"""Journals written by hand: whatever their lines say, the checks agree, as if another version of es_lite had written them."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path


def documents_of(path: Path) -> list[dict]:
    """The objects of the journal's lines, without their checks: the header, then the records."""
    return [{key: value for key, value in json.loads(line).items() if key != "check"} for line in path.read_bytes().splitlines()]


def write_documents(path: Path, documents: Sequence[dict]) -> bytes:
    """Writes a journal of these objects. Returns its bytes."""
    out, check = b"", 0
    for document in documents:
        body = json.dumps(document, separators=(",", ":"))[:-1].encode()
        check = zlib.crc32(body, check)
        out += body + f',"check":"{check:08x}"}}\n'.encode()
    path.write_bytes(out)
    return out
