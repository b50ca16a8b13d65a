"""Between prompts and token ids: chat templates, encoding and decoding."""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from es_lite.data.prompts import Row
from es_lite.errors import UserError

# A tokenizer's output takes hundreds of bytes per token: that of few prompts is held at a time.
BATCH_ROWS = 64
BATCH_CHARACTERS = 2**20


def encode(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[np.ndarray]:
    """The token ids of each prompt, int32 [length], 1 ≤ length ≤ max_length.

    Text gets the special tokens that the tokenizer adds on its own, for instance one that begins a text. Messages go through its
    chat template, up to where the assistant's answer begins, or to the end of a last message of the assistant. Raises
    UserError for messages without a chat template, a template that fails, a prompt without tokens and one that is longer.
    """
    encoded = []
    for batch in _batches(rows):
        texts = [row.prompt for row in batch if isinstance(row.prompt, str)]
        # verbose = False: no warning of a text longer than the model's context, since `max_length` is checked below
        ids = iter(tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else [])
        for row in batch:
            prompt = np.array(next(ids) if isinstance(row.prompt, str) else _chat(row, tokenizer), np.int32)
            if not len(prompt):
                raise UserError(f"{row.where}: the tokenizer makes no tokens of this prompt; give it other text")
            if len(prompt) > max_length:
                raise UserError(
                    f"{row.where}: the prompt has {len(prompt)} tokens, more than fitness.max_length = {max_length}; "
                    "raise that, or shorten the prompt"
                )
            encoded.append(prompt)
    return encoded


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray) -> str:
    """The text of generated token ids, [length], without special tokens and without the end token, otherwise unchanged."""
    tokens = [int(token) for token in ids]
    if tokens and tokens[-1] == tokenizer.eos_token_id:  # which need not be marked as special
        tokens.pop()
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.prompt) if isinstance(row.prompt, str) else 0
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of messages."""
    assert isinstance(row.prompt, list)
    if not tokenizer.chat_template:
        raise UserError(
            f"{row.where}: the prompt is a list of messages, but the tokenizer has no chat template; give prompts as text "
            '(without data.system and data.chat), or take a model, or a data.tokenizer, that has one (often named "Instruct")'
        )
    prefilled = row.prompt[-1]["role"] == "assistant"
    try:
        # Renders and tokenizes without adding special tokens: the template has written those that belong there.
        ids = tokenizer.apply_chat_template(
            row.prompt,
            add_generation_prompt=not prefilled,
            continue_final_message=prefilled,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},
        )
    except Exception as error:  # a template is code of the model's author, and raises what it likes
        reason = (str(error).splitlines() or [""])[0][:300]
        raise UserError(
            f"{row.where}: the tokenizer's chat template fails on these messages: {type(error).__name__}: {reason}; "
            "change the messages to what it takes, or give the prompt as text"
        ) from None
    return cast(list[int], ids)
