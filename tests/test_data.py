import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from es_lite import data
from es_lite.data import BUILTIN, Corpus
from es_lite.errors import UserError
from es_lite.tokenizer import train_bpe


def corpus_of(*samples: list[int]) -> Corpus:
    starts = np.cumsum([0, *map(len, samples)], dtype=np.int64)
    return Corpus(np.array([token for sample in samples for token in sample], np.int32), starts)


def samples_of(corpus: Corpus) -> list[list[int]]:
    return [corpus.sample(i).tolist() for i in range(len(corpus))]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte, and the end token 0."""
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


def test_a_txt_is_one_document_of_its_lines(tmp_path):
    assert data.read_texts(write(tmp_path / "a.txt", "one\n\n  two\u2028\x0b\nthree"), 0) == [
        ["one\n", "\n", "  two\u2028\x0b\n", "three"]
    ]


def test_the_byte_order_mark_and_carriage_returns_of_windows_are_no_text(tmp_path):
    assert data.read_texts(write(tmp_path / "a.TXT", "\ufeffone\r\ntwo\r\n"), 0) == [["one\n", "two\n"]]


def test_a_jsonl_has_a_document_a_record(tmp_path):
    records = '{"text": "one\\ntwo\\n"}\n\n{"text": "drei \\u00e4", "other": 1}\n{"text": " "}\n'
    assert data.read_texts(write(tmp_path / "a.jsonl", records), 0) == [["one\ntwo\n"], ["drei ä"]]


def test_a_folder_is_its_files_in_order(tmp_path):
    write(tmp_path / "b.txt", "b1\nb2\n")
    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "c.txt", "")
    write(tmp_path / "README.md", "not data")
    (tmp_path / "d.txt").mkdir()
    assert data.read_texts(str(tmp_path), 0) == [["a"], ["b1\n", "b2\n"]]


@pytest.mark.parametrize(
    "lines, documents",
    [(1, [["a"]]), (2, [["a"], ["b1\n"]]), (3, [["a"], ["b1\n", "b2\n"]]), (9, [["a"], ["b1\n", "b2\n"], ["c\n"]])],
)
def test_lines_are_counted_over_all_files(tmp_path, lines, documents):
    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "b.txt", "b1\nb2\n")
    write(tmp_path / "c.txt", "c\n")
    assert data.read_texts(str(tmp_path), lines) == documents


def test_what_is_past_the_last_line_wanted_is_not_read(tmp_path):
    assert data.read_texts(write(tmp_path / "a.txt", b"good\n\xff\xfe\0"), 1) == [["good\n"]]


def test_the_builtin_corpus():
    documents = data.read_texts(BUILTIN, 0)
    assert documents == data.read_texts(BUILTIN, 0)
    assert len(documents) > 50
    assert sum(len(line) for document in documents for line in document) > 300_000
    assert "".join(documents[0]).startswith('The "assert" statement')
    assert data.read_texts(BUILTIN, 3) == [documents[0][:3]]


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
        data.read_texts(str(tmp_path / name), 0)


@pytest.mark.parametrize(
    "path, message",
    [("", '"": no such file or folder'), ("builtin:pyton", 'builtin:pyton: no such corpus; .* "builtin:python-ref')],
)
def test_unusable_names(path, message):
    with pytest.raises(UserError, match=message):
        data.read_texts(path, 0)


def test_no_text_within_the_lines_wanted(tmp_path):
    with pytest.raises(UserError, match=r"no text in it, up to line 2 \(data.lines\)"):
        data.read_texts(write(tmp_path / "a.txt", "\n\ntext"), 2)


def test_a_folder_without_text_files(tmp_path):
    write(tmp_path / "a.csv", "1,2")
    with pytest.raises(UserError, match=r"no \.txt or \.jsonl file in this folder"):
        data.read_texts(str(tmp_path), 0)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        data.read_texts(path, 0)


# Tokens and samples


def test_lines_are_cut_and_ended(byte_tokenizer, ids):
    texts = [["abcdef\n", "\n", "abc\n", "ab\n"], ["x"], ["é\n  z"]]
    corpus = data.tokenize(texts, byte_tokenizer, "lines", 4)
    assert samples_of(corpus) == [ids("abcd"), [*ids("abc"), 0], [*ids("ab"), 0], [*ids("x"), 0], ids("é\n ")]
    assert corpus.tokens.dtype == np.int32 and corpus.starts.dtype == np.int64
    assert corpus.starts[-1] == len(corpus.tokens)


def test_lines_without_an_end_token(endless, ids):
    corpus = data.tokenize([["abcdef\n", "x\n", "abc"]], endless, "lines", 4)
    assert samples_of(corpus) == [ids("abcd"), ids("abc")]


def test_joined_documents_have_an_end_token_between_them(byte_tokenizer, ids):
    corpus = data.tokenize([["abc\n", "de\n"], ["fgh"]], byte_tokenizer, "joined", 4)
    assert samples_of(corpus) == [ids("abc\n"), [*ids("de\n"), 0], ids("fgh")]
    assert corpus.tokens.dtype == np.int32 and corpus.starts.dtype == np.int64


@pytest.mark.parametrize("tail, samples", [("", 1), ("e", 1), ("ef", 2), ("efgh", 2)])
def test_a_last_window_of_one_token_is_dropped(byte_tokenizer, ids, tail, samples):
    corpus = data.tokenize([["abcd" + tail]], byte_tokenizer, "joined", 4)
    assert samples_of(corpus) == [ids("abcd"), ids(tail)][:samples]
    assert corpus.starts[-1] == len(corpus.tokens)


def test_joined_without_an_end_token(endless, ids):
    assert samples_of(data.tokenize([["ab"], ["cd"]], endless, "joined", 8)) == [ids("abcd")]


def test_long_documents_are_encoded_in_blocks(byte_tokenizer, ids, monkeypatch):
    texts = [["one line\n", "and\n", "\n", "another\n"], ["a second\n"], ["third"]]
    whole = data.tokenize(texts, byte_tokenizer, "joined", 1000)
    monkeypatch.setattr(data, "BLOCK_CHARACTERS", 6)
    monkeypatch.setattr(data, "BATCH_BLOCKS", 2)
    assert list(data._blocks(texts[0])) == ["one line\n", "and\n\nanother\n"]
    assert samples_of(data.tokenize(texts, byte_tokenizer, "joined", 1000)) == samples_of(whole)
    assert samples_of(whole) == [[*ids("".join(texts[0])), 0, *ids("a second\n"), 0, *ids("third")]]


def test_no_special_tokens_are_added_and_no_warning_is_given(byte_tokenizer, ids, monkeypatch, caplog, capfd):
    from tokenizers import processors

    expected = ids("abcdefgh")
    monkeypatch.setattr(byte_tokenizer, "model_max_length", 4)
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    monkeypatch.setattr(byte_tokenizer.backend_tokenizer, "post_processor", template)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for samples in ("lines", "joined"):
            assert samples_of(data.tokenize([["abcdefgh"]], byte_tokenizer, samples, 8)) == [expected]
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("samples", ["lines", "joined"])
def test_no_sample_is_left(endless, samples):
    with pytest.raises(UserError, match=r"data\.path: not one sample of 2 tokens"):
        data.tokenize([["x"]], endless, samples, 8)


def test_check_vocabulary():
    corpus = corpus_of([1, 256], [300, 2])
    data.check_vocabulary(corpus, 301)
    with pytest.raises(UserError, match=r"token 300, .* vocab_size is 300; .*data\.tokenizer = \"\".*301 or more"):
        data.check_vocabulary(corpus, 300)


# Splitting, drawing, packing


@pytest.mark.parametrize(
    "samples, fraction, held_out",
    [(10, 0.0, 0), (10, 0.05, 1), (10, 0.1, 1), (10, 0.11, 2), (100, 0.07, 7), (2, 0.5, 1), (10**4, 1e-9, 1)],
)
def test_the_last_samples_are_held_out(samples, fraction, held_out):
    corpus = corpus_of(*([i, i + 1, i + 2][: 2 + i % 2] for i in range(samples)))
    train, rest = data.split(corpus, fraction)
    assert len(rest) == held_out
    assert samples_of(train) + samples_of(rest) == samples_of(corpus)


@pytest.mark.parametrize("samples, fraction", [(1, 0.05), (3, 0.9)])
def test_nothing_is_left_to_train_on(samples, fraction):
    with pytest.raises(UserError, match=rf"eval\.fraction = {fraction}: holds out all of the {samples} samples"):
        data.split(corpus_of(*[[1, 2]] * samples), fraction)


@pytest.mark.parametrize(
    "samples, count, chosen", [(3, 64, [0, 1, 2]), (10, 5, [0, 2, 4, 6, 8]), (10, 3, [0, 3, 6]), (7, 1, [0])]
)
def test_spread(samples, count, chosen):
    indices = data.spread(corpus_of(*[[1, 2]] * samples), count)
    assert indices.tolist() == chosen
    assert indices.dtype == np.int64


def test_a_draw_is_the_same_for_ever():
    assert data.draw(1000, 6, seed=42, step=3).tolist() == [670, 870, 647, 41, 956, 519]
    assert data.draw(8, 8, seed=2**64 - 1, step=2**32 - 1).tolist() == [1, 3, 7, 5, 0, 2, 4, 6]


def test_a_draw_is_distinct_and_a_smaller_one_is_its_beginning():
    drawn = data.draw(50, 50, 1, 2)
    assert sorted(drawn) == list(range(50))
    assert data.draw(50, 7, 1, 2).tolist() == drawn[:7].tolist()


def test_draws_of_other_seeds_and_steps_are_others():
    draws = {tuple(data.draw(1000, 5, seed, step)) for seed in range(5) for step in range(20)}
    assert len(draws) == 100


def test_the_words_of_one_step_are_not_those_of_the_next_moved_along():
    first, second = (np.argsort(data.draw(64, 64, 0, step)) for step in (0, 1))
    assert not any(np.array_equal(np.argsort(first[k:]), np.argsort(second[: 64 - k])) for k in range(33))


def test_every_sample_is_drawn_alike_often():
    counts = np.bincount(np.concatenate([data.draw(20, 5, 7, step) for step in range(4000)]), minlength=20)
    assert abs(counts / 1000 - 1).max() < 0.1  # 3.7 standard deviations


def test_more_than_there_are_cannot_be_drawn():
    with pytest.raises(UserError, match=r"fitness\.samples = 6: the corpus has only 5 samples"):
        data.draw(5, 6, 0, 0)


def test_a_batch_is_padded_and_its_longest_comes_first():
    batch = data.pack(corpus_of([1, 2], [3, 4, 5, 6], [7, 8, 9], [10, 11]), np.array([3, 0, 2, 1]))
    assert batch.tokens.tolist() == [[3, 4, 5, 6], [7, 8, 9, 0], [10, 11, 0, 0], [1, 2, 0, 0]]
    assert batch.lengths.tolist() == [4, 3, 2, 2]
    assert batch.tokens.dtype == batch.lengths.dtype == np.int32
    assert batch.targets == 3 + 2 + 1 + 1


def test_a_batch_is_as_wide_as_its_own_longest():
    assert data.pack(corpus_of([1, 2], [3, 4, 5]), np.array([0])).tokens.tolist() == [[1, 2]]


def test_unigram_score_by_hand():
    train, held_out = corpus_of([0, 1, 1], [1, 2]), corpus_of([3, 1, 0], [1, 1])
    logarithms = np.log(np.array([2, 4, 2, 1]) / 9)
    expected = ((logarithms[1] + logarithms[0]) / 2 + logarithms[1]) / 2
    assert data.unigram_score(train, held_out, 4) == pytest.approx(expected, abs=1e-12)


def test_unigram_score_of_the_builtin_corpus():
    texts = data.read_texts(BUILTIN, 0)
    corpus = data.tokenize(texts, train_bpe(texts, 257), "joined", 128)
    data.check_vocabulary(corpus, 257)
    assert data.unigram_score(*data.split(corpus, 0.05), 257) == pytest.approx(-3.19, abs=0.06)


def test_from_a_file_to_a_batch(tmp_path, byte_tokenizer):
    records = [{"text": f"sample {'x' * i}"} for i in range(20)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    corpus = data.tokenize(data.read_texts(path, 10), byte_tokenizer, "lines", 64)
    batch = data.pack(corpus, data.draw(len(corpus), 4, 0, 0))
    for tokens, length in zip(batch.tokens, batch.lengths, strict=True):
        text = byte_tokenizer.decode(tokens[:length])
        assert text.endswith("x<|endoftext|>") or text == "sample <|endoftext|>"
