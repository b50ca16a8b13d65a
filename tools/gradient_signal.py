"""How much of a model's gradient all of its text agrees on, by backpropagation: what a recipe's data has for a step to find.

    python tools/gradient_signal.py [--recipe RECIPE] [--set table.key=value ...] [--samples 32]

On θ₀, with bf16 weights and the recipe's own samples. With g_M the gradient of the mean score of M samples, g all text's and n²
the variance of one sample's, E|g_M|² = |g|² + n²/M, and the product of two independent g_M is |g|² on average. κ = -½ tr H is
what a perturbation costs for each unit of σ², to second order: half of the Gauss-Newton trace, from tokens that the model drew
itself. A step of P pairs gains at most P·|g|²/(4κ) times the share of signal, |g|²/(|g|² + n²/M).

The memory is that of backpropagation: for the 0.5B, 6 GiB.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from _backprop import model_and_samples
from _measuring import table
from torch.nn import functional

from es_lite.data.batch import Batch
from es_lite.errors import UserError
from es_lite.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]

Gradient = dict[str, torch.Tensor]


def pieces(batch: Batch, size: int = 4) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens, and which of them are predicted, a few samples at a time."""
    tokens, lengths = torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.lengths).long()
    for some, long in zip(tokens.split(size), lengths.split(size), strict=True):
        yield some, torch.arange(some.shape[1] - 1) < long[:, None] - 1


def gradient(model: torch.nn.Module, batch: Batch, drawn: bool) -> tuple[Gradient, int]:
    """Of the mean log-probability of the next tokens: the text's, or such as the model drew. Also their number."""
    model.zero_grad()
    count = sum(int(counts.sum()) for _, counts in pieces(batch))
    for tokens, counts in pieces(batch):
        logits = model(tokens, use_cache=False).logits[:, :-1][counts].float()
        targets = tokens[:, 1:][counts]
        if drawn:
            targets = torch.distributions.Categorical(logits=logits.detach()).sample()
        (-functional.cross_entropy(logits, targets, reduction="sum") / count).backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}, count


def part(name: str, blocks: int) -> str:
    found = re.search(r"\.layers\.(\d+)\.", name)
    if not found:
        return name.removeprefix("model.")
    quarter = int(found[1]) * 4 // blocks
    first, end = -(-quarter * blocks // 4), -(-(quarter + 1) * blocks // 4)
    return f"blocks {first} to {end - 1}"


def measure(recipe: Recipe, samples: int) -> str:
    """A table of parts of the model."""
    recipe = replace(recipe, fitness=replace(recipe.fitness, samples=samples))
    model, data = model_and_samples(recipe, torch.bfloat16)
    model.gradient_checkpointing_enable()
    model.train()
    (one, _), (other, _) = (gradient(model, data.draw(step), drawn=False) for step in (0, 1))
    made, count = gradient(model, data.draw(2), drawn=True)
    sums: dict[str, torch.Tensor] = {}
    for name in one:
        a, b, c = (some[name].flatten() for some in (one, other, made))
        found = torch.stack([a @ b, (a @ a + b @ b) / 2, count * (c @ c) / 2])
        for whole in (part(name, model.config.num_hidden_layers), "all"):
            sums[whole] = sums.get(whole, 0) + found
    rows = [["part", "|g|²", "n²", "κ", "signal of 8 samples"]]
    for name, found in sums.items():
        shared, seen, kappa = found.tolist()
        own = samples * (seen - shared)
        rows.append([name, f"{shared:.3g}", f"{own:.3g}", f"{kappa:.3g}", f"{shared / (shared + own / 8):.0%}"])
    return table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/qwen3_0p5b_cpu.toml")
    parser.add_argument("--samples", type=int, default=32, help="M")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="settings")
    arguments = parser.parse_args(argv)
    try:
        print(measure(Recipe.load(arguments.recipe, arguments.settings), arguments.samples))
    except UserError as error:
        print(f"gradient_signal: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
