"""tools/gradient_signal.py: the gradient of transformers' own loss, the unbiased estimates, and the command."""

from pathlib import Path

import gradient_signal
import numpy as np
import pytest
import torch
from support import write_recipe

from es_lite.data.batch import Batch
from es_lite.recipe import Recipe


def models_of(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The models that the tool makes."""
    made, original = [], gradient_signal.gradient

    def noted(model: torch.nn.Module, batch: Batch, drawn: bool) -> tuple[gradient_signal.Gradient, int]:
        made.append(model)
        return original(model, batch, drawn)

    monkeypatch.setattr(gradient_signal, "gradient", noted)
    return made


def test_the_command_prints_a_row_for_each_part(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert gradient_signal.main(["--recipe", str(write_recipe(tmp_path)), "--samples", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names[0] == "embed_tokens.weight" and "all" in names and "norm.weight" in names
    assert any(name.startswith("blocks 0 to ") for name in names)


def test_the_gradient_is_that_of_transformers_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = models_of(monkeypatch)
    gradient_signal.measure(Recipe.load(write_recipe(tmp_path), []), 2)
    model = made[0].float().eval()
    tokens = np.random.default_rng(0).integers(0, 20, (6, 9)).astype(np.int32)
    lengths = np.array([9, 5, 2, 9, 7, 3])
    found, count = gradient_signal.gradient(model, Batch(tokens, lengths), drawn=False)
    assert count == sum(lengths) - 6
    labels = torch.from_numpy(tokens).long()
    labels[torch.arange(9) >= torch.from_numpy(lengths)[:, None]] = -100
    model.zero_grad()
    (-model(torch.from_numpy(tokens).long(), labels=labels).loss).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_what_texts_agree_on_is_told_from_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of 1 for all text, with a deviation of 2 for one sample: of M, E|g_M|² is D·(1 + 4/M)."""
    rng = np.random.default_rng(0)

    def made_up(model: torch.nn.Module, batch: Batch, drawn: bool) -> tuple[gradient_signal.Gradient, int]:
        noise = {name: torch.from_numpy(rng.standard_normal(p.shape)).float() for name, p in model.named_parameters()}
        mean, deviation = (0, 1 / 10) if drawn else (1, 2 / len(batch.lengths) ** 0.5)
        return {name: mean + deviation * each for name, each in noise.items()}, 100

    monkeypatch.setattr(gradient_signal, "gradient", made_up)
    lines = gradient_signal.measure(Recipe.load(write_recipe(tmp_path), []), 16).splitlines()
    (row,) = (line for line in lines if line.startswith("| all "))
    shared, own, kappa, signal = (cell.strip() for cell in row.strip("| ").split("|")[1:])
    size = float(kappa) * 2
    assert float(shared) == pytest.approx(size, rel=0.05) and float(own) == pytest.approx(4 * size, rel=0.15)
    assert int(signal.rstrip("%")) == pytest.approx(100 / (1 + 4 / 8), abs=4)
