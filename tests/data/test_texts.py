"""Documents from files."""

import gzip
from pathlib import Path

import pytest

from es_lite.data.texts import BUILTIN, Texts, text_blocks
from es_lite.errors import UserError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(path: str, lines: int) -> list[list[str]]:
    return [list(document) for document in Texts(path, lines)]


def test_a_txt_file_is_one_document_made_of_its_lines(tmp_path):
    assert read(write(tmp_path / "a.txt", "one\n\n  two\u2028\x0b\nthree"), 0) == [["one\n", "\n", "  two\u2028\x0b\n", "three"]]


def test_the_byte_order_mark_and_carriage_returns_of_windows_are_not_text(tmp_path):
    assert read(write(tmp_path / "a.TXT", "\ufeffone\r\ntwo\r\n"), 0) == [["one\n", "two\n"]]


def test_each_record_of_a_jsonl_file_is_a_document(tmp_path):
    records = '{"text": "one\\ntwo\\n"}\n\n{"text": "drei \\u00e4", "other": 1}\n{"text": " "}\n'
    assert read(write(tmp_path / "a.jsonl", records), 0) == [["one\ntwo\n"], ["drei ä"]]


def test_a_folder_is_read_file_by_file_in_order(tmp_path):
    write(tmp_path / "b.txt", "b1\nb2\n")
    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "c.txt", "")
    write(tmp_path / "README.md", "not data")
    (tmp_path / "d.txt").mkdir()
    assert read(str(tmp_path), 0) == [["a"], ["b1\n", "b2\n"]]


@pytest.mark.parametrize(
    "lines, documents",
    [(1, [["a"]]), (2, [["a"], ["b1\n"]]), (3, [["a"], ["b1\n", "b2\n"]]), (9, [["a"], ["b1\n", "b2\n"], ["c\n"]])],
)
def test_lines_are_counted_over_all_files(tmp_path, lines, documents):
    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "b.txt", "b1\nb2\n")
    write(tmp_path / "c.txt", "c\n")
    assert read(str(tmp_path), lines) == documents


def test_nothing_after_the_last_wanted_line_is_read(tmp_path):
    assert read(write(tmp_path / "a.txt", b"good\n\xff\xfe\0"), 1) == [["good\n"]]


def test_the_builtin_corpus():
    documents = read(BUILTIN, 0)
    assert documents == read(BUILTIN, 0)
    assert len(documents) > 50
    assert sum(len(line) for document in documents for line in document) > 300_000
    assert "".join(documents[0]).startswith('The "assert" statement')
    assert read(BUILTIN, 3) == [documents[0][:3]]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, r"missing\.txt\": no such file or folder; .*builtin:python-reference"),
        ("empty.txt", "", r"empty\.txt: there is no text in it$"),
        ("blank.txt", " \n\n\t\n", r"blank\.txt: there is no text in it$"),
        ("blank.jsonl", '{"text": ""}\n', r"blank\.jsonl: there is no text in it$"),
        ("nul.txt", "fine\na\0b\n", r"nul\.txt:2: has a NUL byte"),
        ("utf16.txt", "text".encode("utf-16-le"), r"utf16\.txt:1: has a NUL byte"),
        ("latin.txt", b"fine\nfine\ncaf\xe9\n", r"latin\.txt:3: not UTF-8"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', r"latin\.jsonl:1: not UTF-8"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', r"broken\.jsonl:2: not JSON"),
        ("deep.jsonl", "[" * 100_000, r"deep\.jsonl:1: not JSON"),
        ("list.jsonl", '["a"]\n', r'list\.jsonl:1: expected an object with a string under "text"'),
        ("keyless.jsonl", '{"text": "a"}\n\n{"txt": "a"}\n', r"keyless\.jsonl:3: expected an object with a string"),
        ("number.jsonl", '{"text": 5}\n', r"number\.jsonl:1: expected an object with a string"),
        ("surrogate.jsonl", '{"text": "\\ud800"}\n', r"surrogate\.jsonl:1: .* half a surrogate pair"),
        ("book.pdf", "text", r'book\.pdf: unknown kind of file "\.pdf"; expected a \.txt or \.jsonl file'),
        ("suffixless", "text", r'suffixless: unknown kind of file ""'),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / name), 0)


@pytest.mark.parametrize(
    "path, message",
    [
        ("", '"": no such file or folder'),
        ("builtin:pyton", 'builtin:pyton: no such corpus; .* "builtin:python-ref'),
        ("a" * 300, "a: cannot be read .File name too long.$"),
        ("~nobody-of-this-name/a.txt", "^~nobody-of-this-name/a.txt: .*; write the folder out$"),
    ],
)
def test_unusable_names(path, message):
    with pytest.raises(UserError, match=message):
        read(path, 0)


