"""The puzzles of reasoning-gym: data.path = "reasoning-gym:NAME", an optional package of about a hundred seeded generators.

A row names its puzzle by name, options, seed, size and index, from which a grader makes it again. The reward, from 0 to 1, is
what reasoning-gym's own scorer pays. What the scorers do was found by feeding them hostile answers
(tests/fitness/tasks/test_puzzles.py, reasoning-gym 0.1.25):

- Some run the answer as Python code: `UNSAFE`. They are never called.
- Some never end on some answers: coin_flip on 1e999999999, rush_hour on A+999999999, propositional_logic on a thousand
  negations. They need a grader that can be killed.
- Some pay when the right answer stands among others, so that a model is rewarded for listing candidates. These pay the length of
  the right answer / the length of the answer: acre, aiw, arc_1d, base_conversion, basic_arithmetic, bf, binary_alternation,
  caesar_cipher, chain_sum, count_bits, count_primes, course_schedule, gcd, largest_island, lcm, leg_counting,
  letter_counting, list_functions, mahjong_puzzle, manipulate_matrix, maze, modulo_grid, number_filtering, number_sequence,
  products, rotate_matrix, rotten_oranges, simple_equations, simple_geometry, string_manipulation, string_splitting,
  string_synthesis, syllogism, tsumego and word_sequence_reversal; futoshiki, mini_sudoku and sudoku about as much.
  These pay all or most: fraction_simplification and gsm_symbolic (the first number counts), figlet_font, letter_jumble and
  spell_backward (what follows the answer does not), polynomial_equations, word_sorting (in part), kakurasu, knights_knaves,
  quantum_lock and sokoban (other text is skipped).
- propositional_logic pays 0.25 for any text that is no formula.
"""

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import io
import json
import math
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

from es_lite import typed_toml
from es_lite.data.prompts import Row, completion_text
from es_lite.errors import UserError
from es_lite.typed_toml import Check

NAME = "puzzles"
FUNCTIONS = ("puzzle",)
WEIGHTS = (1.0,)

LONGEST_ANSWER = 4096
"""In characters; scorers see no more of an answer."""

UNSAFE = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Puzzles whose scorers run the answer as Python code."""

EXACT = frozenset({"binary_matrix", "game_of_life_halting", "n_queens", "spiral_matrix", "string_insertion"})
"""Graded here instead, 1 for a right answer and 0 for any other: the unsafe ones of which the right answers are known, and
game_of_life_halting, whose scorer pays 1 for any text."""

VARYING = frozenset({"codeio", "isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"})
"""Puzzles that depend on the order of Python's sets of strings, which is another in each process."""

INSTEAD = {
    "countdown": 'take data.path = "builtin:countdown"',
    "puzzle24": 'take data.path = "builtin:countdown", with four numbers and the target 24 in a file of your own',
    "polynomial_multiplication": "take polynomial_equations",
}
"""What to do about a puzzle that is refused, where it is not just to take another."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """data.options, beside the puzzle's own."""

    train: Annotated[int, Check("a whole number of at least 1", lambda value: value >= 1)] = 200
    """Rows to train on."""
    test: Annotated[int, Check("a whole number of at least 0", lambda value: value >= 0)] = 200
    """Held-out rows; 0 leaves it to the caller to hold some of the others out."""
    instruction: str = "Reply with the answer only, in the form that the question asks for."
    """Follows the question."""


OWN = tuple(field.name for field in dataclasses.fields(Options))


def rows(what: str, options: dict[str, Any], seed: int) -> tuple[list[Row], list[Row] | None]:
    """Rows to train on and held-out rows, of which no two have the same question.

    what: the puzzle's name in reasoning-gym. options: those of `Options` and the puzzle's own. Raises UserError.
    """
    _check_name(what)
    puzzle = {key: value for key, value in options.items() if key not in OWN}
    _check_options(what, puzzle)
    own = typed_toml.checked(Options, {key: options[key] for key in OWN if key in options}, "data.options")
    try:
        written = json.dumps(puzzle, sort_keys=True)
    except TypeError as error:
        raise UserError(f"data.options: a value cannot be stored as JSON ({error}); leave it out") from None
    known: set[str] = set()
    trained = _part(what, written, _seed(seed, "train"), own.train, "train", own.instruction, known)
    if not own.test:
        return trained, None
    return trained, _part(what, written, _seed(seed, "test"), own.test, "test", own.instruction, known)


def score(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    name: Sequence[str],
    options: Sequence[str],
    seed: Sequence[int],
    size: Sequence[int],
    index: Sequence[int],
    question: Sequence[str],
    **columns: Any,
) -> list[float | None]:
    """What the puzzles' scorers pay for the answers, from 0 to 1 ("puzzle"); the other arguments are the columns of `rows`.

    The answer is what stands in the last <answer>…</answer>, or else the whole completion, up to `LONGEST_ANSWER` characters.
    Text that makes the scorer raise is worth 0. Some texts keep a scorer busy forever: call it where it can be killed.
    """
    puzzles = zip(name, options, seed, size, index, strict=True)
    return [
        _grade(answer_of(completion), puzzle, asked)
        for completion, puzzle, asked in zip(completions, puzzles, question, strict=True)
    ]


def prepare() -> None:
    """Imports reasoning-gym, which takes seconds, ahead of the first call of `score`."""
    _puzzles()


def answer_of(completion: str | list[dict[str, str]]) -> str:
    """The answer in a completion (see `score`)."""
    text = completion_text(completion)
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        text = text[start + len("<answer>") : end]
    return text.strip()[:LONGEST_ANSWER]


