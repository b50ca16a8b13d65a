"""The tokenizer of a run: trained and kept with the run, the model's own, or from a folder."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT

from es_lite.data.corpus import BUILTIN, read_texts
from es_lite.data.tokenizer import END, load_tokenizer, train_bpe
from es_lite.errors import UserError
from es_lite.tables import DataTable

TEXTS = [["the cat sat on the mat\n", "the dog sat on the log\n"], ["and so on, and so on"]]
UNUSUAL = "naïve  café — 東京 😀\n\n\tdef f( x ):  return 'isn't'\r\n\u0000\u2028 "


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_257_entries_are_the_bytes_and_the_end_token(tmp_path):
    tokenizer = load_tokenizer(DataTable(tokenizer="bpe", vocab_size=257), "", tmp_path, TEXTS)
    assert len(tokenizer) == 257
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END, 0)
    assert len(encode(tokenizer, UNUSUAL)) == len(UNUSUAL.encode())
    assert tokenizer.decode(encode(tokenizer, UNUSUAL)) == UNUSUAL
    assert len({*encode(tokenizer, bytes(range(128)).decode())}) == 128


def test_merges_are_learned_from_the_texts(tmp_path):
    texts = read_texts(BUILTIN, 0)
    tokenizer = load_tokenizer(DataTable(tokenizer="bpe", vocab_size=1000), "", tmp_path, texts)
    assert len(tokenizer) == 1000
    sentence = 'The "assert" statement is a convenient way to insert debugging assertions.'
    assert len(encode(tokenizer, sentence)) < len(sentence) / 2
    assert tokenizer.decode(encode(tokenizer, UNUSUAL)) == UNUSUAL


def test_a_small_text_has_fewer_merges_than_were_asked_for():
    assert 257 < len(train_bpe(TEXTS, 8192)) < 400


def test_the_number_of_threads_does_not_change_what_is_trained():
    program = (
        "from es_lite.data.corpus import BUILTIN, read_texts; from es_lite.data.tokenizer import train_bpe;"
        "print(train_bpe(read_texts(BUILTIN, 3000), 600).backend_tokenizer.to_str())"
    )
    trained = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(trained) == 1


def test_a_trained_tokenizer_is_kept_with_the_run(tmp_path):
    table = DataTable(tokenizer="bpe", vocab_size=270)
    trained = load_tokenizer(table, "", tmp_path, TEXTS)
    kept = load_tokenizer(table, "", tmp_path, [["other texts altogether"]])
    assert kept.get_vocab() == trained.get_vocab()
    assert (kept.eos_token, len(kept)) == (END, 270)
    assert encode(kept, UNUSUAL) == encode(trained, UNUSUAL)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_a_crash_while_saving_leaves_no_tokenizer_and_does_not_stop_the_next_run(tmp_path, monkeypatch):
    table = DataTable(tokenizer="bpe", vocab_size=257)

    def crash(fd):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            load_tokenizer(table, "", tmp_path, TEXTS)
    assert not (tmp_path / "tokenizer").exists()
    assert len(load_tokenizer(table, "", tmp_path, TEXTS)) == 257
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_the_models_own_tokenizer_or_that_of_another_folder(tmp_path):
    train_bpe(TEXTS, 257).save_pretrained(tmp_path / "bytes")
    train_bpe(TEXTS, 270).save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    assert len(load_tokenizer(DataTable(), str(tmp_path / "model"), run, TEXTS)) == 270
    other = DataTable(tokenizer=str(tmp_path / "bytes"))
    assert len(load_tokenizer(other, str(tmp_path / "model"), run, TEXTS)) == 257
    assert not run.exists()


def test_a_pretrained_tokenizer_may_have_no_end_token(tmp_path):
    tokenizer = train_bpe(TEXTS, 257)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(DataTable(tokenizer=str(tmp_path)), "", tmp_path, TEXTS).eos_token_id is None


@pytest.mark.parametrize("name", ["./nowhere", "/not/here", "~/nowhere", "a/b/c", "nobody/has-this", "not a name"])
@pytest.mark.parametrize("key", ["data.tokenizer", "model.path"])
def test_a_tokenizer_that_does_not_exist_is_refused(tmp_path, name, key):
    table, model = (DataTable(tokenizer=name), "") if key == "data.tokenizer" else (DataTable(), name)
    with pytest.raises(UserError, match=rf"^{key} = '{name}': no ") as raised:
        load_tokenizer(table, model, tmp_path, TEXTS)
    assert "\n" not in str(raised.value)


def test_a_model_made_from_a_configuration_has_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"^model\.path = '': no such tokenizer"):
        load_tokenizer(DataTable(), "", tmp_path, TEXTS)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": json.dumps({"model_type": "qwen3"})},
        {"config.json": json.dumps({"model_type": "gpt2"}), "tokenizer_config.json": "{}"},
        {"tokenizer.json": "{bad", "tokenizer_config.json": "{}"},
        {"tokenizer.json": '{"version": "1.0"}'},
        {"tokenizer.json": ""},
    ],
    ids=["empty", "config only", "no vocabulary", "broken", "no model", "truncated"],
)
def test_a_broken_tokenizer_folder_is_refused(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    message = r"^data\.tokenizer = '.*': (no tokenizer can be loaded|has no vocabulary)"
    with pytest.raises(UserError, match=message) as raised:
        load_tokenizer(DataTable(tokenizer=str(tmp_path)), "", tmp_path, TEXTS)
    assert "\n" not in str(raised.value)


def test_the_message_about_a_broken_tokenizer_of_the_run_says_what_to_do(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(UserError, match=r"tokenizer \(made by this run: delete it, and it is made again\)"):
        load_tokenizer(DataTable(tokenizer="bpe"), "", tmp_path, TEXTS)