def test_no_text_within_the_wanted_lines(tmp_path):
    with pytest.raises(UserError, match=r"no text in it, up to line 2 \(data.lines\)"):
        read(write(tmp_path / "a.txt", "\n\ntext"), 2)


def test_a_folder_without_text_files(tmp_path):
    write(tmp_path / "a.csv", "1,2")
    with pytest.raises(UserError, match=r"no \.txt, \.jsonl or \.parquet file in this folder"):
        read(str(tmp_path), 0)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        read(path, 0)


def test_packed_files_and_folders_within_are_read(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "a.txt.gz", gzip.compress("one\ntwo ä\n".encode()))
    write(tmp_path / "b/c.jsonl.gz", gzip.compress(b'{"text": "three"}\n'))
    assert read(str(tmp_path), 0) == [["one\n", "two ä\n"], ["three"]]
    assert read(str(tmp_path / "a.txt.gz"), 1) == [["one\n"]]


def test_parquet_files_are_read(tmp_path):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    parquet.write_table(table({"text": ["one", "two\nlines"], "other": [1, 2]}), tmp_path / "a.parquet")
    assert read(str(tmp_path), 0) == [["one"], ["two\nlines"]]


def test_zst_files_are_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    text = b"".join(b"line %d\n" % number for number in range(50_000))
    packed = zstandard.compress(text) + zstandard.compress(b"another frame\n")
    write(tmp_path / "a.txt.zst", packed)
    assert "".join(read(str(tmp_path), 0)[0]).encode() == text + b"another frame\n"
    for torn in (packed[:100], packed[:-3], b"plain\n"):
        with pytest.raises(UserError, match=r"a\.txt\.zst: is damaged, or not compressed at all"):
            read(write(tmp_path / "a.txt.zst", torn), 0)


def test_what_is_about_the_text_is_not_read(tmp_path):
    for name in ("README.txt", "readme.jsonl", "LICENSE.txt", "text.txt"):
        write(tmp_path / name, '{"text": "about"}\n')
    assert [file.name for file in Texts(str(tmp_path)).files] == ["text.txt"]
    assert read(str(tmp_path / "README.txt"), 0) != []  # asked for by name


@pytest.mark.parametrize("content", [b"plain", gzip.compress(b"text\n" * 999)[:30]], ids=["plain", "torn"])
def test_a_damaged_packed_file_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"a\.txt\.gz: is damaged, or not compressed at all"):
        read(write(tmp_path / "a.txt.gz", content), 0)


def test_a_text_is_read_anew_each_time(tmp_path):
    texts = Texts(write(tmp_path / "a.txt", "one\ntwo\n"))
    assert [list(document) for document in texts] == [list(document) for document in texts] == [["one\n", "two\n"]]


def test_a_long_line_is_cut_before_a_space():
    line = "word " * 100
    parts = list(text_blocks([line], 20))
    assert "".join(parts) == line
    assert max(map(len, parts)) <= 80 and all(part.startswith(" ") for part in parts[1:])
    assert list(text_blocks(["x" * 100], 20)) == ["x" * 80, "x" * 20]


def test_run_directories_and_hidden_folders_are_not_read(tmp_path):
    for folder, name in (("run", "journal.jsonl"), (".cache", "b.txt"), ("deep/er", "c.txt"), (".", "readme_of_a_book.txt")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        write(tmp_path / folder / name, "text\n")
    write(tmp_path / "run/samples.jsonl", "text\n")
    assert [file.name for file in Texts(str(tmp_path)).files] == ["c.txt", "readme_of_a_book.txt"]


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    write(tmp_path / "x.txt", "once\n")
    (tmp_path / "again").symlink_to(".")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "x.txt")
    assert [file.name for file in Texts(str(tmp_path)).files] == ["linked.txt", "x.txt"]


def test_other_columns_of_a_parquet_file_do_not_matter(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    from datetime import datetime

    parquet.write_table(pyarrow.table({"text": ["one"], "when": [datetime(2026, 1, 1)], "raw": [b"x"]}), tmp_path / "a.parquet")
    assert read(str(tmp_path), 0) == [["one"]]
    parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'a\.parquet, row 1: expected an object with a string under "text"'):
        read(str(tmp_path), 0)


def test_a_disk_that_fails_in_the_middle_of_a_text_is_named(tmp_path, monkeypatch):
    def failing(file):
        yield 1, "one\n"
        raise OSError(5, "Input/output error", str(file))

    path = write(tmp_path / "a.txt", "one\ntwo\n")
    monkeypatch.setattr("es_lite.data.texts.numbered_lines", failing)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Input/output error\)"):
        read(path, 0)
