"""From text files to samples of tokens."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from corpora import corpus_of, samples_of
from tokenizers import processors

from es_lite.data import corpus as module
from es_lite.data.corpus import (
    BUILTIN,
    check_vocabulary,
    fingerprint,
    read_texts,
    split,
    tokenize,
    unigram_score,
)
from es_lite.data.tokenizer import train_bpe
from es_lite.errors import UserError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token per byte, and the end token 0."""
    return train_bpe([["any text"]], 257)


@pytest.fixture
def endless(byte_tokenizer, monkeypatch):
    """The same without an end token."""
    monkeypatch.setitem(byte_tokenizer._special_tokens_map, "eos_token", None)
    assert byte_tokenizer.eos_token_id is None
    return byte_tokenizer


@pytest.fixture
def ids(byte_tokenizer):
    return lambda text: byte_tokenizer(text, add_special_tokens=False)["input_ids"]


# Reading


def test_a_txt_file_is_one_document_made_of_its_lines(tmp_path):
    assert read_texts(write(tmp_path / "a.txt", "one\n\n  two\u2028\x0b\nthree"), 0) == [
        ["one\n", "\n", "  two\u2028\x0b\n", "three"]
    ]


def test_the_byte_order_mark_and_carriage_returns_of_windows_are_not_text(tmp_path):
    assert read_texts(write(tmp_path / "a.TXT", "\ufeffone\r\ntwo\r\n"), 0) == [["one\n", "two\n"]]


def test_each_record_of_a_jsonl_file_is_a_document(tmp_path):
    records = '{"text": "one\\ntwo\\n"}\n\n{"text": "drei \\u00e4", "other": 1}\n{"text": " "}\n'
    assert read_texts(write(tmp_path / "a.jsonl", records), 0) == [["one\ntwo\n"], ["drei ä"]]


def test_a_folder_is_read_file_by_file_in_order(tmp_path):
    write(tmp_path / "b.txt", "b1\nb2\n")
    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "c.txt", "")
    write(tmp_path / "README.md", "not data")
    (tmp_path / "d.txt").mkdir()
    assert read_texts(str(tmp_path), 0) == [["a"], ["b1\n", "b2\n"]]


@pytest.mark.parametrize(
    "lines, documents",
    [(1, [["a"]]), (2, [["a"], ["b1\n"]]), (3, [["a"], ["b1\n", "b2\n"]]), (9, [["a"], ["b1\n", "b2\n"], ["c\n"]])],
)
def test_lines_are_counted_over_all_files(tmp_path, lines, documents):
    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "b.txt", "b1\nb2\n")
    write(tmp_path / "c.txt", "c\n")
    assert read_texts(str(tmp_path), lines) == documents


def test_nothing_after_the_last_wanted_line_is_read(tmp_path):
    assert read_texts(write(tmp_path / "a.txt", b"good\n\xff\xfe\0"), 1) == [["good\n"]]


def test_the_builtin_corpus():
    documents = read_texts(BUILTIN, 0)
    assert documents == read_texts(BUILTIN, 0)
    assert len(documents) > 50
    assert sum(len(line) for document in documents for line in document) > 300_000
    assert "".join(documents[0]).startswith('The "assert" statement')
    assert read_texts(BUILTIN, 3) == [documents[0][:3]]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, r"missing\.txt\": no such file or folder; .*builtin:python-reference"),
        ("empty.txt", "", r"empty\.txt: there is no text in it$"),
        ("blank.txt", " \n\n\t\n", r"blank\.txt: there is no text in it$"),
        ("blank.jsonl", '{"text": ""}\n', r"blank\.jsonl: there is no text in it$"),
        ("nul.txt", "fine\na\0b\n", r"nul\.txt:2: has a NUL byte"),
        ("utf16.txt", "text".encode("utf-16-le"), r"utf16\.txt:1: has a NUL byte"),
        ("latin.txt", b"fine\nfine\ncaf\xe9\n", r"latin\.txt:3: not UTF-8"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', r"latin\.jsonl:1: not UTF-8"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', r"broken\.jsonl:2: not JSON"),
        ("deep.jsonl", "[" * 100_000, r"deep\.jsonl:1: not JSON"),
        ("list.jsonl", '["a"]\n', r'list\.jsonl:1: expected an object with a string under "text"'),
        ("keyless.jsonl", '{"text": "a"}\n\n{"txt": "a"}\n', r"keyless\.jsonl:3: expected an object with a string"),
        ("number.jsonl", '{"text": 5}\n', r"number\.jsonl:1: expected an object with a string"),
        ("surrogate.jsonl", '{"text": "\\ud800"}\n', r"surrogate\.jsonl:1: .* half a surrogate pair"),
        ("book.pdf", "text", r'book\.pdf: unknown kind of file "\.pdf"; expected a \.txt or \.jsonl file'),
        ("suffixless", "text", r'suffixless: unknown kind of file ""'),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        read_texts(str(tmp_path / name), 0)


