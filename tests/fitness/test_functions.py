"""Reward functions are found by name and called by TRL's convention; what they return is checked."""

import asyncio
import subprocess
import sys
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from es_lite.errors import UserError
from es_lite.fitness.functions import BUILTIN, BadReward, call, load, prepare, role


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def rewards(function, completions=("a", "bcd"), **columns):
    return call(function, "mine", ["p"] * len(completions), list(completions), [[1]] * len(completions), columns, step=7)


# Finding


@pytest.mark.parametrize("name", BUILTIN)
def test_the_built_in_functions_are_there(name):
    assert callable(load(name))
    prepare(name)


def test_finding_functions_loads_neither_torch_nor_numpy():
    code = "import sys, es_lite.fitness.grader; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_function_of_a_file(here):
    (here / "helper.py").write_text("VALUE = 0.25\n")
    (here / "mine.py").write_text(
        "from helper import VALUE\ndef score(completions, **_):\n    return [VALUE] * len(completions)\n"
    )
    assert rewards(load("mine.py:score")) == [0.25, 0.25]
    assert rewards(load(str(here / "mine.py") + ":score")) == [0.25, 0.25]


def test_a_file_in_the_home_folder(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    (here / "mine.py").write_text("def score(**_): ...\n")
    assert load("~/mine.py:score").__name__ == "score"


def test_a_file_is_loaded_once_and_hides_no_module_of_its_name(here):
    (here / "math.py").write_text("open('loaded', 'a').write('x')\ndef one(**_): ...\ndef two(**_): ...\n")
    load("math.py:one"), load("math.py:two")
    assert (here / "loaded").read_text() == "x"
    import math

    assert math.sqrt(4) == 2


def test_a_dotted_path_also_from_the_working_directory(here):
    (here / "package").mkdir()
    (here / "package" / "rewards.py").write_text("def score(completions, **_):\n    return [1] * len(completions)\n")
    assert rewards(load("package.rewards.score")) == [1.0, 1.0]
    assert load("os.path.join") is not None


def test_the_working_directory_hides_nothing_that_is_installed(here):
    (here / "colorsys.py").write_text("raise RuntimeError\n")
    assert load("colorsys.rgb_to_hls")


@pytest.mark.parametrize(
    "name, message",
    [
        ("countdown_anser", r'"countdown_anser": there is no built-in one .*did you mean "countdown_answer"\?'),
        ("zzz", r'"zzz": .*known are countdown_answer, .*"FILE\.py:FUNCTION"'),
        ("", r'"": there is no built-in'),
        ("nowhere.to.be_found", r"nowhere\.to cannot be imported \(ModuleNotFoundError: No module named 'nowhere'\); install it"),
        ("os.path.joint", r"\(AttributeError: .*'joint'\); did you mean \"join\""),
        ("os.path.sep", r"\"os\.path\.sep\": is not a function but '/' \(of type str\)"),
        ("missing.py:score", r"there is no file .*/missing\.py$"),
        ("folder.py:score", r"there is no file .*/folder\.py$"),
        ("good.py", r'"good\.py": expected "FILE\.py:FUNCTION"'),
        ("good.py:", r'"good\.py:": expected "FILE\.py:FUNCTION"'),
        ("good.txt:score", r'"good\.txt:score": expected "FILE\.py:FUNCTION"'),
        ("good.py:scor", r"\(AttributeError: .*'scor'\); did you mean \"score\""),
        ("good.py:NUMBER", r"is not a function but 3 \(of type int\)"),
        ("broken.py:score", r"/broken\.py cannot be imported \(SyntaxError: "),
        ("raises.py:score", r"/raises\.py cannot be imported \(KeyError: 'x'\)$"),
        ("exits.py:score", r"/exits\.py cannot be imported \(SystemExit: 2\)$"),
        ("imports.py:score", r"\(ModuleNotFoundError: No module named 'surely_not_installed'\)"),
        ("raises.score", r"raises cannot be imported \(KeyError: 'x'\)$"),
        (".score", r'"\.score": '),
        ("..score", r'"\.\.score": '),
    ],
)
def test_what_cannot_be_loaded(here, name, message):
    (here / "folder.py").mkdir()
    (here / "good.py").write_text("NUMBER = 3\ndef score(**_): ...\n")
    (here / "broken.py").write_text("def score(:\n")
    (here / "raises.py").write_text("{}['x']\n")
    (here / "exits.py").write_text("import sys; sys.exit(2)\n")
    (here / "imports.py").write_text("import surely_not_installed\n")
    with pytest.raises(UserError, match=message):
        load(name)


# Calling


def test_a_function_gets_what_trl_gives():
    seen = {}

    def score(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
        seen.update(columns, prompts=prompts, completions=completions, ids=completion_ids, step=trainer_state.global_step)
        log_extra("column", [1, 2])
        log_metric("name", 0.5)
        return [1, 2]

    columns = {"answer": ["x", None], "prompt": ["", ""], "completion": ["", ""], "completion_ids": [0, 0]}
    assert call(score, "mine", ["p", "q"], ["a", "b"], [[1], [2, 3]], columns, step=7) == [1.0, 2.0]
    assert seen == {
        "answer": ["x", None],
        "prompts": ["p", "q"],
        "completions": ["a", "b"],
        "ids": [[1], [2, 3]],
        "step": 7,
    }


def test_coroutines_are_run():
    async def score(completions, **_):
        await asyncio.sleep(0)
        return [float(len(completion)) for completion in completions]

    class Scorer:
        async def __call__(self, completions, **_):
            return await score(completions)

    class Plain:
        def __call__(self, completions, **_):
            return [0.0] * len(completions)

    assert rewards(score) == rewards(Scorer()) == rewards(partial(score, more=1)) == [1.0, 3.0]
    assert rewards(Plain()) == [0.0, 0.0]


@pytest.mark.parametrize(
    "returned, expected",
    [
        ([1, 0.5], [1.0, 0.5]),
        ((True, False), [1.0, 0.0]),
        ([None, -1], [None, -1.0]),
        ([Fraction(1, 4), 0], [0.25, 0.0]),
        (np.array([0.5, 2.0], np.float32), [0.5, 2.0]),
        (np.array([True, False]), [1.0, 0.0]),
        ([np.float16(0.5), np.int64(3)], [0.5, 3.0]),
        ([np.bool_(True), np.array([0.5])], [1.0, 0.5]),
        (torch.tensor([0.5, 2.0], dtype=torch.bfloat16, requires_grad=True), [0.5, 2.0]),
        ([torch.tensor(0.5), torch.tensor([2])], [0.5, 2.0]),
    ],
)
def test_rewards_become_numbers_of_python(returned, expected):
    found = rewards(lambda **_: returned)
    assert found == expected
    assert all(type(value) in (float, type(None)) for value in found)


@pytest.mark.parametrize(
    "returned, index, message",
    [
        ([1.0], None, "returned a list of 1 for 2 completions; expected one number, or None, for each"),
        ([1.0] * 3, None, "returned a list of 3 for 2 completions"),
        ([], None, "a list of 0"),
        (None, None, "returned None; expected a list"),
        (0.5, None, r"returned 0\.5 \(of type float\); expected a list"),
        ("12", None, r"returned '12' \(of type str\)"),
        ({0: 1.0, 1: 2.0}, None, r"\(of type dict\)"),
        ((x for x in (1.0, 2.0)), None, r"\(of type generator\)"),
        (np.zeros((2, 1)), None, r"\(of type ndarray\)"),
        (torch.tensor(1.0), None, r"\(of type Tensor\)"),
        ([1.0, float("nan")], 1, r"returned nan \(of type float\); expected a finite number, or None"),
        ([float("-inf"), 1.0], 0, "returned -inf"),
        ([0, 10**400], 1, r"returned 10+… \(of type int\)"),
        ([1.0, "1.0"], 1, r"returned '1\.0' \(of type str\)"),
        ([1.0, 1j], 1, r"\(of type complex\)"),
        ([1.0, [1.0]], 1, r"\(of type list\)"),
        ([np.zeros(2), 0], 0, r"\(of type ndarray\)"),
        ([0, torch.zeros(2)], 1, r"\(of type Tensor\)"),
        ([0, np.str_("1")], 1, r"\(of type str_\)"),
        (np.array([0.0, np.nan]), 1, "returned nan"),
    ],
)
def test_what_is_not_a_reward(returned, index, message):
    with pytest.raises(BadReward, match=message) as caught:
        rewards(lambda **_: returned)
    assert 'reward function "mine" returned ' in str(caught.value)
    assert caught.value.index == index
    assert len(str(caught.value)) < 250


def test_what_cannot_even_be_shown():
    class Hostile:
        def __repr__(self):
            raise RuntimeError

    with pytest.raises(BadReward, match="returned a value of type Hostile"):
        rewards(lambda **_: Hostile())


def test_what_a_function_raises_is_not_touched():
    with pytest.raises(ZeroDivisionError):
        rewards(lambda **_: 1 / 0)


# Roles


@pytest.mark.parametrize(
    "name, expected",
    [
        ("countdown_answer", "right"),
        ("right_answer", "right"),
        ("math_answer", "right"),
        ("puzzle", "right"),
        ("trl.rewards.accuracy_reward", "right"),
        ("mine.py:is_correct", "right"),
        ("countdown_format", "format"),
        ("trl.rewards.think_format_reward", "format"),
        ("mine.py:correct_format", "format"),
        ("conciseness", ""),
        ("math_strict", ""),
        ("accuracy.py:length", ""),
        ("format.helpers.length", ""),
    ],
)
def test_roles(name, expected):
    assert role(name) == expected
