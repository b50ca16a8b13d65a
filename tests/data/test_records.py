"""Records from JSON and parquet files and from Hugging Face datasets."""

import datetime
import json
import sys
from pathlib import Path

import pytest

from es_lite.data.records import DEPTH, read_records
from es_lite.errors import UserError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(path: object) -> list:
    return list(read_records(str(path)))


def test_each_line_of_a_jsonl_file_is_a_record(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1, "b": [null, true, {"c": 0.5}]}\r\n\n{"a": "\\u00e4\u2028"}')
    assert read(path) == [(f"{path}:1", {"a": 1, "b": [None, True, {"c": 0.5}]}), (f"{path}:3", {"a": "ä\u2028"})]


def test_each_element_of_a_json_file_is_a_record(tmp_path):
    path = write(tmp_path / "a.JSON", '[\n {"a": 1},\n {"a": 2}\n]\n')
    assert read(path) == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 2", {"a": 2})]


def test_a_folder_is_read_file_by_file_in_order(tmp_path, monkeypatch):
    b = write(tmp_path / "b.jsonl", '{"b": 1}\n{"b": 2}\n')
    a = write(tmp_path / "a.json", '[{"a": 1}]')
    write(tmp_path / "c.jsonl", "")
    write(tmp_path / "README.md", "not data")
    (tmp_path / "d.jsonl").mkdir()
    unsorted = [tmp_path / name for name in ("README.md", "b.jsonl", "d.jsonl", "a.json", "c.jsonl")]
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(unsorted))
    assert read(tmp_path) == [(f"{a}, row 1", {"a": 1}), (f"{b}:1", {"b": 1}), (f"{b}:2", {"b": 2})]


NESTED = "[" * (DEPTH - 1) + "]" * (DEPTH - 1)


def test_lists_may_be_nested_deeply_but_not_without_end(tmp_path):
    assert len(read(write(tmp_path / "a.jsonl", f'{{"a": {NESTED}}}'))) == 1
    with pytest.raises(UserError, match=rf'a\.jsonl:1: the column "a" has .* nested more than {DEPTH} deep'):
        read(write(tmp_path / "a.jsonl", f'{{"a": [[{NESTED}]]}}'))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("nul.jsonl", '{"a": 1}\n{"a": "\0"}\n', r"nul\.jsonl:2: has a NUL byte"),
        ("utf16.json", '[{"a": 1}]'.encode("utf-16-le"), r"utf16\.json:1: has a NUL byte"),
        ("latin.jsonl", b'{"a": "\xe9"}\n', r"latin\.jsonl:1: not UTF-8"),
        ("latin.json", b'[\n{"a": "\xe9"}]\n', r"latin\.json:2: not UTF-8"),
        ("broken.jsonl", '{"a": 1}\n{"a": \n', r"broken\.jsonl:2: not JSON"),
        ("deep.jsonl", "[" * 100_000, r"deep\.jsonl:1: not JSON"),
        ("deep.json", "[" * 100_000, r"deep\.json: not JSON"),
        ("digits.jsonl", '{"a": ' + "9" * 5000 + "}", r"digits\.jsonl:1: has a number of more than 4,300 digits"),
        ("digits.json", '[{"a": ' + "9" * 5000 + "}]", r"digits\.json: has a number of more than 4,300 digits"),
        ("broken.json", '[{"a": 1},\n{"a": }]', r"broken\.json:2: not JSON \(Expecting value, column 7\); expected a list"),
        ("lines.json", '{"a": 1}\n{"a": 2}\n', r"lines\.json:2: not JSON \(Extra data.*one object per line is named \.jsonl"),
        ("empty.json", "", r"empty\.json:1: not JSON"),
        ("object.json", '{"a": 1}', r"object\.json: holds an object; expected a list of objects"),
        ("list.jsonl", '["a"]\n', r"list\.jsonl:1: expected an object with named columns, got a list"),
        ("null.json", '[{"a": 1}, null]', r"null\.json, row 2: expected an object with named columns, got null"),
        ("nan.jsonl", '{"a": 1}\n{"a": [NaN]}\n', r'nan\.jsonl:2: the column "a" has the number nan, which JSON cannot hold'),
        ("inf.json", '[{"a": {"b": 1e999}}]', r'inf\.json, row 1: the column "a" has the number inf'),
        ("half.jsonl", '{"a": {"b": ["\\ud800"]}}\n', r'half\.jsonl:1: "a" has half a surrogate pair'),
        ("key.jsonl", '{"a": {"\\udfff": 1}}\n', r'key\.jsonl:1: "a" has half a surrogate pair'),
        ("column.jsonl", '{"\\udfff": 1}\n', r'column\.jsonl:1: "a column\'s name" has half a surrogate pair'),
        ("book.pdf", "text", r'book\.pdf: unknown kind of file "\.pdf"; expected a \.jsonl, \.json or \.parquet file'),
        ("suffixless", "text", r'suffixless: unknown kind of file ""'),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read(write(tmp_path / name, content))
    str(caught.value).encode()  # can be printed


def test_a_missing_file(tmp_path):
    write(tmp_path / "prompts.jsonl", "")
    with pytest.raises(
        UserError, match=r'prompt\.jsonl": no such file or folder \(did you mean ".*prompts\.jsonl"\?\); expected'
    ):
        read(tmp_path / "prompt.jsonl")
    for path in ("", "no/such/folder/a.jsonl", "nowhere/a.jsonl", "builtin:countdwn", "a\0b", str(tmp_path / "x" / "y")):
        with pytest.raises(UserError, match=r'": no such file or folder; expected a \.jsonl'):
            read(path)


