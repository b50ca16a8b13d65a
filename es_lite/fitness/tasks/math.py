r"""Mathematical problems: data.path = "math:FILE", with GSM8K, MATH, MATH500, Minerva or OlympiadBench as published.

The columns tell which set a row is of:

- GSM8K: question, answer (a solution that ends in `#### N`).
- MATH, MATH500, Minerva: problem, solution (its last \boxed{} is the answer) or, where there is no solution, answer.
- OlympiadBench: question, final_answer (a list), perhaps is_multiple_answer, error (how far off a number may be).

A rounded number of Minerva's may be off by a ten-thousandth of itself, as in the evaluation of Qwen2.5-Math; all others are
exact. The paper (Evolution Strategies at Scale, arXiv 2509.24372) rewards the last \boxed{} alone,
with 1 or 0.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from es_lite import typed_toml
from es_lite.data.lines import check_characters
from es_lite.data.prompts import Messages, Row, completion_text
from es_lite.data.records import read_records
from es_lite.errors import UserError
from es_lite.fitness.latex_answers import LONGEST_ANSWER, is_right, last_box, math_verify, normal, number
from es_lite.typed_toml import Check

NAME = "math"
FUNCTIONS = ("math_answer", "math_strict")
WEIGHTS = (1.0, 0.0)

SHAPES = (
    "question and answer (GSM8K), problem and solution or answer (MATH, Minerva), or question and final_answer (OlympiadBench)"
)

HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
"""The line in which GSM8K gives a result."""

CALCULATOR_MARKS = re.compile(r"<<[^<>]*>>")
LAST_NUMBER = re.compile(r"(?<![\d.,)])-?\d[\d,]*(?:\.\d+)?|-?\.\d+|\d[\d,]*(?:\.\d+)?")
MINERVA_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Options:
    """data.options."""

    test: Annotated[int, Check("a whole number of at least 0", lambda value: value >= 0)] = 0
    """The last rows of the file, so many, are held out; 0 leaves it to the caller."""
    instruction: str = r"Think step by step, and write the final answer in \boxed{}."
    """Follows the problem."""


def rows(what: str, options: dict[str, Any], seed: int) -> tuple[list[Row], list[Row] | None]:
    """Rows to train on, and the held-out rows if options.test says how many.

    what: what `read_records` reads. options: see `Options`. seed: nothing depends on it. Raises UserError.

    Columns: kind ("gsm8k", "math", "minerva", "olympiad"); answers, list of str; several (bool: all of them are asked for, in any
    order); tolerances, list of float or None, one for each answer; solution, all answers as text.
    """
    read = typed_toml.checked(Options, options, "data.options")
    made = [_row(record, where, read.instruction) for where, record in read_records(what)]
    if not made:
        raise UserError(f"{what}: there is no problem in it")
    if read.test >= len(made):
        raise UserError(
            f"data.options.test = {read.test}: leaves none of the {len(made)} problems of {what} to train on; take fewer"
        )
    return (made[: -read.test], made[-read.test :]) if read.test else (made, None)


def answer(prompts, completions, completion_ids=None, *, answers, kind=None, several=None, tolerances=None, **columns):
    r"""1 where the final answer is right, else 0 ("math_answer"). The columns are those of `rows`; only answers is needed.

    The final answer is the last \boxed{}. GSM8K without one: the last `#### N`, or else the last number of the text, which the
    evaluation harness calls flexible extraction.
    """
    return _graded(_final, completions, answers, kind, several, tolerances)


def strict(prompts, completions, completion_ids=None, *, answers, kind=None, several=None, tolerances=None, **columns):
    r"""1 where the final answer is right and in the form that was asked for, else 0 ("math_strict"). See `answer`.

    That form is the last \boxed{}; GSM8K: or `#### N`, as in its own solutions, whichever comes last.
    """
    return _graded(_strict_final, completions, answers, kind, several, tolerances)


def prepare() -> None:
    """Imports math-verify, if it is installed, ahead of the first call."""
    math_verify()


def _graded(
    final: Callable[[str, str], str | None],
    completions: Sequence[str | Messages],
    answers: Sequence[Any],
    kinds: Sequence[str] | None,
    several: Sequence[bool] | None,
    tolerances: Sequence[list[float | None] | None] | None,
) -> list[float | None]:
    """final: (completion, kind) → its final answer."""
    graded: list[float | None] = []
    for index, completion in enumerate(completions):
        right = [answers[index]] if isinstance(answers[index], str) else answers[index]
        if not isinstance(right, list) or not right or not all(isinstance(one, str) for one in right):
            raise UserError(f'the column "answers" is {right!r:.60}; expected the right answer as text, or a list of them')
        found = final(completion_text(completion), kinds[index] if kinds else "math")
        allowed = (tolerances[index] if tolerances else None) or [None] * len(right)
        graded.append(float(found is not None and is_right(found, right, allowed, bool(several and several[index]))))
    return graded


def _final(text: str, kind: str) -> str | None:
    boxed = last_box(text)
    if boxed is not None or kind != "gsm8k":
        return boxed
    return _last_result(text) or _last_number(text)


def _strict_final(text: str, kind: str) -> str | None:
    return _last_result(text) if kind == "gsm8k" else last_box(text)


def _last_result(text: str) -> str | None:
    r"""What stands in the last \boxed{} or after the last ####, whichever comes last."""
    after, hashes, result = text.rpartition("####")
    boxed = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if not hashes or boxed > len(after):
        return last_box(text)
    return result.strip().partition("\n")[0].strip() or None


