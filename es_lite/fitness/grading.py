"""Grades completions with reward functions that run in grader processes, which are killed and replaced when they pass a limit.

A completion whose grader dies or passes a limit (time, memory, size of a file) scores as wrong and is marked; the run goes on.
A reward function that raises, or returns what is not a reward, is the user's to correct: `UserError`.
"""

import math
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import numpy as np

from es_lite.errors import RunError, UserError
from es_lite.fitness.functions import BUILTIN
from es_lite.fitness.grader_process import GraderProcess

if TYPE_CHECKING:
    from es_lite.data.prompts import Row

START_SECONDS = 120.0
"""What loading the reward functions may take: imports are slow on a busy machine."""

STARTS = 3
"""Graders in a row that may die while they start."""

LONGEST_CHARACTERS = 256 * 1024
"""Completions are cut to this."""

PROMPT_CHARACTERS = 80
"""How much of a prompt a message quotes."""

UNANSWERED = 3
"""Completions on which a user's function may pass a limit if it has never answered: it must be the function, not the text."""


@dataclass(frozen=True)
class Completions:
    """What one member wrote: one completion for each row."""

    rows: "Sequence[Row]"
    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    """The tokens of each text."""
    step: int


@dataclass(frozen=True, eq=False)
class Grades:
    """The rewards of a member's completions."""

    parts: np.ndarray
    """float64 [functions, completions]; NaN where a function returned None."""
    killed: np.ndarray
    """bool [completions]: a grader died of it or passed a limit."""
    causes: dict[int, str]
    """Why, in words, by the number of the completion."""


@dataclass
class _Job:
    """One function on one member's completions."""

    batch: int
    function: int
    alone: bool
    """One completion at a time."""
    first: int = 0
    """The next completion to grade."""
    repeated: bool = False
    """A grader was killed from outside while it graded that one."""


class _Work:
    """What is to be graded, and what has been."""

    def __init__(self, batches: Sequence[Completions], functions: Sequence[str]) -> None:
        self.batches = batches
        sizes = [len(batch.rows) for batch in batches]
        self.grades = [Grades(np.full((len(functions), size), np.nan), np.zeros(size, bool), {}) for size in sizes]
        self.killed = [np.zeros(grades.parts.shape, bool) for grades in self.grades]
        self.waiting = deque(
            _Job(index, function, name in BUILTIN)
            for index, size in enumerate(sizes)
            if size
            for function, name in enumerate(functions)
        )


