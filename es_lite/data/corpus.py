"""A corpus: from texts to tokens and samples.

Token ids are int32. Text that cannot be used raises `UserError`.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from es_lite.data.held_out import held_out_count
from es_lite.data.texts import BLOCK_CHARACTERS, Document, text_blocks
from es_lite.errors import UserError

BATCH_BLOCKS = 16
"""Texts that the tokenizer is given at a time."""

CHARACTERS = 256
"""Of a line that is longer than this for each token of a sample, only its beginning is tokenized."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Samples of at least 2 tokens, concatenated."""

    tokens: np.ndarray
    """int32 [total]."""
    starts: np.ndarray
    """int64 [samples + 1]: sample i is tokens[starts[i]:starts[i + 1]]."""
    dropped: int = 0
    """Lines that were left out because they are too short."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sample(self, i: int) -> np.ndarray:
        """int32 [length]."""
        return self.tokens[self.starts[i] : self.starts[i + 1]]


def tokenize(
    texts: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    samples: Literal["lines", "joined"],
    max_length: int,
    beginning: Sequence[int] = (),
) -> Corpus:
    """The samples of `texts`, each of 2 to `max_length` tokens, of which at least one is of the text.

    "lines": each piece of a document, cut to `max_length`, with the end token if there is room. "joined": all documents, with the
    end token between them, cut into windows of `max_length`. Shorter samples are dropped. The end token is left out if the
    tokenizer has none. beginning: tokens that stand before each sample.
    """
    end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], np.int32)
    begin = np.array(beginning, np.int32)
    length = max_length - begin.size  # of the text's own tokens
    least = max(1, 2 - begin.size)
    if length < least:
        raise UserError(
            f"fitness.max_length = {max_length}: leaves no room after the {begin.size} tokens that begin a sample; raise it"
        )
    found, dropped = _Growing(), 0
    if samples == "lines":
        lines = (piece.removesuffix("\n") for document in texts for piece in document if piece.strip())
        short, found_lengths = (line[: max(BLOCK_CHARACTERS, CHARACTERS * max_length)] for line in lines), []
        for ids in _encode(short, tokenizer):
            own = np.concatenate([ids[:length], end])[:length]
            if len(own) >= least:
                found.add(begin)
                found.add(own)
                found_lengths.append(begin.size + len(own))
            else:
                dropped += 1
        lengths = np.array(found_lengths, np.int64)
        tokens = found.whole()
    else:
        for number, ids in _encode_documents(texts, tokenizer):
            if number:
                found.add(end)
            found.add(ids)
        tokens = found.whole()
        windows, rest = divmod(tokens.size, length)
        lengths = np.array([max_length] * windows + [begin.size + rest] * (rest >= least), np.int64)
        if begin.size and lengths.size:
            with_begin = np.empty(tokens.size + (windows + 1) * begin.size, np.int32)
            whole = with_begin[: windows * max_length].reshape(windows, max_length)
            whole[:, : begin.size], whole[:, begin.size :] = begin, tokens[: windows * length].reshape(windows, length)
            with_begin[windows * max_length :] = np.concatenate([begin, tokens[windows * length :]])
            tokens = with_begin
    if not len(lengths):
        raise UserError("not one sample of 2 tokens in the text (data.path, eval.path or --text); give more text")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Corpus(tokens[: starts[-1]], starts, dropped)


def check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    """Raises `UserError` if a token has no row in an embedding of `vocab_size` rows."""
    check_largest(int(corpus.tokens.max()), vocab_size)


def check_largest(largest: int, vocab_size: int) -> None:
    """The same for the largest of any tokens."""
    if largest >= vocab_size:
        raise UserError(
            f"data.tokenizer: makes the token {largest}, but the model's vocab_size is {vocab_size}; take the model's "
            f'own tokenizer (data.tokenizer = ""), or give model.config a vocab_size of {largest + 1} or more'
        )


def split(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    """(training, held out): the last `fraction` of the samples, rounded up, is held out."""
    samples = len(corpus)
    held_out = held_out_count(samples, fraction, "samples")
    return _part(corpus, 0, samples - held_out), _part(corpus, samples - held_out, samples)


def unigram_score(train: Corpus, held_out: Corpus, vocab_size: int) -> float:
    """The held-out score of a model that knows only token frequencies, as a reference.

    The mean over the held-out samples of the mean log-probability of tokens 2 to last, under add-one-smoothed frequencies of
    `train`.
    """
    counts = np.bincount(train.tokens, minlength=vocab_size) + 1
    scores = np.log(counts / counts.sum())[held_out.tokens]
    firsts = held_out.starts[:-1]
    scores[firsts] = 0.0
    return float(np.mean(np.add.reduceat(scores, firsts) / (np.diff(held_out.starts) - 1)))


def fingerprint(*parts: Corpus | None) -> str:
    """SHA-256 of the samples."""
    digest = hashlib.sha256()
    for part in parts:
        if part is not None:
            digest.update(part.starts.astype("<i8").tobytes() + part.tokens.astype("<i4").tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def _encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """The token ids of each text, int32."""
    texts = iter(texts)
    while batch := list(islice(texts, BATCH_BLOCKS)):
        # verbose = False: no warning of a text longer than the model's context, since it is cut afterwards
        for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            yield np.array(ids, np.int32)


def _encode_documents(texts: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bool, np.ndarray]]:
    """The token ids of each block of all documents, and whether a document other than the first begins with it."""
    marks: deque[bool] = deque()

    def parts() -> Iterator[str]:
        for number, document in enumerate(texts):
            for place, block in enumerate(text_blocks(document)):
                marks.append(number > 0 and place == 0)
                yield block

    for ids in _encode(parts(), tokenizer):
        yield marks.popleft(), ids


class _Growing:
    """An array that grows, int32."""

    def __init__(self) -> None:
        self._array, self._size = np.empty(2**16, np.int32), 0

    def add(self, ids: np.ndarray) -> None:
        end = self._size + ids.size
        if end > self._array.size:
            self._array.resize(max(end, self._array.size * 5 // 4), refcheck=False)
        self._array[self._size : end] = ids
        self._size = end

    def whole(self) -> np.ndarray:
        return self._array[: self._size]


def _part(corpus: Corpus, first: int, last: int) -> Corpus:
    starts = corpus.starts[first : last + 1]
    return Corpus(corpus.tokens[starts[0] : starts[-1]], starts - starts[0])
