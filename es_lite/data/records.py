"""Records, that is objects with named columns, from JSON and parquet files and from Hugging Face datasets.

Values are Python's, and such as JSON can hold. What cannot be used raises `UserError`.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from es_lite.data.lines import check_characters, numbered_lines, parse_line, suffix_of, why_not_json
from es_lite.errors import UserError
from es_lite.files import expanded

SUFFIXES = (".jsonl", ".json", ".parquet")
KINDS = (
    "a .jsonl, .json or .parquet file (also .jsonl.gz), a folder of such files, or a Hugging Face dataset such as "
    "openai/gsm8k:main:train"
)

HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^:]*))?(:(?P<split>.+))?")
"""owner/name, owner/name:config or owner/name:config:split; the config may be empty."""

DEPTH = 100
"""Lists and objects may be nested this deep in a column: far below where Python's own recursion ends."""

Record = dict[str, Any]


def read_records(path: str) -> Iterator[tuple[str, Record]]:
    """All records, in order, each with where it stands: "FILE:LINE", or "PATH, row 3", counted from 1.

    path: a file or folder (sorted by name), a folder that `Dataset.save_to_disk` wrote, or a dataset's name at the hub,
    optionally with its config and split (otherwise "train").
    """
    try:
        yield from _records(path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None


def kind(value: Any) -> str:
    """What `value` is, in JSON's words."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a value of type {type(value).__name__}")


def shown(value: Any) -> str:
    """`value` as JSON, shortened, for messages."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"


def _records(path: str) -> Iterator[tuple[str, Record]]:
    place = expanded(path)
    hub = HUB_NAME.fullmatch(path)
    if path and place.is_dir():
        records = _folder(place)
    elif path and place.exists():
        records = _file(place)
    elif hub and suffix_of(place) not in SUFFIXES and not place.parent.exists():
        records = _hub(path, hub["name"], hub["config"] or None, hub["split"] or "train")
    else:
        raise UserError(f'"{path}": no such file or folder{_near(place)}; expected {KINDS}')
    for where, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object with named columns, got {kind(record)}")
        for name, value in record.items():
            check_characters(name, where, "a column's name")
            _check(value, where, name, DEPTH)
        yield where, record


def _check(value: Any, where: str, name: str, depth: int) -> None:
    """Raises UserError unless JSON can hold `value`, of the column `name`."""
    column = f'{where}: the column "{name}"'
    remedy = "leave it out, or store it as text"
    if depth == 0:
        raise UserError(f"{column} has lists or objects nested more than {DEPTH} deep; {remedy}")
    if isinstance(value, str):
        check_characters(value, where, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{column} has the number {value}, which JSON cannot hold; {remedy}, or take null")
    elif isinstance(value, list):
        for item in value:
            _check(item, where, name, depth - 1)
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            check_characters(key, where, name)
            _check(item, where, name, depth - 1)
    elif not isinstance(value, bool | int | float | None):
        raise UserError(f"{column} has {kind(value)}, which JSON cannot hold; {remedy}")


def _near(place: Path) -> str:
    """A hint at a file beside `place` with almost its name."""
    if not place.parent.is_dir():
        return ""
    names = difflib.get_close_matches(place.name, [file.name for file in place.parent.iterdir()], n=1)
    return f' (did you mean "{place.with_name(names[0])}"?)' if names else ""


def _folder(folder: Path) -> Iterator[tuple[str, Any]]:
    saved = ("dataset_dict.json", "state.json")  # of several splits, and of one
    if any((folder / name).is_file() for name in saved):
        yield from _saved(folder)
        return
    files = sorted(file for file in folder.iterdir() if suffix_of(file) in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{folder}: no .jsonl, .json or .parquet file in this folder, and no saved dataset")
    for file in files:
        yield from _file(file)


def _file(file: Path) -> Iterator[tuple[str, Any]]:
    suffix = suffix_of(file)
    if suffix not in SUFFIXES:
        raise UserError(f'{file}: unknown kind of file "{file.suffix}"; expected {KINDS}')
    if suffix == ".parquet":
        yield from parquet_rows(file)
    elif suffix == ".json":
        yield from _list(file)
    else:
        for number, line in numbered_lines(file):
            if line.strip():
                where = f"{file}:{number}"
                yield where, parse_line(line, where)


def _list(file: Path) -> Iterator[tuple[str, Any]]:
    """The elements of a .json file."""
    remedy = "expected a list of objects; a file with one object per line is named .jsonl"
    text = "".join(line for _, line in numbered_lines(file))
    try:
        elements = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON ({error.msg}, column {error.colno}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {why_not_json(error)}; {remedy}") from None
    if not isinstance(elements, list):
        raise UserError(f"{file}: holds {kind(elements)}; {remedy}")
    for number, element in enumerate(elements, start=1):
        yield f"{file}, row {number}", element


def parquet_rows(file: Path, columns: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """The rows of a .parquet file, of some columns or all, each with where it stands; a column that is missing is in none."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _missing(str(file), error) from None
    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", record
    except OSError:
        raise
    except Exception as error:  # a damaged file raises several types that have no common one
        raise UserError(f"{file}: cannot be read as parquet ({_reason(error)})") from None


def _saved(folder: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a folder that `save_to_disk` wrote; of several splits, those of "train" or of the only one."""
    try:
        import datasets
    except ImportError as error:
        raise _missing(str(folder), error) from None
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # of any of a dozen types
        raise UserError(f"{folder}: the dataset cannot be loaded ({_reason(error)})") from None
    if isinstance(dataset, datasets.DatasetDict):
        splits = ["train"] if "train" in dataset else list(dataset)
        if len(splits) != 1:
            raise UserError(f'{folder}: has no split "train", only {", ".join(splits)}; take the folder of one of them')
        dataset = dataset[splits[0]]
    yield from _dataset(str(folder), dataset)


def _hub(path: str, name: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise _missing(path, error) from None
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of any of a dozen types
        raise UserError(
            f'"{path}": no such file or folder, and no dataset "{name}" with the split "{split}" can be loaded: '
            f'{_reason(error)}; config and split are named so: "{name}:CONFIG:SPLIT"'
        ) from None
    yield from _dataset(path, dataset)


def _dataset(path: str, dataset: Any) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        # A saved dataset may hand out its rows as numpy's or torch's values; without a format they are Python's.
        for record in dataset.with_format(None):
            number += 1
            yield f"{path}, row {number}", record
    except Exception as error:  # an image or a sound that cannot be decoded raises whatever its package does
        raise UserError(f"{path}, row {number + 1}: cannot be read ({_reason(error)})") from None


def _missing(path: str, error: ImportError) -> UserError:
    return UserError(f'{path}: reading it needs a package that cannot be imported ({error}): pip install "es_lite[datasets]"')


def _reason(error: Exception) -> str:
    """Type and first line of the message: some go on for pages."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
