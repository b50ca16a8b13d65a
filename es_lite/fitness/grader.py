"""The grader: a process that runs reward functions on what a model wrote, and can be killed.

It loads the functions once, then answers requests until its socket closes. Requests and answers are JSON, one a line, so what
comes back is data and nothing else; what a function prints goes to stderr. It limits itself: no core dumps, files of at most
`FILE_BYTES`, `MEMORY_BYTES` more memory than the loaded functions take; it dies with the process that started it.

From the grader:  {"ready": true, "wrong": [number or null, one for each function]}  or  {"failed": message}
To the grader:    {"function", "alone", "prompts", "texts", "ids", "columns", "step"}
From the grader:  {"rewards": [...]}, or {"error": message, "index"}, or {"limit": which}

With `alone`, one answer for each completion, until an error or a limit; else one for all.
"""

import contextlib
import ctypes
import errno
import io
import json
import mmap
import os
import resource
import signal
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from es_lite import fitness
from es_lite.errors import UserError
from es_lite.fitness import functions
from es_lite.fitness.functions import BUILTIN, BadReward

FILE_BYTES = 16 * 2**20
MEMORY_BYTES = 2**30

RewardFunction = Callable[..., Any]


def encode(message: dict[str, Any]) -> bytes:
    """One line. Lone surrogates, also two in a row, stay what they are."""
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    return json.loads(line.decode("utf-8", "surrogatepass"))


def main(descriptor: int, parent: int, names: Sequence[str]) -> None:
    """Serves the socket `descriptor` with the functions of these names. parent: the ID of the process that started this one."""
    _die_with(parent)
    for ignored in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # the coordinator handles them; programs that a function starts do not ignore them
        signal.signal(ignored, lambda *_: None)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    os.set_inheritable(descriptor, False)
    sys.stdout = sys.stderr = io.TextIOWrapper(_Unfailing(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
    # Python warns of some mistakes in a text that it parses: here, a model's.
    warnings.filterwarnings("ignore", module="<")
    with open(descriptor, "rb") as requests, contextlib.suppress(BrokenPipeError, ConnectionResetError):

        def tell(message: dict[str, Any]) -> None:
            line = memoryview(encode(message))
            while line:
                line = line[os.write(descriptor, line) :]

        try:
            loaded = [functions.load(name) for name in names]
            for name in names:
                functions.prepare(name)
        except UserError as error:
            return tell({"failed": str(error)})
        _limit_memory()
        wrong = [getattr(each, "wrong", None) if name in BUILTIN else None for name, each in zip(names, loaded, strict=True)]
        tell({"ready": True, "wrong": wrong})
        for line in requests:
            request = decode(line)
            _serve(request, names[request["function"]], loaded[request["function"]], tell)


def _serve(request: dict[str, Any], name: str, function: RewardFunction, tell: Callable[[dict[str, Any]], None]) -> None:
    count = len(request["texts"])
    if not request["alone"]:
        tell(_answer(request, name, function, range(count)))
        return
    for index in range(count):
        answer = _answer(request, name, function, range(index, index + 1))
        tell(answer)
        if "rewards" not in answer:
            return


def _answer(request: dict[str, Any], name: str, function: RewardFunction, which: range) -> dict[str, Any]:
    """The answer for the completions `which`."""
    try:
        return {"rewards": _call(request, name, function, which)}
    except BaseException as error:
        limit = _limit_of(error, name)
        if limit:
            return {"limit": limit}
        index = error.index if isinstance(error, BadReward) else None
        if index is None and len(which) > 1:
            # Which one was it? If each goes well alone, it is a matter of all of them.
            for one in which:
                alone = _answer(request, name, function, range(one, one + 1))
                if "rewards" not in alone:
                    return alone
        position = which[index or 0] if index is not None or len(which) == 1 else None
        return {"error": _message(error, name), "index": position}


def _call(request: dict[str, Any], name: str, function: RewardFunction, which: range) -> list[float | None]:
    prompts = [request["prompts"][index] for index in which]
    texts = [request["texts"][index] for index in which]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    columns = {column: [values[index] for index in which] for column, values in request["columns"].items()}
    ids = [request["ids"][index] for index in which]
    return functions.call(function, name, prompts, completions, ids, columns, request["step"])


def _limit_of(error: BaseException, name: str) -> str:
    """Which limit the error tells of; "" if none."""
    number = error.errno if isinstance(error, OSError) else None
    of_torch = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or number == errno.ENOMEM or of_torch:
        return f"took more than {MEMORY_BYTES // 2**30} GiB of memory"
    if number == errno.EFBIG:
        return f"wrote more than {FILE_BYTES // 2**20} MiB to a file"
    if isinstance(error, RecursionError) and name in BUILTIN:  # the text was nested too deeply
        return "recursed too deeply"
    return ""


def _message(error: BaseException, name: str) -> str:
    if isinstance(error, BadReward):
        return str(error)
    where = _place(error)
    text = str(error)
    return f'reward function "{name}" raised {type(error).__name__}{": " * bool(text)}{text}{f" ({where})" * bool(where)}'


def _place(error: BaseException) -> str:
    """FILE:LINE of the error in code that is neither installed, nor Python's own, nor what calls functions; "" if none."""
    installed = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    calling = [str(Path(fitness.__file__).parent / name) for name in ("functions.py", "grader.py")]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*installed, *calling, "<")):
            return f"{frame.filename}:{frame.lineno}"
    return ""


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request took effect
        os._exit(1)


def _limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def _limit_memory() -> None:
    """Allows `MEMORY_BYTES` more than this process has now: private data or, where the system does not count that, addresses."""
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:  # not Linux: no way to know what it has
        return
    for what, had in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        _limit(what, int(status[had].split()[0]) * 1024 + MEMORY_BYTES)
        try:
            mmap.mmap(-1, 2 * MEMORY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
        except OSError:
            return  # it is refused, as it should be


class _Unfailing(io.FileIO):
    """A file whose writes never fail: the limit on files is not meant for a log that stderr goes to."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)
