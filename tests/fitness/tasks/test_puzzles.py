"""reasoning-gym's puzzles: their rows, their rewards, and what their scorers do with hostile answers."""

import ast
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from es_lite.data.prompts import Row
from es_lite.errors import UserError
from es_lite.fitness.tasks import puzzles

pytest.importorskip("reasoning_gym")

SURVEY = Path(__file__).parent / "scorer_survey.py"


def every_puzzle() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS.keys() - {"composite"})


def small(name: str, seed: int = 1, **options: Any) -> list[Row]:
    return puzzles.rows(name, {"train": 3, "test": 0, **options}, seed)[0]


def pay(row: Row, *completions: str) -> list[float | None]:
    columns = {name: [value] * len(completions) for name, value in row.columns.items()}
    return puzzles.score(prompts=[row.prompt] * len(completions), completions=list(completions), completion_ids=None, **columns)


def refused(name: str, options: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        puzzles.rows(name, options, 0)
    return str(error.value)


# Rows


def test_a_row_is_a_question_with_all_that_makes_the_puzzle_again():
    train, test = puzzles.rows("number_sequence", {"train": 4, "test": 2, "max_complexity": 1}, 7)
    assert test is not None and (len(train), len(test)) == (4, 2)
    row = train[0]
    assert row.columns.keys() == {"name", "options", "seed", "size", "index", "question", "answer"}
    assert row.columns["name"] == "number_sequence" and json.loads(row.columns["options"]) == {"max_complexity": 1}
    assert json.loads(json.dumps(row.columns)) == row.columns
    (message,) = row.prompt
    assert message == {"role": "user", "content": f"{row.columns['question']}\n\n{puzzles.Options.instruction}"}
    assert row.where == "reasoning-gym:number_sequence, puzzle 0"


def test_the_instruction_can_be_another_or_none():
    assert small("chain_sum", instruction="Only the number.")[0].prompt[0]["content"].endswith("\n\nOnly the number.")
    row = small("chain_sum", instruction="")[0]
    assert row.prompt[0]["content"] == row.columns["question"]


def test_no_two_rows_have_the_same_question():
    train, test = puzzles.rows("coin_flip", {"train": 120, "test": 60}, 3)
    questions = [row.columns["question"] for row in train + test]
    assert len(set(questions)) == len(questions) == 180
    assert train[0].columns["seed"] != test[0].columns["seed"]


def test_the_seed_alone_decides_which_puzzles_are_made():
    assert small("chain_sum", 5) == small("chain_sum", 5)
    questions = [{row.columns["question"] for row in small("chain_sum", seed)} for seed in (5, 6)]
    assert not questions[0] & questions[1]


def test_two_hundred_each_are_made_by_default():
    train, test = puzzles.rows("chain_sum", {}, 0)
    assert test is not None and (len(train), len(test)) == (200, 200)


def test_too_few_different_questions_are_an_error():
    assert refused("coin_flip", {"train": 2000}).startswith("data.options.train = 2000: with these options, only ")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("number_sequenc", {}, 'there is no such puzzle; did you mean "number_sequence"?'),
        ("qqqq", {}, "there is no such puzzle; known here: ab, acre,"),
        ("composite", {}, "name one of them"),
        ("countdown", {}, 'runs the model\'s answer as Python code; take data.path = "builtin:countdown"'),
        ("simple_integration", {}, "runs the model's answer as Python code; take another puzzle"),
        ("word_ladder", {}, "in each process"),
        ("number_sequence", {"max_complexit": 2}, 'data.options.max_complexit: unknown option; did you mean "max_complexity"?'),
        ("number_sequence", {"qqqq": 2}, 'unknown option; known for "number_sequence": train, test, instruction, max_complexity'),
        ("number_sequence", {"seed": 2}, "data.options.seed: cannot be set here; the run sets it, from run.seed"),
        ("number_sequence", {"size": 2}, "data.options.size: cannot be set here; the run sets it, from train and test"),
        ("number_sequence", {"train": 0}, "data.options.train = 0: expected a whole number of at least 1"),
        ("number_sequence", {"test": 1.5}, "data.options.test = 1.5: expected a whole number"),
        ("number_sequence", {"instruction": 1}, "data.options.instruction = 1: expected a string"),
        ("number_sequence", {"min_terms": "four"}, "not supported between instances of"),
        ("number_sequence", {"max_complexity": -1}, "self.max_complexity"),
        ("chain_sum", {"min_terms": 9, "max_terms": 3}, "max_terms must be >= min_terms"),
    ],
)
def test_what_cannot_be_used_is_named(name, options, message):
    assert message in refused(name, options)


