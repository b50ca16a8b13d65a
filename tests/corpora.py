"""Corpora from lists of token ids, and back."""

import numpy as np

from es_lite.data.corpus import Corpus


def corpus_of(*samples: list[int]) -> Corpus:
    starts = np.cumsum([0, *map(len, samples)], dtype=np.int64)
    return Corpus(np.array([token for sample in samples for token in sample], np.int32), starts)


def samples_of(corpus: Corpus) -> list[list[int]]:
    return [corpus.sample(i).tolist() for i in range(len(corpus))]
