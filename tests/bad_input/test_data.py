"""Text that is missing, cannot be used, has changed, or is not enough; and samples that do not suit the model."""

from pathlib import Path

import pytest
from refusals import refused, refused_untouched


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
        assert f"{text}: the text or its tokenizer has changed" in refused_untouched(recipe, run)
    finally:
        text.write_text(before)
