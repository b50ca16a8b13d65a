"""Prompts packed for generation: their order, and what of them goes to whom."""

import pickle

import numpy as np
import pytest

from es_lite.data.prompt_batch import Prompts

LENGTHS = [3, 1, 5, 3, 5, 2]
TOKENS = [np.arange(length, dtype=np.int32) + 10 * row for row, length in enumerate(LENGTHS)]


def packed(rows: list[int]) -> Prompts:
    return Prompts.pack(np.array(rows), TOKENS, (7, 0), 4)


def same(one: Prompts, other: Prompts) -> bool:
    tokens = all(np.array_equal(a, b) for a, b in zip(one.tokens, other.tokens, strict=True))
    return tokens and np.array_equal(one.rows, other.rows) and (one.ends, one.new_tokens) == (other.ends, other.new_tokens)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], [2, 4, 0, 3, 5, 1]),
        ([5, 4, 3, 2, 1, 0], [4, 2, 3, 0, 5, 1]),  # of equal lengths, the first drawn is first
        ([3, 1], [3, 1]),
        ([1, 3], [3, 1]),
        ([4], [4]),
    ],
)
def test_the_longest_is_first_and_equal_ones_keep_their_order(rows, expected):
    prompts = packed(rows)
    assert prompts.rows.tolist() == expected and prompts.rows.dtype == np.int64
    assert all(np.array_equal(prompt, TOKENS[row]) for prompt, row in zip(prompts.tokens, expected, strict=True))
    assert (len(prompts), prompts.ends, prompts.new_tokens) == (len(rows), (7, 0), 4)


def test_scored_tokens_are_those_that_are_read_and_all_that_may_be_written():
    assert packed([0, 2, 5]).scored_tokens == 3 + 5 + 2 + 3 * 4
    assert packed([0, 2, 5]).part(0, 1).scored_tokens == 5 + 4


@pytest.mark.parametrize("size", [1, 2, 4, 6, 9])
def test_parts_are_the_whole(size):
    whole = packed([0, 1, 2, 3, 4, 5])
    parts = [whole.part(low, min(low + size, 6)) for low in range(0, 6, size)]
    assert [row for part in parts for row in part.rows] == whole.rows.tolist()
    assert [prompt.tolist() for part in parts for prompt in part.tokens] == [prompt.tolist() for prompt in whole.tokens]
    assert all((part.ends, part.new_tokens) == ((7, 0), 4) for part in parts)
    assert sum(part.scored_tokens for part in parts) == whole.scored_tokens


def test_prompts_can_be_sent_to_a_worker():
    assert same(pickle.loads(pickle.dumps(packed([1, 2]))), packed([1, 2]))
