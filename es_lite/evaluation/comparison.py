"""What a model writes after prompts, and how probable it finds what another wrote, and a text."""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from es_lite.data import batch, corpus
from es_lite.data.batch import Batch
from es_lite.data.corpus import Corpus
from es_lite.data.texts import Texts
from es_lite.data.tokenizer import beginning
from es_lite.errors import UserError
from es_lite.evaluation.figures import columns
from es_lite.evaluation.report import Side
from es_lite.evaluation.subject import Subject
from es_lite.evaluation.weights import WINDOW, Opened
from es_lite.fitness.reward import RewardItems, end_tokens
from es_lite.tables import DataTable

TEXT_TOKENS = 4096
"""Of a text, on which models are compared, evenly spread."""


def write(subject: Subject, model: Opened, items: RewardItems) -> tuple[Side, list[np.ndarray]]:
    """What the subject writes after each prompt, graded, and its tokens, int32 [tokens] each.

    Raises UserError if its logits are not numbers.
    """
    generation = subject.skeleton[0].generation_config
    items = replace(items, ends=end_tokens(subject.config, generation, items.tokenizer))
    packed = items.held_out()
    began = time.perf_counter()
    answers = model.score(packed, f"{subject.name}: writing")
    seconds = time.perf_counter() - began
    if any(ids is None for ids in answers):
        remedy = "it is broken" if subject.journal is None else "its weights have gone astray; take an earlier one with --step"
        raise UserError(f"{subject.name}: the model's logits are not numbers (NaN): {remedy}")
    graded = items.grade(answers[None], packed, subject.step or 0)
    place = np.argsort(packed.rows)  # they were packed by length
    samples = [graded.samples[at] for at in place]
    side = Side(
        name=subject.name,
        step=subject.step,
        samples=samples,
        columns=columns(samples, items.functions),
        new_tokens=int(graded.figures["generated_tokens"]),
        seconds=seconds,
        graders_killed=int(graded.figures["graders_killed"]),
    )
    return side, [answers[at] for at in place]


def completion_log_probabilities(
    model: Opened, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], what: str
) -> list[np.ndarray]:
    """The log-probability of each token of each completion after its prompt: float64 [tokens]. All are int32 [tokens]."""
    whole = [np.concatenate(pair) for pair in zip(prompts, completions, strict=True)]
    lengths = np.array([ids.size for ids in whole])
    order = np.argsort(-lengths, kind="stable")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    found = model.score(batch.pack(Corpus(np.concatenate(whole), starts), order), what)
    values: list[np.ndarray] = [np.empty(0)] * len(whole)
    for place, value in zip(order, found, strict=True):
        values[place] = value[-completions[place].size :]
    return values


def text_samples(tokenizer: PreTrainedTokenizerBase, path: str, window: int, vocabulary: int, data: DataTable) -> Batch:
    """Samples of the text at `path`, about TEXT_TOKENS tokens, evenly spread.

    window: tokens of a sample, at most WINDOW; vocabulary: of the model; data: says how samples begin. Raises UserError.
    """
    window = min(window, WINDOW)
    samples = corpus.tokenize(Texts(path), tokenizer, "joined", window, beginning(tokenizer, data.bos))
    corpus.check_vocabulary(samples, vocabulary)
    return batch.pack(samples, batch.spread(samples, max(1, TEXT_TOKENS // window)))


def text_log_probabilities(model: Opened, samples: Batch, what: str) -> np.ndarray:
    """The mean log-probability of each sample's tokens: float64 [samples]."""
    return np.array([value.mean() for value in model.score(samples, what)])