def _grade(answer: str, puzzle: tuple[str, str, int, int, int], question: str) -> float:
    name = puzzle[0]
    entry = copy.deepcopy(_entry(*puzzle))  # some scorers change it
    if entry["question"] != question:
        raise UserError(
            f'puzzle {puzzle[-1]} of "{name}" has another question here than when the prompts were made: '
            "is this another version of reasoning_gym?"
        )
    if name in EXACT:
        right = entry["metadata"]["valid_answers"] if name == "n_queens" else [entry["answer"]]
        return float(_lines(answer) in map(_lines, right))
    if name == "complex_arithmetic" and "nan" in answer.lower():
        return 0.0  # its scorer takes min(1.0, nan), which is 1.0
    try:
        paid = float(_dataset(*puzzle[:-1]).score_answer(answer, entry))
    except MemoryError:
        raise
    except Exception:  # whatever a scorer raises on text that it did not expect
        return 0.0
    return min(max(paid, 0.0), 1.0) if math.isfinite(paid) else 0.0


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _part(name: str, options: str, seed: int, count: int, key: str, instruction: str, known: set[str]) -> list[Row]:
    """`count` rows whose questions are not in `known`, to which they are added."""
    size = 4 * count + 100
    made = []
    for index in range(size):
        entry = _entry(name, options, seed, size, index)
        question = entry["question"]
        if question in known:
            continue
        known.add(question)
        columns = {"name": name, "options": options, "seed": seed, "size": size, "index": index, "question": question}
        columns["answer"] = entry["answer"]
        content = f"{question}\n\n{instruction}" if instruction else question
        made.append(Row([{"role": "user", "content": content}], columns, f"reasoning-gym:{name}, puzzle {index}"))
        if len(made) == count:
            return made
    raise UserError(
        f"data.options.{key} = {count}: with these options, only {len(made)} different questions were found among {size} that "
        f'"{name}" made; take fewer, or options that allow for more'
    )


@lru_cache(maxsize=8)
def _dataset(name: str, options: str, seed: int, size: int) -> Any:
    """The puzzles of this name. options: JSON."""
    _check_name(name)  # columns may also come from a file
    data_class, config_class = _puzzles()[name]
    with _complaints(name), contextlib.redirect_stdout(io.StringIO()):
        config = config_class(seed=seed, size=size, **json.loads(options))
        if hasattr(config, "validate"):
            config.validate()
        return data_class(config)


@lru_cache(maxsize=1024)
def _entry(name: str, options: str, seed: int, size: int, index: int) -> Entry:
    dataset = _dataset(name, options, seed, size)
    state = random.getstate()
    random.seed(f"{seed} {index}")  # list_functions draws from Python's own generator
    try:
        with _complaints(name), contextlib.redirect_stdout(io.StringIO()):  # bf prints dots
            return dataset[index]
    finally:
        random.setstate(state)


@contextlib.contextmanager
def _complaints(name: str):
    """Turns what a generator raises about its options into a UserError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        # Its assertions say what they expect in their source line, most in a message too.
        reason = str(error) or (traceback.extract_tb(error.__traceback__)[-1].line if error.__traceback__ else "")
        raise UserError(
            f'data.options: reasoning-gym cannot make "{name}" with these ({type(error).__name__}: {reason}); correct them'
        ) from None


def _puzzles() -> dict[str, tuple[Callable[[Any], Any], Any]]:
    """(dataset's class, its options' dataclass) by name."""
    try:
        import reasoning_gym  # noqa: F401  (registers the puzzles)
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(
            f'data.path: "reasoning-gym:…" needs a package that cannot be imported ({error}): pip install "es_lite[puzzles]"'
        ) from None
    return DATASETS


def _check_name(name: str) -> None:
    puzzles = _puzzles()
    where = f'data.path = "reasoning-gym:{name}"'
    if name not in puzzles:
        near = difflib.get_close_matches(name, puzzles, n=1, cutoff=0.5)
        remedy = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(sorted(puzzles))}"
        raise UserError(f"{where}: there is no such puzzle; {remedy}")
    instead = INSTEAD.get(name, "take another puzzle, such as number_sequence or zebra_puzzles")
    if name in UNSAFE - EXACT:
        raise UserError(f"{where}: its scorer runs the model's answer as Python code; {instead}")
    if name in VARYING:
        raise UserError(f"{where}: makes other questions or answers in each process, so that no run could be resumed; {instead}")
    if name == "composite":
        raise UserError(f"{where}: mixes puzzles with their scorers; name one of them")


def _check_options(name: str, options: dict[str, Any]) -> None:
    for own, instead in (("seed", "run.seed"), ("size", "train and test")):
        if own in options:
            raise UserError(f"data.options.{own}: cannot be set here; the run sets it, from {instead}")
    fields = {field.name for field in dataclasses.fields(_puzzles()[name][1])} - {"seed", "size"}
    known = [*OWN, *sorted(fields)]
    for key in options:
        if key not in fields:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            remedy = f'; did you mean "{near[0]}"?' if near else f'; known for "{name}": {", ".join(known)}'
            raise UserError(f"data.options.{key}: unknown option{remedy}")


def _seed(seed: int, part: str) -> int:
    """31 bits: some puzzles hand it to numpy, with the index added."""
    return int.from_bytes(hashlib.sha256(f"{seed} {part}".encode()).digest()[:4], "little") >> 1
