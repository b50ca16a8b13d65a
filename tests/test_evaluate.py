"""The command `evaluate` on tiny models, against Hugging Face's own `generate` and forward."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import message_of
from safetensors.torch import load_file, save_file
from support import PROMPTS, ROOT, Finished, contents, finished_run, metrics, write_recipe, write_reward_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from es_lite import evaluate as command
from es_lite import replay
from es_lite.data.corpus import tokenize
from es_lite.data.texts import Texts
from es_lite.fitness.tasks import conciseness

HELD_OUT = PROMPTS[-3:]
NEW = 6
TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def evaluate(*words: object) -> Finished:
    """Runs the command to its end in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command.main([str(word) for word in words])
    return Finished(code, out.getvalue(), err.getvalue())


def figures(out: Path, *words: object) -> dict[str, Any]:
    """What the command writes to `out`; it must succeed."""
    finished = evaluate(*words, "--out", out)
    assert finished.code == 0, finished.err
    return json.loads(out.read_text())


def refused(*words: object) -> str:
    finished = evaluate(*words)
    assert finished.code == 2, finished.err
    assert finished.out == ""
    return message_of(finished.err)


def without_time(found: dict[str, Any]) -> dict[str, Any]:
    for side in (found, found.get("against", {})):
        for name in ("seconds", "tokens_per_second"):
            side.get("figures", {}).pop(name, None)
    return found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    tables: dict[str, dict] = {"run": {"iterations": 2, "checkpoint_every": 2}, "eval": {"samples": 3, "best": False}}
    return write_reward_recipe(folder, workers={"compute": "fp32"}, **tables)


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of rewards; no test changes it, except that there may be an evaluation.json."""
    return finished_run(recipe, tmp_path_factory.mktemp("evaluate") / "run")


@pytest.fixture(scope="module")
def start(run: Path) -> Path:
    """What the run started from, as a folder."""
    folder = run.parent / "start"
    assert replay.main([str(run), "--out", str(folder), "--step", "0"]) == 0
    return folder


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """The run's held-out prompts, as a file."""
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in HELD_OUT))
    return path


def hugging_face(folder: Path) -> Any:
    """The folder's weights, which are bf16, in a model that computes in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def generated(model: Any, prompt: list[int], new: int = NEW) -> list[int]:
    ends = model.generation_config.eos_token_id
    config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=ends, pad_token_id=0)
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()


def log_probabilities(model: Any, ids: list[int]) -> np.ndarray:
    """Of all tokens but the first, float64."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[1:, None])[:, 0].numpy()


def near(text: str, ids: list[int], wanted: int) -> float:
    """The reward function of that name in the recipe's file."""
    return len(text) / 10 - abs(sum(ids) - wanted) / 400


def same(value: float) -> Any:
    """Equal but for the order in which prompts are added up."""
    return pytest.approx(value, rel=1e-12, abs=1e-12)


def mean_and_error(values: list[float]) -> dict[str, Any]:
    return {"mean": pytest.approx(np.mean(values)), "error": pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))}


# Figures