@pytest.mark.parametrize(
    "path, message",
    [("", '"": no such file or folder'), ("builtin:pyton", 'builtin:pyton: no such corpus; .* "builtin:python-ref')],
)
def test_unusable_names(path, message):
    with pytest.raises(UserError, match=message):
        read_texts(path, 0)


def test_no_text_within_the_wanted_lines(tmp_path):
    with pytest.raises(UserError, match=r"no text in it, up to line 2 \(data.lines\)"):
        read_texts(write(tmp_path / "a.txt", "\n\ntext"), 2)


def test_a_folder_without_text_files(tmp_path):
    write(tmp_path / "a.csv", "1,2")
    with pytest.raises(UserError, match=r"no \.txt or \.jsonl file in this folder"):
        read_texts(str(tmp_path), 0)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        read_texts(path, 0)


# Tokens and samples


def test_lines_are_cut_and_ended(byte_tokenizer, ids):
    texts = [["abcdef\n", "\n", "abc\n", "ab\n"], ["x"], ["é\n  z"]]
    corpus = tokenize(texts, byte_tokenizer, "lines", 4)
    assert samples_of(corpus) == [ids("abcd"), [*ids("abc"), 0], [*ids("ab"), 0], [*ids("x"), 0], ids("é\n ")]
    assert corpus.tokens.dtype == np.int32 and corpus.starts.dtype == np.int64
    assert corpus.starts[-1] == len(corpus.tokens)


def test_lines_without_an_end_token(endless, ids):
    corpus = tokenize([["abcdef\n", "x\n", "abc"]], endless, "lines", 4)
    assert samples_of(corpus) == [ids("abcd"), ids("abc")]


def test_joined_documents_have_an_end_token_between_them(byte_tokenizer, ids):
    corpus = tokenize([["abc\n", "de\n"], ["fgh"]], byte_tokenizer, "joined", 4)
    assert samples_of(corpus) == [ids("abc\n"), [*ids("de\n"), 0], ids("fgh")]
    assert corpus.tokens.dtype == np.int32 and corpus.starts.dtype == np.int64


@pytest.mark.parametrize("tail, samples", [("", 1), ("e", 1), ("ef", 2), ("efgh", 2)])
def test_a_last_window_of_one_token_is_dropped(byte_tokenizer, ids, tail, samples):
    corpus = tokenize([["abcd" + tail]], byte_tokenizer, "joined", 4)
    assert samples_of(corpus) == [ids("abcd"), ids(tail)][:samples]
    assert corpus.starts[-1] == len(corpus.tokens)


def test_joined_without_an_end_token(endless, ids):
    assert samples_of(tokenize([["ab"], ["cd"]], endless, "joined", 8)) == [ids("abcd")]


def test_long_documents_are_encoded_in_blocks(byte_tokenizer, ids, monkeypatch):
    texts = [["one line\n", "and\n", "\n", "another\n"], ["a second\n"], ["third"]]
    whole = tokenize(texts, byte_tokenizer, "joined", 1000)
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 6)
    monkeypatch.setattr(module, "BATCH_BLOCKS", 2)
    assert list(module._blocks(texts[0])) == ["one line\n", "and\n\nanother\n"]
    assert samples_of(tokenize(texts, byte_tokenizer, "joined", 1000)) == samples_of(whole)
    assert samples_of(whole) == [[*ids("".join(texts[0])), 0, *ids("a second\n"), 0, *ids("third")]]


