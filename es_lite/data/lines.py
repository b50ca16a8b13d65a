"""Lines of UTF-8 text files, and the JSON in them. What cannot be read raises `UserError`."""

import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from es_lite.errors import UserError

PACKED = (".gz", ".zst")
READ_BYTES = 2**14


def suffix_of(file: Path) -> str:
    """The kind of file, such as ".jsonl": its suffix in small letters, without that of a compression."""
    return (Path(file.stem).suffix if file.suffix.lower() in PACKED else file.suffix).lower()


def _open(file: Path) -> IO[bytes]:
    """The file's bytes, decompressed if it is a .gz or a .zst."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(file, "rb"))
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{file}: reading .zst needs a package: pip install zstandard; or decompress it") from None
        return io.BufferedReader(_Frames(file, zstandard.ZstdDecompressor))
    return file.open("rb")


class _Frames(io.RawIOBase):
    """What the frames of a .zst decompress to; zstandard's own reader takes a file that is cut off for its end."""

    def __init__(self, file: Path, decompressor: Callable[[], Any]) -> None:
        self._file, self._decompressor = file.open("rb"), decompressor
        self._frame: Any = None
        self._made, self._rest = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._made:
            packed = self._rest or self._file.read(READ_BYTES)
            if not packed:
                if self._frame and not self._frame.eof:
                    raise EOFError("it ends too early")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor().decompressobj()
            self._made = self._frame.decompress(packed)
            self._rest = self._frame.unused_data if self._frame.eof else b""
        count = min(len(buffer), len(self._made))
        buffer[:count] = self._made[:count]
        self._made = self._made[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Line numbers, from 1, and lines, each with a single newline as its end. Raises OSError too."""
    try:
        yield from _lines(file)
    except Exception as error:
        if not isinstance(error, EOFError | zlib.error | gzip.BadGzipFile) and type(error).__name__ != "ZstdError":
            raise
        raise UserError(f"{file}: is damaged, or not compressed at all ({error})") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if b"\0" in line:
                raise UserError(f"{file}:{number}: has a NUL byte: a binary file, or UTF-16; expected UTF-8 text")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{file}:{number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
            yield number, text[:-2] + "\n" if text.endswith("\r\n") else text


def parse_line(line: str, where: str) -> Any:
    """The JSON value of a .jsonl file's line."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {why_not_json(error)}; expected one object per line") from None


def why_not_json(error: Exception) -> str:
    """What `json.loads` has raised, in words."""
    if isinstance(error, json.JSONDecodeError | RecursionError):
        return f"not JSON ({error})"
    return f"has a number of more than {sys.get_int_max_str_digits():,} digits, which Python does not read; write it as text"


def check_characters(text: str, where: str, name: str) -> None:
    """Raises `UserError` if `text`, called `name`, cannot be encoded: JSON can spell half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f'{where}: "{name}" has half a surrogate pair (\\ud800 to \\udfff), not a character') from None
