"""Damaged layer files in the combinations of noise, weights, master and residency."""

from pathlib import Path

import pytest
from combinations import References, in_turn
from support import digest, train_here

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("noise", "weights", "master", "residency", "settings"), in_turn(("resident",), ("streamed",)))
def test_damaged_files_are_named_and_made_again(
    references: References, noise: str, weights: str, master: str, residency: str, settings: str, tmp_path: Path
) -> None:
    """A layer file with one bit changed, one that is cut short, and one that is another layer's: refused, then rebuilt."""
    reference = references(noise, weights, master, settings)
    run, overrides = tmp_path / "run", (f"memory.residency={residency}", "run.iterations=3")
    assert train_here(reference.recipe, run, *overrides).code == 0
    files = {path.stem: path for path in (*run.glob("master/*"), *run.glob("weights/*"))}
    whole = files["block-001"].read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 4
    other = files["block-000"].read_bytes()
    before = digest(run)
    for damaged, word in ((bytes(flipped), "checksum"), (whole[:-1], "bytes"), (other, "of this model's block-001")):
        files["block-001"].write_bytes(damaged)
        refused = train_here(reference.recipe, run, *overrides, resume=True)
        assert (refused.code, refused.out.count("3 of 3")) == (2, 0)
        assert "block-001.safetensors" in refused.err and word in refused.err and "--rebuild" in refused.err
        assert files["block-001"].read_bytes() == damaged
    rebuilt = train_here(reference.recipe, run, *overrides, resume=True, rebuild=True)
    assert rebuilt.code == 0, rebuilt.err
    assert "block-001" in rebuilt.out
    assert digest(run) == before
