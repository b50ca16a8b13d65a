"""A corpus: from text files to documents, tokens and samples.

Token ids are int32. Text that cannot be used raises `UserError`.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from es_lite.data.lines import check_characters, numbered_lines, parse_line
from es_lite.errors import UserError

BUILTIN = "builtin:python-reference"
SUFFIXES = (".txt", ".jsonl")

# Long texts are tokenized in blocks: a tokenizer's output takes hundreds of bytes per token, and it uses one core per text.
BLOCK_CHARACTERS = 2**16
BATCH_BLOCKS = 64

Document = list[str]
"""Pieces that together are a text: the lines of a .txt with their line ends, or the whole text of a .jsonl record. With
data.samples = "lines", each piece is a sample."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Samples of at least 2 tokens, concatenated."""

    tokens: np.ndarray
    """int32 [total]."""
    starts: np.ndarray
    """int64 [samples + 1]: sample i is tokens[starts[i]:starts[i + 1]]."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sample(self, i: int) -> np.ndarray:
        """int32 [length]."""
        return self.tokens[self.starts[i] : self.starts[i + 1]]


def read_texts(path: str, lines: int) -> list[Document]:
    """The documents of a .txt (one) or .jsonl file (one per record), of a folder of such files, or of `BUILTIN`.

    lines: stop after this many lines or records in total; 0 reads all. Blank documents are left out.
    """
    try:
        pieces = islice(_pieces(path), lines or None)
        documents = [[piece for _, piece in group] for _, group in groupby(pieces, key=itemgetter(0))]
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    documents = [document for document in documents if any(map(str.strip, document))]
    if not documents:
        raise UserError(f"{path}: there is no text in it" + (f", up to line {lines} (data.lines)" if lines else ""))
    return documents


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
    if samples == "lines":
        lines = (piece.removesuffix("\n") for document in texts for piece in document if piece.strip())
        cut = (np.concatenate([ids[:length], end])[:length] for ids in _encode(lines, tokenizer))
        parts = [np.concatenate([begin, ids]) for ids in cut if len(ids) >= least]
        lengths = np.array([len(ids) for ids in parts], np.int64)
    else:
        blocks = [list(_blocks(document)) for document in texts]
        encoded = _encode(chain.from_iterable(blocks), tokenizer)
        parts = [ids for document in blocks for ids in (*islice(encoded, len(document)), end)][:-1]
        windows, rest = divmod(sum(map(len, parts)), length)
        lengths = np.array([max_length] * windows + [begin.size + rest] * (rest >= least), np.int64)
        if begin.size and lengths.size:
            tokens = np.concatenate(parts)
            parts = [part for low in range(0, tokens.size, length) for part in (begin, tokens[low : low + length])]
    if not len(lengths):
        raise UserError("data.path: not one sample of 2 tokens in the text; give more text")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Corpus(np.concatenate(parts)[: starts[-1]], starts)


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
    held_out = math.ceil(round(samples * fraction, 6))  # 100 * 0.07 is 7.000000000000001
    if fraction > 0:
        held_out = max(1, held_out)
    if held_out >= samples:
        raise UserError(
            f"eval.fraction = {fraction}: holds out all of the {samples} samples, which leaves none to train on; "
            "take a smaller fraction, more text, or a text of its own for eval.path"
        )
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


def _pieces(path: str) -> Iterator[tuple[object, str]]:
    """The pieces of all documents, each with a key of its document."""
    if path.startswith("builtin:"):
        yield from _builtin(path)
        return
    for file in _files(path):
        for number, line in numbered_lines(file):
            if file.suffix.lower() == ".txt":
                yield file, line
            elif line.strip():
                yield (file, number), _text_of_record(line, f"{file}:{number}")


def _builtin(path: str) -> Iterator[tuple[str, str]]:
    if path != BUILTIN:
        raise UserError(f'{path}: no such corpus; the one that is built in is "{BUILTIN}"')
    from pydoc_data.topics import topics  # 0.7 MB of text that comes with Python

    for topic in sorted(topics):
        for line in topics[topic].splitlines(keepends=True):
            yield topic, line


def _files(path: str) -> list[Path]:
    kinds = "a .txt or .jsonl file, a folder of such files"
    place = Path(path).expanduser()
    if not path or not place.exists():
        raise UserError(f'"{path}": no such file or folder; data.path and eval.path take {kinds}, or "{BUILTIN}"')
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{place}: no .txt or .jsonl file in this folder")
        return files
    if place.suffix.lower() not in SUFFIXES:
        raise UserError(f'{place}: unknown kind of file "{place.suffix}"; expected {kinds}')
    return [place]


def _text_of_record(line: str, where: str) -> str:
    record = parse_line(line, where)
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: expected an object with a string under "text"')
    check_characters(text, where, "text")
    return text


def _blocks(document: Document) -> Iterator[str]:
    """The document's text, cut at line ends into blocks of at least `BLOCK_CHARACTERS`."""
    block: list[str] = []
    size = 0
    for line in document:
        block.append(line)
        size += len(line)
        if size >= BLOCK_CHARACTERS:
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


def _encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """The token ids of each text, int32."""
    texts = iter(texts)
    while batch := list(islice(texts, BATCH_BLOCKS)):
        # verbose = False: no warning of a text longer than the model's context, since it is cut afterwards
        for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            yield np.array(ids, np.int32)


def _part(corpus: Corpus, first: int, last: int) -> Corpus:
    starts = corpus.starts[first : last + 1]
    return Corpus(corpus.tokens[starts[0] : starts[-1]], starts - starts[0])
