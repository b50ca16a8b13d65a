"""Rewards on generated text, the fitness "reward" (Evolution Strategies at Scale, arXiv 2509.24372).

An item is a prompt with its columns. A member continues it greedily; reward functions grade what it wrote, and the item's score
is the weighted sum of their values. Workers generate; the coordinator has the text graded, by processes of their own.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from es_lite import system
from es_lite.data import batch, prompts
from es_lite.data.batch import HELD_OUT, Batch
from es_lite.data.chat import decode, encode
from es_lite.data.corpus import Document, check_largest
from es_lite.data.prompt_batch import Prompts, PromptShelf
from es_lite.data.prompts import Row
from es_lite.data.tokenizer import load_tokenizer
from es_lite.errors import UserError
from es_lite.fitness.base import Graded, GradedCompletion, ItemMemory, Items
from es_lite.fitness.functions import role
from es_lite.fitness.grading import Completions, Graders
from es_lite.fitness.tasks.known import rows_of, task_of
from es_lite.model.configuration import intermediate_size, size_of
from es_lite.quantities import count
from es_lite.recipe import Recipe
from es_lite.scoring.arguments import state_width
from es_lite.scoring.attention import room
from es_lite.scoring.generate import Limits
from es_lite.scoring.heads import VOCABULARY_BLOCK
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import Perturbation
from es_lite.scoring.sequences import PADDING, check_cache
from es_lite.tables import DataTable

SHOWN = 8
"""Completions of an evaluation that are kept as samples."""

GRADER_BYTES = 64 * 2**20
"""Memory of a grader that has no large library to load (measured)."""


@dataclass(frozen=True)
class RewardItems:
    """The prompts that a run trains on and is evaluated on, and what grades the completions."""

    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Row]
    """To train on first, then held-out ones."""
    train: int
    """How many of them are to train on."""
    tokens: Sequence[np.ndarray]
    """Each row's prompt, int32 [length]."""
    ends: tuple[int, ...]
    functions: Sequence[str]
    weights: np.ndarray
    """float64 [functions]."""
    graders: Graders
    recipe: Recipe
    shown: int = SHOWN
    """Completions that are kept as samples, evenly spread."""
    causes: set[str] = field(default_factory=set)
    """Why graders were killed, as far as it has been said."""

    def description(self) -> str:
        lengths = [len(tokens) for tokens in self.tokens]
        ends = ", ".join(map(str, self.tokenizer.convert_ids_to_tokens(list(self.ends)))) or "no token"
        return (
            f"{self.train:,} prompts and {len(self.rows) - self.train:,} held out, of {min(lengths)} to {max(lengths)} tokens; "
            f"completions end with {ends}"
        )

    @property
    def shelf(self) -> PromptShelf:
        recipe, new_tokens = self.recipe, self.recipe.generation.max_new_tokens
        asked, held_out, seed = recipe.fitness.samples, recipe.eval.samples, recipe.run.seed
        return PromptShelf(self.tokens, self.train, self.ends, new_tokens, asked, held_out, seed)

    def draw(self, step: int) -> Prompts:
        return self.shelf.items(step)

    def held_out(self) -> Prompts:
        return self.shelf.items(HELD_OUT)

    def fingerprint(self) -> str:
        return prompts.fingerprint(self.rows)

    def reference(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.graders.close()

    def grade(self, answers: np.ndarray, items: Items, step: int) -> Graded:
        """See `Dataset.grade`. answers: what was written, object [members, items]: int32 [tokens], or None.

        An item for which all functions that have a weight returned None is not counted; a member whose logits were not numbers
        is not graded, and has scores of -inf. Raises UserError, also if nothing counts at all.
        """
        assert isinstance(items, Prompts)
        began = time.perf_counter()
        rows = [self.rows[row] for row in items.rows]
        written = [[np.zeros(0, np.int32) if ids is None else ids for ids in member] for member in answers]
        texts = [[decode(self.tokenizer, ids) for ids in member] for member in written]
        broken = np.array([any(ids is None for ids in member) for member in answers])
        sound = np.flatnonzero(~broken)
        grades = self.graders.grade_all([Completions(rows, texts[i], [ids.tolist() for ids in written[i]], step) for i in sound])
        parts = np.full((len(answers), len(self.functions), len(rows)), np.nan)  # [members, functions, items]
        for i, grade in zip(sound, grades, strict=True):
            parts[i] = grade.parts
        weighed = self.weights != 0  # others are only reported
        counted = ~np.isnan(parts[:, weighed])
        if sound.size and not counted.any():
            raise UserError(
                f"reward.functions: {', '.join(self.functions)} returned None for every completion, so that none counts; "
                f"return a number for some (the first prompt is that of {rows[0].where})"
            )
        scores = np.where(np.isnan(parts), 0.0, parts).transpose(0, 2, 1) @ self.weights
        scores[~counted.any(axis=1)] = np.nan
        scores[broken] = -np.inf
        cut = np.array([[not ids.size or ids[-1] not in self.ends for ids in member] for member in written])
        figures = {
            "generated_tokens": sum(ids.size for member in written for ids in member),
            "grading_seconds": time.perf_counter() - began,
            "graders_killed": int(sum(grade.killed.sum() for grade in grades)),
        }
        causes = {cause for grade in grades for cause in grade.causes.values()} - self.causes
        self.causes.update(causes)
        samples = [
            GradedCompletion(
                prompt=row.prompt,
                completion=texts[0][i],
                rewards={name: _number(parts[0, j, i]) for j, name in enumerate(self.functions)},
                score=_number(scores[0, i]),
                cut=bool(cut[0, i]),
            )
            for i, row in ((i, rows[i]) for i in batch.spread(rows, self.shown))
        ]
        return Graded(scores, figures, self._described(parts, texts, cut), samples, sorted(causes))

    def _described(self, parts: np.ndarray, texts: Sequence[Sequence[str]], cut: np.ndarray) -> dict[str, float]:
        """accuracy and format (the share of completions to which a function of that role gives 1), length in characters, and
        cut, the share that had no end."""
        found = {}
        for name, what in (("right", "accuracy"), ("format", "format")):
            which = [j for j, function in enumerate(self.functions) if role(function) == name]
            values = parts[:, which[0]] if which else np.full(1, np.nan)
            if not np.isnan(values).all():
                found[what] = float(np.mean(values[~np.isnan(values)] >= 1))
        found["length"] = float(np.mean([[len(text) for text in member] for member in texts]))
        return found | {"cut": float(cut.mean())}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


class Reward:
    """The fitness "reward"."""

    name = "reward"
    measures = "mean reward"
    unit = ""
    largest_loss = float("inf")
    generates = True

    def open(self, recipe: Recipe, config: PretrainedConfig, generation: GenerationConfig | None, run_dir: Path) -> RewardItems:
        table, seed = recipe.data, recipe.run.seed
        if recipe.eval.every:
            train, held_out = split_rows(recipe)
        else:
            train, held_out = rows_of(table.path, table, seed)[0], []
        rows = [*train, *held_out]
        tokenizer = load_tokenizer(table, recipe.model.path, run_dir, _texts(train))
        tokens = encode(rows, tokenizer, recipe.fitness.max_length)
        check_vocabulary(tokens, config)
        functions, weights = functions_of(recipe)
        graders = Graders(functions, system.cores(), recipe.reward.seconds)
        ends = end_tokens(config, generation, tokenizer)
        items = RewardItems(tokenizer, rows, len(train), tokens, ends, functions, np.array(weights), graders, recipe)
        if recipe.fitness.samples > len(train):
            apart = f" ({len(rows) - len(train)} are held out)" if len(rows) > len(train) else ""
            raise UserError(
                f"fitness.samples = {recipe.fitness.samples}: there are only {count(len(train), 'prompt')} to train on{apart}; "
                "lower it, or give more prompts"
            )
        if not ends:
            new = recipe.generation.max_new_tokens
            print(
                f"note: neither the model nor its tokenizer has an end token, so every completion has {new} tokens "
                "(generation.max_new_tokens)",
                flush=True,
            )
        graders.start()
        return items

    def memory(self, recipe: Recipe, config: PretrainedConfig, itemsize: int) -> ItemMemory:
        text = config.get_text_config()
        length, new, micro = recipe.fitness.max_length, recipe.generation.max_new_tokens, recipe.fitness.micro_batch
        check_cache(config)
        width = text.hidden_size
        queries = size_of(config, "num_attention_heads", 1)
        heads, head = size_of(config, "num_key_value_heads", queries), size_of(config, "head_dim", width // queries)
        slots = PADDING + length + new - 1
        block = 3 * intermediate_size(config) * itemsize + 8 * width * 4
        return ItemMemory(
            tokens=length,
            hidden=3 * (length + PADDING) * state_width(config) * itemsize,
            activations=micro * (length + PADDING) * block,
            new_tokens=new,
            cache=(room(slots) + slots) * heads * head * itemsize * text.num_hidden_layers,
            decoding=block + 2 * VOCABULARY_BLOCK * itemsize + 4 * slots * heads * head * itemsize,
            graders=system.cores() * GRADER_BYTES,
        )

    def score(self, model: PerturbedModel, perturbations: Sequence[Perturbation], items: Items, pass_items: int) -> np.ndarray:
        """What each member writes after each prompt, int32 [tokens]; of a `Batch`, which evaluations compare models on, the
        log-probabilities of its tokens, float64 [length - 1]: object [members, items]."""
        if isinstance(items, Batch):
            return model.token_log_probabilities(perturbations, items, pass_items)
        assert isinstance(items, Prompts)
        return model.generate(perturbations, items.tokens, Limits(items.ends, items.new_tokens), pass_items)


def split_rows(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and held-out rows: those of eval.path, the task's own, or the last part of data.path."""
    table, seed = recipe.data, recipe.run.seed
    train, held_out = rows_of(table.path, table, seed)
    if recipe.eval.path:
        other, its_held_out = rows_of(recipe.eval.path, _for_evaluation(recipe), seed, "eval.path")
        return train, its_held_out or other
    return prompts.split(train, recipe.eval.fraction) if held_out is None else (train, held_out)


def _for_evaluation(recipe: Recipe) -> DataTable:
    """What of the data's keys also says how the prompts of eval.path are made: options, if it is such a task as data.path is;
    what files need, if it is none."""
    table = recipe.data
    (task, source), (own, own_source) = task_of(recipe.eval.path), task_of(table.path)
    if task is not own or bool(source) != bool(own_source):
        table = replace(table, options={})
    return table if task is None else replace(table, system="", template="", chat=False)


def check_vocabulary(tokens: Sequence[np.ndarray], config: PretrainedConfig) -> None:
    """Raises UserError if a prompt, int32 [length], has a token that the model does not know."""
    check_largest(max(int(prompt.max()) for prompt in tokens), config.get_text_config().vocab_size)


def functions_of(recipe: Recipe) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The recipe's reward functions and their weights, or those of its task. Raises UserError."""
    functions, weights = recipe.reward.functions, recipe.reward.weights
    task, _ = task_of(recipe.data.path)
    if not functions:
        if task is None:
            raise UserError(
                f'reward.functions: missing, and data.path = "{recipe.data.path}" is no task that has its own; name built-in '
                'ones (such as "math_answer"), dotted paths, or "file.py:function"'
            )
        functions, weights = task.FUNCTIONS, weights or task.WEIGHTS
    weights = weights or (1.0,) * len(functions)
    if len(weights) != len(functions):
        raise UserError(
            f"reward.weights: has {count(len(weights), 'number')} for {count(len(functions), 'function')}: {', '.join(functions)}"
        )
    if not any(weights):
        raise UserError("reward.weights: all are 0, so that every completion would score the same; give one function a weight")
    return tuple(functions), tuple(weights)


def end_tokens(
    config: PretrainedConfig, generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Those of the generation config, else of the model's, else of the tokenizer; none if nobody knows one."""
    for source in (generation, config.get_text_config(), tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()


def _texts(rows: Sequence[Row]) -> list[Document]:
    """The prompts as documents, for a tokenizer that is trained on them."""
    return [[row.prompt] if isinstance(row.prompt, str) else [message["content"] for message in row.prompt] for row in rows]
