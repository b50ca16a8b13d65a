"""Text that is missing, cannot be used, has changed, or is not enough; and samples that do not suit the model."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import refused, refused_untouched
from support import ROOT, train_here, write_recipe

from es_lite.data.tokenizer import train_bpe


def test_more_samples_a_step_than_there_are_is_refused(recipe: Path, tmp_path: Path) -> None:
    assert "fitness.samples = 100000: the corpus has only" in refused(recipe, tmp_path / "run", "fitness.samples=100000")


def test_a_refused_run_leaves_no_tokenizer_that_the_next_would_take(recipe: Path, tmp_path: Path) -> None:
    message = refused(recipe, tmp_path / "run", "data.vocab_size=300")
    assert "data.tokenizer: makes the token" in message and "the model's vocab_size is 257" in message
    assert "fitness.samples" in refused(recipe, tmp_path / "run", "fitness.samples=100000")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", b"", "there is no text in it"),
        ("blank.txt", b"\n \n\n", "there is no text in it"),
        ("binary.txt", b"\x7fELF\x02\x01\0\0\0", "NUL byte"),
        ("latin.txt", "é".encode("latin-1") * 100, "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text":\n', ":2: not JSON"),
        ("column.jsonl", b'{"body": "a"}\n', 'expected an object with a string under "text"'),
        ("model.bin", b"text", "unknown kind of file"),
    ],
)
def test_data_that_cannot_be_used_is_named(recipe: Path, tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for key in ("data.path", "eval.path"):
        message = refused(recipe, tmp_path / "run", f"{key}={path}", "eval.every=1")
        assert str(path) in message and reason in message
    assert path.read_bytes() == content


def test_data_that_is_missing_is_named(recipe: Path, tmp_path: Path) -> None:
    assert f'"{tmp_path}/gone.txt": no such file' in refused(recipe, tmp_path / "run", f"data.path={tmp_path}/gone.txt")


def test_samples_longer_than_the_model_allows_are_refused(recipe: Path, tmp_path: Path) -> None:
    message = refused(recipe, tmp_path / "run", "model.config.max_position_embeddings=16")
    assert "fitness.max_length = 32: the model's max_position_embeddings is 16; set at most that" in message
    assert not (tmp_path / "run").exists()


def test_a_text_that_changed_since_the_run_began_is_refused(recipe: Path, run: Path) -> None:
    text = recipe.parent / "text.txt"
    before = text.read_text()
    text.write_text(before + "One line more.\n")
    try:
        assert f"{text}: the text or prompts, the tokenizer or data.bos have changed" in refused_untouched(recipe, run)
    finally:
        text.write_text(before)


def test_an_end_token_that_the_model_has_not_is_named(tmp_path: Path) -> None:
    tokenizer = train_bpe([["text"]], 257)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = write_recipe(tmp_path, data={"tokenizer": str(tmp_path / "tokenizer")})
    message = refused(recipe, tmp_path / "run")
    assert "data.tokenizer: its end token <end> is number 257, but the model has only 257 tokens" in message
    assert "name another eos_token in its tokenizer_config.json" in message


def test_a_tokenizer_model_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    (tmp_path / "tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    recipe = write_recipe(tmp_path, data={"tokenizer": str(tmp_path / "tokenizer")})
    assert "has a tokenizer.model but no tokenizer.json; install sentencepiece" in refused(recipe, tmp_path / "run")


def test_what_was_read_of_a_folder_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "within").mkdir(parents=True)
    (folder / "README.txt").write_text("about it\n")
    (folder / "a.txt").write_text("one line\n" * 8)
    (folder / "within/b.txt.gz").write_bytes(gzip.compress(b"another line\n\n" * 8))
    recipe = write_recipe(tmp_path, run={"iterations": 0}, data={"samples": "lines"})
    finished = train_here(recipe, tmp_path / "run", f"data.path={folder}")
    assert finished.code == 0, finished.err
    assert "16 samples with 176 tokens from 2 files; a sample has nothing put before it and ends with <|end" in finished.out


@pytest.mark.long
def test_a_large_text_takes_little_memory(tmp_path: Path) -> None:
    """200 MB of lines, and a line of 18 MB."""
    words = " ".join(f"word{i * 7919 % 30011}" for i in range(100_000))
    with (tmp_path / "large.txt").open("w") as file:
        while file.tell() < 2e8:
            file.write(words[: 10**5] + "\n")
        file.write(words * 20 + "\n")
    code = (
        "import resource, sys\n"
        "from es_lite.data import corpus\n"
        "from es_lite.data.texts import Texts\n"
        "from es_lite.data.tokenizer import train_bpe\n"
        "tokenizer = train_bpe(Texts(sys.argv[1]), 8192)\n"
        "corpus.tokenize(Texts(sys.argv[1]), tokenizer, 'joined', 256)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large.txt"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 1.5 * 2**30
