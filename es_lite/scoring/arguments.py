"""What a module is called with for all rows, and what belongs to a tile of them.

Gemma 3n has several states of each token between its blocks, [copies, rows, T, H]; they pass as one wide state, [rows, T,
copies·H], and a block sees what it expects.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PretrainedConfig

from es_lite.model.configuration import size_of
from es_lite.scoring.sequences import SequenceTile
from es_lite.scoring.tiles import Output, Tile


@dataclass(frozen=True)
class Arguments:
    args: tuple
    kwargs: dict[str, Any]
    copies: int
    """States of each token that the module is given and returns; 0: one, as usual."""

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any], rows: int, copies: int) -> Self:
        """copies: states of each token between the model's blocks, if the module is one; else 1."""
        first = args[0] if args else None
        if copies > 1 and isinstance(first, torch.Tensor) and first.dim() == 4 and first.shape[:2] == (copies, rows):
            return cls((_wide(first), *args[1:]), kwargs, copies)
        return cls(args, kwargs, 0)

    def of_each_row(self, rows: int) -> bool:
        """Whether the module is given something else for each row."""
        return any(isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) for value in self.args)

    def of_tile(self, tile: Tile | SequenceTile) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = tile.cut(self.args), tile.cut(self.kwargs)
        if self.copies:
            args = (args[0].unflatten(-1, (self.copies, -1)).movedim(-2, 0), *args[1:])
        return args, kwargs

    def put(self, output: Output, tile: Tile | SequenceTile, result: Any) -> None:
        """Puts what the module made of a tile to the output for all rows."""
        output.put(tile, _wide(result) if self.copies else result)

    def result(self, output: Output) -> Any:
        """What the module returns."""
        states = output.result()
        return states.unflatten(-1, (self.copies, -1)).movedim(-2, 0) if self.copies else states


def _wide(states: torch.Tensor) -> torch.Tensor:
    """[copies, rows, T, H] as [rows, T, copies·H]."""
    return states.movedim(0, -2).flatten(-2)


def state_copies(config: PretrainedConfig) -> int:
    """States of each token between a model's blocks."""
    return size_of(config, "altup_num_inputs", 1)


def state_width(config: PretrainedConfig) -> int:
    """Elements that a token has between a model's blocks: its states, and keys and values that later blocks use again."""
    text = config.get_text_config()
    width = text.hidden_size * state_copies(config)
    if getattr(text, "num_kv_shared_layers", 0):
        width += 2 * size_of(config, "num_key_value_heads") * size_of(config, "head_dim") * len(set(text.layer_types))
    return width
