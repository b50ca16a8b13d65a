"""Rows of prompts and columns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from es_lite.data.prompts import RESERVED, Row, fingerprint, read_rows, split
from es_lite.errors import UserError

QUESTION = [{"role": "user", "content": "Why?"}]


@pytest.fixture
def jsonl(tmp_path):
    """Writes records to a file and returns its path."""

    def write(*records: object) -> str:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def prompts(path: str, system: str = "", template: str = "", chat: bool = False) -> list:
    return [row.prompt for row in read_rows(path, system, template, chat)]


def test_graders_can_import_it_without_numpy_torch_or_transformers():
    code = "import sys, es_lite.data.prompts; print(*{'numpy', 'torch', 'transformers', 'datasets', 'pyarrow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_row_has_a_prompt_its_further_columns_and_its_place(jsonl):
    path = jsonl({"prompt": " Why?\n", "answer": 7, "tags": [None, {"a": 0.5}]}, {"prompt": QUESTION})
    assert read_rows(path, "", "", False) == [
        Row(" Why?\n", {"answer": 7, "tags": [None, {"a": 0.5}]}, f"{path}:1"),
        Row(QUESTION, {}, f"{path}:2"),
    ]


def test_rows_of_a_parquet_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "a.parquet"
    prefilled = [{"role": "user", "content": "Why?", "name": None}, {"role": "assistant", "content": "<think>", "name": None}]
    write_table(pyarrow.Table.from_pylist([{"prompt": prefilled, "numbers": [1, 2]}]), path)
    without_name = [{"role": message["role"], "content": message["content"]} for message in prefilled]
    assert read_rows(str(path), "", "", False) == [Row(without_name, {"numbers": [1, 2]}, f"{path}, row 1")]


# Messages


def test_text_becomes_messages_if_asked(jsonl):
    path = jsonl({"prompt": "Why?"})
    assert prompts(path) == ["Why?"]
    assert prompts(path, chat=True) == [QUESTION]
    assert prompts(path, system="Be brief.") == [[{"role": "system", "content": "Be brief."}, *QUESTION]]


def test_messages_get_the_system_message_and_keep_their_prefill(jsonl):
    prefilled = [*QUESTION, {"role": "assistant", "content": "<think>"}]
    path = jsonl({"prompt": prefilled})
    assert prompts(path, chat=True) == [prefilled]
    assert prompts(path, system="Be brief.") == [[{"role": "system", "content": "Be brief."}, *prefilled]]


def test_two_system_messages_are_refused(jsonl):
    own = [{"role": "system", "content": "Be kind."}, *QUESTION]
    path = jsonl({"prompt": own})
    assert prompts(path) == [own]
    with pytest.raises(UserError, match=r"a\.jsonl:1: has a system message of its own, beside data\.system"):
        prompts(path, system="Be brief.")


@pytest.mark.parametrize(
    "prompt, message",
    [
        (5, r'"prompt" is a number; expected text, or a list of messages'),
        (None, r'"prompt" is null; expected text'),
        ({"role": "user"}, r'"prompt" is an object; expected text'),
        ("", r"the prompt is empty"),
        (" \n", r"the prompt is empty"),
        ([], r"the prompt is empty: no message has text"),
        ([{"role": "user", "content": " "}], r"the prompt is empty: no message has text"),
        ("a\0b", r"the prompt has a NUL character"),
        ("\ud800", r'"prompt" has half a surrogate pair'),
        ([{"role": "user", "content": "\udfff"}], r'"prompt" has half a surrogate pair'),
        ([*QUESTION, {"role": "user", "content": "\0"}], r"message 2 of the prompt: has a NUL character"),
        (["Why?"], r"message 1 of the prompt: is text; expected an object"),
        ([*QUESTION, {"role": "user"}], r'message 2 of the prompt: "content" is missing; expected text'),
        ([{"content": "Why?"}], r'message 1 of the prompt: "role" is missing; expected text'),
        ([{"role": "user", "content": None}], r'message 1 of the prompt: "content" is null; expected text'),
        ([{"role": "user", "content": [{"text": "Why?"}]}], r'message 1 of the prompt: "content" is a list; expected text'),
        ([{"role": 1, "content": "Why?"}], r'message 1 of the prompt: "role" is a number; expected text'),
        ([QUESTION[0] | {"name": "Ann"}], r'message 1 of the prompt: has the key "name"; expected "role" and "content" alone'),
        ([{"role": "asistant", "content": "a"}], r'message 1 of the prompt: unknown role "asistant"; did you mean "assistant"\?'),
        (
            [{"role": "q", "content": "a"}],
            r'message 1 .*: unknown role "q"; known here: system, developer, user, assistant, tool',
        ),
    ],
)
def test_unusable_prompts(jsonl, prompt, message):
    path = jsonl({"prompt": "Good."}, {"prompt": prompt})
    with pytest.raises(UserError, match=r"a\.jsonl:2: " + message):
        prompts(path)


def test_a_row_without_a_prompt(jsonl):
    message = r'a\.jsonl:1: has no "prompt", only question, answer; .* data\.template$'
    with pytest.raises(UserError, match=message):
        prompts(jsonl({"question": "Why?", "answer": 7}))
    with pytest.raises(UserError, match=r'a\.jsonl:1: has no "prompt", and no other column'):
        prompts(jsonl({}))


@pytest.mark.parametrize("name", RESERVED)
def test_columns_named_like_arguments_of_reward_functions(jsonl, name):
    path = jsonl({"prompt": "Why?"}, {"prompt": "Why?", name: 1})
    with pytest.raises(UserError, match=rf'a\.jsonl:2: the column "{name}" has the name of an argument'):
        prompts(path)


@pytest.mark.parametrize("name, content", [("a.jsonl", "\n \n"), ("a.json", "[]")])
def test_a_file_without_rows(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=r": there is no prompt in it$"):
            prompts(str(path))


def test_a_file_that_may_not_be_read(jsonl, monkeypatch):
    path = jsonl({"prompt": "Why?"})

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(Permission denied\)"):
        prompts(path)


def test_a_path_longer_than_a_file_system_takes():
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\)"):
        prompts("a" * 5000)


# Templates


def test_a_template_makes_the_prompt_and_leaves_the_columns(jsonl):
    record = {"question": "Why {x}?", "the numbers": [1, 2.5, "ä", None], "x": {"a": True}, "prompt": "unused"}
    path = jsonl(record)
    template = "{{{question}}}\n{the numbers} {x} {question}"
    expected = '{Why {x}?}\n[1, 2.5, "ä", null] {"a": true} Why {x}?'
    assert read_rows(path, "", template, False) == [Row(expected, record, f"{path}:1")]
    assert prompts(path, "Be brief.", "{question}") == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why {x}?"}]
    ]


@pytest.mark.parametrize(
    "template, message",
    [
        ("{", r"Single '{' encountered.*; in braces goes the name of a column"),
        ("a}", r"Single '}' encountered"),
        ("{question", r"expected '}'"),
        ("{}", r"\{\} is not the name of a column"),
        ("{question.__class__}", r"\{question\.__class__\} is not the name of a column"),
        ("{question[0]}", r"\{question\[0\]\} is not the name of a column"),
        ("{question!r}", r"\{question!r\} is not the name of a column"),
        ("{question:>999999999999}", r"\{question:>999999999999\} is not the name of a column"),
        ("{question:{question}}", r"is not the name of a column"),
        ("{question} {{answer}} {0.real}", r"\{0\.real\} is not the name of a column"),
        ("Why?", r"names no column, so that all prompts would be the same"),
        ("{{question}}", r"names no column"),
    ],
)
def test_unusable_templates(jsonl, template, message):
    with pytest.raises(UserError, match=r"^data\.template: .*" + message):
        prompts(jsonl({"question": "Why?"}), template=template)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"questoin": "a", "b": 1}, r'has no column "question", which data\.template names; did you mean "questoin"\?'),
        ({"a": 1, "b": 1}, r'has no column "question", which data\.template names; known here: a, b'),
        ({}, r'has no column "question", which data\.template names; the row is empty'),
        ({"question": None}, r'the column "question", which data\.template names, is null'),
        ({"question": " "}, r"the prompt is empty"),
    ],
)
def test_rows_that_a_template_cannot_take(jsonl, record, message):
    path = jsonl({"question": "Why?"}, record)
    with pytest.raises(UserError, match=r"a\.jsonl:2: " + message):
        prompts(path, template="{question}")


# Splitting, the fingerprint


def rows_of(*texts: str) -> list[Row]:
    return [Row(text, {"n": number}, f"a.jsonl:{number}") for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    "count, fraction, held_out",
    [(10, 0.0, 0), (10, 0.05, 1), (10, 0.1, 1), (10, 0.11, 2), (100, 0.07, 7), (2, 0.5, 1), (10**4, 1e-12, 1)],
)
def test_the_last_rows_are_held_out(count, fraction, held_out):
    rows = rows_of(*map(str, range(count)))
    train, rest = split(rows, fraction)
    assert len(rest) == held_out
    assert train + rest == rows


@pytest.mark.parametrize("count, fraction", [(1, 0.05), (3, 0.9)])
def test_holding_out_all_rows_is_refused(count, fraction):
    with pytest.raises(UserError, match=rf"eval\.fraction = {fraction}: holds out all of the {count} prompts"):
        split(rows_of(*"abc"[:count]), fraction)


def test_a_fingerprint_is_the_same_forever():
    """Journals hold it: with another value, no run could be resumed."""
    rows = [Row("Why? ä", {"b": [1, 0.5, None], "a": True}, "a.jsonl:1"), Row(QUESTION, {}, "a.jsonl:2")]
    assert fingerprint(rows) == "71a530f3404e21529a76ab9486ee8ba5e09c9307a1dd20dcc52b63bcbac7a83a"


def test_a_fingerprint_does_not_depend_on_the_file_or_on_the_order_of_columns():
    one = [Row("Why?", {"a": 1, "b": 2}, "a.jsonl:1")]
    two = [Row("Why?", {"b": 2, "a": 1}, "b.jsonl:7")]
    assert fingerprint(one) == fingerprint(two)


def test_other_rows_have_another_fingerprint():
    sets = [
        [],
        [Row("a", {}, "")],
        [Row("b", {}, "")],
        [Row("a", {}, ""), Row("b", {}, "")],
        [Row("b", {}, ""), Row("a", {}, "")],
        [Row([{"role": "user", "content": "a"}], {}, "")],
        [Row("a", {"x": 1}, "")],
        [Row("a", {"x": 1.0}, "")],
        [Row("a", {"x": True}, "")],
        [Row("a", {"x": "1"}, "")],
        [Row("a", {"y": 1}, "")],
    ]
    assert len({fingerprint(rows) for rows in sets}) == len(sets)
