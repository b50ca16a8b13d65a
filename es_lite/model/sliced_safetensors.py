"""Reads and writes safetensors files in slices, so no whole tensor has to be in memory.

The safetensors library validates a file (`open_tensors`); slices are then read directly, since the library's own readers map the
file or load whole tensors. Format: 8 bytes little-endian header length, the header as JSON, then the tensors' bytes at the
offsets in the header.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors import SafetensorError, safe_open

from es_lite.algorithm import formats
from es_lite.errors import DamagedFile, RunError, UserError
from es_lite.files import NewFile, TruncatedFile, open_file, read_fully, view_of

_NUMPY: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}

_NAMES = {
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "bool": "BOOL",
}

LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: at byte `offset` of `file`. dtype: "F32", "BF16" or "F16"; others cannot be read."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def open_tensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by name and the metadata of a safetensors file, after the library has validated it.

    Raises DamagedFile if it is truncated or malformed, UserError if it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(LFS)) == LFS:
                raise UserError(f"{path}: is a pointer of git-lfs, not the file itself; run `git lfs pull` in its folder")
        with safe_open(path, framework="numpy") as _:
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, ValueError) as error:
        raise DamagedFile(f"{path}: truncated or not a safetensors file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); download it, or create it again") from None
    metadata = header.pop("__metadata__", None) or {}
    start = 8 + length
    entries = {
        name: Entry(path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return entries, metadata


class Reader:
    """Reads slices of tensors, with one file open at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._descriptor = -1

    def raw(self, entry: Entry, start: int, count: int) -> np.ndarray:
        """Elements start … start + count - 1 as stored (bfloat16 as uint16).

        Raises UserError if their type is not supported, DamagedFile if the file is too short, RunError if it cannot be read.
        """
        if entry.dtype not in _NUMPY:
            raise UserError(f"{entry.file}: tensors of type {entry.dtype} cannot be used; save the model as bf16 or fp32")
        out = np.empty(count, _NUMPY[entry.dtype])
        try:
            if entry.file != self._path:
                self.close()
                self._descriptor = open_file(entry.file, os.O_RDONLY)
                self._path = entry.file
            read_fully(self._descriptor, view_of(out), entry.offset + start * out.itemsize, out.nbytes)
        except TruncatedFile as error:
            raise DamagedFile(f"{entry.file}: cannot be read ({error.strerror})") from None
        except OSError as error:
            raise RunError(f"{entry.file}: cannot be read ({error.strerror})") from None
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
    """Writes a safetensors file from front to back. A context manager: if the block raises, the file is not written."""

    def __init__(
        self,
        path: Path,
        shapes: dict[str, tuple[int, ...]],
        dtype: str,
        metadata: dict[str, str],
        stored: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """shapes: name to shape, in the order of the data; dtype: "F32" or "BF16" for all of them. stored: tensors of any type
        that follow them. Raises OSError.
        """
        self._dtype = dtype
        self._stored = [np.ascontiguousarray(values) for values in stored.values()]
        header: dict[str, object] = {"__metadata__": metadata}
        offset = 0

        def add(name: str, shape: tuple[int, ...], dtype: str, itemsize: int) -> None:
            nonlocal offset
            end = offset + int(np.prod(shape, dtype=np.int64)) * itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end

        for name, shape in shapes.items():
            add(name, shape, dtype, _NUMPY[dtype].itemsize)
        for name, values in stored.items():
            add(name, values.shape, _NAMES[values.dtype.name], values.itemsize)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._left = offset
        self._path = path

    def __enter__(self) -> "Writer":
        self._file = NewFile(self._path)
        try:
            self._file.append(self._head)
        except BaseException:
            self._file.discard()
            raise
        return self

    def write(self, values: np.ndarray) -> None:
        """Appends float32 values, rounded (to nearest, ties to even) if the file is bfloat16. Raises OSError."""
        if self._dtype == "BF16":
            rounded = np.empty(values.size, np.uint16)
            formats.to_bf16(rounded, values)
            values = rounded
        self._file.append(view_of(np.ascontiguousarray(values)))
        self._left -= values.nbytes

    def __exit__(self, kind: type | None, *_: object) -> None:
        for values in self._stored if kind is None else ():
            self._file.append(view_of(values))
            self._left -= values.nbytes
        if kind is not None or self._left:
            self._file.discard()
            assert kind is not None, f"{self._path}: fewer or more bytes written than its header says"
            return
        self._file.commit()
