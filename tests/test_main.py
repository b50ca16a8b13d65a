"""The console command `es-lite`: its help, its sub-commands, and what it says to a word that is none of them."""

import importlib
import subprocess
import sys
import tomllib

import pytest
from support import ROOT, write_recipe

from es_lite import __main__, evaluate, plan, replay, system, train
from es_lite.planning.rates import StepTime
from es_lite.system import MemoryLimit


def test_the_installed_command_is_this_function():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["es-lite"].partition(":")
    assert getattr(importlib.import_module(module), name) is __main__.main


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_lists_the_commands(capsys, word):
    assert __main__.main([word]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("usage: es-lite COMMAND") and output.err == ""
    assert [line.split()[0] for line in output.out.splitlines()[2:]] == ["train", "plan", "replay", "evaluate"]


@pytest.mark.parametrize("words", [[], ["trian"], ["trian", "--help"], ["recipe.toml"]])
def test_an_unknown_command_is_refused(capsys, words):
    assert __main__.main(words) == 2
    output = capsys.readouterr()
    assert output.out == "" and "usage: es-lite COMMAND" in output.err and "  plan " in output.err


@pytest.mark.parametrize(("name", "module"), [("train", train), ("plan", plan), ("replay", replay), ("evaluate", evaluate)])
def test_a_command_gets_the_words_after_it_and_gives_its_exit_code(monkeypatch, name, module):
    given = []
    monkeypatch.setattr(module, "main", lambda words: given.append(words) or 7)
    assert __main__.main([name, "recipe.toml", "--set", "es.sigma=1"]) == 7
    assert given == [["recipe.toml", "--set", "es.sigma=1"]]


def test_plan_is_the_same_as_the_module(capsys, monkeypatch, tmp_path):
    """What the machine has left changes from one moment to the next, so it is fixed."""
    monkeypatch.setattr(plan, "step_time", lambda *_: StepTime(1.0, 2.0, "the rates of the test"))
    monkeypatch.setattr(system, "memory_limit", lambda *_, **__: MemoryLimit(2**34, "the test"))
    monkeypatch.setattr(system, "free_disk_bytes", lambda path: 2**36)
    words = [str(write_recipe(tmp_path)), "--set", "run.iterations=7"]
    outputs = [(main(given), capsys.readouterr()) for main, given in ((plan.main, words), (__main__.main, ["plan", *words]))]
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == 0 and "7 steps about 21 s" in outputs[0][1].out


def test_the_module_is_the_same_command(tmp_path):
    command = [sys.executable, "-m", "es_lite", "plan", str(tmp_path / "absent.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"es_lite: {tmp_path}/absent.toml: no such recipe")