class Graders:
    """`processes` grader processes with the reward functions of these names. A context manager: none is left when it ends."""

    def __init__(self, functions: Sequence[str], processes: int, seconds: float) -> None:
        """seconds: time limit for one completion. The processes start when they are first needed, or by `start`."""
        self._functions = list(functions)
        self._processes = processes
        self._seconds = seconds
        self._graders: list[GraderProcess] = []
        self._jobs: dict[GraderProcess, _Job] = {}
        self._failed_starts = 0
        self._wrong: list[float | None] = []
        self._answered: set[int] = set()
        self._unanswered = [0] * len(functions)

    @property
    def pids(self) -> list[int]:
        """Process IDs of the graders."""
        return [one.pid for one in self._graders]

    def start(self) -> None:
        """Starts the processes and waits until they have loaded the functions.

        Raises `UserError` if one cannot be loaded, `RunError` if the processes die or take more than `START_SECONDS`.
        """
        work = _Work([], self._functions)
        try:
            self._open()
            while not all(one.ready for one in self._graders):
                self._turn(work)
        except BaseException:
            self.close()
            raise

    def grade(self, rows: "Sequence[Row]", completions: Sequence[str], ids: Sequence[Sequence[int]], step: int) -> Grades:
        """Grades one member's completions, one for each row; see `grade_all`."""
        return self.grade_all([Completions(rows, completions, ids, step)])[0]

    def grade_all(self, batches: Sequence[Completions]) -> list[Grades]:
        """Grades the completions of several members, on all processes at once.

        A built-in function gets one completion at a time, and has `seconds` for it. Any other gets a member's completions
        together, as in TRL, and has `seconds` times their number; if it passes a limit, it gets them again one at a time. The
        reward of a completion that is killed is the function's attribute `wrong`, if it is built in and has one, else the least
        of 0 and that function's other rewards of the member.

        Raises `UserError` if a function cannot be loaded, raises, returns what is not a reward, or is the user's and has never
        answered within the limits; `RunError` if graders cannot be started.
        """
        work = _Work(batches, self._functions)
        try:
            self._open()
            while work.waiting or self._jobs:
                self._turn(work)
        except BaseException:
            self.close()  # what they are doing is of no use to anyone
            raise
        for grades, killed in zip(work.grades, work.killed, strict=True):
            for wrong, rewards, these in zip(self._wrong, grades.parts, killed, strict=False):
                others = rewards[~these & ~np.isnan(rewards)]
                rewards[these] = others.min(initial=0.0) if wrong is None else wrong
        return work.grades

    def close(self) -> None:
        """Kills all graders, and what they have started."""
        for one in self._graders:
            one.end()
        self._graders.clear()
        self._jobs.clear()

    def __enter__(self) -> "Graders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        if not self._graders:
            self._failed_starts = 0
            for _ in range(self._processes):
                self._graders.append(GraderProcess(self._functions, START_SECONDS))

    def _turn(self, work: _Work) -> None:
        """Gives jobs to graders without one, waits until something happens, and deals with it."""
        for index, one in enumerate(self._graders):
            if one.ready and one not in self._jobs and work.waiting and not self._give(one, work):
                one.end()  # it has died since its last answer
                self._graders[index] = GraderProcess(self._functions, START_SECONDS)
        busy = [one for one in self._graders if one in self._jobs or not one.ready]
        heard = wait([one.socket for one in busy], max(0.0, min(one.deadline for one in busy) - time.monotonic()))
        now = time.monotonic()
        for one in busy:
            limit, code = "", None
            if one.socket in heard:
                answers, alive = one.receive()
                for answer in answers:
                    limit = self._take(one, answer, work)
                if not alive and not limit:
                    code = one.end()
                    limit = f"ended its process ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
            elif now > one.deadline:
                limit = f"took more than {one.seconds:g} s"
            if limit:
                one.end()
                if one in self._jobs:
                    self._lost(self._jobs.pop(one), limit, code == -signal.SIGKILL, work)
                elif not one.ready:
                    self._failed_start(limit, code is None)
                self._graders[self._graders.index(one)] = GraderProcess(self._functions, START_SECONDS)

    def _give(self, one: GraderProcess, work: _Work) -> bool:
        """Gives it the next job; False if it is dead."""
        job = work.waiting[0]
        batch = work.batches[job.batch]
        rows = batch.rows[job.first :]
        names = dict.fromkeys(name for row in rows for name in row.columns)
        request = {
            "function": job.function,
            "alone": job.alone,
            "prompts": [row.prompt for row in rows],
            "texts": [text[:LONGEST_CHARACTERS] for text in batch.texts[job.first :]],
            "ids": [list(map(int, ids)) for ids in batch.ids[job.first :]],
            "columns": {name: [row.columns.get(name) for row in rows] for name in names},
            "step": batch.step,
        }
        if not one.send(request):
            return False
        one.allow(self._seconds * (1 if job.alone else len(rows)))
        self._jobs[one] = work.waiting.popleft()
        return True

    def _take(self, one: GraderProcess, answer: dict[str, Any], work: _Work) -> str:
        """Notes a grader's answer. Returns the limit that it has passed, if any."""
        if "failed" in answer:
            raise UserError(answer["failed"])
        if "ready" in answer:
            one.ready, self._failed_starts, self._wrong = True, 0, answer["wrong"]
            return ""
        if "limit" in answer:
            return answer["limit"]
        job = self._jobs[one]
        if "error" in answer:
            about = 0 if job.alone else answer["index"]
            raise UserError(_complaint(answer["error"], work.batches[job.batch].rows[job.first :], about))
        rewards = [math.nan if reward is None else reward for reward in answer["rewards"]]
        parts = work.grades[job.batch].parts[job.function]
        parts[job.first : job.first + len(rewards)] = rewards
        job.first, job.repeated = job.first + len(rewards), False
        self._answered.add(job.function)
        if job.first == len(parts):
            del self._jobs[one]
        one.allow(self._seconds)
        return ""

    def _lost(self, job: _Job, limit: str, from_outside: bool, work: _Work) -> None:
        """A grader was lost to this job: marks the completion that it graded, if that is clear, and lets another do the rest."""
        rows = work.batches[job.batch].rows
        if from_outside and not job.repeated:  # by the kernel for memory, perhaps: not the completion's fault
            job.repeated = True
        elif not job.alone and len(rows) > 1:
            job.alone, job.repeated = True, False
        else:
            name, index, grades = self._functions[job.function], job.first, work.grades[job.batch]
            self._unanswered[job.function] += name not in BUILTIN
            if job.function not in self._answered and self._unanswered[job.function] == UNANSWERED:
                raise UserError(
                    f'reward function "{name}" {limit}, as on each of the first {UNANSWERED} completions: raise reward.seconds '
                    "if it needs more time for one; what it loads while its module is imported takes nothing from its limits"
                )
            work.killed[job.batch][job.function, index] = grades.killed[index] = True
            grades.causes.setdefault(index, f'reward function "{name}" {limit} on {_row(rows[index])}')
            job.first, job.repeated = index + 1, False
        if job.first < len(rows):
            work.waiting.appendleft(job)

    def _failed_start(self, limit: str, hung: bool) -> None:
        self._failed_starts += 1
        if hung or self._failed_starts == STARTS:
            times = "" if hung else f", {STARTS} times in a row"
            names = ", ".join(self._functions)
            raise RunError(
                f"loading the reward functions {names} {limit}{times}; import them in a Python of their own to see why"
            )


def _complaint(error: str, rows: "Sequence[Row]", index: int | None) -> str:
    """The message for the user. index: of the row that it is about; None: all of them together."""
    if index is None:
        return f"{_line(error, 600)}; it graded {len(rows)} completions together, the first of {_row(rows[0])}"
    return f"{_line(error, 600)}; it graded {_row(rows[index])}"


def _row(row: "Row") -> str:
    """The row's place and the beginning of its prompt, on one line."""
    prompt = row.prompt
    if not isinstance(prompt, str):
        asked = [message for message in prompt if message["role"] == "user"]
        prompt = (asked or prompt)[-1]["content"]
    return f'{row.where} ("{_line(prompt, PROMPT_CHARACTERS)}")'


def _line(text: str, longest: int) -> str:
    """The text on one line, shortened; what cannot be printed is escaped."""
    line = " ".join(text[: 10 * longest].split())
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line[: longest + 1])
    return line if len(line) <= longest else line[: longest - 1] + "…"
