"""Countdown: reach a target from given numbers by + - * / (Evolution Strategies at Scale, arXiv 2509.24372).

Rewards are the paper's, which has them, with the idea of the prompt, from GRPO-Zero (Apache-2.0): 1 for a right answer and 0.1
times a reward for the format. What a model wrote is parsed and computed here; it is never evaluated as Python.
"""

import ast
import operator
import random
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from es_lite import typed_toml
from es_lite.data.prompts import Messages, Row, completion_text
from es_lite.data.records import read_records, shown
from es_lite.errors import UserError
from es_lite.typed_toml import Check

NAME = "countdown"
FUNCTIONS = ("countdown_answer", "countdown_format")
WEIGHTS = (1.0, 0.1)

SYSTEM = "You are a helpful assistant. You think a problem through before you give the answer."
USER = (
    "Combine the numbers {numbers} into an expression that equals {target}. Use each number exactly once, with the operations "
    "+, -, *, / and parentheses. Write your reasoning in <think> </think> tags, and after it the expression alone in "
    "<answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
)
PREFILL = "Let me solve this step by step.\n<think>"

LARGEST_TARGET = 1000
"""Of the built-in problems."""

TOLERANCE = Fraction(1, 100_000)

# Limits of a file's problems and of an expression: computing one takes well under a millisecond.
MOST_NUMBERS = 32
LARGEST_NUMBER = 10**9
MOST_CHARACTERS = 1000
DEEPEST = 100
CHARACTERS = frozenset("0123456789+-*/() ")
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

# Digits after the point: targets that are no decimal fraction are published as Python prints a float ("266.6666666666667").
TARGET = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,20})?")

COUNT = Check("a whole number from 1 to 100,000", lambda value: 1 <= value <= 100_000)
COUNTS = Check(
    "a whole number from 2 to 6, or a list of such numbers",
    lambda value: len(value) > 0 and all(isinstance(count, int) and 2 <= count <= 6 for count in value),
)


@dataclass(frozen=True)
class Options:
    """data.options of the built-in problems."""

    train: Annotated[int, COUNT] = 200
    test: Annotated[int, COUNT] = 2000
    numbers: Annotated[tuple[int, ...], COUNTS] = (4,)
    """How many numbers a problem has: one of these, each as likely."""
    largest: Annotated[int, Check("a whole number from 1 to 1,000", lambda value: 1 <= value <= 1000)] = 100
    """Numbers are drawn from 1 to this."""
    whole: bool = True
    """Targets, and the results on the way to them, are whole. If not, targets have up to 3 digits after the point."""


def rows(what: str, options: dict[str, Any], seed: int) -> tuple[list[Row], list[Row] | None]:
    """Problems to train on, and held-out ones; None for those of a file, of which the caller holds a part out.

    what: a file or dataset (see `read_records`) with the columns `numbers` (or `nums`), whole numbers, and `target`, a number or
    text; "" makes problems from `seed`. options: of the built-in problems, see `Options`.

    A row's columns are `id`, `numbers` (a list of int) and `target` (str, since it is not always whole: "15.5").
    """
    if what:
        if options:
            raise UserError(f"data.options.{next(iter(options))}: problems from a file have no options; take data.options out")
        return _read(what), None
    counts = options.get("numbers", 4)
    options = {**options, "numbers": counts if isinstance(counts, list) else [counts]}
    read = typed_toml.checked(Options, options, "data.options")
    return _made(read, seed)


def answer(prompts, completions, completion_ids=None, *, numbers, target, **columns) -> list[float | None]:
    """1 for each completion whose last <answer>…</answer> is right, else 0.

    Right is an expression of whole numbers with + - * / and parentheses that has exactly the row's numbers, each once, and comes
    within 1e-5 of its target. Anything else between the tags is wrong, an equation ("1 + 2 = 3") too. Differs from the paper's
    code, which evaluates Python, in that ** and // are wrong.
    """
    return [
        float(_right(_last_answer(completion_text(completion)), *_problem(these, goal, FUNCTIONS[0])))
        for completion, these, goal in zip(completions, numbers, target, strict=True)
    ]


