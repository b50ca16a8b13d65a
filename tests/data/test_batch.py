"""Which samples a step draws, and how they are packed into a batch."""

import json

import numpy as np
import pytest
from corpora import corpus_of

from es_lite.data.batch import Batch, draw, pack, spread
from es_lite.data.corpus import tokenize
from es_lite.data.texts import Texts
from es_lite.data.tokenizer import train_bpe
from es_lite.errors import UserError

# Choosing samples


@pytest.mark.parametrize(
    "samples, count, chosen", [(3, 64, [0, 1, 2]), (10, 5, [0, 2, 4, 6, 8]), (10, 3, [0, 3, 6]), (7, 1, [0])]
)
def test_spread(samples, count, chosen):
    indices = spread(corpus_of(*[[1, 2]] * samples), count)
    assert indices.tolist() == chosen
    assert indices.dtype == np.int64


def test_a_draw_is_the_same_forever():
    assert draw(1000, 6, seed=42, step=3).tolist() == [670, 870, 647, 41, 956, 519]
    assert draw(8, 8, seed=2**64 - 1, step=2**32 - 1).tolist() == [1, 3, 7, 5, 0, 2, 4, 6]


def test_drawn_samples_are_distinct_and_a_smaller_draw_is_the_beginning_of_a_larger_one():
    drawn = draw(50, 50, 1, 2)
    assert sorted(drawn) == list(range(50))
    assert draw(50, 7, 1, 2).tolist() == drawn[:7].tolist()


def test_draws_of_different_seeds_and_steps_differ():
    draws = {tuple(draw(1000, 5, seed, step)) for seed in range(5) for step in range(20)}
    assert len(draws) == 100


def test_the_words_of_a_step_are_not_those_of_the_step_before_shifted():
    first, second = (np.argsort(draw(64, 64, 0, step)) for step in (0, 1))
    assert not any(np.array_equal(np.argsort(first[k:]), np.argsort(second[: 64 - k])) for k in range(33))


def test_all_samples_are_drawn_equally_often():
    counts = np.bincount(np.concatenate([draw(20, 5, 7, step) for step in range(4000)]), minlength=20)
    assert abs(counts / 1000 - 1).max() < 0.1  # 3.7 standard deviations


def test_more_samples_than_there_are_cannot_be_drawn():
    with pytest.raises(UserError, match=r"fitness\.samples = 6: the corpus has only 5 samples"):
        draw(5, 6, 0, 0)


# Packing


def test_a_batch_is_padded_and_its_longest_sample_comes_first():
    batch = pack(corpus_of([1, 2], [3, 4, 5, 6], [7, 8, 9], [10, 11]), np.array([3, 0, 2, 1]))
    assert batch.tokens.tolist() == [[3, 4, 5, 6], [7, 8, 9, 0], [10, 11, 0, 0], [1, 2, 0, 0]]
    assert batch.lengths.tolist() == [4, 3, 2, 2]
    assert batch.tokens.dtype == batch.lengths.dtype == np.int32
    assert len(batch) == 4
    assert batch.scored_tokens == 3 + 2 + 1 + 1


def test_a_batch_is_as_wide_as_its_own_longest_sample():
    assert pack(corpus_of([1, 2], [3, 4, 5]), np.array([0])).tokens.tolist() == [[1, 2]]


@pytest.fixture
def batch() -> Batch:
    return pack(corpus_of([1, 2], [3, 4, 5, 6], [7, 8, 9], [10, 11]), np.arange(4))


def test_a_part_is_those_samples_cut_to_the_longest_of_them(batch):
    part = batch.part(1, 3)
    assert part.tokens.tolist() == [[7, 8, 9], [1, 2, 0]]
    assert part.lengths.tolist() == [3, 2]
    assert part.tokens.dtype == part.lengths.dtype == np.int32
    assert (len(part), part.scored_tokens) == (2, 3)


def test_the_whole_is_a_part_of_itself(batch):
    whole = batch.part(0, len(batch))
    assert np.array_equal(whole.tokens, batch.tokens) and np.array_equal(whole.lengths, batch.lengths)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_hold_every_sample_once(batch, size):
    parts = [batch.part(low, min(low + size, len(batch))) for low in range(0, len(batch), size)]
    assert sum(map(len, parts)) == len(batch)
    assert sum(part.scored_tokens for part in parts) == batch.scored_tokens
    samples = [row[:length].tolist() for part in parts for row, length in zip(part.tokens, part.lengths, strict=True)]
    assert samples == [row[:length].tolist() for row, length in zip(batch.tokens, batch.lengths, strict=True)]
    assert all(part.tokens.shape == (len(part), part.lengths[0]) for part in parts)


def test_a_part_of_a_part(batch):
    assert batch.part(1, 4).part(1, 2).tokens.tolist() == batch.part(2, 3).tokens.tolist() == [[1, 2]]


def test_from_a_file_to_a_batch(tmp_path):
    byte_tokenizer = train_bpe([["any text"]], 257)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"sample {'x' * i}"}) for i in range(20)))
    corpus = tokenize(Texts(str(tmp_path / "a.jsonl"), 10), byte_tokenizer, "lines", 64)
    batch = pack(corpus, draw(len(corpus), 4, 0, 0))
    assert len(batch) == 4
    for tokens, length in zip(batch.tokens, batch.lengths, strict=True):
        text = byte_tokenizer.decode(tokens[:length])
        assert text.endswith("x<|endoftext|>") or text == "sample <|endoftext|>"
