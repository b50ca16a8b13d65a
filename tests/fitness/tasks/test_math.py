"""Mathematical problems: rows from files as published, and whether a completion's final answer is right."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from es_lite.data.prompts import Row
from es_lite.errors import UserError
from es_lite.fitness.tasks import math as module

SAMPLES = Path(__file__).parent / "samples"
PUBLISHED = Path(os.environ.get("ES_LITE_MATH_DATA", "none"))
"""A folder with gsm8k_train.jsonl and minerva_math.jsonl as published; the samples are in their shapes."""
SETS = ("gsm8k", "math", "math500", "minerva", "olympiad")

needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math_verify is not installed")


def rows_of(path: Path | str, **options: Any) -> list[Row]:
    rows, held_out = module.rows(str(path), options, 0)
    assert held_out is None
    return rows


def graded(function, row: Row, *completions: str) -> list[float | None]:
    columns = {name: [value] * len(completions) for name, value in row.columns.items()}
    messages = [[{"role": "assistant", "content": text}] for text in completions]
    return function(prompts=[row.prompt] * len(completions), completions=messages, completion_ids=None, **columns)


def right(completion: str, *answers: str, kind: str = "math", several: bool = False, tolerance: float | None = None) -> bool:
    (reward,) = module.answer(
        prompts=["?"],
        completions=[completion],
        completion_ids=[[1]],
        answers=[list(answers)],
        kind=[kind],
        several=[several],
        tolerances=[[tolerance] * len(answers)],
    )
    assert reward in (0.0, 1.0)
    return reward == 1.0


def write(folder: Path, *records: Any) -> Path:
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


# Rows


def test_a_row_asks_for_a_box_and_knows_the_answer():
    row = rows_of(SAMPLES / "gsm8k.jsonl")[2]
    content = "A mill grinds 250 kg of wheat an hour. How much does it grind in 6 hours?\n\n" + module.Options.instruction
    assert row.prompt == [{"role": "user", "content": content}]
    assert row.columns == {
        "kind": "gsm8k",
        "answers": ["1,500"],
        "several": False,
        "tolerances": [None],
        "solution": "$1,500$",
    }
    assert row.where == f"{SAMPLES / 'gsm8k.jsonl'}:3"


@pytest.mark.parametrize("name, kind", list(zip(SETS, ("gsm8k", "math", "math", "minerva", "olympiad"), strict=True)))
def test_the_columns_tell_the_set(name, kind):
    rows = rows_of(SAMPLES / f"{name}.jsonl")
    assert len(rows) == 10 and {row.columns["kind"] for row in rows} == {kind}
    assert json.loads(json.dumps([row.columns for row in rows])) == [row.columns for row in rows]


def test_the_solution_goes_before_a_damaged_answer():
    assert rows_of(SAMPLES / "math500.jsonl")[1].columns["answers"] == [r"\left( 2, \frac{\pi}{2} \right)"]
    assert [row.columns for row in rows_of(SAMPLES / "math500.jsonl")] == [row.columns for row in rows_of(SAMPLES / "math.jsonl")]


def test_an_answer_will_do_where_there_is_no_solution(tmp_path):
    file = write(tmp_path, {"problem": "1 + 1?", "answer": "2"}, {"problem": "1 + 2?", "solution": "No box.", "answer": "3"})
    assert [row.columns["answers"] for row in rows_of(file)] == [["2"], ["3"]]


def test_olympiad_bench_has_lists_and_tolerances():
    rows = rows_of(SAMPLES / "olympiad.jsonl")
    assert rows[0].columns["answers"] == ["$2$, $-2$"] and rows[0].columns["solution"] == "$2$, $-2$"
    assert rows[0].columns["several"] and not rows[2].columns["several"]
    assert rows[4].columns["tolerances"] == [0.05]
    assert (rows[7].columns["answers"], rows[7].columns["tolerances"]) == (["$25$", "$50$"], [0.1, 1.0])


def test_rounded_numbers_of_minerva_have_a_tolerance():
    tolerances = [row.columns["tolerances"] for row in rows_of(SAMPLES / "minerva.jsonl")]
    assert tolerances[0] == tolerances[3] == [None]
    assert tolerances[1] == [pytest.approx(7.5e4)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json", ".parquet"])
def test_other_kinds_of_files_have_the_same_rows(tmp_path, suffix):
    records = [json.loads(line) for line in (SAMPLES / "olympiad.jsonl").read_text().splitlines()]
    file = tmp_path / f"problems{suffix}"
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    elif suffix == ".json":
        file.write_text(json.dumps(records))
    else:
        file.write_bytes(gzip.compress((SAMPLES / "olympiad.jsonl").read_bytes()))
    expected = rows_of(SAMPLES / "olympiad.jsonl")
    assert [(row.prompt, row.columns) for row in rows_of(file)] == [(row.prompt, row.columns) for row in expected]


def test_a_log_of_the_evaluation_harness_has_rows(tmp_path):
    file = write(tmp_path, {"doc": {"problem": "1 + 1?", "solution": r"\boxed{2}", "level": 1}, "idx": 0})
    assert rows_of(file)[0].columns["answers"] == ["2"]


def test_the_last_rows_can_be_held_out():
    everything = rows_of(SAMPLES / "math.jsonl", instruction="Go.")
    train, test = module.rows(str(SAMPLES / "math.jsonl"), {"test": 3, "instruction": "Go."}, 5)
    assert test is not None and (train, test) == (everything[:7], everything[7:])
    assert train[0].prompt[0]["content"].endswith("\n\nGo.")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tets": 3}, 'data.options.tets: unknown key; did you mean "test"?'),
        ({"test": -1}, "data.options.test = -1: expected a whole number of at least 0"),
        ({"test": 10}, "data.options.test = 10: leaves none of the 10 problems"),
        ({"test": "3"}, "data.options.test = '3': expected a whole number"),
        ({"instruction": 3}, "data.options.instruction = 3: expected a string"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError) as error:
        module.rows(str(SAMPLES / "math.jsonl"), options, 0)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "1 + 1"}, "has the columns text; expected question and answer (GSM8K)"),
        ({}, "is empty"),
        ({"question": "1 + 1?", "answer": "2"}, 'its "answer" has no line that starts with ####'),
        ({"question": "1 + 1?", "answer": "#### two"}, "what follows #### in \"answer\" is 'two', not a number"),
        ({"question": "1 + 1?"}, "has the columns question"),
        ({"question": " ", "answer": "#### 2"}, "has the columns question, answer"),
        ({"problem": "1 + 1?", "solution": r"It is \boxed{2"}, r"neither a solution with a \boxed{} nor an"),
        ({"problem": "1 + 1?", "solution": None, "answer": None}, "neither"),
        ({"question": "1 + 1?", "final_answer": []}, '"final_answer" is []'),
        ({"question": "1 + 1?", "final_answer": [2]}, '"final_answer" is [2]'),
        ({"question": "1 + 1?", "final_answer": ["2"], "error": "much"}, "\"error\" is 'much'"),
        ({"question": "1 + 1?", "final_answer": ["2"], "error": "nan"}, "\"error\" is 'nan'"),
        ({"problem": "\ud800", "answer": "2"}, "half a surrogate pair"),
    ],
)
def test_a_row_of_no_known_shape_is_named_with_its_line(tmp_path, record, message):
    file = write(tmp_path, {"problem": "1 + 1?", "answer": "2"}, record)
    with pytest.raises(UserError) as error:
        rows_of(file)
    assert f"{file}:2: " in str(error.value) and message in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name, content in (("a.jsonl.gz", b"plain"), ("b.jsonl.gz", gzip.compress(b"{}\n" * 999)[:30]), ("c.jsonl", b"\xff\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            rows_of(tmp_path / name)
    for name, message in (
        ("missing.jsonl.gz", "no such file"),
        ("missing.jsonl", "no such file"),
        ("d.jsonl", "no problem in it"),
    ):
        (tmp_path / "d.jsonl").write_text("\n")
        with pytest.raises(UserError, match=message):
            rows_of(tmp_path / name)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="ES_LITE_MATH_DATA names no folder with the published sets")
@pytest.mark.parametrize("name, count", [("gsm8k_train", 7473), ("minerva_math", 272)])
def test_published_sets_are_read_and_their_own_answers_are_right(name, count):
    rows = rows_of(PUBLISHED / f"{name}.jsonl")
    assert len(rows) == count
    columns = {column: [row.columns[column] for row in rows] for column in rows[0].columns}
    boxed = [rf"It is \boxed{{{row.columns['answers'][0]}}}." for row in rows]
    assert module.answer([row.prompt for row in rows], boxed, None, **columns) == [1.0] * count


# Rewards


@pytest.mark.parametrize("name", SETS)
def test_a_boxed_answer_is_right_and_another_is_wrong(name):
    for row in rows_of(SAMPLES / f"{name}.jsonl"):
        solution = ", ".join(row.columns["answers"])
        completions = [
            rf"So \boxed{{{solution}}}.",
            r"So \boxed{987654}.",
            r"So \boxed{}.",
            "",
            rf"\boxed{{{solution}}} or \boxed{{8}}",
        ]
        if solution in ("8", "4", "20", "15"):
            completions.pop()
        for function in (module.answer, module.strict):
            assert graded(function, row, *completions) == [1.0] + [0.0] * (len(completions) - 1)


@pytest.mark.parametrize(
    "completion, flexible, strict",
    [
        (r"18 - 3, so \boxed{18}", 1.0, 1.0),
        ("She has 18.\n#### 18", 1.0, 1.0),
        ("#### $18.00\n", 1.0, 1.0),
        ("#### 18 rolls", 1.0, 1.0),
        ("The answer is 18.", 1.0, 0.0),
        ("It is $18, not more.", 1.0, 0.0),
        ("12, 30 and 18", 1.0, 0.0),
        ("20-18", 1.0, 0.0),  # a minus between numbers is no sign
        ("it is -18", 0.0, 0.0),
        ("18 or 20", 0.0, 0.0),
        (r"18, that is \boxed{20}", 0.0, 0.0),
        (r"\boxed{20} no: #### 18", 0.0, 1.0),  # a box goes first; strictly, what comes last
        ("#### 20\n18", 0.0, 0.0),
        (r"#### 20, I mean \boxed{18}", 1.0, 1.0),
        (r"18 is \boxed{18", 1.0, 0.0),  # cut off
        ("####", 0.0, 0.0),
        ("eighteen", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_gsm8k_is_graded_flexibly_and_strictly(completion, flexible, strict):
    row = rows_of(SAMPLES / "gsm8k.jsonl")[0]
    assert row.columns["answers"] == ["18"]
    assert graded(module.answer, row, completion) == [flexible]
    assert graded(module.strict, row, completion) == [strict]


def test_other_sets_need_a_box():
    assert not right("The answer is 5", "5")
    assert not right("#### 5", "5")


@pytest.mark.parametrize(
    "box",
    [
        r"\boxed{5}",
        r"\boxed {5}",
        r"\boxed 5",
        r"$\boxed{ 5 }$",
        r"\fbox{5}",
        r"\boxed{4} \boxed{5}",
        r"\boxed{\boxed{5}}",
        r"\boxed{\text{5}}",
    ],
)
def test_the_last_box_counts_in_all_its_forms(box):
    assert right(f"So {box}", "5")


@pytest.mark.parametrize("box", [r"\boxed{5", r"\boxed{5} \boxed{", r"boxed{5}", r"\boxed{5\}", r"\boxed{6} 5", r"\boxed", "5"])
def test_a_box_that_is_not_closed_is_none(box):
    assert not right(f"So {box}", "5")


def test_escaped_braces_are_part_of_the_answer():
    assert right(r"\boxed{\{1, 2\}}", r"\{1,2\}")


@pytest.mark.parametrize(
    "given, expected",
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        ("0.5", r"\frac12"),
        ("1/2", ".5"),
        ("-3/4", r"-\frac{3}{4}"),
        ("3 1/2", r"\frac{7}{2}"),
        (r"3\frac{1}{2}", "3.5"),
        ("1,000", "1000"),
        ("1{,}000", "1 000"),
        ("1.0", "1"),
        ("+7.", "7"),
        (r"5 \text{ cm}", "5"),
        (r"6.5 \times 10^3 \mathrm{~kg} / \mathrm{m}^{3}", "6500"),
        ("10 dollars", r"\$10"),
        (r"90^\circ", "90"),
        (r"50\%", "50"),
        ("4.5e33", r"4.5 \times 10^{33}"),
        ("10^{-3}", "0.001"),
        ("x = 5", "5"),
        (r"\text{Monday}", "monday"),
        (r"\text{(A)}", "A"),
        (r"\left( 3, \pi/2 \right)", r"(3,\frac{\pi}{2})"),
        ("(-\\infty, 3]", r"\left(-\infty,3\right]"),
        ("2, 1", "1,2"),
        (r"\{ 3, 1, 2 \}", r"\{1,2,3\}"),
        (r"\sqrt2", r"\sqrt{2}"),
        ("x^{2}", "x^2"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ],
)
def test_the_same_answer_may_be_written_otherwise(given, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # by the comparison of our own
    latex_answers = sys.modules["es_lite.fitness.latex_answers"]
    latex_answers.math_verify.cache_clear()
    try:
        assert right(rf"\boxed{{{given}}}", expected)
        assert right(rf"\boxed{{{expected}}}", given)
    finally:
        latex_answers.math_verify.cache_clear()


@pytest.mark.parametrize(
    "given, expected",
    [
        ("12", "1,2"),
        ("1 2", "12"),
        ("(2,1)", "(1,2)"),
        ("[1,2]", "(1,2)"),
        ("0,1", "1,000"),
        ("1,2,3", "1,2"),
        ("1,1", "1,2"),
        ("1", "1,1"),
        ("0.33", "1/3"),
        ("5", "50"),
        ("31/2", "3 1/2"),
        ("x", "y"),
        ("1000000000000000000001", "1000000000000000000000"),
        ("2", r"\frac{2}{0}"),
        ("x", r"\$"),
        ("b", "."),
        ("b", r"\text{ }"),
        ("(a,b)", "(a,)"),
    ],
)
def test_other_answers_are_wrong(given, expected):
    assert not right(rf"\boxed{{{given}}}", expected)


@needs_math_verify
@pytest.mark.parametrize(
    "given, expected",
    [("1+x^2", "x^2+1"), (r"\frac{2}{\sqrt{3}}", r"\frac{2\sqrt{3}}{3}"), (r"\sqrt{16}", "4"), ("y=3+2x", "y=2x+3")],
)
def test_math_verify_knows_equal_expressions(given, expected):
    assert right(rf"\boxed{{{given}}}", expected)
    assert not right(rf"\boxed{{{given}+1}}", expected)


def test_several_answers_may_come_in_any_order():
    assert right(r"\boxed{3 \text{ and } 2}", "$2$", "$3$", several=True)
    assert right(r"\boxed{x=3 or x=2}", "2,3", several=True)
    assert right(r"\boxed{\{3, 2\}}", "2", "3", several=True)
    assert right(r"\boxed{(3,4),(1,2)}", "(1,2)", "(3,4)", several=True)
    for wrong in ("2", "2,2", "2,3,4", "2,4"):
        assert not right(rf"\boxed{{{wrong}}}", "2", "3", several=True)
    assert right(r"\boxed{3}", "2", "3")  # any one of them, where they are not all asked for


def test_numbers_may_be_off_by_the_tolerance():
    assert right(r"\boxed{2.05}", "2.02", tolerance=0.05)
    assert not right(r"\boxed{2.08}", "2.02", tolerance=0.05)
    row = rows_of(SAMPLES / "olympiad.jsonl")[7]
    assert graded(module.answer, row, r"\boxed{49.5, 25.05}", r"\boxed{25.5, 50}") == [1.0, 0.0]


def test_a_user_s_own_rows_need_only_answers():
    assert module.answer(["?", "?"], [r"\boxed{2}", r"\boxed{3}"], answers=["2", ["2", "3"]]) == [1.0, 1.0]
    with pytest.raises(UserError, match='the column "answers" is 2'):
        module.answer(["?"], [r"\boxed{2}"], answers=[2])


def test_importing_the_module_loads_nothing_heavy():
    code = (
        "import sys, es_lite.fitness.tasks.math\n"
        "print({'torch', 'numpy', 'transformers', 'math_verify', 'sympy'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


# Hostile answers

HOSTILE = {
    "tower": "9**9**9**9",
    "latex tower": "9^{9^{9^{9}}}",
    "plain tower": "9^9^9^9",
    "great power": "(9^{99})^{99999999}",
    "parentheses": "(" * 10**5 + "1" + ")" * 10**5,
    "few parentheses": "(" * 250 + "1" + ")" * 250,
    "braces": "{" * 10**5 + "}" * 10**5,
    "few braces": "{" * 200 + "1" + "}" * 200,
    "fractions": r"\frac{1}{" * 60 + "1" + "}" * 60,
    "digits": "9" * 10**6,
    "some digits": "9" * 4000,
    "ones": "1+" * 5 * 10**5 + "1",
    "list": "1," * 2000 + "1",
    "factorial": "99999!!",
    "factorials": "((9!)!)!",
    "exponent": "1e999999999",
    "sum": r"\sum_{i=1}^{999999999} i!",
    "integral": r"\int_0^1 e^{-x^2}\sin(x^3) dx",
    "units": r"\text{a}" * 580,
    "names": "x=" * 2000,
    "spaces": "7" + " " * 4000 + "a" + " " * 4000 + "b",
    "NUL": "7\0",
    "surrogate": "7\ud800",
    "call": "__import__('os').system('touch ran')",
    "text call": r"\text{__import__('os').system('touch ran')}",
    "open": "open('ran', 'w')",
}


GRADE_ALL = r"""
import json, resource, sys
from es_lite.fitness.tasks import math
math.prepare()
resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
for name, hostile in json.load(open(sys.argv[1])).items():
    texts = [r"\boxed{" + hostile + "}", hostile, "I say " + hostile + " #### " + hostile]
    paid = set()
    for right, kind in (("5", "gsm8k"), ("1,2", "olympiad"), ("x^2+1", "math")):
        for grade in (math.answer, math.strict):
            paid.update(grade(["?"] * 3, texts, answers=[[right]] * 3, kind=[kind] * 3, several=[kind == "olympiad"] * 3))
    print(name, paid, flush=True)
