"""Rewards: prompts and recipes that cannot be used, reward functions that fail, and models that write nothing, never end, or
compute no numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import message_of, refused
from support import PROMPTS, REWARD_FUNCTIONS, TINY, contents, digest, metrics, records, samples, train_here, write_reward_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from es_lite.data.tokenizer import train_bpe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_reward_recipe(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """The digests of a run after one step and after two."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe, found = write_reward_recipe(folder, eval={"every": 0}), {}
    for steps in (1, 2):
        finished = train_here(recipe, folder / "run", f"run.iterations={steps}", resume=steps > 1)
        assert finished.code == 0, finished.err
        found[steps] = digest(folder / "run")
    return found


def prompts_file(path: Path, *lines: Any) -> str:
    """An override that names a file of usable prompts, followed by `lines`."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in (*PROMPTS, *lines)]
    path.write_text("".join(f"{text}\n" for text in texts))
    return f"data.path={path}"


def function_file(path: Path, code: str) -> tuple[str, str]:
    """Overrides that name the function `f` of a new file."""
    path.write_text(code)
    return f'reward.functions=["{path}:f"]', "reward.weights=[1]"


# Prompts


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"question": "x"}, 'has no "prompt", only question; add it, or make it from these with data.template'),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 5}, '"prompt" is a number; expected text, or a list of messages'),
        ({"prompt": "a", "completion_ids": [1]}, 'the column "completion_ids" has the name of an argument of reward functions'),
        ('{"prompt": ', "not JSON"),
        ({"prompt": [{"role": "user", "content": "a"}], "wanted": 1}, "the tokenizer has no chat template; give prompts as text"),
        (
            {"prompt": "a" * 33, "wanted": 1},
            "the prompt has 33 tokens, more than fitness.max_length = 32; raise that, or shorten",
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_prompt_that_cannot_be_used_is_named_by_file_and_line(recipe: Path, tmp_path: Path, line: Any, reason: str) -> None:
    override = prompts_file(tmp_path / "other.jsonl", line)
    before = (tmp_path / "other.jsonl").read_bytes()
    message = refused(recipe, tmp_path / "run", override)
    assert f"{tmp_path}/other.jsonl:{len(PROMPTS) + 1}: " in message and reason in message
    assert (tmp_path / "other.jsonl").read_bytes() == before
    # The directory is not taken: the prompts are put right, and the same command meets the next mistake.
    prompts_file(tmp_path / "other.jsonl")
    assert "fitness.samples = 1000" in refused(recipe, tmp_path / "run", override, "fitness.samples=1000")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.template=Q: {question}"], 'prompts.jsonl:1: has no column "question", which data.template names'),
        (["data.template=Q: {wantd}"], '"wantd", which data.template names; did you mean "wanted"?'),
        (["data.chat=true"], "prompts.jsonl:1: the prompt is a list of messages, but the tokenizer has no chat template"),
        (["data.system=Be brief."], "(without data.system and data.chat)"),
        (["data.options={size=3}"], "data.options.size: only tasks have options, and data.path = "),
        (
            ["fitness.samples=10"],
            "fitness.samples = 10: there are only 9 prompts to train on (3 are held out); lower it, or give more",
        ),
        (["eval.fraction=0.99"], "eval.fraction = 0.99: holds out all of the 12 prompts"),
        (["eval.path=gone.jsonl"], '"gone.jsonl": no such file or folder'),
        (["data.path=gone.jsonl"], '"gone.jsonl": no such file or folder'),
        (["data.path=builtin:countdwn"], '"builtin:countdwn": no such task is built in; did you mean "builtin:countdown"?'),
        (["data.path=mth:problems.jsonl"], '"mth:problems.jsonl": no such task; did you mean "math:FILE"?'),
        (["data.path=builtin:countdown", "data.system=Be brief."], "data.system: the task of data.path = "),
        (["data.path=builtin:countdown", "data.chat=true"], "data.chat: the task of data.path = "),
        (["data.path=builtin:python-reference"], 'data.path: missing; rewards need prompts: a file, or a task such as "builtin:'),
        (["data.path=builtin:countdown", "data.options={nmbers=3}"], 'data.options.nmbers: unknown key; did you mean "numbers"?'),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_data_that_cannot_be_used_is_named(recipe: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refused(recipe, tmp_path / "run", *overrides)
    assert not (tmp_path / "run/journal.jsonl").exists()


def test_an_unknown_puzzle_is_named_with_the_nearest(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    message = refused(recipe, tmp_path / "run", "data.path=reasoning-gym:number_sequnce")
    assert '"reasoning-gym:number_sequnce": there is no such puzzle; did you mean "number_sequence"?' in message


def test_prompts_and_completions_longer_than_the_context_are_refused(recipe: Path, tmp_path: Path) -> None:
    message = refused(recipe, tmp_path / "run", "model.config.max_position_embeddings=37")
    assert "fitness.max_length = 32 and generation.max_new_tokens = 6: the model's max_position_embeddings is 37" in message
    assert not (tmp_path / "run").exists()
    assert "fitness.samples" in refused(recipe, tmp_path / "run", "model.config.max_position_embeddings=38", "fitness.samples=10")


# Reward functions that cannot be had


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.functions=[]", "reward.weights=[]"], "reward.functions: missing, and data.path = "),
        (["reward.weights=[1]"], "reward.weights: has 1 number for 2 functions: "),
        (["reward.weights=[0, 0]"], "reward.weights: all are 0, so that every completion would score the same"),
        (["reward.weights=[nan, 1]"], "reward.weights[0] = nan: expected a finite number"),
        (["reward.seconds=0"], "reward.seconds = 0.0: expected greater than 0"),
        (["generation.max_new_tokens=0"], "generation.max_new_tokens = 0: expected at least 1"),
        (
            ['reward.functions=["no_such.module.f", "math_answer"]'],
            "(ModuleNotFoundError: No module named 'no_such'); install it",
        ),
        (['reward.functions=["gone.py:f", "math_answer"]'], 'reward function "gone.py:f": there is no file '),
        (['reward.functions=["countdwn_answer", "math_answer"]'], 'did you mean "countdown_answer"?'),
        (['reward.functions=["os.sep", "math_answer"]'], "is not a function but '/' (of type str)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_reward_functions_that_cannot_be_had_are_named(recipe: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refused(recipe, tmp_path / "run", *overrides)
    assert not (tmp_path / "run/journal.jsonl").exists()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def f(:\n", "f.py cannot be imported (SyntaxError: "),
        ("import no_such_thing\n", "f.py cannot be imported (ModuleNotFoundError: No module named 'no_such_thing')"),
        ("raise SystemExit(3)\n", "f.py cannot be imported (SystemExit: 3)"),
        ("def ff(): pass\n", "not found in its module (AttributeError: "),
    ],
)
def test_a_file_without_the_function_is_named_with_pythons_reason(recipe: Path, tmp_path: Path, code: str, reason: str) -> None:
    message = refused(recipe, tmp_path / "run", *function_file(tmp_path / "f.py", code))
    assert f'reward function "{tmp_path}/f.py:f"' in message and reason in message
    assert not (tmp_path / "run/journal.jsonl").exists()


def test_a_function_that_is_only_reported_makes_nothing_count(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def none(completions, **_):\n    return [None] * len(completions)\n\n\n")
    with (tmp_path / "f.py").open("a") as file:
        file.write("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    functions = f'reward.functions=["{tmp_path}/f.py:none", "{tmp_path}/f.py:one"]'
    message = refused(recipe, tmp_path / "run", functions, "reward.weights=[1, 0]")
    assert "returned None for every completion, so that none counts" in message


# Reward functions that fail during the run

FAILURES = {
    "raises": ('{}["key"]', "raised KeyError: 'key'"),
    "too few": ("[1.0]", "returned a list of 1 for 4 completions; expected one number, or None, for each"),
    "nan": ('[float("nan")] * len(completions)', "returned nan (of type float); expected a finite number, or None"),
    "text": ('["good"] * len(completions)', "returned 'good' (of type str); expected a finite number, or None"),
    "none": ("[None] * len(completion_ids)", "returned None for every completion, so that none counts"),
}


SOON = ("raises", "nan", "none")
"""The others are long."""


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("failure", [f if f in SOON else pytest.param(f, marks=pytest.mark.long) for f in FAILURES])
def test_a_function_that_fails_changes_nothing_and_the_run_goes_on_once_it_is_repaired(
    tmp_path: Path, undisturbed: dict[int, dict[str, str]], failure: str, step: int
) -> None:
    recipe = write_reward_recipe(tmp_path, run={"iterations": 2}, eval={"every": 0})
    returned, reason = FAILURES[failure]
    broken = f"""
    if trainer_state.global_step == {step - 1}:
        return {returned}"""
    functions = tmp_path / "rewards.py"
    for name in ("near", "even_format") if failure == "none" else ("near",):
        code = functions.read_text()
        line = next(line for line in code.splitlines() if line.startswith(f"def {name}("))
        functions.write_text(code.replace(line, line.replace("**_", "trainer_state, **_") + broken))
    failed = train_here(recipe, tmp_path / "run")
    assert failed.code == 2, failed.err
    message = message_of(failed.err)
    assert reason in message and f"{functions}:near" in message and "prompts.jsonl:" in message
    if failure == "raises":
        assert f"({functions}:4)" in message
    assert records(tmp_path / "run") == step - 1
    if step == 2:
        assert digest(tmp_path / "run") == undisturbed[1]
    # It fails in the same way again, and that changes nothing either.
    before = contents(tmp_path / "run")
    assert message_of(train_here(recipe, tmp_path / "run", resume=True).err) == message
    assert contents(tmp_path / "run") == before
    functions.write_text(REWARD_FUNCTIONS)
    finished = train_here(recipe, tmp_path / "run", resume=True)
    assert finished.code == 0, finished.err
    assert digest(tmp_path / "run") == undisturbed[2]


@pytest.mark.slow
def test_a_text_on_which_a_function_hangs_is_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    """And more time can be given when the run is resumed."""
    prompts = tmp_path / "two.jsonl"
    prompts.write_text('{"prompt": "A longer prompt"}\n{"prompt": "Hang"}\n')
    code = "import time\n\ndef f(prompts, completions, **_):\n"
    code += "    if 'Hang' in prompts:\n        time.sleep(30)\n    return [float(len(text)) for text in completions]\n"
    recipe = write_reward_recipe(tmp_path, run={"iterations": 1}, eval={"every": 0}, es={"population": 2}, fitness={"samples": 2})
    overrides = (f"data.path={prompts}", *function_file(tmp_path / "f.py", code))
    finished = train_here(recipe, tmp_path / "run", *overrides, "reward.seconds=0.5")
    assert finished.code == 0, finished.err
    assert finished.err == f'warning: reward function "{tmp_path}/f.py:f" took more than 0.5 s on {prompts}:2 ("Hang")\n'
    assert metrics(tmp_path / "run")[-1]["graders_killed"] == 2  # members; θ, which the first step scores too, is not counted
    (tmp_path / "f.py").write_text(code.replace("sleep(30)", "sleep(0.6)"))
    finished = train_here(recipe, tmp_path / "run", *overrides, "reward.seconds=20", "run.iterations=2", resume=True)
    assert (finished.code, finished.err) == (0, "")
    assert metrics(tmp_path / "run")[-1]["graders_killed"] == 0


# Models


@pytest.mark.slow
def test_an_empty_completion_has_the_score_that_the_functions_give_it(tmp_path: Path) -> None:
    """A model whose logits are all 0 writes the first token, its end token, at once."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY | {"tie_word_embeddings": False, "eos_token_id": 0}))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "model")
    recipe = write_reward_recipe(
        tmp_path,
        run={"iterations": 1},
        model={"config": "", "path": str(tmp_path / "model")},
        es={"groups": [{"pattern": "lm_head", "sigma": 0.0, "alpha": 0.0}]},
    )
    code = "def f(completions, completion_ids, **_):\n    return [5.0 if not text and ids == [0] else -1.0"
    code += " for text, ids in zip(completions, completion_ids)]\n"
    finished = train_here(recipe, tmp_path / "run", *function_file(tmp_path / "f.py", code))
    assert finished.code == 0, finished.err
    assert [(sample["completion"], sample["score"], sample["cut"]) for sample in samples(tmp_path / "run")] == [
        ("", 5.0, False)
    ] * 4
    line = metrics(tmp_path / "run")[-1]
    assert (line["score_mean"], line["length"], line["cut"]) == (5.0, 0.0, 0.0)