def form(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
    """The paper's reward for the format of "<think>" + completion, from 0 to 1.

    1 for <think>…</think>, a newline, <answer>…</answer> and nothing else; otherwise 0.1 if there is a pair of think tags, and
    0.5 more if there is a pair of answer tags. What is between the tags does not matter.
    """
    return [_form(completion_text(completion)) for completion in completions]


def _made(options: Options, seed: int) -> tuple[list[Row], list[Row]]:
    seen: set[tuple] = set()
    # Test problems come first, so that they do not depend on options.train.
    test = _draw("test", options.test, options, seed, seen)
    return _draw("train", options.train, options, seed, seen), test


def _draw(part: str, count: int, options: Options, seed: int, seen: set[tuple]) -> list[Row]:
    """`count` rows whose problems are not in `seen`, which they join."""
    # Seeding with text and random() give the same numbers in every version of Python; randrange, choice and shuffle need not.
    generator = random.Random(f"countdown {seed} {part}")
    made: list[Row] = []
    vain = 0
    while len(made) < count:
        numbers, target = _drawn(generator, options)
        problem = (*sorted(numbers), target)
        if problem in seen or not _suits(numbers, target):
            vain += 1
            if vain == 10_000:
                raise UserError(
                    f"data.options: too few different problems: found {len(seen)} of the {options.train + options.test} that "
                    "train and test ask for; lower these, or raise numbers or largest"
                )
            continue
        vain = 0
        seen.add(problem)
        name = f"{part}-{len(made) + 1}"
        text = str(target.numerator if target.denominator == 1 else float(target))
        made.append(_row(name, numbers, text, f"builtin:countdown, problem {name}"))
    return made


def _drawn(generator: random.Random, options: Options) -> tuple[list[int], Fraction]:
    """Numbers, and what a random expression makes of all of them."""

    def below(bound: int) -> int:
        return int(generator.random() * bound)

    count = options.numbers[below(len(options.numbers))]
    numbers = [1 + below(options.largest) for _ in range(count)]
    values = [Fraction(number) for number in numbers]
    while len(values) > 1:
        a, b = values.pop(below(len(values))), values.pop(below(len(values)))
        results = [a + b, a * b]
        if a != b:
            results.append(abs(a - b))
        if not options.whole or (a / b).denominator == 1:
            results.append(a / b)
        values.append(results[below(len(results))])
    return numbers, values[0]


def _suits(numbers: list[int], target: Fraction) -> bool:
    """Whether the target is short to write, in range, and not there for the asking: a number itself, or the sum of several."""
    short = (target * 1000).denominator == 1
    trivial = target in numbers or (len(numbers) > 2 and target == sum(numbers))
    return short and 1 <= target <= LARGEST_TARGET and not trivial


def _read(path: str) -> list[Row]:
    read = []
    for number, (where, record) in enumerate(read_records(path), start=1):
        record = {"numbers": record["nums"], **record} if "nums" in record else record
        for column in ("numbers", "target"):
            if column not in record:
                has = ", ".join(record)[:300] or "none"
                raise UserError(f'{where}: has no column "{column}" (it has: {has}); a problem needs "numbers" and "target"')
        numbers, _ = _problem(record["numbers"], record["target"], where)
        read.append(_row(record.get("id", number), numbers, _target_text(record["target"]), where))
    if not read:
        raise UserError(f"{path}: there is no problem in it")
    return read


def _row(name: Any, numbers: list[int], target: str, where: str) -> Row:
    prompt: Messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": USER.format(numbers=numbers, target=target)},
        {"role": "assistant", "content": PREFILL},
    ]
    return Row(prompt, {"id": name, "numbers": numbers, "target": target}, where)


def _problem(numbers: Any, target: Any, where: str) -> tuple[list[int], Fraction]:
    """The columns, checked."""
    if not isinstance(numbers, list) or not 1 <= len(numbers) <= MOST_NUMBERS:
        raise UserError(f'{where}: "numbers" is {shown(numbers)}; expected a list of 1 to {MOST_NUMBERS} whole numbers')
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= LARGEST_NUMBER:
            raise UserError(f'{where}: "numbers" has {shown(number)}; expected whole numbers from 0 to {LARGEST_NUMBER:,}')
    text = _target_text(target)
    if not TARGET.fullmatch(text):
        raise UserError(f'{where}: "target" is {shown(target)}; expected a number such as 98 or "15.5", of at most 15 digits')
    return numbers, Fraction(text)


def _target_text(target: Any) -> str:
    """A target as text; "" for what cannot be one."""
    if isinstance(target, bool) or not isinstance(target, str | int | float):
        return ""
    return str(int(target) if isinstance(target, float) and target.is_integer() else target).strip()


def _last_answer(text: str) -> str:
    """What is between the last pair of answer tags, or "".

    As in the paper, an opening tag goes with the next closing one. The time is linear in the length of the text, as that of a
    regular expression is not where tags are opened and never closed.
    """
    found, end = "", 0
    while (start := text.find("<answer>", end)) >= 0:
        start += len("<answer>")
        end = text.find("</answer>", start)
        if end < 0:
            break
        found = text[start:end]
    return found


def _right(written: str, numbers: list[int], target: Fraction) -> bool:
    if len(written) > 4 * MOST_CHARACTERS:
        return False
    expression = written.strip()
    if not expression or len(expression) > MOST_CHARACTERS or not CHARACTERS.issuperset(expression):
        return False
    try:
        tree = ast.parse(expression, mode="eval").body
        constants: list[Any] = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        # Before anything is computed: then no number can be larger than the problem's own allow.
        if sorted(constants) != sorted(numbers):
            return False
        return abs(_value(tree, DEEPEST) - target) < TOLERANCE
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):  # all that ast raises, and 1 / 0
        return False


def _value(node: ast.expr, depth: int) -> Fraction:
    """The value of an expression of whole numbers; ValueError if it has anything else or is nested deeper than `depth`."""
    if depth == 0:
        raise ValueError("nested too deep")
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, depth - 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left, depth - 1), _value(node.right, depth - 1))
    raise ValueError(f"not arithmetic: {type(node).__name__}")


def _form(completion: str) -> float:
    text = "<think>" + completion
    if "</think>\n<answer>" in text and text.removesuffix("\n").endswith("</answer>"):  # the paper's $ allows the newline
        return 1.0
    opened = text.find("<answer>")
    answered = opened >= 0 and text.find("</answer>", opened) >= 0
    return 0.1 * ("</think>" in text) + 0.5 * answered
