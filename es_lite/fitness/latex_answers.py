r"""Whether a final answer in LaTeX equals the right one: as text, exact numbers, lists of these, or by math-verify if installed.

Graders import this module in processes of their own: it loads neither numpy nor torch. Nothing of an answer is evaluated here.
math-verify parses LaTeX by a grammar of its own and computes with sympy, which runs no code of the text but takes minutes, or
forever, for deep nesting, towers of powers, \int and the like: it is asked only about modest texts, and has time limits.

What normalisation takes away follows the evaluations of MATH (Hendrycks et al. 2021) and Minerva (Lewkowycz et al. 2022,
appendix D).
"""

import logging
import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from types import ModuleType

from es_lite.errors import RunError

LONGEST_ANSWER = 4096
"""In characters: a longer answer is wrong."""

LONGEST_NUMBER = 400
"""In characters, and the greatest power of ten."""

MOST_PARTS = 100
"""A longer list is wrong."""

MOST_UNITS = 8
"""Words at the end of an answer that are taken away: kg, m, s."""

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(\{)|(?<=\s)([^\s${}\\]+))")

REPLACED = (
    (re.compile(r"\\(?:left|right|displaystyle|limits|[Bb]igg?[lr]?)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"(?<!\\)\\(?:[,;:!> ]|q?quad(?![a-zA-Z]))|~"), " "),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])|°"), ""),
    (re.compile(r"\\?[%$]|(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), ","),
    (re.compile(r"\\cdot(?![a-zA-Z])|×"), r"\\times "),
    (re.compile(r"\\(l|g|n)e(?![a-zA-Z])"), r"\\\1eq "),
    (re.compile(r"\\[lc]?dots(?![a-zA-Z])"), "..."),
    (re.compile(r"[−–]"), "-"),
)
"""What is written in several ways, in the order in which it is replaced."""

WORDS = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
LAST_WORDS = re.compile(rf"\s*(?:/|\\times)?\s*{WORDS.pattern}\s*(?:\^\s*(?:\{{\s*-?\d\s*\}}|\d))?$")
UNIT = re.compile(r"([-+]?[\d.,/]*\d)\s+[a-zA-Z][a-zA-Z ./]*(?:\^\s*(?:\{\s*-?\d\s*\}|\d))?")
"""A number with words, or a unit, after it."""

NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
DECIMAL = re.compile(NUMBER)
SCIENTIFIC = re.compile(rf"(?:({NUMBER})(?:[eE]|(?:\\times|\*)10\^)|([-+]?)10\^)(?:\{{([-+]?\d{{1,4}})\}}|([-+]?\d{{1,4}}))")
RATIO = re.compile(r"([-+]?\d+)/(\d+)|([-+]?)(\d*)\\frac\{([-+]?\d+)\}\{(\d+)\}")
"""A fraction, or a mixed number."""

THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
NAME_EQUALS = re.compile(r"(?:[a-zA-Z]|\\[a-z]+)(?:_\w|_\{\w+\}|\([a-z]\))?=")

SECONDS = 2
"""math-verify's own time limit, for each of three parts."""

LONGEST_MODEST = 512
DEEPEST_MODEST = 8
IMMODEST = re.compile(
    r"\^\s*\{?\s*[-+]?\s*\d{3}|\^\s*\{[^{}]*\^|\^\s*\w\s*\^|\d{4}\s*!|[!)}]\s*!|\d{40}"
    r"|[eE][-+]?\d{4}|\\(?:sum|prod|i+nt|oint|lim|d?binom|frac\s*d|[A-Z])"
)
"""What may keep sympy busy: great powers and towers of them, factorials, long numbers, sums, integrals, limits."""


def last_box(text: str) -> str | None:
    r"""What stands in the last \boxed{…} of `text`; None if there is none, or its brace is never closed.

    An escaped brace is not a brace. \fbox counts too, and \boxed 5 without braces.
    """
    box = None
    for found in BOX.finditer(text):
        box = found
    if box is None:
        return None
    if not box[1]:
        return box[2]
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[box.end() :], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[box.end() : box.end() + brace.start()]
    return None


def is_right(answer: str, right: Sequence[str], tolerances: Sequence[float | None], several: bool) -> bool:
    """Whether `answer` lists all of `right`, in any order, if `several`; else whether it equals one of them.

    tolerances: the greatest difference of a number from each of `right`; None where it must be exact.
    """
    if len(answer) > LONGEST_ANSWER or not answer.strip():
        return False
    if not several:
        return any(equal(answer, one, tolerance) for one, tolerance in zip(right, tolerances, strict=True))
    given = parts(answer)
    expected = [(part, tolerance) for one, tolerance in zip(right, tolerances, strict=True) for part in parts(one)]
    if _pair_off(given, expected):
        return True
    return len(given) == len(expected) and _verified(",".join(given), ",".join(part for part, _ in expected))


def equal(answer: str, right: str, tolerance: float | None = None) -> bool:
    """Whether two answers are the same; math-verify is asked last, if it is installed, and in a main thread only (RunError)."""
    given, expected = normal(answer), normal(right)
    if _same(given, expected, tolerance):
        return True
    if number(given) is not None and number(expected) is not None:
        return False
    # To math-verify, a list is a set, in which 2,2 is 2.
    return len(parts(answer)) == len(parts(right)) and _verified(answer, right)


def normal(text: str) -> str:
    """`text` without what changes nothing: spaces, kinds of fractions, units, signs of money and degrees, a full stop."""
    for pattern, other in REPLACED:
        text = pattern.sub(other, text)
    text = " ".join(text.split()).rstrip(".").strip()
    for _ in range(MOST_UNITS):
        unit = LAST_WORDS.search(text)
        if not unit or not text[: unit.start()].strip() or unit[1].strip() in ("e", "i"):
            break
        text = text[: unit.start()].strip()
    if number_and_unit := UNIT.fullmatch(text):
        text = number_and_unit[1]
    text = WORDS.sub(r" \1 ", text).strip()
    text = re.sub(r"(?<=\d)\s+(\d+)/(\d+)", r"\\frac{\1}{\2}", text)  # a mixed number
    text = re.sub(r"(?<=\d)\s+(?=\d{3}(?!\d))", "", text)  # thousands
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    text = re.sub(r"(?<![\w.})\\])(\d+|\\?[a-zA-Z]+)/(\d+)(?![\w.{])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\(frac|sqrt)(\w)", r"\\\1{\2}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"^\(([A-Z])\)$", r"\1", text)  # a choice
    return text.lower() if len(text) > 1 and text.isalpha() else text


def number(text: str) -> Fraction | None:
    """The value of a number in normal form: whole, decimal, fraction, mixed, or with a power of ten; None if it is none."""
    if len(text) > LONGEST_NUMBER:
        return None
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if DECIMAL.fullmatch(text):
        return Fraction(text)
    if found := SCIENTIFIC.fullmatch(text):
        power = int(found[3] or found[4])
        return Fraction(found[1] or f"{found[2]}1") * Fraction(10) ** power if abs(power) <= LONGEST_NUMBER else None
    found = RATIO.fullmatch(text)
    if not found or int(found[2] or found[6]) == 0:
        return None
    if found[2]:
        return Fraction(int(found[1]), int(found[2]))
    value = int(found[4] or 0) + Fraction(int(found[5]), int(found[6]))
    return -value if found[3] == "-" else value


def parts(text: str) -> list[str]:
    """The answers that `text` lists between commas, semicolons, "and" or "or", perhaps in the braces of a set; in normal form."""
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b", ",", text)
    listed = normal(text)
    if listed.startswith("\\{") and listed.endswith("\\}"):
        listed = listed[2:-2]
    return [normal(part) for part in _split(listed) if part]


def _same(answer: str, right: str, tolerance: float | None) -> bool:
    """The comparison of two answers in normal form."""
    if answer == right:
        return True
    if answer.count("=") + right.count("=") == 1 and (NAME_EQUALS.match(answer) or NAME_EQUALS.match(right)):
        return _same(NAME_EQUALS.sub("", answer, count=1), NAME_EQUALS.sub("", right, count=1), tolerance)
    value, right_value = number(answer), number(right)
    if value is not None and right_value is not None:
        return abs(value - right_value) <= Fraction(tolerance or 0)
    if value is not None or right_value is not None or not answer or not right:
        return False
    if right.startswith("\\{") and right.endswith("\\}"):
        return (
            answer.startswith("\\{") and answer.endswith("\\}") and _pair_off(_split(answer[2:-2]), _with(tolerance, right[2:-2]))
        )
    if right[0] in "([" and right[-1] in ")]" and answer[0] == right[0] and answer[-1] == right[-1]:
        items, right_items = _split(answer[1:-1]), _split(right[1:-1])
        if len(right_items) > 1:
            return len(items) == len(right_items) and all(
                _same(item, other, tolerance) for item, other in zip(items, right_items, strict=True)
            )
    expected = _with(tolerance, right)
    return len(expected) > 1 and _pair_off(_split(answer), expected)


def _with(tolerance: float | None, text: str) -> list[tuple[str, float | None]]:
    return [(part, tolerance) for part in _split(text)]


def _pair_off(answers: Sequence[str], expected: Sequence[tuple[str, float | None]]) -> bool:
    """Whether each answer is the same as one of those expected, and none is left over."""
    if len(answers) != len(expected) or len(answers) > MOST_PARTS:
        return False
    left = list(expected)
    for answer in answers:
        match = next((index for index, (right, tolerance) in enumerate(left) if _same(answer, right, tolerance)), None)
        if match is None:
            return False
        del left[match]
    return True


def _split(text: str) -> list[str]:
    """`text` cut at commas and semicolons that are in no bracket."""
    pieces, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            pieces.append(text[start:position])
            start = position + 1
    return [*pieces, text[start:]]


def _verified(answer: str, right: str) -> bool:
    """math-verify's word on it; False where it is not installed or not asked."""
    package = math_verify()
    if package is None or not (_modest(answer) and _modest(right)):
        return False
    if threading.current_thread() is not threading.main_thread():
        raise RunError(
            "math-verify limits its time by a signal, which works in a main thread only; grade in a process of its own"
        )
    configuration = [
        package.LatexExtractionConfig(boxed_match_priority=0)
    ]  # no plain expressions: those go to sympy's own parser
    sides = [
        package.parse(f"\\boxed{{{side}}}", configuration, fallback_mode="no_fallback", parsing_timeout=SECONDS)
        for side in (right, answer)
    ]
    return all(sides) and bool(package.verify(*sides, timeout_seconds=SECONDS))


def _modest(text: str) -> bool:
    if len(text) > LONGEST_MODEST or not text.isprintable() or IMMODEST.search(text):
        return False
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > DEEPEST_MODEST:
            return False
    return True


@lru_cache(maxsize=1)
def math_verify() -> ModuleType | None:
    """The package, or None where it is not installed. Importing it takes seconds."""
    try:
        import math_verify as package
    except ImportError:
        return None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs what it cannot parse
    return package
