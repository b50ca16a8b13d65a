"""Lines of UTF-8 text files, and the JSON in them. What cannot be read raises `UserError`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from es_lite.errors import UserError


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Line numbers, from 1, and lines, each with a single newline as its end. Raises OSError too."""
    with file.open("rb") as stream:
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
        raise UserError(f"{where}: not JSON ({error}); expected one object per line") from None


def check_characters(text: str, where: str, name: str) -> None:
    """Raises `UserError` if `text`, called `name`, cannot be encoded: JSON can spell half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f'{where}: "{name}" has half a surrogate pair (\\ud800 to \\udfff), not a character') from None
