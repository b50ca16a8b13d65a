"""Texts: documents from files, read a line at a time, so that a large text is never in memory whole.

Text that cannot be used raises `UserError`.
"""

import contextlib
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path

from es_lite.data.lines import check_characters, numbered_lines, parse_line, suffix_of
from es_lite.errors import UserError
from es_lite.files import expanded

BUILTIN = "builtin:python-reference"
SUFFIXES = (".txt", ".jsonl", ".parquet")
NO_TEXT = ("readme", "license", "licence", "notice")
"""Files of a folder that have these names are about the text, and not part of it."""

BLOCK_CHARACTERS = 2**16
"""Long texts are tokenized in blocks: a tokenizer's output takes hundreds of bytes per token, and it uses one core per text."""

Document = Iterable[str]
"""Pieces that together are a text: the lines of a .txt with their line ends, or the whole text of a record. With
data.samples = "lines", each piece is a sample."""


class Texts:
    """The documents of a file (of a .txt one, of the others one per record), of a folder of such files, or of `BUILTIN`.

    They are read anew each time they are gone through, in order; a document must be used before the next one is taken. Blank
    documents are left out.
    """

    def __init__(self, path: str, lines: int = 0) -> None:
        """lines: stop after this many lines or records in total; 0 reads all."""
        self._path, self._lines = path, lines
        with _refusing(path):
            self.files = [] if path.startswith("builtin:") else _files(path)

    def __iter__(self) -> Iterator[Document]:
        some = False
        for _, group in groupby(islice(self._readable(), self._lines or None), key=itemgetter(0)):
            if (document := _not_blank(piece for _, piece in group)) is not None:
                some = True
                yield document
        if not some:
            limit = f", up to line {self._lines} (data.lines)" if self._lines else ""
            raise UserError(f"{self._path}: there is no text in it{limit}")

    def _readable(self) -> Iterator[tuple[object, str]]:
        with _refusing(self._path):
            yield from self._pieces()

    def _pieces(self) -> Iterator[tuple[object, str]]:
        """The pieces of all documents, each with a key of its document."""
        if self._path.startswith("builtin:"):
            yield from _builtin(self._path)
            return
        for file in self.files:
            kind = suffix_of(file)
            if kind == ".parquet":
                yield from _rows(file)
                continue
            for number, line in numbered_lines(file):
                if kind == ".txt":
                    yield file, line
                elif line.strip():
                    yield (file, number), _text_of(parse_line(line, f"{file}:{number}"), f"{file}:{number}")


def text_blocks(document: Document, size: int = 0) -> Iterator[str]:
    """The document's text, cut into blocks of at least `size` characters (0: BLOCK_CHARACTERS): at line ends or, of a line that
    is longer than four blocks, before a space.
    """
    size = size or BLOCK_CHARACTERS
    block: list[str] = []
    length = 0
    for piece in document:
        for part in _short(piece, 4 * size):
            block.append(part)
            length += len(part)
            if length >= size:
                yield "".join(block)
                block, length = [], 0
    if block:
        yield "".join(block)


def _short(piece: str, most: int) -> Iterator[str]:
    start = 0
    while len(piece) - start > most:
        cut = piece.rfind(" ", start + 1, start + most)
        cut = cut if cut > 0 else start + most
        yield piece[start:cut]
        start = cut
    yield piece[start:] if start else piece


def _not_blank(pieces: Iterator[str]) -> Document | None:
    """The pieces, if there is more than white space in them."""
    before = []
    for piece in pieces:
        before.append(piece)
        if piece.strip():
            return chain(before, pieces)
    return None


def _builtin(path: str) -> Iterator[tuple[str, str]]:
    if path != BUILTIN:
        raise UserError(f'{path}: no such corpus; the one that is built in is "{BUILTIN}"')
    from pydoc_data.topics import topics  # 0.7 MB of text that comes with Python

    for topic in sorted(topics):
        for line in topics[topic].splitlines(keepends=True):
            yield topic, line


@contextlib.contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Raises UserError, which names the file, for an OSError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None


def _files(path: str) -> list[Path]:
    kinds = "a .txt or .jsonl file (also .gz or .zst), a .parquet file, a folder of such files"
    place = expanded(path)
    if not path or not place.exists():
        raise UserError(f'"{path}": no such file or folder; expected {kinds}, or "{BUILTIN}"')
    if not place.is_dir():
        if suffix_of(place) not in SUFFIXES:
            raise UserError(f'{place}: unknown kind of file "{place.suffix}"; expected {kinds}')
        return [place]
    files = sorted(file for file in _within(place) if suffix_of(file) in SUFFIXES)
    if not files:
        raise UserError(f"{place}: no .txt, .jsonl or .parquet file in this folder, nor in those within it")
    return files


def _within(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those within it, except hidden ones and those of run directories."""
    for place in folder.iterdir():
        if place.name.startswith("."):
            continue
        if place.is_dir():  # a link may lead back here
            if not place.is_symlink() and not (place / "journal.jsonl").exists():
                yield from _within(place)
        elif place.name.lower().partition(".")[0] not in NO_TEXT:
            yield place


def _rows(file: Path) -> Iterator[tuple[object, str]]:
    from es_lite.data.records import parquet_rows  # which needs more than text files do

    for number, (where, record) in enumerate(parquet_rows(file, ["text"])):
        yield (file, number), _text_of(record, where)


def _text_of(record: object, where: str) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: expected an object with a string under "text"')
    check_characters(text, where, "text")
    return text
