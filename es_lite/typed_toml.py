"""Reads TOML documents into dataclasses; collects unknown names, wrong types and invalid values as messages."""

import dataclasses
import difflib
import math
import tomllib
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from es_lite.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """A condition on a value, in words and as a function."""

    expected: str
    holds: typing.Callable[[Any], bool]


def read(cls: type, values: Any, path: str, problems: list[str]) -> Any:
    """An instance of the dataclass `cls`; None if that is impossible: `problems` then has the messages."""
    if not isinstance(values, dict):
        problems.append(f"{path}: expected a table, got {values!r}")
        return None
    before = len(problems)
    hints = typing.get_type_hints(cls, include_extras=True)
    arguments = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            remedy = f'; did you mean "{near[0]}"?' if near else f"; known here: {', '.join(hints)}"
            problems.append(f"{where}: unknown {'key' if path else 'table'}{remedy}")
        else:
            arguments[key] = _value(hints[key], value, where, problems)
    return cls(**arguments) if len(problems) == before else None


def checked(cls: type[T], values: Any, path: str) -> T:
    """An instance of the dataclass `cls`. Raises UserError with all that is wrong."""
    problems: list[str] = []
    found = read(cls, values, path, problems)
    if problems:
        raise UserError("\n".join(problems))
    return found


def _value(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        return read(typing.cast(type, hint), value, where, problems)
    if typing.get_origin(hint) is Annotated:
        base, check = typing.get_args(hint)
        before = len(problems)
        value = _value(base, value, where, problems)
        typed = len(problems) == before
        union = len(typing.get_args(base)) > 1  # whose check says better than its types what is expected
        wrong = not check.holds(value) if typed else union
        if wrong:
            problems[before:] = [f"{where} = {value!r}: expected {check.expected}"]
        return value
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            remedy = f'; did you mean "{near[0]}"?' if near else ""
            problems.append(f"{where} = {value!r}: expected {' or '.join(map(repr, choices))}{remedy}")
        return value
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        if not isinstance(value, list):
            problems.append(f"{where} = {value!r}: expected a list")
            return ()
        return tuple(_value(element, item, f"{where}[{index}]", problems) for index, item in enumerate(value))
    types = typing.get_args(hint) or (hint,)
    if float in types and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "a table"}
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        problems.append(f"{where} = {value!r}: expected {' or '.join(names[kind] for kind in types)}")
    elif isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{where} = {value!r}: expected a finite number")
    return value


def override(document: dict, setting: str, problems: list[str]) -> None:
    """Applies `setting`, table.key=value, to a TOML document; appends to `problems` what is wrong with it."""
    name, equals, text = setting.partition("=")
    *tables, last = name.strip().split(".")
    if not (equals and tables and last):
        problems.append(f"--set {setting}: expected table.key=value, for instance es.sigma=2e-3")
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # no TOML, or a number of thousands of digits
        value = text.strip()  # a bare word is a string: --set run.dir=runs/mine
    for part in tables:
        document = document.setdefault(part, {})
        if not isinstance(document, dict):
            problems.append(f"--set {setting}: {part} is not a table")
            return
    document[last] = value
