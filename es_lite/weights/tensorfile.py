"""safetensors files read and written in slices, so that no tensor need be in memory whole.

The safetensors library validates a file (`open_tensors`), after which plain positioned reads
serve any slice: its own readers map the file or hold whole tensors. Writing: the header with all shapes
first, then the data from front to back. Format: 8 bytes little-endian header length, the header as JSON,
the tensors' bytes in the order and at the offsets that the header gives.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from es_lite.algorithm import formats
from es_lite.errors import RunError, UserError

_NUMPY: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: absolute byte `offset` in `file`, `dtype` "F32" | "BF16" | "F16" (others cannot be read)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def open_tensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by name and the metadata of a safetensors file, after the library has validated it.

    Raises UserError naming the file where it is missing, truncated or malformed.
    """
    try:
        with safe_open(path, framework="numpy") as _:
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error}); fetch or make it anew") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    metadata = header.pop("__metadata__", None) or {}
    start = 8 + length
    entries = {
        name: Entry(path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return entries, metadata


class Reader:
    """Reads slices of tensors as float32; keeps one file open at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._descriptor = -1

    def raw(self, entry: Entry, start: int, count: int) -> np.ndarray:
        """Elements start … start + count - 1 as stored (bfloat16 as uint16)."""
        if entry.dtype not in _NUMPY:
            raise UserError(f"{entry.file}: tensors of type {entry.dtype} cannot be used; save the model as bf16 or fp32")
        try:
            return self._read(entry, start, np.empty(count, _NUMPY[entry.dtype]))
        except OSError as error:
            raise RunError(f"{entry.file}: cannot be read ({error.strerror})") from None

    def _read(self, entry: Entry, start: int, out: np.ndarray) -> np.ndarray:
        if entry.file != self._path:
            self.close()
            self._descriptor = os.open(entry.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._path = entry.file
        view = memoryview(out).cast("B")
        position = entry.offset + start * out.itemsize
        done = 0
        while done < len(view):
            got = os.preadv(self._descriptor, [view[done:]], position + done)
            if got == 0:
                raise UserError(f"{entry.file}: ends too soon; fetch or make it anew")
            done += got
        return out

    def float32(self, entry: Entry, start: int, count: int) -> np.ndarray:
        """Elements start … start + count - 1 as float32 [count]; every stored type converts exactly."""
        stored = self.raw(entry, start, count)
        if entry.dtype == "F32":
            return stored
        if entry.dtype == "F16":
            return stored.astype(np.float32)
        return formats.as_float32(stored)

    def close(self) -> None:
        if self._path is not None:
            os.close(self._descriptor)
            self._path = None

    __del__ = close


class Writer:
    """Writes one safetensors file front to back; as a context manager it is complete, or absent, at the end.

    shapes: name to shape, in the order of the data; dtype: "F32" or "BF16" for all. The data goes to `path`
    plus ".next", which replaces `path` when the block ends well.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, metadata: dict[str, str]) -> None:
        self.path = path
        self.dtype = dtype
        self._partial = path.with_name(path.name + ".next")
        itemsize = _NUMPY[dtype].itemsize
        header: dict[str, object] = {"__metadata__": metadata}
        offset = 0
        for name, shape in shapes.items():
            end = offset + int(np.prod(shape, dtype=np.int64)) * itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._size = len(self._head) + offset

    def __enter__(self) -> "Writer":
        self._file = self._partial.open("wb", buffering=0)
        try:
            self._write(self._head)
        except BaseException:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            raise
        return self

    def write(self, values: np.ndarray) -> None:
        """Appends float32 values, rounded to nearest even where the file is bfloat16."""
        if self.dtype == "BF16":
            rounded = np.empty(values.size, np.uint16)
            formats.to_bf16(rounded, values)
            values = rounded
        self._write(memoryview(np.ascontiguousarray(values)).cast("B"))

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def __exit__(self, kind: type | None, *_: object) -> None:
        complete = kind is None and self._file.tell() == self._size
        self._file.close()
        if not complete:
            self._partial.unlink(missing_ok=True)
            assert kind is not None, f"{self.path}: fewer or more bytes written than its header says"
            return
        self._partial.replace(self.path)