def test_a_missing_file_in_a_folder_that_exists_is_not_sought_at_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'"data/prompts": no such file or folder; expected'):
        read("data/prompts")


def test_a_folder_without_records(tmp_path):
    write(tmp_path / "a.csv", "1,2")
    with pytest.raises(UserError, match=r"no \.jsonl, \.json or \.parquet file in this folder"):
        read(tmp_path)


@pytest.mark.parametrize("package, path", [("pyarrow.parquet", "a.parquet"), ("datasets", "saved"), ("datasets", "owner/name")])
def test_a_package_that_is_missing(tmp_path, monkeypatch, package, path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet", b"")
    (tmp_path / "saved").mkdir()
    write(tmp_path / "saved" / "state.json", "{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'^{path}: .*{package}.*: pip install "es_lite\[datasets\]"'):
        read(path)


# Parquet


RECORDS = [
    {"prompt": [{"role": "user", "content": "ä"}], "answer": [1, 2], "score": 0.5, "none": None},
    {"prompt": [], "answer": None, "score": 2.0, "none": None},
]


def parquet(path: Path, records: list) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


def test_rows_of_a_parquet_file_are_pythons_values(tmp_path):
    path = parquet(tmp_path / "a.parquet", RECORDS)
    rows = read(path)
    assert rows == [(f"{path}, row 1", RECORDS[0]), (f"{path}, row 2", RECORDS[1])]
    assert type(rows[0][1]["score"]) is float and type(rows[0][1]["answer"]) is list
    assert [json.loads(json.dumps(record)) for _, record in rows] == RECORDS


def test_a_parquet_file_of_several_batches(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"a": i} for i in range(2500)])
    assert read(path) == [(f"{path}, row {i + 1}", {"a": i}) for i in range(2500)]


@pytest.mark.parametrize(
    "value, kind",
    [(b"image", "bytes"), (datetime.date(2026, 1, 1), "date"), ([{"x": datetime.datetime(2026, 1, 1)}], "datetime")],
)
def test_a_column_that_json_cannot_hold(tmp_path, value, kind):
    path = parquet(tmp_path / "a.parquet", [{"a": 1, "odd": None}, {"a": 2, "odd": value}])
    with pytest.raises(UserError, match=rf'row 2: the column "odd" has a value of type {kind}, which JSON cannot hold'):
        read(path)


@pytest.mark.parametrize("cut", [0, 40, -8])
def test_a_damaged_parquet_file(tmp_path, cut):
    path = Path(parquet(tmp_path / "a.parquet", RECORDS))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet \("):
        read(path)


# Datasets


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


@pytest.mark.parametrize("form", [None, "numpy"])
def test_a_saved_dataset(tmp_path, datasets, form):
    dataset = datasets.Dataset.from_list(RECORDS).with_format(form)
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert [record for _, record in read(tmp_path / "saved")] == RECORDS
    where, record = read(tmp_path / "saved")[1]
    assert where == f"{tmp_path / 'saved'}, row 2"
    assert type(record["score"]) is float


def test_a_saved_dataset_of_several_splits(tmp_path, datasets):
    one, two = (datasets.Dataset.from_list([{"a": i}]) for i in (1, 2))
    for name, splits in [("t", {"test": one, "train": two}), ("o", {"test": one}), ("n", {"test": one, "dev": two})]:
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / name))
    assert [record for _, record in read(tmp_path / "t")] == [{"a": 2}]
    assert [record for _, record in read(tmp_path / "t" / "test")] == [{"a": 1}]
    assert [record for _, record in read(tmp_path / "o")] == [{"a": 1}]
    with pytest.raises(UserError, match=r'n: has no split "train", only test, dev; take the folder of one of them'):
        read(tmp_path / "n")


def test_a_damaged_saved_dataset(tmp_path, datasets):
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"saved: the dataset cannot be loaded \("):
        read(tmp_path / "saved")


def test_a_row_that_cannot_be_decoded(tmp_path, datasets):
    class Broken:
        def with_format(self, form):
            yield {"a": 1}
            raise RuntimeError("no decoder\nfor this")

    from es_lite.data.records import _dataset

    with pytest.raises(UserError, match=r"^x, row 2: cannot be read \(RuntimeError: no decoder\)$"):
        list(_dataset("x", Broken()))


@pytest.mark.parametrize(
    "path, asked",
    [
        ("openai/gsm8k", ("openai/gsm8k", None, "train")),
        ("openai/gsm8k:main", ("openai/gsm8k", "main", "train")),
        ("openai/gsm8k:main:test", ("openai/gsm8k", "main", "test")),
        ("o.w-n/n_a.me::train[:5%]", ("o.w-n/n_a.me", None, "train[:5%]")),
    ],
)
def test_a_dataset_of_the_hub(datasets, monkeypatch, tmp_path, path, asked):
    monkeypatch.chdir(tmp_path)
    calls = []

    def load(name, config, *, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [where for where, _ in read(path)] == [f"{path}, row 1", f"{path}, row 2"]
    assert calls == [asked]


def test_a_dataset_that_the_hub_does_not_have(datasets, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def load(name, config, *, split):
        raise ValueError("Config name is missing.\nPick one of: main")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        UserError, match=r'"o/n": no such file.*no dataset "o/n".*ValueError: Config name is missing\.; .*"o/n:CON'
    ):
        read("o/n")
