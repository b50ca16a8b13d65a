"""Prompts with their columns, from files and datasets.

Graders import this module in processes of their own: it loads neither numpy, torch nor transformers. Prompts that cannot be used
raise `UserError`.
"""

import difflib
import hashlib
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from es_lite.data.held_out import held_out_count
from es_lite.data.records import Record, kind, read_records
from es_lite.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")

RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments of reward functions (TRL's signature) that are not columns."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """A prompt with its columns."""

    prompt: str | Messages
    """Text, or messages {"role", "content"}; a last message of the assistant is continued by the model (prefill)."""
    columns: dict[str, Any]
    """Further columns, JSON values."""
    where: str
    """For messages: "FILE:LINE", "FILE, row 3", or "builtin:countdown, problem 17"."""


def completion_text(completion: str | Messages) -> str:
    """The text of a completion as reward functions get it."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def read_rows(path: str, system: str, template: str, chat: bool) -> list[Row]:
    """The rows of a .jsonl, .json or .parquet file, of a folder of such files, or of a Hugging Face dataset (see `read_records`).

    template: text with names of columns in braces, which becomes the prompt; "" takes the column "prompt", which is then not
    among the row's columns. system: a system message; "" for none. chat: a prompt that is text becomes a message of the user; a
    system message implies it.
    """
    parts = _parse(template) if template else []
    rows = [_row(record, where, system, parts, chat) for where, record in read_records(path)]
    if not rows:
        raise UserError(f"{path}: there is no prompt in it")
    return rows


def split(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(training, held out): the last `fraction` of the rows, rounded up, is held out."""
    first = len(rows) - held_out_count(len(rows), fraction, "prompts")
    return list(rows[:first]), list(rows[first:])


def fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 of the prompts and columns, each row as a line of JSON with sorted keys."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.columns], sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _row(record: Record, where: str, system: str, parts: list[tuple[str, str | None]], chat: bool) -> Row:
    for name in RESERVED:
        if name in record:
            raise UserError(f'{where}: the column "{name}" has the name of an argument of reward functions; rename it')
    if parts:
        prompt: str | Messages = _filled(parts, record, where)
    elif "prompt" in record:
        prompt = _prompt(record["prompt"], where)
        record = {name: value for name, value in record.items() if name != "prompt"}
    else:
        columns = ", ".join(record)[:300]
        has = f"only {columns}; add it, or make it from these" if record else "and no other column; add it, or make it"
        raise UserError(f'{where}: has no "prompt", {has} with data.template')
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{where}: the prompt is empty; give it text, or take the row out")
        if "\0" in prompt:
            raise UserError(f"{where}: the prompt has a NUL character; take it out")
        if system or chat:
            prompt = [{"role": "user", "content": prompt}]
    if system:
        assert isinstance(prompt, list)
        if prompt[0]["role"] in ("system", "developer"):
            raise UserError(
                f'{where}: has a {prompt[0]["role"]} message of its own, beside data.system; take one out (data.system = "")'
            )
        prompt = [{"role": "system", "content": system}, *prompt]
    return Row(prompt, record, where)


def _prompt(value: Any, where: str) -> str | Messages:
    """The column "prompt", checked."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f'{where}: "prompt" is {kind(value)}; expected text, or a list of messages with "role" and "content"')
    messages = [_message(message, f"{where}: message {number} of the prompt") for number, message in enumerate(value, start=1)]
    if not any(message["content"].strip() for message in messages):
        raise UserError(f"{where}: the prompt is empty: no message has text; give it text, or take the row out")
    return messages


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UserError(f'{where}: is {kind(value)}; expected an object with "role" and "content"')
    # Where one message of a parquet file has a further key, all have it: null in the others.
    message = {key: item for key, item in value.items() if item is not None}
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise UserError(f'{where}: "{key}" is {kind(value[key]) if key in value else "missing"}; expected text')
    for key in message:
        if key not in ("role", "content"):
            raise UserError(f'{where}: has the key "{key}"; expected "role" and "content" alone')
    if message["role"] not in ROLES:
        raise UserError(f'{where}: unknown role "{message["role"]}"{_remedy(message["role"], ROLES)}')
    if "\0" in message["content"]:
        raise UserError(f"{where}: has a NUL character; take it out")
    return message


def _parse(template: str) -> list[tuple[str, str | None]]:
    """`template` as pieces: literal text, and the column that follows it (None: none does)."""
    where = "data.template"
    plain = "in braces goes the name of a column and nothing else, as in {question}; a brace itself is written {{ or }}"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{where}: {error}; {plain}") from None
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion or "." in name or "[" in name or "{" in name):
            written = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise UserError(f"{where}: {{{written}}} is not the name of a column; {plain}")
    if not any(name for _, name, _, _ in parts):
        raise UserError(f"{where}: names no column, so that all prompts would be the same; {plain}")
    return [(text, name) for text, name, _, _ in parts]


def _filled(parts: list[tuple[str, str | None]], record: Record, where: str) -> str:
    """The template's text with the columns: text as it is, numbers and lists as JSON."""
    pieces = []
    for text, name in parts:
        pieces.append(text)
        if name is None:
            continue
        if name not in record:
            raise UserError(f'{where}: has no column "{name}", which data.template names{_remedy(name, list(record))}')
        value = record[name]
        if value is None:
            raise UserError(f'{where}: the column "{name}", which data.template names, is null; fill it, or take the row out')
        pieces.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(pieces)


def _remedy(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; known here: {', '.join(known)[:300]}" if known else "; the row is empty"
