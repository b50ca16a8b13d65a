"""Every causal model type of transformers is exact or refused, and docs/models.md says so."""

import re
from pathlib import Path

import model_table
import numpy as np
import pytest
from model_table import PAGE, Verdict, configurations, judge, page
from support import ROOT


def listed() -> dict[str, Verdict]:
    """The page's verdicts."""
    text = PAGE.read_text(encoding="utf-8")
    exact, refused, other = (text.split(f"## {title}\n")[1].split("\n## ")[0] for title in ("Exact", "Refused", "Not tried"))
    found = {name: Verdict(name, "exact") for name in re.findall(r"`([^`]+)`", exact)}
    for kind, part in (("refused", refused), ("not tried", other)):
        rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", part, re.MULTILINE)
        found |= {name: Verdict(name, kind, why) for name, why in rows}
    return found


def test_the_page_has_every_type_and_variant_that_there_is():
    """A type that a newer transformers brings is named here: run `python tools/model_table.py --write`."""
    assert sorted(configurations().keys() ^ listed().keys()) == []


def test_the_page_says_nothing_wrong_and_counts_right():
    kinds = [verdict.kind for verdict in listed().values()]
    assert set(kinds) == {"exact", "refused", "not tried"}
    exact, refused = kinds.count("exact"), kinds.count("refused")
    first = PAGE.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# Models: {exact} of {exact + refused} configurations exact, {refused} refused"
    assert exact >= 210


def test_the_readme_has_the_pages_first_line():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert PAGE.read_text(encoding="utf-8").splitlines()[0].removeprefix("# Models: ") in readme


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "bert"])
def test_a_configuration_is_judged(name):
    verdict = judge(name)
    assert verdict.kind == listed()[name].kind
    assert page([verdict]).startswith("# Models: ")


def test_what_is_wrong_is_found(monkeypatch):
    monkeypatch.setattr(model_table, "_hugging_face", lambda *_: np.zeros(len(model_table.LENGTHS)))
    assert judge("qwen3").kind == "wrong"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_configuration_is_as_the_page_says(part: int, tmp_path: Path):
    expected = listed()
    names = list(configurations())[part::8]
    found = {name: judge(name) for name in names}
    assert {name: v for name, v in found.items() if v.kind in ("wrong", "traceback")} == {}
    assert {name: v.kind for name, v in found.items()} == {name: expected[name].kind for name in names}
