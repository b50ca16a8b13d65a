"""A program that feeds reasoning-gym's scorers hostile answers and says what they did: `scorer_survey.py FOLDER PUZZLE …`.

It prints a line of JSON a puzzle: {"name", "runs": an answer that was compiled, run or opened as a file, or null, "stuck":
answers that took longer than `SECONDS`}, or {"name", "error"} if the survey itself failed. Each answer is scored in a process of
its own, with limits, in FOLDER, where an answer that runs makes a file.
"""

import contextlib
import io
import json
import os
import re
import resource
import select
import signal
import sys
import time

MARK = "zqjmark"
SECONDS = 3.0
LONGEST = 4096
EVENTS = ("compile", "exec", "open", "import", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
"""Audit events of Python that tell of code, if an answer's mark is in them."""


def hostile(right: str) -> list[str]:
    """Answers that would leave a trace if a scorer ran them, or a part of them."""
    run, quoted = f"open('{MARK}','w')", f'open("{MARK}","w")'
    forms = [
        *(
            run,
            quoted,
            f"[{run}]",
            f"[[{run}]]",
            f"({run},)",
            f"{{{run}}}",
            f"{{'a': {run}}}",
            f'{{"a": {run}}}',
            f"f'{{{quoted}}}'",
        ),
        *(
            f"str({run})",
            f"{run} or 1",
            f"1 if {run} else 2",
            f"0*len(str({run}))+1",
            f"(lambda: {run})()",
            f"[x for x in [{run}]]",
        ),
        *(
            f"__import__('os').system('touch {MARK}')",
            f"import os; os.system('touch {MARK}')",
            f'exec("{run}")',
            f'eval("{run}")',
        ),
        *(f"1; {run}", f"1\n{run}", f"'; {run}; '", f'"+{run}+"', f"'+str({run})+'", f"') or {run} or ('", f"1) or {run} or (1"),
        *(f"1]+[{run}]+[1", f"x={run}", f"A={run}", f"A={run},B=1", f"x*{run}", f"x**2 + {run}", f"sin({run})", f"{run}*24"),
        *(f"!!python/object/apply:os.system ['touch {MARK}']", f"cos\nsystem\n(S'touch {MARK}'\ntR.", f"`touch {MARK}`"),
        *(f"$(touch {MARK})", MARK, f"./{MARK}", f"[{MARK}]", f"{MARK}(1)"),
    ]
    words = [match.span() for match in re.finditer(r"\w+|\S", right)]
    for code in (run, f"({run} and 1)"):
        for pattern in (
            "{1}{0}",
            "{1} {0}",
            "{1}\n{0}",
            "{1}, {0}",
            "{0} {1}",
            "{1}; {0}",
            "{1} + {0}",
            "{1}*{0}",
            "[{1}, {0}]",
            "{0} or {1}",
        ):
            forms.append(pattern.format(code, right))
        for start, end in words[:4] + words[-4:]:
            forms.append(right[:start] + code + right[end:])
        forms.append(re.sub(r"\d+", lambda number, code=code: f"({code} and {number[0]})", right))
    return [form[:LONGEST] for form in dict.fromkeys(forms)]


def heavy(right: str) -> list[str]:
    """Answers that may keep a scorer busy, or break it."""
    numbers = (
        "9" * LONGEST,
        "1+" * 2047 + "1",
        "-" * 4095 + "1",
        "1e999999999",
        "-1e999999999",
        "1e-999999999",
        "inf",
        "nan",
        "1/0",
    )
    towers = ("9**9**9**9", "9^{9^{9^{9}}}", "99999!!", "factorial(99999999)", "range(10**12)", "'a'*10**10", "x**x**x**x")
    nested = (
        "(" * 2000 + "1" + ")" * 2000,
        "[" * 2048 + "]" * 2048,
        '{"a":' * 600,
        "¬" * 4000 + "P",
        "(P∧" * 1000 + "P" + ")" * 1000,
    )
    others = (
        "",
        "\0",
        "\ud800",
        right + "\ud800",
        " " * LONGEST,
        "\n" * LONGEST,
        "a" * LONGEST,
        "1," * 2047 + "1",
        "A=9," * 1000,
    )
    moves = (
        "R2 " * 1365,
        "R999999999",
        "A+999999999 B-999999999",
        "LDRU" * 1024,
        "Move disk 1 from Peg 1 to Peg 2\n" * 120,
        "\\boxed{" * 585,
    )
    changed = [re.sub(r"\d+", number, right)[:LONGEST] for number in ("999999999", "1e999999999", "9" * 1000, "-1", "")]
    return [*numbers, *towers, *nested, *others, *moves, (right + " ") * 2, *changed]


def right_of(entry: dict) -> str:
    known = [entry["answer"], *map(entry["metadata"].get, ("example_answer", "example_correct_answer", "possible_answer"))]
    value = next((value for value in known if value is not None), "A+1")
    return value if isinstance(value, str) else json.dumps(value)


def forked(action, seconds: float) -> tuple[list[str], bool]:
    """What `action(descriptor)` writes in a process of its own, as lines, and whether it was killed for taking too long."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(reading)
            action(writing)
        except BaseException as error:
            os.write(writing, f"error {error!r:.500}\n".encode(errors="backslashreplace"))
        os._exit(0)
    os.close(writing)
    received, deadline = b"", time.monotonic() + seconds
    while late := select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(reading, 65536)
        if not chunk:
            break
        received += chunk
    if not late:
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(reading)
    return received.decode(errors="replace").splitlines(), not late


def score(dataset, entry: dict, answer: str, descriptor: int) -> None:
    def hook(event: str, arguments: tuple) -> None:
        if event in EVENTS:
            text = arguments[0] if event == "compile" else arguments
            text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
            if MARK in text.lower():
                os.write(descriptor, f"ran {event}\n".encode())

    sys.addaudithook(hook)
    for limit in (resource.RLIMIT_DATA, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (2**31, 2**31))
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        dataset.score_answer(answer, entry)


def survey(name: str, descriptor: int) -> None:
    import reasoning_gym

    with contextlib.redirect_stdout(io.StringIO()):
        dataset = reasoning_gym.create_dataset(name, seed=3, size=5)
        entry = dataset[0]
    right, runs, stuck = right_of(entry), None, []
    for answer in [*hostile(right), *heavy(right)]:
        lines, late = forked(lambda pipe, answer=answer: score(dataset, entry, answer, pipe), SECONDS)
        if os.path.exists(MARK) or any(line.startswith("ran") for line in lines):
            runs = answer
            break
        if late:
            stuck.append(answer[:80])
    os.write(descriptor, json.dumps({"name": name, "runs": runs, "stuck": stuck}).encode() + b"\n")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(MARK)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    import numpy  # noqa: F401
    import reasoning_gym  # noqa: F401
    import sympy  # noqa: F401

    for name in sys.argv[2:]:
        lines, late = forked(lambda pipe, name=name: survey(name, pipe), 300.0)
        print(
            lines[-1] if lines and lines[-1].startswith("{") else json.dumps({"name": name, "error": lines, "late": late}),
            flush=True,
        )
