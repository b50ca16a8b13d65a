"""Grading in real processes: what a model wrote, and what reward functions do, cannot hurt the run."""

import contextlib
import gc
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from es_lite.data.prompts import Row
from es_lite.errors import RunError, UserError
from es_lite.fitness import grading
from es_lite.fitness.functions import BUILTIN, role
from es_lite.fitness.grading import Completions, Graders, Grades

nan = np.nan

FUNCTIONS = r"""
import asyncio, ctypes, mmap, os, resource, signal, subprocess, sys, time

def length(completions, **_):
    return [float(len(completion)) for completion in completions]

def obey(completions, **_):
    # Does what the completions say.
    return [run(completion) for completion in completions]

obey.wrong = -7.0

def run(text):
    if text == "hang":
        while True:
            pass
    if text == "sleep":
        time.sleep(1000)
    if text == "allocate":
        return len(bytearray(4 * 2**30))
    if text == "creep":
        held = []
        while True:
            held.append(bytearray(2**26))
    if text == "map":
        return len(mmap.mmap(-1, 2**32, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    if text == "write":
        with open("large", "wb") as file:
            for _ in range(1024):
                file.write(bytes(2**20))
    if text == "exit":
        os._exit(3)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "suicide":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "recurse":
        return run("recurse")
    if text == "close":
        os.closerange(3, 100)
    if text == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        with open("child", "w") as file:
            file.write(str(child.pid))
        time.sleep(1000)
    return float(len(text))

def once(completions, **_):
    # Is killed at its first call, as by the kernel for memory.
    if not os.path.exists("once"):
        open("once", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(completions)

def together(completions, **_):
    return [float(len(completions))] * len(completions)

def columns(prompts, completions, completion_ids, trainer_state, target, **_):
    assert all(type(one) is type(other) for one, other in zip(prompts, prompts[1:]))
    return [100 * len(ids) + 10 * trainer_state.global_step + number for ids, number in zip(completion_ids, target)]

def compare(completions, expected, **_):
    return [[ord(char) for char in completion] == wanted for completion, wanted in zip(completions, expected)]

def messages(prompts, completions, **_):
    shape = [{"role": "assistant", "content": "ab"}]
    return [1 if completion == shape and isinstance(prompt, list) else 0 for prompt, completion in zip(prompts, completions)]

def none(completions, **_):
    return [None if completion == "none" else 2.0 for completion in completions]

async def slowly(completions, **_):
    await asyncio.sleep(0.01)
    return [0.5] * len(completions)

def arrays(completions, **_):
    import numpy
    return numpy.array([float(len(completion)) for completion in completions])

def tensors(completions, **_):
    import torch
    return torch.tensor([float(len(completion)) for completion in completions])

def prints(completions, **_):
    print('{"rewards": [9.0]}\n' * 10)
    os.write(1, b'{"rewards": [9.0]}\n')
    print("\ud800", "x" * 2**25)
    return [1.0] * len(completions)

def key(completions, target, **_):
    return [{1: 1.0}[number] for number in target]

def deep(completions, **_):
    import json
    return [json.loads(completion) for completion in completions]

def unequal(completions, **_):
    assert len(completions) == 1
    return [1.0]

def short(completions, **_):
    return [1.0] * (len(completions) - 1)

def not_finite(completions, **_):
    return [float("nan") if completion == "bad" else 1.0 for completion in completions]

def text(completions, **_):
    return ["1.0"] * len(completions)

def leaves(completions, **_):
    sys.exit(3)

def hashes(completions, **_):
    return [hash(completion) % 1000 for completion in completions]

def limits(completions, **_):
    names = ("RLIMIT_CORE", "RLIMIT_FSIZE")
    assert [resource.getrlimit(getattr(resource, name)) for name in names] == [(0, 0), (2**24, 2**24)]
    assert 2**30 < resource.getrlimit(resource.RLIMIT_DATA)[1] < 2**31
    assert sys.getrecursionlimit() == 1000
    assert not set(sys.modules) & {"torch", "numpy", "transformers"}
    import threading
    assert threading.current_thread() is threading.main_thread()
    return [1.0] * len(completions)

def interrupted(completions, **_):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    return [1.0] * len(completions)
"""


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """The working directory has the file f.py; a test ends with the processes and descriptors with which it began."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text(FUNCTIONS)
    gc.collect()
    descriptors, children = set(os.listdir("/proc/self/fd")), set(psutil.Process().children())
    yield
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert set(psutil.Process().children(recursive=True)) == children


@pytest.fixture
def built_in(tmp_path, monkeypatch):
    """Makes functions of f.py built-in ones, as far as coordinator and graders can tell; returns what to grade with."""

    def make(*names: str) -> list[str]:
        (tmp_path / "patch.py").write_text(
            f"from es_lite.fitness.functions import BUILTIN\nfor name in {names!r}: BUILTIN[name] = 'f:' + name\n"
            "def nothing(completions, **_): return [None] * len(completions)\n"
        )
        for name in names:
            monkeypatch.setitem(BUILTIN, name, f"f:{name}")
        return ["patch.py:nothing", *names]

    return make


def rows_of(count: int, **columns) -> list[Row]:
    values = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)] or [{}] * count
    return [Row(f"question\n  number {index}", values[index], f"data.jsonl:{index + 1}") for index in range(count)]


def grade(functions: str | list[str], *texts: str, seconds: float = 5.0, processes: int = 1, **columns) -> Grades:
    names = [f"f.py:{functions}"] if isinstance(functions, str) else functions
    with Graders(names, processes, seconds) as graders:
        return graders.grade(rows_of(len(texts), **columns), texts, [[1, 2]] * len(texts), 3)


def wait_until_dead(*pids: int) -> None:
    """Returns when they are gone, or only wait for init to take notice."""
    for process in [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]:
        for _ in range(3000):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.01)
                    continue
            break
        else:
            process.kill()
            pytest.fail(f"process {process.pid} lives on")


# Rewards


def test_parts_are_functions_by_completions():
    grades = grade(["f.py:length", "f.py:none"], "a", "none", "abc")
    assert grades.parts.dtype == np.float64 and grades.killed.dtype == bool
    np.testing.assert_array_equal(grades.parts, [[1, 4, 3], [2, nan, 2]])
    assert not grades.killed.any() and grades.causes == {}


def test_a_users_function_gets_the_completions_together_and_a_built_in_one_each_alone(built_in):
    np.testing.assert_array_equal(grade("together", "a", "b", "c").parts, [[3, 3, 3]])
    np.testing.assert_array_equal(grade(built_in("together"), "a", "b", "c").parts[1], [1, 1, 1])


@pytest.mark.parametrize("name, expected", [("slowly", 0.5), ("arrays", 2), ("tensors", 2), ("prints", 1), ("interrupted", 1)])
def test_all_kinds_of_functions(name, expected, capfd):
    np.testing.assert_array_equal(grade(name, "ab", "ab", seconds=60).parts, [[expected, expected]])
    output, errors = capfd.readouterr()
    assert output == ""
    assert ("9.0" in errors) == (name == "prints")


def test_a_grader_limits_itself_and_is_light():
    assert grade("limits", "a").parts == 1


def test_columns_ids_and_step_arrive():
    np.testing.assert_array_equal(grade("columns", "a", "b", target=[1, 2]).parts, [[231, 232]])


@pytest.mark.parametrize("alone", [False, True])
def test_texts_arrive_unchanged(built_in, alone):
    texts = ["\0", "\ud800", "\ud83d\ude00", "\U0001f600", "\udc80\ud800", "é\r\n\u2028 \t", "", "1" * 2**18]
    names = built_in("compare") if alone else ["f.py:compare"]
    codes = [[ord(char) for char in text] for text in texts]
    assert grade(names, *texts, expected=codes).parts[-1].tolist() == [1.0] * len(texts)


def test_columns_arrive_unchanged():
    values = [[1, 2.5, None, {"a": [True, "\0\ud800"]}], 2**80, 1e-300, {"": {}}]
    Path("same.py").write_text(f"def same(completions, value, **_): return [value == {values!r}] * len(completions)\n")
    assert grade(["same.py:same"], *"abcd", value=values).parts.tolist() == [[1.0] * 4]


def test_long_completions_are_cut():
    assert grade("length", "x" * 10**6).parts == 256 * 1024


def test_completions_are_messages_where_prompts_are():
    rows = [Row([{"role": "user", "content": "q"}], {}, "x:1"), Row("q", {}, "x:2")]
    with Graders(["f.py:messages"], 1, 5) as graders:
        assert graders.grade(rows, ["ab", "ab"], [[], []], 0).parts.tolist() == [[1.0, 0.0]]


def test_many_members_on_two_processes():
    with Graders(["f.py:length", "f.py:together"], 2, 5) as graders:
        graders.start()
        assert len(set(graders.pids)) == 2
        pids = graders.pids
        batches = [Completions(rows_of(n), ["x" * (10 * n + i) for i in range(n)], [[]] * n, 0) for n in (3, 0, 1, 5, 2)]
        for _ in range(2):
            for batch, grades in zip(batches, graders.grade_all(batches), strict=True):
                n = len(batch.rows)
                assert grades.parts.tolist() == [[10 * n + i for i in range(n)], [n] * n]
        assert graders.grade_all([]) == []
        assert graders.pids == pids


def test_the_order_of_sets_is_the_same_in_every_grader():
    texts = ["a", "b", "c"]
    np.testing.assert_array_equal(grade("hashes", *texts).parts, grade("hashes", *texts).parts)


# Limits

NASTY = {
    "hang": r"took more than 0\.5 s",
    "sleep": r"took more than 0\.5 s",
    "allocate": "took more than 1 GiB of memory",
    "creep": "took more than 1 GiB of memory",
    "map": "took more than 1 GiB of memory",
    "write": "wrote more than 16 MiB to a file",
    "exit": r"ended its process \(exit code 3\)",
    "segfault": r"ended its process \(SIGSEGV\)",
    "suicide": r"ended its process \(SIGKILL\)",
    "close": r"ended its process",
}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("nasty, cause", NASTY.items())
def test_what_kills_a_grader_scores_as_wrong_and_the_rest_is_graded(built_in, nasty, cause, alone):
    names = built_in("obey") if alone else ["f.py:obey"]
    seconds = 0.5 if nasty in ("hang", "sleep") else 60.0
    grades = grade([*names, "f.py:length"], "abc", nasty, "ab", seconds=seconds)
    wrong = -7 if alone else 0  # only a built-in function says what is wrong
    assert grades.parts[-2].tolist() == [3, wrong, 2]
    assert grades.parts[-1].tolist() == [3, len(nasty), 2]
    assert grades.killed.tolist() == [False, True, False]
    assert list(grades.causes) == [1]
    assert re.fullmatch(rf'reward function "{names[-1]}" {cause}.* on data\.jsonl:2 \("question number 1"\)', grades.causes[1])
    assert not Path("large").exists() or Path("large").stat().st_size <= 2**24


def test_memory_that_torch_is_refused():
    Path("t.py").write_text(
        "import torch\ndef ones(completions, **_):\n"
        "    return [float(torch.ones(2**32 if completion == 'large' else 1).sum()) for completion in completions]\n"
    )
    grades = grade(["t.py:ones"], "a", "large", seconds=60)
    assert grades.parts.tolist() == [[1, 0]]
    assert "took more than 1 GiB of memory" in grades.causes[1]


def test_a_text_that_is_nested_too_deeply_for_a_built_in_function(built_in):
    grades = grade(built_in("obey"), "recurse", "a")
    assert grades.parts[1].tolist() == [-7, 1]
    assert "recursed too deeply" in grades.causes[0]


def test_killed_is_the_least_reward_where_that_is_below_zero(built_in):
    (Path("g.py")).write_text("from f import run\ndef less(completions, **_): return [-run(text) for text in completions]\n")
    assert grade(["g.py:less"], "exit", "ab", "abc", "exit").parts.tolist() == [[-3, -2, -3, -3]]
    assert grade(["g.py:less"], "exit").parts.tolist() == [[0]]


def test_several_in_one_batch_and_two_functions(built_in):
    grades = grade([*built_in("obey"), "f.py:obey"], "exit", "a", "exit", "ab", "exit", processes=2)
    np.testing.assert_array_equal(grades.parts[1:], [[-7, 1, -7, 2, -7], [0, 1, 0, 2, 0]])
    assert grades.killed.tolist() == [True, False, True, False, True]


def test_a_grader_that_was_killed_from_outside_is_repeated():
    grades = grade("once", "a")
    assert grades.parts == 1 and not grades.killed.any()


def test_a_grader_that_died_while_it_had_nothing_to_do_costs_nothing():
    with Graders(["f.py:together"], 2, 5) as graders:
        graders.start()
        for pid in graders.pids:
            os.kill(pid, signal.SIGKILL)
        wait_until_dead(*graders.pids)
        grades = graders.grade(rows_of(2), ["a", "b"], [[], []], 0)
        assert grades.parts.tolist() == [[2, 2]] and not grades.killed.any()


def test_what_a_function_started_is_killed_with_it():
    grades = grade("obey", "child", "a", seconds=1)
    assert grades.killed.tolist() == [True, False]
    wait_until_dead(int(Path("child").read_text()))


def test_a_users_function_that_never_answers_is_reported(built_in):
    with pytest.raises(UserError, match=r'"f\.py:obey" took more than 0\.2 s, as on each of the first 3 .*reward\.seconds'):
        grade("obey", "hang", "hang", "hang", "a", seconds=0.2)
    assert grade(built_in("obey"), *["exit"] * 5).killed.all()
    assert grade("obey", "hang", "hang", "a", "hang", seconds=0.2).killed.tolist() == [True, True, False, True]


def test_loading_takes_nothing_from_the_limits():
    Path("late.py").write_text(
        f"import mmap, time; time.sleep(1); held = mmap.mmap(-1, 3 * 2**29, flags=mmap.MAP_PRIVATE)\n{FUNCTIONS}"
    )
    assert grade(["late.py:length"], "abc", seconds=0.5).parts == 3


def test_a_built_in_function_can_prepare_itself(built_in):
    names = built_in("length")
    Path("f.py").write_text(FUNCTIONS + "def prepare():\n    open('prepared', 'w').close()\n")
    grade(names, "a")
    assert Path("prepared").exists()


# The user's mistakes


@pytest.mark.parametrize(
    "name, message",
    [
        ("key", r'"f\.py:key" raised KeyError: 2 \(/.*/f\.py:\d+\); it graded data\.jsonl:2 \("question number 1"\)$'),
        (
            "deep",
            r'raised JSONDecodeError: Expecting value.* \(/.*/f\.py:\d+\); it graded data\.jsonl:1 \("question',
        ),
        ("unequal", r"raised AssertionError \(/.*/f\.py:\d+\); it graded 3 completions together, the first of data\.jsonl:1 \("),
        ("short", r"returned a list of 0 for 1 completion; expected one number, or None, for each; it graded data\.jsonl:1 "),
        ("not_finite", r"returned nan \(of type float\); expected a finite number, or None; it graded data\.jsonl:3 "),
        ("text", r"returned '1\.0' \(of type str\); .*; it graded data\.jsonl:1 "),
        ("leaves", r"raised SystemExit: 3 .*; it graded data\.jsonl:1 "),
        ("absent", r"AttributeError: .*'absent'"),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_what_the_user_must_correct(name, message, processes, capfd):
    with pytest.raises(UserError, match=message) as caught:
        grade(name, "a", "b", "bad", target=[1, 2, 1], processes=processes)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_mistake_in_a_built_in_function_names_the_row_too(built_in):
    with pytest.raises(UserError, match=r'"key" raised KeyError: 2 .*data\.jsonl:2'):
        grade(built_in("key"), "a", "b", target=[1, 2])


def test_recursion_in_a_users_function_is_the_users_mistake():
    with pytest.raises(UserError, match=r"RecursionError: maximum .*; it graded data\.jsonl:2"):
        grade("obey", "a", "recurse")


def test_messages_are_one_printable_line_of_bounded_length():
    Path("loud.py").write_text("def loud(completions, **_): raise ValueError(completions[0][0]['content'])\n")
    prompt = [{"role": "user", "content": "ask\x1b[2J\n\ud800" * 100}, {"role": "assistant", "content": "prefill"}]
    with pytest.raises(UserError) as caught, Graders(["loud.py:loud"], 1, 5) as graders:
        graders.grade([Row(prompt, {}, "x:1")], ["\x1b[31m\n\0\ud800" * 10_000], [[]], 0)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    assert message.startswith(r'reward function "loud.py:loud" raised ValueError: \x1b[31m \x00\ud800\x1b[31m')
    assert r'x:1 ("ask\x1b[2J \ud800ask' in message


def test_after_an_error_the_same_graders_can_be_used():
    with Graders(["f.py:key"], 2, 5) as graders:
        with pytest.raises(UserError):
            graders.grade(rows_of(1, target=[2]), ["a"], [[]], 0)
        assert graders.pids == []
        assert graders.grade(rows_of(1, target=[1]), ["a"], [[]], 0).parts == 1


@pytest.mark.parametrize("name", ["nowhere.py:f", "nowhere.f", "countdown", "f.py:absent"])
def test_functions_that_cannot_be_loaded_are_reported_at_the_start(name):
    with Graders([name], 2, 5) as graders, pytest.raises(UserError, match=rf'reward function "{name}"'):
        graders.start()


@pytest.mark.parametrize("death, how", [("os._exit(5)", "exit code 5"), ("os.kill(os.getpid(), 11)", "SIGSEGV")])
def test_a_start_that_dies_three_times(death, how):
    Path("dies.py").write_text(f"import os; open('starts', 'a').write('x'); {death}")
    with pytest.raises(RunError, match=rf"loading the reward functions dies\.py:f ended its process \({how}\), 3 times in a row"):
        grade(["dies.py:f"], "a")
    assert Path("starts").read_text() == "xxx"


def test_a_start_that_hangs(monkeypatch):
    monkeypatch.setattr(grading, "START_SECONDS", 0.5)
    Path("hangs.py").write_text("import time; time.sleep(1000)")
    with pytest.raises(RunError, match=r"loading the reward functions hangs\.py:f took more than 0\.5 s; import them"):
        grade(["hangs.py:f"], "a")


# What a model might write

HOSTILE = {
    "power": "9**9**9**9",
    "parentheses": "(" * 100_000 + ")" * 100_000,
    "digits": "9" * 1_000_000,
    "sum": "1+" * 500_000 + "1",
    "factorial": "99999!!",
    "boxed": r"\boxed{" * 50_000,
    "tower": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "nul": "1\0+2",
    "surrogate": "\ud800",
    "code": "__import__('os').system('touch executed')",
    "escape": r"1if 2else '\d'",
}
WRAPPED = [form % text for text in HOSTILE.values() for form in ("%s", "<answer>%s</answer>", r"</think>\boxed{%s}")]


GSM8K = '{"question": "What is 70 + 6?", "answer": "It is <<70+6=76>>76.\\n#### 76"}\n'


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, what, options, package",
    [
        ("countdown", "", {"train": 1, "test": 1}, "es_lite"),
        ("conciseness", "", {}, "es_lite"),
        ("math", "gsm8k.jsonl", {}, "math_verify"),
        ("puzzles", "number_sequence", {"train": 1, "test": 1}, "reasoning_gym"),
    ],
)
def test_hostile_texts_in_the_tasks(task, what, options, package, capfd):
    pytest.importorskip(package)
    Path("gsm8k.jsonl").write_text(GSM8K)
    module = importlib.import_module(f"es_lite.fitness.tasks.{task}")
    row = module.rows(what, options, 0)[0][0]
    with Graders(module.FUNCTIONS, 2, 5) as graders:
        grades = graders.grade([row] * len(WRAPPED), WRAPPED, [[]] * len(WRAPPED), 0)
    assert np.isfinite(grades.parts).all()
    right = [role(name) == "right" for name in module.FUNCTIONS]
    assert any(right) and (grades.parts[right] < 0.5).all()
    assert not Path("executed").exists()
    assert capfd.readouterr() == ("", "")


def test_warnings_of_parsing_a_models_text_are_not_shown(built_in, capfd):
    Path("p.py").write_text(
        "import ast\ndef parse(completions, **_):\n    return [bool(ast.parse(completion)) for completion in completions]\n"
    )
    assert grade(["p.py:parse"], HOSTILE["escape"]).parts == 1
    assert capfd.readouterr() == ("", "")


# The coordinator's end


COORDINATOR = """
from es_lite.data.prompts import Row
from es_lite.fitness.grading import Graders
graders = Graders(["f.py:obey"], 2, 1000)
graders.start()
print(*graders.pids, flush=True)
graders.grade([Row("q", {}, "x:1")], ["hang"], [[]], 0)
"""


def test_graders_die_with_the_coordinator():
    with subprocess.Popen([sys.executable, "-c", COORDINATOR], stdout=subprocess.PIPE, text=True) as coordinator:
        graders = [int(pid) for pid in coordinator.stdout.readline().split()]
        assert len(graders) == 2 and all(map(psutil.pid_exists, graders))
        coordinator.kill()
    wait_until_dead(*graders)


def test_an_exception_in_the_coordinator_leaves_nothing():
    graders = Graders(["f.py:obey"], 2, 1000)
    graders.start()
    processes = [psutil.Process(pid) for pid in graders.pids]

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            graders.grade(rows_of(1), ["sleep"], [[]], 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert graders.pids == [] and not any(process.is_running() for process in processes)


# TRL's own functions, unmodified


def test_trls_functions():
    pytest.importorskip("trl")
    pytest.importorskip("math_verify")
    Path("instances.py").write_text(
        "from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment\n"
        "repeats = get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)\n"
        "overlong = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)\n"
    )
    texts = [r"<think>half</think>It is \boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{1/3}", r"\boxed{9^{9^{9^{9}}}}", "?"]
    solutions = [r"\frac{1}{2}", "$0.5$", "$0.5$", "$0.5$", "not to be parsed"]
    rows = [Row([{"role": "user", "content": "q"}], {"solution": text}, f"x:{i}") for i, text in enumerate(solutions)]
    ids = [[1] * 90, [1, 2, 3, 4], [5, 5, 5], [], [1] * 101]
    names = [
        "trl.rewards.accuracy_reward",
        "trl.rewards.reasoning_accuracy_reward",
        "trl.rewards.think_format_reward",
        "instances.py:repeats",
        "instances.py:overlong",
    ]
    with Graders(names, 1, 30) as graders:
        grades = graders.grade(rows, texts, ids, 0)
    assert not grades.killed.any()
    accuracy, reasoning, form, repeats, overlong = grades.parts
    np.testing.assert_array_equal(accuracy, [1, 1, 0, 0, nan])
    np.testing.assert_array_equal(reasoning, [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(form, [1, 0, 0, 0, 0])
    np.testing.assert_allclose(repeats, [-88 / 89, 0, -0.5, 0, -0.99])
    np.testing.assert_allclose(overlong, [-0.5, 0, 0, 0, -1])
