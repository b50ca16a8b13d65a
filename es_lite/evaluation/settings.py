"""The recipe of an evaluation, made of a run's recipe and the command's options, and the prompts that it names."""

import difflib
import sys
import tomllib
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from es_lite import typed_toml
from es_lite.data import batch
from es_lite.data.chat import encode
from es_lite.data.prompts import Row
from es_lite.errors import UserError
from es_lite.evaluation.progress import warn
from es_lite.evaluation.subject import Subject
from es_lite.fitness.reward import split_rows
from es_lite.fitness.tasks.known import BUILT_IN, FROM_FILES, PUZZLES, rows_of, task_of
from es_lite.recipe import Recipe

COUNTS = {
    "samples": ("eval", "samples"),
    "new_tokens": ("generation", "max_new_tokens"),
    "max_length": ("fitness", "max_length"),
    "seed": ("run", "seed"),
}
"""Options of the command that are keys of a recipe."""


def data_path(task: str, prompts: str) -> str:
    """data.path for --task and --prompts, of which at least one is not "". Raises UserError, with the nearest task."""
    if not task:
        return prompts
    name, builtin = task.removeprefix("builtin:"), task.startswith("builtin:")
    if prompts:
        if name not in FROM_FILES:
            raise UserError(f"--task {task}: takes no --prompts, as {', '.join(FROM_FILES)} do{_near(name, list(FROM_FILES))}")
        return f"{name}:{prompts}"
    if name in FROM_FILES and name not in BUILT_IN:
        raise UserError(f"--task {task}: has no prompts of its own; add --prompts FILE")
    if name in BUILT_IN:
        return f"builtin:{name}"
    if ":" not in task:
        known = [*FROM_FILES, f"{PUZZLES}:PUZZLE"]
        raise UserError(f"--task {task}: no such task; there are {', '.join(known)}{_near(task, known)}")
    task_of(f"builtin:{name}" if builtin else task)
    return task


def recipe_of(subject: Subject, options: Namespace) -> Recipe:
    """The recipe: the run's, or the defaults, changed by the command's options; its fitness is "reward".

    options: task, prompts ("" if not given); functions, overrides (lists of str); samples, new_tokens, max_length, seed (int or
    None). Raises UserError.
    """
    document = _run_document(subject)
    if options.task or options.prompts:
        path = options.prompts
        if options.task or subject.recipe is None or subject.recipe.fitness.kind != "reward":
            path = data_path(options.task, options.prompts)
        elif (task := task_of(subject.recipe.data.path)[0]) and task.NAME in FROM_FILES:
            path = f"{task.NAME}:{options.prompts}"  # the run's own task, with other prompts
        if options.task:
            document["reward"] |= {"functions": [], "weights": []}
        if options.task or task_of(path)[0]:
            document["data"] |= {"system": "", "template": "", "chat": False}
        document["data"] |= {"path": path, "options": {}}
        document["eval"]["path"] = ""
    if options.functions:
        document["reward"] |= {"functions": options.functions, "weights": []}
    for option, (table, key) in COUNTS.items():
        if getattr(options, option) is not None:
            document[table][key] = getattr(options, option)
    problems: list[str] = []
    for override in options.overrides:
        typed_toml.override(document, override, problems)
    recipe = typed_toml.read(Recipe, document, "", problems)
    if problems:
        raise UserError("\n".join(problems))
    if subject.journal is not None and recipe.memory.storage != subject.origin.storage:
        raise UserError("--set memory: what a run's layers are stored as cannot be changed")
    return replace(recipe, fitness=replace(recipe.fitness, kind="reward"))


def stored(subject: Subject, recipe: Recipe) -> Subject:
    """The subject; a model that no run trains is stored as the recipe says."""
    if subject.journal is not None:
        return subject
    return replace(subject, origin=replace(subject.origin, storage=recipe.memory.storage))


def prompts_of(subject: Subject, recipe: Recipe, options: Namespace) -> list[Row]:
    """At most eval.samples prompts, evenly spaced: those that the run is evaluated on, the task's held-out ones, or a file's.

    Raises UserError if no task is known.
    """
    of_run = subject.recipe is not None and subject.recipe.fitness.kind == "reward"
    if not options.task and not options.prompts and not of_run:
        kind = "a model has" if subject.recipe is None else 'a run of fitness.kind = "logprob" has'
        raise UserError(
            f"{subject.name}: {kind} no task of its own; add --task, such as countdown, or --prompts FILE with --functions"
        )
    if task_of(recipe.data.path)[0] is None and not recipe.reward.functions:
        raise UserError(
            f"--prompts {options.prompts}: nothing says what a right completion is; add --task ({', '.join(FROM_FILES)}), or "
            "--functions, such as math_answer, a dotted path, or file.py:function"
        )
    if of_run and not options.task and not options.prompts:
        rows = _held_out(recipe)
    else:
        first, held_out = rows_of(recipe.data.path, recipe.data, recipe.run.seed)
        rows = [*first, *(held_out or [])] if options.prompts else held_out or first
    return [rows[index] for index in batch.spread(rows, recipe.eval.samples)]


def room_for_prompts(recipe: Recipe, context: int, longest: int | None) -> int:
    """Tokens of the longest prompt. Raises UserError if there is no room for one.

    context: tokens that the model takes; longest: --max-length.
    """
    new = recipe.generation.max_new_tokens
    if context - new < 2:
        raise UserError(f"--new-tokens {new}: leaves no room for prompts in the model's {context} tokens; lower it")
    return min(context - new, longest or context)


def encoded(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, room: int) -> list[np.ndarray]:
    """The tokens of each prompt, int32 [length]. Raises UserError if they are more than `room`."""
    prompts = encode(rows, tokenizer, sys.maxsize)
    for row, prompt in zip(rows, prompts, strict=True):
        if prompt.size > room:
            raise UserError(
                f"{row.where}: the prompt has {prompt.size} tokens, but there is room for {room}; shorten it, lower "
                "--new-tokens, or raise --max-length"
            )
    return prompts


def _held_out(recipe: Recipe) -> list[Row]:
    """The prompts that the run is evaluated on; if it is not, those that it would be."""
    if not recipe.eval.every:
        first, held_out = rows_of(recipe.data.path, recipe.data, recipe.run.seed)
        if held_out is None:
            warn("the run held no prompts out: it has trained on those that it is evaluated on")
            return first
    return split_rows(recipe)[1]


def _run_document(subject: Subject) -> dict[str, Any]:
    """The tables of the run's recipe, or the defaults."""
    if subject.recipe is not None:
        document = tomllib.loads(subject.recipe.dumps())
    else:
        document = tomllib.loads(Recipe().dumps())
        document["model"] = {"path": subject.origin.path, "config": subject.origin.config}
        if subject.origin.storage != "fp32":
            document["memory"] |= {"master": "none", "weights": subject.origin.storage}
    document["model"]["path"] = subject.origin.path
    return document


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'; did you mean "{near[0]}"?' if near else ""