def test_no_special_tokens_are_added_and_no_warning_is_given(byte_tokenizer, ids, monkeypatch, caplog, capfd):
    expected = ids("abcdefgh")
    monkeypatch.setattr(byte_tokenizer, "model_max_length", 4)
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    monkeypatch.setattr(byte_tokenizer.backend_tokenizer, "post_processor", template)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for samples in ("lines", "joined"):
            assert samples_of(tokenize([["abcdefgh"]], byte_tokenizer, samples, 8)) == [expected]
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("samples", ["lines", "joined"])
def test_a_text_without_a_sample_is_refused(endless, samples):
    with pytest.raises(UserError, match=r"data\.path: not one sample of 2 tokens"):
        tokenize([["x"]], endless, samples, 8)


def test_a_token_beyond_the_vocabulary_is_refused():
    corpus = corpus_of([1, 256], [300, 2])
    check_vocabulary(corpus, 301)
    with pytest.raises(UserError, match=r"token 300, .* vocab_size is 300; .*data\.tokenizer = \"\".*301 or more"):
        check_vocabulary(corpus, 300)


# Splitting


@pytest.mark.parametrize(
    "samples, fraction, held_out",
    [(10, 0.0, 0), (10, 0.05, 1), (10, 0.1, 1), (10, 0.11, 2), (100, 0.07, 7), (2, 0.5, 1), (10**4, 1e-9, 1)],
)
def test_the_last_samples_are_held_out(samples, fraction, held_out):
    corpus = corpus_of(*([i, i + 1, i + 2][: 2 + i % 2] for i in range(samples)))
    train, rest = split(corpus, fraction)
    assert len(rest) == held_out
    assert samples_of(train) + samples_of(rest) == samples_of(corpus)


@pytest.mark.parametrize("samples, fraction", [(1, 0.05), (3, 0.9)])
def test_holding_out_all_samples_is_refused(samples, fraction):
    with pytest.raises(UserError, match=rf"eval\.fraction = {fraction}: holds out all of the {samples} samples"):
        split(corpus_of(*[[1, 2]] * samples), fraction)


# The score of token frequencies


def test_unigram_score_by_hand():
    train, held_out = corpus_of([0, 1, 1], [1, 2]), corpus_of([3, 1, 0], [1, 1])
    logarithms = np.log(np.array([2, 4, 2, 1]) / 9)
    expected = ((logarithms[1] + logarithms[0]) / 2 + logarithms[1]) / 2
    assert unigram_score(train, held_out, 4) == pytest.approx(expected, abs=1e-12)


def test_unigram_score_of_the_builtin_corpus():
    texts = read_texts(BUILTIN, 0)
    corpus = tokenize(texts, train_bpe(texts, 257), "joined", 128)
    check_vocabulary(corpus, 257)
    assert unigram_score(*split(corpus, 0.05), 257) == pytest.approx(-3.19, abs=0.06)


# The fingerprint


def test_a_fingerprint_is_the_same_forever():
    """Journals hold it: with another value, no run could be resumed."""
    assert fingerprint(corpus_of([1, 2], [3, 4, 5]), None) == "7bfd2896ed235af9505697c6b0831e1aad7f95276f3a590a304571e559ac2aa2"


def test_other_samples_have_another_fingerprint():
    parts = [
        (corpus_of([1, 2], [3, 4, 5]), None),
        (corpus_of([1, 2, 3], [4, 5]), None),
        (corpus_of([1, 2], [3, 4, 6]), None),
        (corpus_of([1, 2]), corpus_of([3, 4, 5])),
        (corpus_of([3, 4, 5]), corpus_of([1, 2])),
        (None, corpus_of([1, 2], [3, 4, 5])),
    ]
    assert len({fingerprint(*both) for both in parts}) == len(parts)


# The token that begins a text


def test_samples_may_begin_with_a_token(byte_tokenizer, ids):
    begin = [7]
    lines = tokenize([["abcdef\n", "x\n"]], byte_tokenizer, "lines", 4, begin)
    assert samples_of(lines) == [[7, *ids("abc")], [7, *ids("x"), 0]]
    joined = tokenize([["abcdefg"]], byte_tokenizer, "joined", 4, begin)
    assert samples_of(joined) == [[7, *ids("abc")], [7, *ids("def")], [7, *ids("g")]]
    two = tokenize([["abcde"]], byte_tokenizer, "joined", 4, [7, 8])
    assert samples_of(two) == [[7, 8, *ids("ab")], [7, 8, *ids("cd")], [7, 8, *ids("e")]]
