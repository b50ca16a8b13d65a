"""The fitness "reward": its functions and their weights, and the tokens that end a completion."""

import json
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, GenerationConfig

from es_lite.errors import UserError
from es_lite.fitness.reward import end_tokens, functions_of, split_rows
from es_lite.recipe import Recipe
from es_lite.tables import DataTable, EvalTable, RewardTable


def functions_with(path: str, *functions: str, weights: tuple[float, ...] = ()) -> tuple[tuple[str, ...], tuple[float, ...]]:
    return functions_of(Recipe(data=DataTable(path=path), reward=RewardTable(functions=functions, weights=weights)))


# Reward functions


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("builtin:countdown", (("countdown_answer", "countdown_format"), (1.0, 0.1))),
        ("countdown:some.jsonl", (("countdown_answer", "countdown_format"), (1.0, 0.1))),
        ("builtin:conciseness", (("conciseness", "right_answer"), (1.0, 0.0))),
        ("math:openai/gsm8k:main:train", (("math_answer", "math_strict"), (1.0, 0.0))),
        ("reasoning-gym:number_sequence", (("puzzle",), (1.0,))),
    ],
)
def test_a_task_has_its_own(path, expected):
    assert functions_with(path) == expected


def test_the_recipes_functions_replace_a_tasks_and_count_1_each():
    """The task's weights belong to the task's functions."""
    assert functions_with("builtin:countdown", "countdown_format", "m.f", "g.py:f") == (
        ("countdown_format", "m.f", "g.py:f"),
        (1.0, 1.0, 1.0),
    )
    assert functions_with("some.jsonl", "m.f") == (("m.f",), (1.0,))


def test_the_recipes_weights_are_those_of_its_functions_or_of_a_tasks():
    assert functions_with("some.jsonl", "m.f", "m.g", weights=(0.5, -2.0)) == (("m.f", "m.g"), (0.5, -2.0))
    assert functions_with("builtin:countdown", weights=(0.0, 3.0)) == (("countdown_answer", "countdown_format"), (0.0, 3.0))
    assert functions_with("some.jsonl", "m.f", "m.g", weights=(0.0, 1.0))[1] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("path", "functions", "weights", "message"),
    [
        ("some.jsonl", (), (), r'reward\.functions: missing, and data\.path = "some\.jsonl" is no task that has its own'),
        ("some.jsonl", (), (1.0,), r"reward\.functions: missing"),
        ("some.jsonl", ("m.f", "m.g"), (1.0,), r"reward\.weights: has 1 number for 2 functions: m\.f, m\.g"),
        ("some.jsonl", ("m.f",), (1.0, 2.0), r"reward\.weights: has 2 numbers for 1 function: m\.f"),
        ("builtin:countdown", (), (1.0,), r"has 1 number for 2 functions: countdown_answer, countdown_format"),
        ("some.jsonl", ("m.f", "m.g"), (0.0, 0.0), r"reward\.weights: all are 0"),
        ("some.jsonl", ("m.f",), (-0.0,), r"reward\.weights: all are 0"),
        ("builtin:cuontdown", (), (), r'no such task is built in; did you mean "builtin:countdown"'),
    ],
)
def test_functions_and_weights_that_do_not_fit_are_refused(path, functions, weights, message):
    with pytest.raises(UserError, match=message):
        functions_with(path, *functions, weights=weights)


# Prompts of eval.path


def test_options_concern_held_out_prompts_of_the_same_task_only(tmp_path):
    problem = {"numbers": [1, 2], "target": 3}
    (tmp_path / "test.jsonl").write_text(json.dumps(problem) + "\n")
    (tmp_path / "own.jsonl").write_text('{"prompt": "1 + 1"}\n')

    def held_out(path, other, **keys):
        data = DataTable(path=path, **keys)
        return split_rows(Recipe(data=data, eval=EvalTable(path=other, every=1)))[1]

    options = {"numbers": 2, "train": 3, "test": 5}
    assert len(held_out("builtin:countdown", f"countdown:{tmp_path}/test.jsonl", options=options)) == 1
    assert held_out("builtin:countdown", f"{tmp_path}/own.jsonl", options=options)[0].prompt == "1 + 1"
    assert len(held_out(f"{tmp_path}/own.jsonl", "builtin:conciseness", template="{prompt} =")) == 24
    with pytest.raises(UserError, match=r'the task of data\.path = "builtin:countdown" makes its own prompts'):
        held_out("builtin:countdown", f"{tmp_path}/own.jsonl", template="{prompt} =")


# End tokens

CONFIG = AutoConfig.for_model("qwen3", eos_token_id=4)
NONE = AutoConfig.for_model("qwen3", eos_token_id=None)
TOKENIZER, NO_TOKENIZER = SimpleNamespace(eos_token_id=9), SimpleNamespace(eos_token_id=None)


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        (GenerationConfig(eos_token_id=[7, 8]), CONFIG, TOKENIZER, (7, 8)),
        (GenerationConfig(eos_token_id=7), CONFIG, TOKENIZER, (7,)),
        (GenerationConfig(eos_token_id=0), CONFIG, TOKENIZER, (0,)),  # a token like any other
        (GenerationConfig(), CONFIG, TOKENIZER, (4,)),
        (None, CONFIG, TOKENIZER, (4,)),
        (None, AutoConfig.for_model("qwen3", eos_token_id=0), TOKENIZER, (0,)),
        (None, AutoConfig.for_model("qwen3", eos_token_id=[5, 6]), TOKENIZER, (5, 6)),
        (GenerationConfig(), NONE, TOKENIZER, (9,)),
        (None, NONE, SimpleNamespace(eos_token_id=0), (0,)),
        (None, NONE, NO_TOKENIZER, ()),
    ],
)
def test_end_tokens_are_those_of_the_first_that_knows_any(generation, config, tokenizer, expected):
    """Of generation_config.json, config.json and the tokenizer."""
    assert end_tokens(config, generation, tokenizer) == expected


def test_of_a_config_with_parts_the_texts_end_token_counts():
    config = AutoConfig.for_model("gemma3", text_config={"eos_token_id": 3})
    assert end_tokens(config, None, TOKENIZER) == (3,)
