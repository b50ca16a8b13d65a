"""What containers, clusters and terminals do to a program: no UTF-8, no home, no locks, damaged side files."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from support import ROOT, TINY, arguments, train_here, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM

NO_CACHE = """
import sys
from numba.core import caching

def refuse(self):
    raise PermissionError(13, "Permission denied")

for name, locator in list(vars(caching).items()):
    if "InTree" in name or "UserWide" in name:
        locator.ensure_cache_path = refuse
from es_lite.train import main
sys.exit(main(sys.argv[1:]))
"""
"""The command under a user who can write neither to the package's folder nor to a home."""


def command(recipe: Path, run: Path, code: str = "", **environment: str) -> subprocess.CompletedProcess:
    program = ["-c", code] if code else ["-m", "es_lite.train"]
    words = [sys.executable, *program, *arguments(recipe, run)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, env=os.environ | environment)


@pytest.mark.slow
def test_an_ascii_locale(tmp_path: Path) -> None:
    """Every step prints ±."""
    recipe = write_recipe(tmp_path, run={"iterations": 2})
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    finished = command(recipe, tmp_path / "run", **ascii_only)
    assert finished.returncode == 0, finished.stderr
    assert b"step 2/2 | score" in finished.stdout and b" ? " in finished.stdout


@pytest.mark.long
@pytest.mark.slow
def test_a_user_without_a_folder_for_compiled_code(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, run={"iterations": 1})
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # not below tmp_path, where a socket's name may be too long
        finished = command(recipe, tmp_path / "run", NO_CACHE, TMPDIR=short)
        assert finished.returncode == 0, finished.stderr
        assert list(Path(short).glob("es_lite-numba-*")) == []


def test_a_folder_for_temporary_files_whose_name_is_too_long_for_sockets(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, run={"iterations": 1})
    long = tmp_path / ("t" * 108)
    long.mkdir()
    refused = command(recipe, tmp_path / "run", TMPDIR=str(long))
    said = f"es_lite: {long}: its name is too long for a folder of sockets; set TMPDIR to a shorter one, e.g. /tmp\n"
    assert (refused.returncode, refused.stderr.decode()) == (2, said)
    assert not (tmp_path / "run").exists()


NO_TMP = """
import sys, tempfile

def nowhere():
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

tempfile._get_default_tempdir = nowhere
from es_lite.train import main
sys.exit(main(sys.argv[1:]))
"""
"""The command where nothing can be written but the run directory."""


def test_no_folder_for_temporary_files(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, run={"iterations": 1})
    refused = command(recipe, tmp_path / "run", NO_TMP)
    said = b"es_lite: No usable temporary directory found in ['/tmp']; set TMPDIR to a folder that can be written\n"
    assert (refused.returncode, refused.stderr) == (2, said)
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    finished = train_here(write_recipe(tmp_path, run={"iterations": 1}), tmp_path / "run")
    assert finished.code == 0, finished.err
    assert "this file system has no locks (Operation not supported), so nothing keeps a second run out" in finished.err


@pytest.mark.parametrize("content", ["", "{", '{"eos_token_id": 0'])
def test_a_damaged_generation_config_is_passed_over(tmp_path: Path, content: str) -> None:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).save_pretrained(tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(content)
    recipe = write_recipe(tmp_path, run={"iterations": 1}, model={"config": "", "path": str(tmp_path / "model")})
    finished = train_here(recipe, tmp_path / "run")
    assert finished.code == 0, finished.err
    assert "model/generation_config.json cannot be used" in finished.err


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).save_pretrained(tmp_path / "model")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    (tmp_path / "model/model.safetensors").write_text(pointer)
    recipe = write_recipe(tmp_path, model={"config": "", "path": str(tmp_path / "model")})
    finished = train_here(recipe, tmp_path / "run")
    assert finished.code == 2
    assert "model.safetensors: is a pointer of git-lfs, not the file itself; run `git lfs pull` in its folder" in finished.err
