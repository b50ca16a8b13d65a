"""The command `evaluate`: what a model or a run writes, what it is worth, and how it differs from another; and talk with it.

    python -m es_lite.evaluate MODEL_OR_RUN [--task TASK] [--prompts FILE] [--against BASE] [--out FILE.json]
    python -m es_lite.evaluate MODEL_OR_RUN --chat ["TEXT"]

The model answers prompts greedily. A run is evaluated on its own held-out prompts unless --task or --prompts names others. The
table goes to standard output, everything also to a JSON file. The model's files and the run are only read.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from es_lite import system
from es_lite.data.batch import Batch
from es_lite.data.texts import BUILTIN
from es_lite.engine.local import LocalEngine
from es_lite.errors import RunError, UserError
from es_lite.evaluation import chat, comparison, figures, report, settings
from es_lite.evaluation.subject import Subject
from es_lite.evaluation.weights import Comparison, opened
from es_lite.files import write_durably
from es_lite.fitness.grading import Graders
from es_lite.fitness.reward import Reward, RewardItems, check_vocabulary, end_tokens, functions_of
from es_lite.recipe import Recipe
from es_lite.terminal import accept_any_text, exit_code_of


def evaluate(subject: Subject, base: Subject | None, recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """The figures, as `report.document` gives them. Raises UserError, RunError."""
    rows = settings.prompts_of(subject, recipe, options)
    tokenizer = subject.tokenizer(recipe.data)
    window = min(side.context for side in (subject, base) if side)
    vocabulary = min(side.config.get_text_config().vocab_size for side in (subject, base) if side)
    prompts = settings.encoded(rows, tokenizer, settings.room_for_prompts(recipe, window, options.max_length))
    check_vocabulary(prompts, subject.config)
    text = None
    if base:
        _check_same_tokenizer(subject, tokenizer, base, recipe)
        text = comparison.text_samples(tokenizer, options.text or BUILTIN, window, vocabulary, recipe.data)
    longest = max(2, *(prompt.size for prompt in prompts))
    recipe = replace(
        recipe,
        fitness=replace(recipe.fitness, samples=len(rows), max_length=longest),
        eval=replace(recipe.eval, every=1, samples=len(rows)),
    )
    functions, weights = functions_of(recipe)
    ends = end_tokens(subject.config, subject.skeleton[0].generation_config, tokenizer)
    with Graders(functions, system.cores(), recipe.reward.seconds) as graders:
        graders.start()
        items = RewardItems(tokenizer, rows, 0, prompts, ends, functions, np.array(weights), graders, recipe, shown=len(rows))
        found = _compare(subject, base, items, text, options.text or BUILTIN)
    return found


def _compare(subject: Subject, base: Subject | None, items: RewardItems, text: Batch | None, path: str) -> dict[str, Any]:
    """Opens one model after the other; the second is also asked how probable it finds what the first wrote."""
    recipe, weights = items.recipe, items.weights.tolist()
    chosen = {
        "task": recipe.data.path,
        "functions": dict(zip(items.functions, weights, strict=True)),
        "max_new_tokens": recipe.generation.max_new_tokens,
        "seed": recipe.run.seed,
    }
    if base is None or text is None:
        with opened(subject, recipe, Reward()) as model:
            own, _ = comparison.write(subject, model, items)
        return report.document(own, chosen, None, np.empty(0), None)
    with opened(subject, recipe, Comparison()) as model:
        own, written = comparison.write(subject, model, items)
        here = comparison.completion_log_probabilities(model, items.tokens, written, f"{subject.name}: its completions")
        read = comparison.text_log_probabilities(model, text, f"{subject.name}: the text")
    check_vocabulary(written, base.config)
    with opened(base, recipe, Comparison()) as model:
        other, _ = comparison.write(base, model, items)
        there = comparison.completion_log_probabilities(model, items.tokens, written, f"{base.name}: the other's completions")
        read_there = comparison.text_log_probabilities(model, text, f"{base.name}: the text")
    retained = report.Text(path, text.scored_tokens, read, read_there)
    return report.document(own, chosen, other, figures.kl(here, there), retained)


def _check_same_tokenizer(subject: Subject, tokenizer: PreTrainedTokenizerBase, base: Subject, recipe: Recipe) -> None:
    """Raises UserError if the two models' tokens do not mean the same."""
    if base.origin.path == subject.origin.path and base.journal == subject.journal:
        return
    own = "" if base.origin.path else recipe.data.tokenizer
    theirs = base.tokenizer(base.recipe.data if base.recipe else replace(recipe.data, tokenizer=own))
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--against {base.name}: its vocabulary is not that of {subject.name}, so that probabilities of tokens cannot be "
            "compared; evaluate each by itself"
        )


def run(options: argparse.Namespace) -> None:
    """The command. Raises UserError, RunError."""
    subject = Subject.find(options.model_or_run, options.model, options.step)
    base = None
    if options.against:
        base = subject.start() if options.against == "start" else Subject.find(options.against)
    LocalEngine.prepare()
    recipe = settings.recipe_of(subject, options)
    subject = settings.stored(subject, recipe)
    if options.chat is not None:
        chat.chat(subject, recipe, options.chat, options.max_length)
        return
    out = options.out or (subject.folder and subject.folder / "evaluation.json")
    if out and not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")
    if out and (out.is_dir() or not os.access(out.absolute().parent, os.W_OK)):
        raise UserError(f"--out {out}: cannot be written; name a file in a folder that can")
    found = evaluate(subject, base and settings.stored(base, recipe), recipe, options)
    print(report.table(found))
    if out:
        try:
            write_durably(out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise RunError(f"{out}: cannot be written ({error.strerror}); the table above is complete") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="es-lite evaluate",
        description="Say what a model or a run writes, what it is worth, and how it differs from another's.",
    )
    add = parser.add_argument
    add("model_or_run", metavar="MODEL_OR_RUN", help="a Hugging Face folder, a hub name, a run directory, or a journal.jsonl")
    add("--task", default="", help="countdown, conciseness, reasoning-gym:PUZZLE, or, with --prompts, math; default: the run's")
    add("--prompts", default="", metavar="FILE", help="prompts in place of the task's or the run's held-out ones")
    add("--functions", nargs="+", default=[], metavar="F", help="reward functions; default: the run's, or the task's")
    add("--samples", type=_count, metavar="N", help="at most this many prompts, evenly spread; default: the run's, or 64")
    add("--new-tokens", type=_count, metavar="N", help="tokens of a completion, at most; default: the run's, or 128")
    add("--max-length", type=_count, metavar="N", help="refuse longer prompts (tokens); default: the model's, in a chat 1024")
    add("--seed", type=int, metavar="S", help="of the task's prompts; default: the run's, or 0")
    add("--step", type=int, metavar="T", help="of a run; default: its last")
    add("--model", default="", metavar="PATH", help="where a run's pretrained model is, if not where the run found it")
    add("--against", default="", metavar="BASE", help='a folder, a hub name, a run, or "start", what the run started from')
    add("--text", default="", metavar="FILE", help="with --against: a text to compare on, as data.path takes it")
    add("--out", type=Path, metavar="FILE.json", help="where figures and completions go; default: evaluation.json in the run")
    add("--chat", nargs="?", const="", metavar="TEXT", help="answer TEXT, or without it, every line of a conversation")
    add("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="overrides", help="override a key of the recipe")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    accept_any_text()
    options = _parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is refused where it is used
    return exit_code_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
