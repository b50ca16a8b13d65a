"""tools/compare.py: real runs of each variant on the same samples; a finished run is kept; a table and a figure."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import compare
from support import RECIPE, write_recipe

from es_lite.recipe import Recipe


@pytest.mark.long
@pytest.mark.slow
def test_every_variant_is_run_with_every_seed_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = compare.COMPARISONS["kinds"].variants
    few = compare.Comparison({name: kinds[name] for name in ("gaussian", "low rank 4")})
    monkeypatch.setitem(compare.COMPARISONS, "kinds", few)
    recipe, folder = write_recipe(tmp_path, eval={"every": 1}), tmp_path / "compared"
    words = ["kinds", str(folder), "--recipe", str(recipe), "--seeds", "2", "--jobs", "2", "--set", "run.iterations=2"]
    assert compare.main(words) == 0
    document = json.loads((folder / "kinds.json").read_text())
    assert list(document["scores"]) == list(few.variants)
    for seed in range(2):
        firsts, lasts = zip(*((runs[seed][0], runs[seed][-1]) for runs in document["scores"].values()), strict=True)
        assert len(set(map(tuple, firsts))) == 1 and [step for step, _ in lasts] == [2, 2], "all begin at the same θ₀"
        assert len({score for _, score in lasts}) == 2
    out = capsys.readouterr().out
    for name, runs in document["scores"].items():
        ends = [run[-1][1] for run in runs]
        assert f"| {name} | 2 | {sum(ends) / 2:.4f} | {ends[0]:.4f}, {ends[1]:.4f} |" in out
    assert (folder / "kinds.png").stat().st_size > 10_000

    journal = folder / "low-rank-4-0" / "journal.jsonl"
    before = journal.stat().st_mtime_ns
    compare.main(words)
    assert capsys.readouterr().out == out and journal.stat().st_mtime_ns == before


@pytest.mark.parametrize("what", [*compare.COMPARISONS, "steps"])
def test_every_variant_is_a_recipe_of_its_own(tmp_path: Path, what: str) -> None:
    recipe = write_recipe(tmp_path, es={"alpha_decay_every": 5})
    comparison = compare.COMPARISONS.get(what) or compare.steps((0.1, 0.2, 0.3, 0.4, 0.5), 3)
    found = [Recipe.load(recipe, [*comparison.settings, *variant]) for variant in comparison.variants.values()]
    assert len({one.dumps() for one in found}) == len(found) >= 3


def test_a_given_alpha_is_the_same_at_every_step_or_ends_at_a_tenth() -> None:
    variants = compare.steps((0.1, 0.2, 0.3, 0.4, 0.5), 200).variants
    assert variants["constant 0.1"] == ("es.alpha=0.1",)
    assert [name for name in variants if name.startswith("decaying")] == [f"decaying from 0.{tenths}" for tenths in (2, 3, 4)]
    factor = float(variants["decaying from 0.2"][1].partition("=")[2])
    assert factor**10 == pytest.approx(0.1) and variants["decaying from 0.2"][2] == "es.alpha_decay_every=20"
    assert variants["auto, begun 100 times too small"][1] == "es.alpha_start=0.003"


def test_the_papers_ratios_and_populations() -> None:
    assert RECIPE["es"]["population"] != 20  # so that a variant changes it
    samples = [int(name.split()[0]) for name in compare.COMPARISONS["samples"].variants]
    assert [count / samples[0] for count in samples] == [1, 3, 5, 7]
    assert list(compare.COMPARISONS["population"].variants) == ["20 members", "30 members", "40 members"]


def test_a_wrong_recipe_is_named(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    for words in (["steps"], ["kinds"]):
        assert compare.main([*words, str(tmp_path / "out"), "--set", "es.sigmma=1"]) == 2
        assert "es.sigmma: unknown key" in capfd.readouterr().err


@pytest.mark.parametrize("words", [["kinds"], ["kinds", "DIR", "--seeds", "0"], ["other", "DIR"]])
def test_wrong_arguments(capsys: pytest.CaptureFixture, words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main(words)
    assert ended.value.code == 2 and "usage: " in capsys.readouterr().err