def test_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert 'pip install "es_lite[puzzles]"' in refused("number_sequence", {})


def test_importing_the_module_loads_nothing_heavy():
    code = (
        "import sys, es_lite.fitness.tasks.puzzles\n"
        "print({'torch', 'numpy', 'transformers', 'reasoning_gym', 'sympy'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


# Rewards


@pytest.mark.parametrize(
    "name", ["number_sequence", "chain_sum", "mini_sudoku", "letter_counting", "arc_1d", "list_functions", "bf"]
)
def test_the_right_answer_is_worth_1_and_a_wrong_one_less(name):
    row = small(name)[0]
    right = row.columns["answer"]
    assert pay(row, right, f"I think <answer>\n{right}\n</answer> is it.", "xyzzy", "") == [1.0, 1.0, 0.0, 0.0]


def test_the_last_answer_in_tags_counts_or_else_the_whole_text():
    assert puzzles.answer_of("<answer>1</answer> no, <answer> 2 </answer>.") == "2"
    assert puzzles.answer_of(" 3\n") == "3"
    assert puzzles.answer_of("<answer>4") == "<answer>4"
    assert puzzles.answer_of("5</answer>") == "5</answer>"
    assert puzzles.answer_of([{"role": "assistant", "content": "<answer>6</answer>"}]) == "6"
    assert puzzles.answer_of("7" * 10**6) == "7" * puzzles.LONGEST_ANSWER


@pytest.mark.parametrize("name", sorted(puzzles.EXACT))
def test_puzzles_that_are_graded_here_pay_for_the_right_answer_only(name):
    row = small(name)[0]
    right = row.columns["answer"]
    wrong = "True" if right == "False" else "False"
    assert pay(row, right, right + " \n", f"{right} {right}", wrong, "", repr([right])) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_not_a_number_is_no_complex_number():
    from reasoning_gym import create_dataset

    dataset = create_dataset("complex_arithmetic", seed=1, size=1)
    assert dataset.score_answer("nan", dataset[0]) == 1.0  # the fault that is made up for
    row = small("complex_arithmetic")[0]
    assert pay(row, row.columns["answer"], "nan", "NaN+1i", "inf") == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("answer", ["9" * 10**6, "1+" * 5 * 10**5, "(" * 10**5 + ")" * 10**5, "\0", "\ud800", "1/0", "-", "inf"])
@pytest.mark.parametrize(
    "name", ["chain_sum", "number_sequence", "prime_factorization", "boxnet", "time_intervals", "mini_sudoku", "gcd"]
)
def test_hostile_answers_score_low_and_raise_nothing(name, answer):
    (paid,) = pay(small(name)[0], answer)
    assert paid is not None and 0.0 <= paid < 0.5


def test_code_in_an_answer_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = ["__import__('os').system('touch ran')", "[open('ran', 'w')]", "open('ran', 'w').write('1')"]
    for name in [*sorted(puzzles.EXACT), "chain_sum"]:
        row = small(name)[0]
        assert (
            pay(row, *codes, *(f"{row.columns['answer']}\n{code}" for code in codes))
            == [0.0] * 3 + [pytest.approx(0, abs=0.5)] * 3
        )
    assert not os.listdir(tmp_path)


def test_columns_from_elsewhere_do_not_reach_an_unsafe_scorer():
    columns = {"name": "countdown", "options": "{}", "seed": 1, "size": 5, "index": 0, "question": "?"}
    with pytest.raises(UserError, match="Python code"):
        puzzles.score(["?"], ["1"], **{name: [value] for name, value in columns.items()})


def test_a_puzzle_that_comes_out_otherwise_is_an_error():
    row = small("chain_sum")[0]
    row.columns["question"] += " "
    with pytest.raises(UserError, match="another version of reasoning_gym"):
        pay(row, "1")


def test_scorers_that_pay_for_lists_of_candidates():
    """What the docstring says of them."""
    row = small("number_sequence")[0]
    (paid,) = pay(row, f"1 2 {row.columns['answer']} 3 4")
    assert paid is not None and 0.0 < paid < 1.0
    row = small("knights_knaves")[0]
    assert pay(row, f"Perhaps: {row.columns['answer']} Or not!") == [1.0]


# What the scorers do, found by trying


def calls(name: str) -> set[str]:
    """Names of all that a scorer calls, with the functions and methods of its own module that it calls."""
    from reasoning_gym.factory import DATASETS

    score = DATASETS[name][0].score_answer
    tree = ast.parse(inspect.getsource(sys.modules[score.__module__]))
    functions: dict[str, list[ast.AST]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            functions.setdefault(node.name, []).append(node)
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(textwrap.dedent(inspect.getsource(score)))]
    while waiting:
        for node in ast.walk(waiting.pop()):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if called not in found:
                    found.add(called)
                    waiting += functions.get(called, [])
    return found


def test_the_sources_name_no_other_scorer_that_evaluates():
    evaluating = {
        "eval",
        "exec",
        "compile",
        "sympify",
        "parse_expr",
        "parse_latex",
        "literal_eval",
        "S",
        "lambdify",
        "system",
        "run",
    }
    suspects = {name for name in every_puzzle() if calls(name) & evaluating}
    # These evaluate a problem, or the right answer, of their own; and propositional_logic has a harmless parse_expr of its own.
    assert suspects - {"bitwise_arithmetic", "number_sorting", "propositional_logic"} == puzzles.UNSAFE


@pytest.mark.long
def test_hostile_answers_run_in_the_unsafe_scorers_and_in_no_other(tmp_path):
    names = every_puzzle()
    children = []
    for part in range(2):
        (tmp_path / str(part)).mkdir()
        command = [sys.executable, str(SURVEY), str(tmp_path / str(part)), *names[part::2]]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
    results = [json.loads(line) for child in children for line in child.communicate(timeout=1800)[0].splitlines()]
    assert sorted(result["name"] for result in results) == names
    assert [result for result in results if "error" in result] == []
    assert {result["name"] for result in results if result["runs"]} == puzzles.UNSAFE
    stuck = {result["name"] for result in results if result["stuck"]} - puzzles.UNSAFE
    assert stuck <= {"coin_flip", "propositional_logic", "rush_hour"}, stuck


@pytest.mark.long
def test_all_other_puzzles_are_the_same_in_every_process():
    code = (
        "import sys, hashlib; from es_lite.fitness.tasks import puzzles as p; p.VARYING = p.UNSAFE = frozenset()\n"
        "for name in sys.argv[1:]:\n"
        "    entries = [p._entry(name, '{}', 11, 40, index) for index in range(40)]\n"
        "    made = repr([(entry['question'], entry['answer']) for entry in entries])\n"
        "    print(name, hashlib.sha256(made.encode()).hexdigest())\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, *every_puzzle()],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    first, second = (dict(line.split() for line in child.communicate()[0].splitlines()) for child in children)
    assert first.keys() == second.keys() == set(every_puzzle())
    assert {name for name in first if first[name] != second[name]} - puzzles.UNSAFE == puzzles.VARYING - puzzles.UNSAFE
