"""Sizes, durations and counts, from words and in words."""

import pytest

from es_lite.quantities import count, duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8 GiB", 8 * 2**30),
        ("512MiB", 512 * 2**20),
        ("2 GB", 2 * 10**9),
        ("1.5 gib", 3 * 2**29),
        (" 3 KiB ", 3072),
        ("7kb", 7000),
        ("9 MB", 9_000_000),
        ("1000000", 1_000_000),
        ("10 B", 10),
        ("0", 0),
        ("", 0),
        ("GiB", 0),
        ("8 GiBs", 0),
        ("8 8", 0),
        ("-8 GiB", 0),
        ("1.2.3 GiB", 0),
        (". GiB", 0),
        ("1e9", 0),
        ("inf", 0),
        ("٣ GiB", 0),
        ("9" * 400 + " GiB", 0),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "less than 0.1 s"),
        (0.099, "less than 0.1 s"),
        (0.1, "0.1 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.95, "10 s"),
        (38.2, "38 s"),
        (99.4, "99 s"),
        (99.5, "1 min 40 s"),
        (118, "2 min"),
        (144, "2 min 20 s"),
        (599, "10 min"),
        (12 * 60 + 29, "12 min"),
        (59.4 * 60, "59 min"),
        (59.6 * 60, "1 h"),
        (3 * 3600 + 20 * 60, "3 h 20 min"),
        (47 * 3600 + 59 * 60, "47 h 59 min"),
        (48 * 3600, "2 days"),
        (52 * 3600 + 29 * 60, "2 days 4 h"),
        (30 * 86400, "30 days"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (0, "step", "0 steps"),
        (1, "step", "1 step"),
        (2, "step", "2 steps"),
        (1, "pass", "1 pass"),
        (3, "pass", "3 passes"),
        (5000, "sample", "5,000 samples"),
    ],
)
def test_counts(number, noun, words):
    assert count(number, noun) == words
