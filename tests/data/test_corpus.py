"""From text files to samples of tokens."""

import warnings

import numpy as np
import pytest
from corpora import corpus_of, samples_of
from tokenizers import processors

from es_lite.data import corpus as module
from es_lite.data import texts as texts_module
from es_lite.data.corpus import (
    check_vocabulary,
    fingerprint,
    split,
    tokenize,
    unigram_score,
)
from es_lite.data.texts import BUILTIN, Texts
from es_lite.data.tokenizer import train_bpe
from es_lite.errors import UserError


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
    monkeypatch.setattr(texts_module, "BLOCK_CHARACTERS", 6)
    monkeypatch.setattr(module, "BATCH_BLOCKS", 2)
    assert list(texts_module.text_blocks(texts[0])) == ["one line\n", "and\n\nanother\n"]
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
    with pytest.raises(UserError, match=r"^not one sample of 2 tokens in the text \(data\.path, "):
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
    texts = Texts(BUILTIN)
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


def test_lines_that_are_too_short_are_counted(endless):
    assert tokenize([["abc\n", "a\n", "\n", "b\n"]], endless, "lines", 4).dropped == 2
    assert tokenize([["abc\n"]], endless, "joined", 4).dropped == 0


def test_a_sample_needs_room_for_text_after_its_beginning(byte_tokenizer):
    with pytest.raises(UserError, match=r"fitness\.max_length = 2: leaves no room after the 2 tokens that begin a sample"):
        tokenize([["abc"]], byte_tokenizer, "joined", 2, [7, 8])
