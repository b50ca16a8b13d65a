"""Log-probability of text, the fitness "logprob" (EA4LLM, section 3).

An item is a sample of text. Its score is the mean log-probability of its true next tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from es_lite.data import corpus
from es_lite.data.batch import HELD_OUT, Batch, SampleShelf
from es_lite.data.corpus import Corpus
from es_lite.data.lines import PACKED
from es_lite.data.texts import Texts
from es_lite.data.tokenizer import beginning, load_tokenizer
from es_lite.errors import UserError
from es_lite.fitness.base import Graded, ItemMemory, Items
from es_lite.model.configuration import intermediate_size
from es_lite.recipe import Recipe
from es_lite.scoring.arguments import state_width
from es_lite.scoring.heads import VOCABULARY_BLOCK
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import Perturbation

SMALL_TEXT = 2**22
"""Bytes of a text that the coordinator's memory has room for as it is."""

TOKENIZER_BYTES = 400 * 2**20
"""Buffers of the tokenizer and its trainer."""


@dataclass(frozen=True)
class Samples:
    """The samples that a run trains on and is evaluated on."""

    tokenizer: PreTrainedTokenizerBase
    train: Corpus
    held_out_corpus: Corpus | None
    """None if the recipe asks for no evaluations."""
    recipe: Recipe
    vocab_size: int
    """The model's."""
    begin: Sequence[int] = ()
    """Tokens that stand before each sample."""
    files: int = 0
    dropped: int = 0
    """Lines that are too short to be samples."""

    def description(self) -> str:
        tokenizer, parts = self.tokenizer, [f"{len(self.train):,} samples with {self.train.tokens.size:,} tokens"]
        if self.files > 1:
            parts[0] += f" from {self.files:,} files"
        if self.dropped:
            parts.append(f"{self.dropped:,} lines of fewer than 2 tokens left out")
        if self.held_out_corpus is not None:
            parts.append(f"{len(self.held_out_corpus):,} held out")
        begins = f"begins with {tokenizer.decode(list(self.begin))}" if self.begin else "has nothing put before it"
        end = tokenizer.eos_token
        where = {"lines": f"ends with {end}", "joined": f"has {end} where a document ends"}[self.recipe.data.samples]
        return f"{', '.join(parts)}; a sample {begins} and {where if end else 'has no end token'}"

    @property
    def shelf(self) -> SampleShelf:
        recipe = self.recipe
        return SampleShelf(self.train, self.held_out_corpus, recipe.fitness.samples, recipe.eval.samples, recipe.run.seed)

    def draw(self, step: int) -> Batch:
        return self.shelf.items(step)

    def held_out(self) -> Batch:
        return self.shelf.items(HELD_OUT)

    def fingerprint(self) -> str:
        return corpus.fingerprint(self.train, self.held_out_corpus)

    def grade(self, answers: np.ndarray, items: Items, step: int) -> Graded:
        """The answers are the scores; a member that has one which is no number has scores of -inf."""
        broken = np.isnan(answers).any(axis=1, keepdims=True)
        return Graded(np.where(broken, -np.inf, answers))

    def close(self) -> None:
        """Nothing was started."""

    def reference(self) -> dict[str, float]:
        """vocab_size and unigram_score (see `corpus.unigram_score`)."""
        assert self.held_out_corpus is not None
        score = corpus.unigram_score(self.train, self.held_out_corpus, self.vocab_size)
        return {"vocab_size": self.vocab_size, "unigram_score": score}


class LogProb:
    """The fitness "logprob"."""

    name = "logprob"
    measures = "mean log-probability of a token"
    unit = "nats"
    largest_loss = 0.5
    generates = False

    def open(self, recipe: Recipe, config: PretrainedConfig, generation: GenerationConfig | None, run_dir: Path) -> Samples:
        table, length = recipe.data, recipe.fitness.max_length
        texts = Texts(table.path, table.lines)
        tokenizer = load_tokenizer(table, recipe.model.path, run_dir, texts)
        vocab_size = config.get_text_config().vocab_size
        if (tokenizer.eos_token_id or 0) >= vocab_size:
            raise UserError(
                f"data.tokenizer: its end token {tokenizer.eos_token} is number {tokenizer.eos_token_id}, but the model has only "
                f"{vocab_size} tokens; take the model's own tokenizer, or name another eos_token in its tokenizer_config.json"
            )
        begin = beginning(tokenizer, table.bos)
        train = corpus.tokenize(texts, tokenizer, table.samples, length, begin)
        dropped = train.dropped
        held_out = None
        if recipe.eval.every and recipe.eval.path:
            held_out = corpus.tokenize(Texts(recipe.eval.path), tokenizer, table.samples, length, begin)
        elif recipe.eval.every:
            train, held_out = corpus.split(train, recipe.eval.fraction)
        for part in filter(None, (train, held_out)):
            corpus.check_vocabulary(part, vocab_size)
        samples = Samples(tokenizer, train, held_out, recipe, vocab_size, begin, len(texts.files), dropped)
        samples.draw(0)  # reports at once if there are fewer samples than a step draws
        return samples

    def memory(self, recipe: Recipe, config: PretrainedConfig, itemsize: int) -> ItemMemory:
        text = config.get_text_config()
        width, length, micro = text.hidden_size, recipe.fitness.max_length, recipe.fitness.micro_batch
        block = micro * length * (3 * intermediate_size(config) * itemsize + 8 * width * 4)
        logits = micro * length * 2 * VOCABULARY_BLOCK * itemsize
        # Hidden states: a layer's input and output, and the head's selection of them.
        hidden = 3 * length * state_width(config) * itemsize
        return ItemMemory(tokens=length, hidden=hidden, activations=block + logits, text=_text_bytes(recipe))

    def score(self, model: PerturbedModel, perturbations: Sequence[Perturbation], items: Items, pass_items: int) -> np.ndarray:
        assert isinstance(items, Batch)
        return model.log_probabilities(perturbations, items, pass_items)


def _text_bytes(recipe: Recipe) -> int:
    """What a text takes: its tokens, and buffers of the tokenizer (measured)."""
    size = 0
    trained = "" if recipe.data.lines else recipe.data.path
    for path in filter(None, (trained, recipe.eval.path if recipe.eval.every else "")):
        try:
            for file in Texts(path).files:
                packed = file.suffix.lower() in (*PACKED, ".parquet")
                size += file.stat().st_size * (4 if packed else 1)
        except (UserError, OSError):  # is said when it is read
            continue
    most_tokens = size if recipe.data.tokenizer == "bpe" and recipe.data.vocab_size < 512 else size // 2
    return 0 if size < SMALL_TEXT else 10 * most_tokens + min(20 * size, TOKENIZER_BYTES)
