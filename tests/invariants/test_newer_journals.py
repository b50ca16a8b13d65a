"""A journal that has something this version does not know is refused by name, by every command that reads it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from journals import documents_of, write_documents
from support import ROOT, contents, train_here

from es_lite import replay

OLD_RUN = ROOT / "tests/fixtures/old_runs/master-bf16"

CHANGES = {
    "kind": (lambda lines: lines[3].update(kind="cauchy"), ["line 4", "'cauchy'", "does not know"]),
    "rank": (
        lambda lines: lines[3].update(kind="lowrank", rank=[2, 4]),
        ["line 4", "'lowrank' with rank [2, 4]", "a whole number"],
    ),
    "record": (lambda lines: lines[5].update(momentum=0.9), ["line 6", "momentum", "does not know"]),
    "origin": (lambda lines: lines[0]["origin"].update(adapter="x"), ["adapter", "does not know"]),
    "group": (lambda lines: lines[0]["origin"]["groups"][0].update(rank=4), ["rank", "does not know"]),
}
"""What is changed in the journal, and words of the message."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)  # the old recipe's data.path is relative to it
    return Path(shutil.copytree(OLD_RUN, tmp_path / "run"))


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_what_is_unknown_is_refused_by_name(
    run: Path, change: Callable[[list[dict]], object], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = run / "journal.jsonl"
    documents = documents_of(journal)
    assert write_documents(journal, documents) == (OLD_RUN / "journal.jsonl").read_bytes()  # the checks are right
    change(documents)
    write_documents(journal, documents)
    before = contents(run)
    refused = train_here(OLD_RUN / "recipe.toml", run, resume=True)
    assert refused.code == 2
    assert replay.main([str(run), "--out", str(tmp_path / "out")]) == 2
    for message in (refused.err, capsys.readouterr().err):
        assert str(journal) in message and all(word in message for word in words), message
    assert contents(run) == before | {"lock": b""}
    assert not (tmp_path / "out").exists()
