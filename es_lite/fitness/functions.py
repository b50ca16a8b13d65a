"""Reward functions: found by name, and called as TRL's trainers call them.

A reward function takes the keywords prompts, completions, completion_ids, every column of the rows and, as TRL passes them,
trainer_state, log_extra and log_metric. It returns one number or None for each completion. This module needs neither torch nor
numpy, so that a process that only grades stays small.
"""

import difflib
import importlib
import importlib.util
import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

from es_lite.errors import UserError
from es_lite.files import expanded
from es_lite.python_file import run_once

TASKS = "es_lite.fitness.tasks"

BUILTIN = {
    "countdown_answer": f"{TASKS}.countdown:answer",
    "countdown_format": f"{TASKS}.countdown:form",
    "conciseness": f"{TASKS}.conciseness:brevity",
    "right_answer": f"{TASKS}.conciseness:right",
    "math_answer": f"{TASKS}.math:answer",
    "math_strict": f"{TASKS}.math:strict",
    "puzzle": f"{TASKS}.puzzles:score",
}
"""The built-in reward functions: "module:function" by name."""

RIGHT = ("countdown_answer", "right_answer", "math_answer", "puzzle")
"""Those that say whether a completion is right."""

OTHERS = 'for one of your own, give "FILE.py:FUNCTION" or a dotted path such as "trl.rewards.accuracy_reward"'

NOT_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns that are not passed on, as in TRL: the arguments of the call say the same."""


class BadReward(ValueError):
    """A reward function returned something that is not one finite number or None for each completion."""

    def __init__(self, message: str, index: int | None = None) -> None:
        """index: of the completion that it is about; None if it is about all of them."""
        super().__init__(message)
        self.index = index


def load(name: str) -> Callable[..., Any]:
    """The reward function of that name: a built-in one, "package.module.function", or "FILE.py:FUNCTION".

    A file's folder comes first in the search path for imports, and the working directory last. A file is loaded once, also if
    several of its functions are named. Raises `UserError` if there is no such function, with Python's own reason.
    """
    if name in BUILTIN:
        module, _, function = BUILTIN[name].partition(":")
        return _function(name, _module(name, module), function)
    file, colon, function = name.rpartition(":")
    if colon or name.endswith(".py"):
        if not file.endswith(".py") or not function:
            raise UserError(f'reward function "{name}": expected "FILE.py:FUNCTION", with the name of a function of that file')
        return _function(name, _module_of_file(name, Path(file)), function)
    module, dot, function = name.rpartition(".")
    if not dot:
        near = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.5)
        remedy = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(BUILTIN)};"
        raise UserError(f'reward function "{name}": there is no built-in one of this name; {remedy} {OTHERS}')
    return _function(name, _module(name, module), function)


def prepare(name: str) -> None:
    """Lets a built-in function import what it needs late: calls its module's `prepare()`, if there is one.

    Graders do this before their time limit applies.
    """
    if name in BUILTIN:
        module = importlib.import_module(BUILTIN[name].partition(":")[0])
        if hasattr(module, "prepare"):
            module.prepare()


def call(
    function: Callable[..., Any],
    name: str,
    prompts: Sequence[str | list[dict[str, str]]],
    completions: Sequence[str | list[dict[str, str]]],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, list],
    step: int = 0,
) -> list[float | None]:
    """Calls a reward function by TRL's convention. Returns one number or None for each completion.

    columns: each a list with one value for each completion. step: what it sees as trainer_state.global_step. What it gives to
    log_extra and log_metric is dropped. A coroutine (`async def`) is run to its end.

    Raises what the function raises, and `BadReward`.
    """
    arguments: dict[str, Any] = {column: values for column, values in columns.items() if column not in NOT_COLUMNS}
    arguments |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    arguments |= {"trainer_state": SimpleNamespace(global_step=step), "log_extra": _drop, "log_metric": _drop}
    returned = function(**arguments)
    if hasattr(returned, "__await__"):
        import asyncio

        async def whole() -> Any:
            return await returned

        returned = asyncio.run(whole())
    return _rewards(name, returned, len(completions))


def role(name: str) -> Literal["right", "format", ""]:
    """What a reward function tells of a completion: "right", whether it is right; "format", whether its form is; else ""."""
    last = name.rpartition(":")[2].rpartition(".")[2]
    if name in RIGHT:
        return "right"
    if "format" in last:  # before the next: "correct_format" is about the form
        return "format"
    return "right" if "accuracy" in last or "correct" in last else ""


def _module(name: str, module: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError)
        remedy = "; install it in this environment, or correct the name" if missing else ""
        raise UserError(f'reward function "{name}": {module} cannot be imported ({_reason(error)}){remedy}') from None


def _module_of_file(name: str, file: Path) -> ModuleType:
    path = expanded(file).resolve()
    if not path.is_file():
        raise UserError(f'reward function "{name}": there is no file {path}')
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        return run_once(path, str(path))  # not the stem, which may be another module's name
    except (Exception, SystemExit) as error:
        raise UserError(f'reward function "{name}": {path} cannot be imported ({_reason(error)})') from None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _function(name: str, module: ModuleType, function: str) -> Callable[..., Any]:
    try:
        found = getattr(module, function)
    except Exception as error:  # a module that imports its parts late raises more than AttributeError
        names = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        near = difflib.get_close_matches(function, names, n=1)
        remedy = f'; did you mean "{near[0]}"?' if near else ""
        raise UserError(f'reward function "{name}": not found in its module ({_reason(error)}){remedy}') from None
    if not callable(found):
        raise UserError(f'reward function "{name}": is not a function but {_shown(found)}; name something that can be called')
    return found


def _drop(*_: Any, **__: Any) -> None:
    pass


def _rewards(name: str, returned: Any, count: int) -> list[float | None]:
    """What a function returned, as numbers of Python."""
    if getattr(returned, "ndim", None) == 1 and hasattr(returned, "tolist"):  # an array or a tensor
        returned = returned.tolist()
    if not isinstance(returned, list | tuple):
        raise BadReward(
            f'reward function "{name}" returned {_shown(returned)}; expected a list with a number for each completion'
        )
    if len(returned) != count:
        raise BadReward(
            f'reward function "{name}" returned a list of {len(returned)} for {count} completion{"s" * (count != 1)}; '
            "expected one number, or None, for each"
        )
    return [None if value is None else _number(name, value, index) for index, value in enumerate(returned)]


def _number(name: str, value: Any, index: int) -> float:
    number = value
    if not isinstance(value, numbers.Real) and hasattr(value, "item"):  # a scalar of numpy or torch
        try:
            number = value.item()
        except (RuntimeError, TypeError, ValueError):
            number = None  # it has several elements
    if isinstance(number, numbers.Real):
        try:
            reward = float(number)
        except OverflowError:
            reward = math.inf
        if math.isfinite(reward):
            return reward
    raise BadReward(f'reward function "{name}" returned {_shown(value)}; expected a finite number, or None', index)


def _shown(value: Any) -> str:
    """The value and its type, shortened."""
    try:
        text = repr(value)
    except Exception:
        return f"a value of type {type(value).__name__}"
    text = text if len(text) <= 60 else text[:60] + "…"
    return text if value is None else f"{text} (of type {type(value).__name__})"