@pytest.mark.slow
def test_a_model_without_an_end_token_writes_as_much_as_it_may(tmp_path: Path) -> None:
    tokenizer = train_bpe([["any text"]], 257)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = write_reward_recipe(tmp_path, run={"iterations": 1})
    overrides = (f"data.tokenizer={tmp_path}/tokenizer", "model.config.eos_token_id=[]")
    finished = train_here(recipe, tmp_path / "run", *overrides)
    assert (finished.code, finished.err) == (0, "")
    line = (
        "note: neither the model nor its tokenizer has an end token, so every completion has 6 tokens (generation.max_new_tokens)"
    )
    assert finished.out.count(line) == 1
    assert all(sample["cut"] for sample in samples(tmp_path / "run"))
    last = metrics(tmp_path / "run")[-1]
    assert (last["cut"], last["generated_tokens"]) == (1.0, 4 * 4 * 6)


def overflowing(factor: float) -> dict[str, Any]:
    """σ of a few weights that is about the largest number, so that some members' logits are no numbers, or all."""
    return {"population": 6, "antithetic": False, "groups": [{"pattern": "q_norm", "sigma": factor, "alpha": 1.0}]}


@pytest.mark.slow
def test_members_whose_logits_are_not_numbers_are_ignored(tmp_path: Path) -> None:
    """They are not graded either: a function sees no completion without tokens."""
    recipe = write_reward_recipe(tmp_path, run={"iterations": 1}, es=overflowing(2e38))
    code = "def f(completion_ids, **_):\n    return [sum(ids) / len(ids) for ids in completion_ids]\n"
    finished = train_here(recipe, tmp_path / "run", *function_file(tmp_path / "f.py", code))
    assert finished.code == 0, finished.err
    record = json.loads((tmp_path / "run/journal.jsonl").read_text().splitlines()[1])
    ignored = record["scores"].count(None)
    assert 0 < ignored < 5
    assert [score is None for score in record["scores"]] == [c == 0 for c in record["coefficients"]]
    assert f"warning: step 1: {ignored} of 6 scores are not finite; they are ignored" in finished.err


@pytest.mark.slow
def test_a_population_without_a_number_ends_the_run(tmp_path: Path) -> None:
    recipe = write_reward_recipe(tmp_path, run={"iterations": 1}, es=overflowing(1e41))
    finished = train_here(recipe, tmp_path / "run")
    assert finished.code == 1
    assert "es_lite: step 1: 0 of 6 scores are finite; at least two are needed; nothing has changed. es.sigma" in finished.err
    assert records(tmp_path / "run") == 0


@pytest.mark.slow
def test_a_model_whose_logits_are_not_numbers_ends_the_run(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
    torch.nn.init.constant_(model.model.norm.weight, 3e38)  # finite, but what it multiplies is not
    model.save_pretrained(tmp_path / "model")
    recipe = write_reward_recipe(tmp_path, run={"iterations": 1}, model={"config": "", "path": str(tmp_path / "model")})
    for resume in (False, True):
        finished = train_here(recipe, tmp_path / "run", resume=resume)
        assert finished.code == 1
        assert "step 0: the model's score on the held-out items is not finite: the model is broken" in message_of(finished.err)
    assert not (tmp_path / "run/metrics.jsonl").exists() and records(tmp_path / "run") == 0
