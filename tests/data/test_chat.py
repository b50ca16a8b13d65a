"""From prompts to token ids, and from generated ids to text."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from es_lite.data import chat
from es_lite.data.chat import decode, encode
from es_lite.data.prompts import Row
from es_lite.data.tokenizer import END, train_bpe
from es_lite.errors import UserError

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:{{ message['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
USER = {"role": "user", "content": "Why?"}


def row(prompt, where: str = "a.jsonl:7") -> Row:
    return Row(prompt, {}, where)


@pytest.fixture
def tokenizer():
    """One token per byte, the end token 0, which also begins each text."""
    tokenizer = train_bpe([["any text"]], 257)
    tokenizer.bos_token = END
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def ids(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


# Encoding


def test_text_is_tokenized_with_the_tokenizers_own_special_tokens(tokenizer, ids):
    (tokens,) = encode([row("Why? ä")], tokenizer, 100)
    assert tokens.tolist() == [0, *ids("Why? ä")]
    assert tokens.dtype == np.int32


def test_messages_end_where_the_answer_begins_and_do_not_begin_twice(tokenizer, ids):
    (tokens,) = encode([row([{"role": "system", "content": "Brief."}, USER])], tokenizer, 100)
    assert tokens.tolist() == [0, *ids("system:Brief.;user:Why?;assistant:")]
    assert tokens.dtype == np.int32


@pytest.mark.parametrize("prefill", ["<think>", "Let me think.\n", " ", ""])
def test_a_last_message_of_the_assistant_is_continued(tokenizer, ids, prefill):
    (tokens,) = encode([row([USER, {"role": "assistant", "content": prefill}])], tokenizer, 100)
    assert tokens.tolist() == [0, *ids(f"user:Why?;assistant:{prefill}")]


def test_batches_keep_the_order_of_text_and_messages(tokenizer, ids, monkeypatch):
    prompts = ["a", [USER], "b" * 9, "c", [USER], [USER], "d"]
    expected = [[0, *(ids(prompt) if isinstance(prompt, str) else ids("user:Why?;assistant:"))] for prompt in prompts]
    for rows, characters in [(64, 2**20), (2, 2**20), (64, 9), (1, 1)]:
        monkeypatch.setattr(chat, "BATCH_ROWS", rows)
        monkeypatch.setattr(chat, "BATCH_CHARACTERS", characters)
        assert [tokens.tolist() for tokens in encode(map(row, prompts), tokenizer, 100)] == expected


def test_few_characters_are_tokenized_at_a_time(tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "BATCH_ROWS", 3)
    monkeypatch.setattr(chat, "BATCH_CHARACTERS", 10)
    sizes = [len(batch) for batch in chat._batches(row(text) for text in ["a", "b", "c", "d" * 12, "e", "f" * 10, "g"])]
    assert sizes == [3, 1, 2, 1]


def test_a_prompt_that_just_fits_and_one_that_does_not(tokenizer):
    for prompt, length in [("abc", 4), ([USER], 21)]:
        assert len(encode([row(prompt)], tokenizer, length)[0]) == length
        with pytest.raises(UserError, match=rf"^a\.jsonl:7: .* has {length} tokens, .*max_length = {length - 1}; raise"):
            encode([row(prompt)], tokenizer, length - 1)


def test_a_prompt_without_tokens(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(UserError, match=r"^a\.jsonl:7: the tokenizer makes no tokens"):
        encode([row("")], tokenizer, 100)
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(UserError, match=r"^a\.jsonl:7: the tokenizer makes no tokens"):
        encode([row([USER])], tokenizer, 100)


def test_messages_without_a_chat_template(tokenizer):
    tokenizer.chat_template = None
    assert encode([row("a")], tokenizer, 100)
    with pytest.raises(UserError, match=r"a\.jsonl:7: .* no chat template; give prompts as text .* data\.tokenizer"):
        encode([row("a", "a.jsonl:1"), row([USER])], tokenizer, 100)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('Roles must alternate.\nMore.') }}", r"TemplateError: Roles must alternate\.; change"),
        ("{{ messages[0].content.no.such }}", r"UndefinedError: "),
        ("{% for %}", r"TemplateSyntaxError: "),
        ("{{ messages.__class__.__mro__ }}", r"SecurityError: "),
        ("{{ 1 // 0 }}", r"ZeroDivisionError: "),
    ],
)
def test_a_chat_template_that_fails(tokenizer, template, reason):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"a\.jsonl:7: the tokenizer's chat template fails on these messages: " + reason):
        encode([row([USER])], tokenizer, 100)


def test_a_chat_template_that_drops_the_prefill(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match=r"a\.jsonl:7: .* ValueError: continue_final_message is set but") as caught:
        encode([row([USER, {"role": "assistant", "content": "<think>"}])], tokenizer, 100)
    assert "\n" not in str(caught.value)


def test_no_warning_of_the_models_context_is_given(tokenizer, caplog, capfd):
    tokenizer.model_max_length = 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode([row("abcdefgh"), row([USER])], tokenizer, 100)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_real_chat_templates(name):
    folder = Path(f"~/.cache/es_lite/{name}").expanduser()
    if not folder.exists():
        pytest.skip(f"{folder} has not been made here")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    system = {"role": "system", "content": "Be brief."}
    prefill = {"role": "assistant", "content": "<think>\n"}
    asked, continued, text = encode([row([system, USER]), row([system, USER, prefill]), row("Why?")], tokenizer, 100)
    beginning = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(asked) == beginning
    assert tokenizer.decode(continued) == beginning + "<think>\n"
    assert tokenizer.decode(text) == "Why?"
    assert tokenizer.convert_ids_to_tokens([asked[0]]) == ["<|im_start|>"]
    answer = [*tokenizer("Because .", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert decode(tokenizer, np.array(answer, np.int32)) == "Because ."


# Decoding


def test_special_tokens_and_the_end_are_not_text(tokenizer, ids):
    assert decode(tokenizer, np.array([0, *ids("Why ?"), 0, *ids(" ä"), 0], np.int32)) == "Why ? ä"
    assert decode(tokenizer, [0]) == decode(tokenizer, []) == decode(tokenizer, np.zeros(0, np.int32)) == ""


def test_an_end_token_that_is_not_marked_as_special(tokenizer, ids):
    (end,) = ids("!")
    tokenizer._special_tokens_map["eos_token"] = "!"
    assert tokenizer.eos_token_id == end
    assert decode(tokenizer, [*ids("a!b"), end]) == "a!b"
    assert decode(tokenizer, ids("ab")) == "ab"


def test_spaces_are_not_cleaned_up(tokenizer, ids):
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    text = " It 's , well , done .\n "
    assert tokenizer.decode(ids(text)) != text
    assert decode(tokenizer, ids(text)) == text


def test_half_a_character_and_a_token_beyond_the_vocabulary(tokenizer, ids):
    assert decode(tokenizer, ids("aä")[:-1]) == "a\ufffd"
    assert decode(tokenizer, [*ids("a"), 300]) == "a"  # models have more rows than their tokenizers have tokens