def test_all_figures_are_those_of_hugging_face(run: Path, start: Path):
    before = contents(run)
    finished = evaluate(run, "--against", "start")
    assert finished.code == 0, finished.err
    assert finished.err == ""
    found = json.loads((run / "evaluation.json").read_text())
    after = contents(run)
    del after["evaluation.json"]
    before.pop("evaluation.json", None)
    assert after == before, "the run is only read, and no temporary folder is left"

    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    models = {"own": hugging_face(run / "checkpoint"), "base": hugging_face(start)}
    texts: dict[str, list[str]] = {}
    rewards: dict[str, list[float]] = {}
    ids: dict[str, list[list[int]]] = {}
    for name, model in models.items():
        ids[name] = [generated(model, tokenizer(row["prompt"])["input_ids"]) for row in HELD_OUT]
        ends = model.generation_config.eos_token_id
        texts[name] = [tokenizer.decode(one, skip_special_tokens=True) for one in ids[name]]
        rewards[name] = [
            near(text, one, row["wanted"]) + 0.5 * (sum(one) % 2 == 0)
            for text, one, row in zip(texts[name], ids[name], HELD_OUT, strict=True)
        ]
        side = found["figures"] if name == "own" else found["against"]["figures"]
        assert side["reward"] == mean_and_error(rewards[name])
        assert side["format"] == mean_and_error([float(sum(one) % 2 == 0) for one in ids[name]])
        assert side["length"] == mean_and_error([float(len(text)) for text in texts[name]])
        assert side["cut"] == mean_and_error([float(one[-1] not in ends) for one in ids[name]])
        assert side["new_tokens"] == sum(map(len, ids[name]))
        assert "accuracy" not in side
    assert [one["prompt"] for one in found["completions"]] == [row["prompt"] for row in HELD_OUT]
    assert [one["completion"] for one in found["completions"]] == texts["own"]
    assert [one["base_completion"] for one in found["completions"]] == texts["base"]
    assert texts["own"] != texts["base"]
    paired = np.subtract(rewards["own"], rewards["base"]).tolist()
    assert found["against"]["difference"]["reward"] == mean_and_error(paired)

    divergences = []
    for row, written in zip(HELD_OUT, ids["own"], strict=True):
        whole = tokenizer(row["prompt"])["input_ids"] + written
        own, base = (log_probabilities(model, whole)[-len(written) :] for model in models.values())
        divergences.append(float(np.mean(np.exp(base - own) - (base - own) - 1)))
    assert min(divergences) > 1e-3
    kl = found["against"]["kl"]
    assert kl["mean"] == pytest.approx(np.mean(divergences), rel=1e-4)
    assert kl["error"] == pytest.approx(np.std(divergences, ddof=1) / np.sqrt(3), rel=1e-4)

    # Retention, on 64 windows of 64 tokens of the built-in text.
    corpus = tokenize(Texts("builtin:python-reference"), tokenizer, "joined", 64)
    windows = [corpus.sample(index * len(corpus) // 64).tolist() for index in range(64)]
    own, base = ([log_probabilities(model, window).mean() for window in windows] for model in models.values())
    text = found["against"]["text"]
    assert text["tokens"] == 64 * 63
    assert text["log_probability"]["mean"] == pytest.approx(np.mean(own), rel=1e-5)
    assert text["difference"]["mean"] == pytest.approx(np.mean(np.subtract(own, base)), rel=1e-3)
    assert text["difference"]["error"] == pytest.approx(np.std(np.subtract(own, base), ddof=1) / 8, rel=1e-3)

    # What people see, and what the run itself found after its last step.
    lines = finished.out.splitlines()
    assert lines[0].split() == [*f"{run}, step 2".split(), "start", "difference"]
    assert [line.split("  ")[0] for line in lines[1:5]] == ["reward", "", "", "right form"]
    assert f"{found['figures']['reward']['mean']:.4f} ± " in lines[1]
    assert any(line.startswith("KL from the base") for line in lines)
    assert found["figures"]["reward"]["mean"] == same(metrics(run)[-1]["eval_score"])


def test_neither_workers_nor_residency_nor_the_kind_of_folder_change_a_figure(run: Path, held_out: Path, tmp_path: Path):
    """The run, its journal alone, and its checkpoint, which has the same weights in bf16, write the same."""
    functions = ["--functions", *figures(tmp_path / "0.json", run)["functions"]]
    where = ["--prompts", held_out, *functions, "--new-tokens", NEW]
    found = []
    settings = ["--set", "workers.compute=fp32", "--set", "fitness.micro_batch=2", "--set", "workers.threads=1"]
    tokenizer = ["--set", f"data.tokenizer={run / 'tokenizer'}"]
    journal = tmp_path / "journal.jsonl"
    shutil.copy(run / "journal.jsonl", journal)
    for words in (
        [run, "--set", "workers.count=1"],
        [run, "--set", "workers.count=2"],
        [run, "--set", "memory.residency=streamed"],
        [journal, *tokenizer],
        [run / "checkpoint"],
    ):
        found.append(without_time(figures(tmp_path / "one.json", *words, *where, *settings)))
    one = found[0]
    for other in found[1:3]:
        assert other == one
    for other in found[3:]:
        assert (other["completions"], other["figures"]) == (one["completions"], one["figures"])
    assert one["prompts"] == 3 and one["figures"]["new_tokens"] > 3


def test_at_its_start_a_run_differs_in_nothing_from_it(run: Path, tmp_path: Path):
    found = figures(tmp_path / "found.json", run, "--step", 0, "--against", "start")
    against = found["against"]
    assert (found["step"], against["model"]) == (0, "start")
    assert against["kl"] == {"mean": 0.0, "error": 0.0}
    assert set(map(str, against["difference"].values())) == {"{'mean': 0.0, 'error': 0.0}"}
    assert against["text"]["difference"] == {"mean": 0.0, "error": 0.0}
    assert found["figures"]["reward"]["mean"] == same(metrics(run)[0]["eval_score"])
    assert {one["kl"] for one in found["completions"]} == {0.0}


def test_an_earlier_step_is_that_of_the_run(run: Path, tmp_path: Path):
    found = figures(tmp_path / "found.json", run, "--step", 1)
    assert found["figures"]["reward"]["mean"] == same(metrics(run)[1]["eval_score"])
    assert metrics(run)[1]["eval_score"] != metrics(run)[2]["eval_score"]
    assert "against" not in found


def test_a_task_has_its_own_prompts_and_rewards(start: Path, tmp_path: Path):
    """Of a plain model, on built-in questions, with a chat template that the tokenizer gets."""
    folder = with_template(start, tmp_path / "model")
    found = figures(tmp_path / "found.json", folder, "--task", "conciseness", "--new-tokens", 2, "--set", "data.options.test=2")
    asked = [one["prompt"][0]["content"] for one in found["completions"]]
    assert asked == [conciseness.TEST[0][0], conciseness.TEST[1][0]]
    assert found["functions"] == {"conciseness": 1.0, "right_answer": 0.0}
    assert list(found["figures"])[:4] == ["reward", "functions.conciseness", "functions.right_answer", "accuracy"]
    assert found["step"] is None


# Talking


def with_template(model: Path, folder: Path) -> Path:
    """A copy of the model whose tokenizer has a chat template."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_chat_prints_the_answer_alone(run: Path):
    finished = evaluate(run, "--chat", HELD_OUT[0]["prompt"])
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    ids = generated(hugging_face(run / "checkpoint"), tokenizer(HELD_OUT[0]["prompt"])["input_ids"])
    assert finished == Finished(0, tokenizer.decode(ids, skip_special_tokens=True) + "\n", "")


def test_a_conversation_is_kept_as_messages(start: Path, tmp_path: Path, monkeypatch):
    folder = with_template(start, tmp_path / "model")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"ab\n\ncd\n{'x' * 60}\nab"))
    finished = evaluate(folder, "--chat", "--new-tokens", 4, "--set", "workers.compute=fp32")
    assert finished.code == 0, finished.err
    tokenizer, model = AutoTokenizer.from_pretrained(folder), hugging_face(folder)

    def answer(text: str) -> str:
        return tokenizer.decode(generated(model, tokenizer(text)["input_ids"], 4), skip_special_tokens=True)

    first = answer("<u>ab<a>")
    second = answer(f"<u>ab<a>{first}<u>cd<a>")
    assert finished.out == f"{first}\n{second}\n{first}\n", "the line that is too long makes it begin anew"
    assert "there is room for 60" in finished.err and finished.err.count("\n") == 1


# Bad input


def test_what_is_no_model_and_no_run_is_refused(run: Path, tmp_path: Path, monkeypatch):
    near = f"{run}x"
    assert f"{near}: no such folder; did you mean {run}?" in refused(near)
    assert "neither a run directory" in refused(tmp_path)
    (tmp_path / "model.bin").write_text("")
    assert "is a file; expected" in refused(tmp_path / "model.bin")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused("somebody/absent", "--task", "conciseness")
    assert "'somebody/absent': no such folder, and it cannot be downloaded from the hub" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--task", "contdown"], 'no such task; there are countdown, conciseness, math, reasoning-gym:PUZZLE; did you mean "cou'),
        (["--task", "builtin:maths"], '"builtin:maths": no such task is built in'),
        (["--task", "math"], "--task math: has no prompts of its own; add --prompts FILE"),
        (["--task", "reasoning-gym:x", "--prompts", "f"], "--task reasoning-gym:x: takes no --prompts"),
        (["--prompts", "absent.jsonl", "--functions", "puzzle"], '"absent.jsonl": no such file'),
        (["--prompts", "{text}", "--functions", "puzzle"], "unknown kind of file"),
        (["--step", "3"], "has steps 0 to 2"),
        (["--step", "-1"], "has steps 0 to 2"),
        (["--model", "m"], "--model m: this run started from random weights"),
        (["--against", "absent"], "absent: no such folder"),
        (["--new-tokens", "64"], "--new-tokens 64: leaves no room for prompts in the model's 64 tokens"),
        (["--new-tokens", "64", "--chat", "x"], "--new-tokens 64: leaves no room for prompts in the model's 64 tokens"),
        (["--chat", "x" * 60], "the prompt has 60 tokens, but there is room for 58"),
        (["--max-length", "3"], "tokens, but there is room for 3"),
        (["--functions", "lenght"], 'reward function "lenght": there is no built-in one of this name'),
        (["--out", "absent/found.json"], "--out absent/found.json: there is no folder"),
        (["--set", "workers.cuont=1"], 'workers.cuont: unknown key; did you mean "count"?'),
        (["--set", "memory.master=none"], "--set memory: what a run's layers are stored as cannot be changed"),
        (["--set", "memory.limit=1 MiB"], "does not fit: needs"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_clear_message(run: Path, recipe: Path, words: list[str], expected: str):
    words = [word.replace("{text}", str(recipe)) for word in words]
    assert expected in refused(run, *words)


def test_a_plain_model_needs_a_task_and_has_neither_steps_nor_a_start(start: Path, held_out: Path):
    assert "a model has no task of its own; add --task" in refused(start)
    assert "nothing says what a right completion is; add --task (countdown" in refused(start, "--prompts", held_out)
    assert "--step 1: only a run has it" in refused(start, "--task", "conciseness", "--step", 1)
    assert "--against start: only a run has a start" in refused(start, "--task", "conciseness", "--against", "start")
    assert "no chat template" in refused(start, "--task", "conciseness", "--new-tokens", 2)
    held_out.write_text('{"question": "a"}\n')
    message = refused(start, "--prompts", held_out, "--functions", "math_answer")
    assert f'{held_out}:1: has no "prompt", only question' in message


def test_a_run_of_log_probabilities_needs_a_task(tmp_path: Path):
    run = finished_run(write_recipe(tmp_path, run={"iterations": 1}), tmp_path / "run")
    assert 'a run of fitness.kind = "logprob" has no task of its own; add --task' in refused(run)
    assert evaluate(run, "--chat", "Line 1", "--new-tokens", 2).code == 0


def test_models_of_other_vocabularies_are_not_compared(run: Path, start: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(start, other)
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(document))
    assert "its vocabulary is not that of" in refused(run, "--against", other)


def test_a_place_that_cannot_be_written_is_named_before_anything_is_computed(run: Path, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "folder", tmp_path / "gone/out.json"):
        assert f"--out {out}: " in refused(run, "--out", out)


def test_a_text_that_is_none_is_named(run: Path):
    assert '"text" has half a surrogate pair' in refused(run, "--chat", "caf\udce9")


def test_a_model_leaves_no_memory_behind(run: Path, tmp_path: Path):
    before = set(os.listdir("/proc/self/fd"))
    figures(tmp_path / "out.json", run)
    left = set(os.listdir("/proc/self/fd")) - before
    assert not [fd for fd in left if "working-copy" in os.readlink(f"/proc/self/fd/{fd}")]


def test_a_broken_model_is_named(start: Path, held_out: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(start, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    message = refused(broken, "--prompts", held_out, "--functions", "conciseness", "--new-tokens", 2)
    assert "model.norm.weight has values that are not finite" in message


def test_a_damaged_layer_of_the_run_is_named_with_what_to_do(run: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = copy / "master" / "block-001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    message = refused(copy)
    assert str(file) in message and "--resume --rebuild" in message


def test_nothing_is_left_when_it_is_stopped(run: Path, tmp_path: Path):
    """Even of a process that was killed, as soon as the next evaluation begins."""
    code = "import sys, time\nfrom es_lite import evaluate\nfrom es_lite.evaluation import comparison\n"
    code += "comparison.write = lambda *_: time.sleep(100)\nsys.exit(evaluate.main(sys.argv[1:]))"
    for number, code_at_end in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)):
        process = subprocess.Popen([sys.executable, "-c", code, str(run)], cwd=ROOT, start_new_session=True)
        try:
            until = time.monotonic() + 120
            before = set(run.glob("es_lite-evaluate-*"))
            while not any((folder / "block-001.safetensors").exists() for folder in set(run.glob("es_lite-*")) - before):
                assert time.monotonic() < until and process.poll() is None
                time.sleep(0.05)
            time.sleep(0.5)
            os.kill(process.pid, number)
            assert process.wait(60) == code_at_end
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert list(run.glob("es_lite-evaluate-*")) == []
