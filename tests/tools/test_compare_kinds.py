"""tools/compare_kinds.py: real runs with each kind of noise on the same samples; a finished run is kept; one figure."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import compare_kinds
from support import write_recipe


@pytest.mark.slow
def test_every_kind_is_run_with_every_seed_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {name: compare_kinds.KINDS[name] for name in ("gaussian", "low rank 4")}
    monkeypatch.setattr(compare_kinds, "KINDS", kinds)
    recipe, folder = write_recipe(tmp_path, eval={"every": 1}), tmp_path / "compared"
    words = [str(recipe), str(folder), "--seeds", "1", "--set", "run.iterations=2"]
    assert compare_kinds.main(words) == 0
    document = json.loads((folder / "kinds.json").read_text())
    assert list(document["scores"]) == list(kinds)
    firsts, lasts = zip(*((runs[0][0], runs[0][-1]) for runs in document["scores"].values()), strict=True)
    assert len(set(map(tuple, firsts))) == 1 and [step for step, _ in lasts] == [2, 2], "all begin at the same θ₀"
    assert len({score for _, score in lasts}) == 2
    out = capsys.readouterr().out
    assert all(
        f"| {name} | 2 | {score:.4f} | {score:.4f} |" in out for name, (_, score) in zip(document["scores"], lasts, strict=True)
    )

    journal = folder / "low-rank-4-0" / "journal.jsonl"
    before = journal.stat().st_mtime_ns
    compare_kinds.main(words)
    assert capsys.readouterr().out == out and journal.stat().st_mtime_ns == before
    assert compare_kinds.main([str(folder), str(folder), "--out", str(tmp_path / "kinds.png")]) == 0
    assert (tmp_path / "kinds.png").stat().st_size > 10_000


def test_a_recipe_needs_a_folder(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        compare_kinds.main(["recipes/quickstart.toml"])
    assert ended.value.code == 2 and "expected RECIPE DIR" in capsys.readouterr().err