def _last_number(text: str) -> str | None:
    found = LAST_NUMBER.findall(text[-LONGEST_ANSWER:])
    return found[-1].rstrip(",") if found else None


def _row(record: dict[str, Any], where: str, instruction: str) -> Row:
    if isinstance(record.get("doc"), dict):  # a log of the evaluation harness
        record = record["doc"]
    problem = record.get("problem") if "problem" in record else record.get("question")
    if not isinstance(problem, str) or not problem.strip():
        raise _no_shape(record, where)
    several, tolerances = False, None
    if "final_answer" in record:
        kind, answers, several, tolerances = "olympiad", *_olympiad(record, where)
    elif "problem" in record:
        kind, answers = "minerva" if "idx" in record and "level" not in record else "math", [_math(record, where)]
    else:
        kind, answers = "gsm8k", [_gsm8k(record, where)]
    if kind == "minerva":
        tolerances = [_minerva_tolerance(answers[0])]
    for text in (problem, *answers):
        check_characters(text, where, "a problem or its answer")
    content = f"{problem.strip()}\n\n{instruction}" if instruction else problem.strip()
    columns = {
        "solution": ", ".join(one if "$" in one else f"${one}$" for one in answers),
        "answers": answers,
        "several": several,
        "tolerances": tolerances or [None] * len(answers),
        "kind": kind,
    }
    return Row([{"role": "user", "content": content}], columns, where)


def _gsm8k(record: dict[str, Any], where: str) -> str:
    solution = record.get("answer")
    results = HASHES.findall(CALCULATOR_MARKS.sub("", solution)) if isinstance(solution, str) else []
    if not results:
        raise _no_shape(record, where, 'its "answer" has no line that starts with ####' if isinstance(solution, str) else "")
    result = results[-1].strip()
    if number(result.replace("$", "")) is None:
        raise UserError(
            f'{where}: what follows #### in "answer" is {result[:60]!r}, not a number; correct the row, or take it out'
        )
    return result


def _math(record: dict[str, Any], where: str) -> str:
    solution, result = record.get("solution"), record.get("answer")
    if isinstance(solution, str) and solution.strip():
        # Copies of MATH are about in which "answer" is damaged and the solution is not.
        result = last_box(solution) or result
    if not isinstance(result, str) or not result.strip():
        raise _no_shape(record, where, r'it has neither a solution with a \boxed{} nor an "answer"')
    return result


def _olympiad(record: dict[str, Any], where: str) -> tuple[list[str], bool, list[float | None]]:
    answers = record["final_answer"]
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one.strip() for one in answers):
        raise UserError(f'{where}: "final_answer" is {answers!r:.60}; expected a list of texts; correct the row, or take it out')
    answers = [one.strip() for one in answers]
    error = record.get("error")
    try:
        given = [float(one) for one in str(error).split(",")] if error not in (None, "") else []
    except ValueError:
        raise UserError(f'{where}: "error" is {error!r:.60}; expected a number, or several with commas') from None
    if not all(math.isfinite(one) and one >= 0 for one in given):
        raise UserError(f'{where}: "error" is {error!r:.60}; expected finite numbers of at least 0')
    tolerances: list[float | None] = list(given) if len(given) == len(answers) else [given[0] if given else None] * len(answers)
    return answers, bool(record.get("is_multiple_answer")), tolerances


def _minerva_tolerance(right: str) -> float | None:
    value = number(normal(right))
    rounded = value is not None and any(mark in right for mark in (".", "e", "\\times"))
    return abs(float(value)) * MINERVA_TOLERANCE if value is not None and rounded else None


def _no_shape(record: dict[str, Any], where: str, detail: str = "") -> UserError:
    has = detail or f"has the columns {', '.join(record)[:300]}" if record else "is empty"
    return UserError(f"{where}: not a problem with its answer: {has}; expected {SHAPES}")