"""


def test_hostile_answers_are_wrong_and_run_nothing(tmp_path):
    """In a process of its own, with limits on memory and time."""
    (tmp_path / "hostile.json").write_text(json.dumps(HOSTILE))
    run = [sys.executable, "-c", GRADE_ALL, "hostile.json"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{name} {{0.0}}" for name in HOSTILE]
    assert os.listdir(tmp_path) == ["hostile.json"]


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 10**5, r"\boxed{" * 10**5 + "}" * 10**5, r"\boxed " * 10**5, "#" * 10**6, "-" * 10**6]
)
def test_towers_of_boxes_are_read_in_one_pass(text):
    row = rows_of(SAMPLES / "gsm8k.jsonl")[0]
    assert graded(module.answer, row, text) == graded(module.strict, row, text) == [0.0]


@needs_math_verify
def test_math_verify_in_a_thread_is_refused_in_plain_words():
    code = (
        "import threading\nfrom es_lite.fitness.tasks import math\n"
        "def grade():\n"
        "    try:\n        math.answer(['?'], [chr(92) + 'boxed{1+x}'], answers=['x+1'])\n"
        "    except Exception as error:\n        print(type(error).__name__, error)\n"
        "thread = threading.Thread(target=grade)\nthread.start()\nthread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("RunError math-verify limits its time by a signal, which works in a main thread only")
