"""The tasks by name, and the rows that a recipe's data.path or eval.path names: a task's, or those of a file of prompts."""

import difflib
import re
from types import ModuleType

from es_lite.data.prompts import Row, read_rows
from es_lite.errors import UserError
from es_lite.fitness.tasks import conciseness, countdown, math, puzzles
from es_lite.tables import DataTable

FROM_FILES = {task.NAME: task for task in (countdown, conciseness, math)}
"""Tasks whose rows can come from a file: "countdown:FILE"."""

BUILT_IN = {task.NAME: task for task in (countdown, conciseness)}
"""Tasks that make or have rows of their own: "builtin:countdown"."""


PUZZLES = "reasoning-gym"
"""What the puzzles' names follow: "reasoning-gym:number_sequence"."""


def task_of(path: str) -> tuple[ModuleType | None, str]:
    """The task that `path` names, and what follows the colon; (None, path) if it names files or a dataset.

    Raises UserError for an unknown task, with the nearest name.
    """
    match = re.fullmatch(r"([A-Za-z_-]+):(.*)", path)
    if not match:
        return None, path
    name, what = match.groups()
    if name == "builtin":
        if what not in BUILT_IN:
            raise UserError(f'"{path}": no such task is built in{_remedy(what, [f"builtin:{name}" for name in BUILT_IN])}')
        return BUILT_IN[what], ""
    if name == PUZZLES:
        return puzzles, what
    if name in FROM_FILES and what:
        return FROM_FILES[name], what
    known = [*(f"builtin:{task}" for task in BUILT_IN), *(f"{task}:FILE" for task in FROM_FILES), f"{PUZZLES}:PUZZLE"]
    near = difflib.get_close_matches(name, ["builtin", *FROM_FILES, PUZZLES], n=1, cutoff=0.5)
    likely = [f'"{form}"' for form in known if near and form.startswith(f"{near[0]}:")]
    remedy = f"did you mean {' or '.join(likely)}?" if likely else f"there are {', '.join(known)}"
    raise UserError(f'"{path}": no such task; {remedy}')


def rows_of(path: str, table: DataTable, seed: int, key: str = "data.path") -> tuple[list[Row], list[Row] | None]:
    """Rows to train on, and held-out rows: None if the caller is to hold some out.

    table: has the task's options, or how prompts are made of a file's columns. key: that names `path`. Raises UserError.
    """
    task, what = task_of(path)
    if task is None:
        if table.options:
            option = next(iter(table.options))
            raise UserError(f'data.options.{option}: only tasks have options, and {key} = "{path}" is none')
        return read_rows(what, table.system, table.template, table.chat), None
    for name in ("system", "template", "chat"):
        if getattr(table, name):
            raise UserError(f'data.{name}: the task of {key} = "{path}" makes its own prompts; take it out')
    train, held_out = task.rows(what, table.options, seed)
    return train, held_out


def _remedy(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f'; did you mean "{near[0]}"?' if near else f"; there are {', '.join(known)}"
