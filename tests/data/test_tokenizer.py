"""The tokenizer of a run: trained and kept with the run, the model's own, or from a folder."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT, train_here, write_recipe
from tokenizers.processors import TemplateProcessing

from es_lite.data.texts import BUILTIN, Texts
from es_lite.data.tokenizer import END, beginning, load_tokenizer, train_bpe
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
    texts = Texts(BUILTIN)
    tokenizer = load_tokenizer(DataTable(tokenizer="bpe", vocab_size=1000), "", tmp_path, texts)
    assert len(tokenizer) == 1000
    sentence = 'The "assert" statement is a convenient way to insert debugging assertions.'
    assert len(encode(tokenizer, sentence)) < len(sentence) / 2
    assert tokenizer.decode(encode(tokenizer, UNUSUAL)) == UNUSUAL


def test_a_small_text_has_fewer_merges_than_were_asked_for():
    assert 257 < len(train_bpe(TEXTS, 8192)) < 400


def test_the_number_of_threads_does_not_change_what_is_trained():
    program = (
        "from es_lite.data.texts import BUILTIN, Texts; from es_lite.data.tokenizer import train_bpe;"
        "print(train_bpe(Texts(BUILTIN, 3000), 600).backend_tokenizer.to_str())"
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


# The token that begins a text


def with_bos(also_end: bool = False):
    """A tokenizer of bytes that, as Llama's, puts a token before a text."""
    tokenizer = train_bpe(TEXTS, 257)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    template = "<s> $A" + (f" {END}" if also_end else "")
    tokenizer._tokenizer.post_processor = TemplateProcessing(template, special_tokens=[("<s>", 257), (END, 0)])
    return tokenizer


@pytest.mark.parametrize("also_end", [False, True])
def test_samples_begin_as_the_tokenizer_begins_a_text(also_end):
    tokenizer = with_bos(also_end)
    assert beginning(tokenizer, "auto") == beginning(tokenizer, "always") == [257]
    assert beginning(tokenizer, "never") == []


def test_a_tokenizer_that_puts_nothing_before_a_text():
    tokenizer = train_bpe(TEXTS, 257)
    assert beginning(tokenizer, "auto") == []
    with pytest.raises(UserError, match=r'data\.bos = "always": the tokenizer has no token that begins a text'):
        beginning(tokenizer, "always")
    tokenizer.add_special_tokens({"bos_token": "<s>"})  # it has one, but does not put it there
    assert beginning(tokenizer, "auto") == [] and beginning(tokenizer, "always") == [257]


def test_the_command_says_what_stands_at_a_samples_edges(tmp_path):
    with_bos().save_pretrained(tmp_path / "tokenizer")
    recipe = write_recipe(tmp_path, run={"iterations": 1}, data={"tokenizer": str(tmp_path / "tokenizer"), "samples": "lines"})
    text = recipe.read_text().replace("vocab_size = 257\nhidden", "vocab_size = 258\nhidden")
    recipe.write_text(text)
    assert "vocab_size = 258" in text
    auto = train_here(recipe, tmp_path / "auto")
    assert auto.code == 0, auto.err
    assert "60 samples with " in auto.out and "; a sample begins with <s> and ends with <|endoftext|>" in auto.out
    never = train_here(recipe, tmp_path / "never", "data.bos=never")
    assert "; a sample has nothing put before it and ends with" in never.out
    scores = [(tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1] for run in ("auto", "never")]
    assert json.loads(scores[0])["score_mean"] != json.loads(scores[1])["score_mean"]
    changed = train_here(recipe, tmp_path / "auto", "data.bos=never", resume=True)
    assert changed.code == 2 and "the text or prompts, the tokenizer or data.bos have changed" in changed.err
