"""The model of recipes/binary_features.toml trained by backpropagation, to compare: with its true gradient, or a made-up one.

    python tools/straight_through.py [--recipe RECIPE] [--steps 300] [--seeds 3]

Adam on the recipe's samples, as many in a step. "true": below the head, the gradient is 0. "straight-through": the sign counts
as the identity when gradients are computed (Bengio et al., arXiv 1308.3432). Prints held-out log-probabilities, nats a token.
"""

import argparse
import sys
from collections.abc import Sequence
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
RATE = 3e-3


def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    tokens = torch.from_numpy(batch.tokens).long()
    logits = model(tokens[:, :-1]).logits
    targets = tokens[:, 1:].clone()
    beyond = torch.arange(targets.shape[1]) >= torch.from_numpy(batch.lengths)[:, None].long() - 1
    targets[beyond] = -100
    return functional.cross_entropy(logits.transpose(1, 2), targets)


def trained(recipe: Recipe, steps: int, straight_through: bool) -> tuple[float, float]:
    """The held-out log-probability before and after."""
    model, data = model_and_samples(recipe)
    if straight_through:
        norm = type(model.model.norm).__mro__[1].forward

        def signs(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            values = norm(self, hidden)
            return values + (torch.sign(values) - values).detach()

        model.model.norm.forward = signs.__get__(model.model.norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def held_out() -> float:
        with torch.no_grad():
            return -float(loss(model, data.held_out()))

    before = held_out()
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, data.draw(step)).backward()
        optimizer.step()
    return before, held_out()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/binary_features.toml")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args(argv)
    try:
        recipe = Recipe.load(arguments.recipe)
    except UserError as error:
        print(f"straight_through: {error}", file=sys.stderr)
        return error.exit_code
    rows = [["gradient", "before", "after, each seed"]]
    for name, straight_through in (("true", False), ("straight-through", True)):
        seeds = [replace(recipe, run=replace(recipe.run, seed=seed)) for seed in range(arguments.seeds)]
        found = [trained(one, arguments.steps, straight_through) for one in seeds]
        rows.append([name, f"{found[0][0]:.3f}", ", ".join(f"{after:.3f}" for _, after in found)])
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
