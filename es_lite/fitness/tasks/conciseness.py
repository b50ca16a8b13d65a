"""Conciseness: answer a question with as few words as will do (Evolution Strategies at Scale, arXiv 2509.24372).

The reward looks at nothing but the length, so `right` says beside it whether the answer is there. The questions that are built in
have short answers that nobody disputes.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Annotated, Any

from es_lite import typed_toml
from es_lite.data.prompts import Row, completion_text
from es_lite.data.records import read_records, shown
from es_lite.errors import UserError
from es_lite.typed_toml import Check

NAME = "conciseness"
FUNCTIONS = ("conciseness", "right_answer")
WEIGHTS = (1.0, 0.0)

MOST_CHARACTERS = 4096
"""`right` looks at no more of a completion."""

WORD = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+\.[0-9]+|[^\W_]+")
"""Letters and digits, or a number with a point or with commas between its thousands."""

Questions = tuple[tuple[str, tuple[str, ...]], ...]

TRAIN: Questions = (
    ("What is the chemical symbol of gold?", ("Au",)),
    ("What is the capital of Japan?", ("Tokyo",)),
    ("Who wrote the play Romeo and Juliet?", ("Shakespeare", "William Shakespeare")),
    ("How many legs does a spider have?", ("8", "eight")),
    ("Which planet is closest to the Sun?", ("Mercury",)),
    ("Which gas do plants take from the air for photosynthesis?", ("CO2", "carbon dioxide")),
    ("What is the largest ocean on Earth?", ("Pacific", "Pacific Ocean")),
    ("In which year did the Second World War end?", ("1945",)),
    ("What is 12 times 12?", ("144",)),
    ("What is the currency of the United Kingdom?", ("pound", "pounds", "sterling")),
    ("Who painted the Mona Lisa?", ("Leonardo", "Leonardo da Vinci", "da Vinci")),
    ("How many sides does a hexagon have?", ("6", "six")),
    ("At what temperature does water freeze, in degrees Celsius?", ("0", "zero")),
    ("What is the longest bone in the human body?", ("femur", "thigh bone", "thighbone")),
    ("On which continent is Kenya?", ("Africa",)),
    ("What is the opposite of hot?", ("cold",)),
    ("What is the name of the first element in the periodic table?", ("hydrogen",)),
    ("How many days does a leap year have?", ("366",)),
    ("What is the capital of Italy?", ("Rome",)),
    ("Who developed the theory of general relativity?", ("Einstein", "Albert Einstein")),
    ("What language do most people in Brazil speak?", ("Portuguese",)),
    ("What is the square root of 81?", ("9", "nine")),
    ("Which organ pumps blood through the human body?", ("heart",)),
    ("What color do you get by mixing blue and yellow paint?", ("green",)),
)

TEST: Questions = (
    ("What is the chemical symbol of iron?", ("Fe",)),
    ("What is the capital of France?", ("Paris",)),
    ("Who wrote the novel Pride and Prejudice?", ("Austen", "Jane Austen")),
    ("How many legs does an insect have?", ("6", "six")),
    ("Which planet is called the Red Planet?", ("Mars",)),
    ("Which gas in the air do people need in order to stay alive?", ("O2", "oxygen")),
    ("What is the highest mountain on Earth above sea level?", ("Everest", "Mount Everest")),
    ("In which year did people first land on the Moon?", ("1969",)),
    ("What is 15 plus 27?", ("42", "forty-two")),
    ("What is the currency of Japan?", ("yen",)),
    ("Who painted the ceiling of the Sistine Chapel?", ("Michelangelo",)),
    ("How many sides does a triangle have?", ("3", "three")),
    ("At what temperature does water boil at sea level, in degrees Celsius?", ("100", "one hundred")),
    ("What is the largest organ of the human body?", ("skin",)),
    ("On which continent is Argentina?", ("South America",)),
    ("What is the opposite of up?", ("down",)),
    ("What is the name of the element with the atomic number 2?", ("helium",)),
    ("How many hours does a day have?", ("24", "twenty-four")),
    ("What is the capital of Germany?", ("Berlin",)),
    ("Who discovered the law of universal gravitation?", ("Newton", "Isaac Newton")),
    ("What language do most people in Mexico speak?", ("Spanish",)),
    ("What is half of 50?", ("25", "twenty-five")),
    ("Which part of the human body do people see with?", ("eye", "eyes")),
    ("What color is a ripe lemon?", ("yellow",)),
)


@dataclass(frozen=True)
class Options:
    """data.options of the built-in questions: how many of them to take."""

    train: Annotated[int, Check(f"a whole number from 1 to {len(TRAIN)}", lambda value: 1 <= value <= len(TRAIN))] = len(TRAIN)
    test: Annotated[int, Check(f"a whole number from 1 to {len(TEST)}", lambda value: 1 <= value <= len(TEST))] = len(TEST)


def rows(what: str, options: dict[str, Any], seed: int) -> tuple[list[Row], list[Row] | None]:
    """Questions to train on, and held-out ones; None for those of a file, of which the caller holds a part out.

    what: a file or dataset (see `read_records`) with the columns `prompt` (or `question`), text, and `answers` (or `answer`), the
    right answers or the only one; "" takes the built-in questions, which are the same whatever the seed.

    A row's prompt is a message of the user; its column is `answers`, a list of str.
    """
    if what:
        if options:
            raise UserError(f"data.options.{next(iter(options))}: questions from a file have no options; take data.options out")
        return _read(what), None
    read = typed_toml.checked(Options, options, "data.options")
    return _builtin("train", TRAIN[: read.train]), _builtin("test", TEST[: read.test])


def brevity(prompts, completions, completion_ids=None, *, answers, **columns) -> list[float | None]:
    """The paper's reward: how far each completion's length is from the shortest right answer's, in characters, negative.

    0 is best. A completion without a character scores as the formula says: minus the length of that answer.
    """
    return [
        float(-abs(len(completion_text(completion)) - min(map(len, _answers(these, FUNCTIONS[0])))))
        for completion, these in zip(completions, answers, strict=True)
    ]


brevity.wrong = -1000.0  # type: ignore[attr-defined]  # what a completion scores whose grader was killed


def right(prompts, completions, completion_ids=None, *, answers, **columns) -> list[float | None]:
    """1 for each completion that has one of the right answers in it, as whole words; 0 for others.

    Case, accents and punctuation make no difference. Only the first 4,096 characters count. A completion that denies the right
    answer, or lists it among wrong ones, passes as well: read some.
    """
    return [
        float(_has(completion_text(completion)[:MOST_CHARACTERS], _answers(these, FUNCTIONS[1])))
        for completion, these in zip(completions, answers, strict=True)
    ]


def _builtin(part: str, questions: Questions) -> list[Row]:
    return [
        _row(question, list(answers), f"builtin:conciseness, question {part}-{number}")
        for number, (question, answers) in enumerate(questions, start=1)
    ]


def _read(path: str) -> list[Row]:
    read = [_row(*_question(record, where), where) for where, record in read_records(path)]
    if not read:
        raise UserError(f"{path}: there is no question in it")
    return read


def _question(record: dict[str, Any], where: str) -> tuple[str, list[str]]:
    """The question and its right answers, checked."""
    found = {}
    for column, other in (("prompt", "question"), ("answers", "answer")):
        name = column if column in record else other
        if name not in record:
            has = ", ".join(record)[:300] or "none"
            raise UserError(f'{where}: has no column "{column}" or "{other}" (it has: {has})')
        found[column] = record[name]
    question = found["prompt"]
    if not isinstance(question, str) or not question.strip() or "\0" in question:
        raise UserError(f"{where}: the question is {shown(question)}; expected text that is not empty and has no NUL character")
    return question, _answers(found["answers"], where)


def _answers(value: Any, where: str) -> list[str]:
    """The right answers, checked; a single one may be text."""
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{where}: the right answers are {shown(value)}; expected text, or a list of texts")
    for answer in answers:
        if not isinstance(answer, str) or not _words(answer):
            raise UserError(f"{where}: a right answer is {shown(answer)}; expected text with a letter or a digit")
    return answers


def _row(question: str, answers: list[str], where: str) -> Row:
    return Row([{"role": "user", "content": question}], {"answers": answers}, where)


def _has(text: str, answers: list[str]) -> bool:
    spaced = f" {' '.join(_words(text))} "
    return any(f" {' '.join(_words(answer))} " in spaced for answer in answers)


def _words(text: str) -> list[str]:
    """The words of `text` without case and accents; a number is a word without its commas."""
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return [word.replace(",", "") for word in WORD.findall(plain.casefold())]
