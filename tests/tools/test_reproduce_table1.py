"""tools/reproduce_table1.py: the real command on a tiny model, the paper's rows, and the table."""

import json
from pathlib import Path

import pytest
import reproduce_table1
from support import TINY, metrics

from es_lite.recipe import Recipe

SMALL = ["--population", "2", "--prompts", "2", "--new-tokens", "3", "--test", "2"]


def figure(mean: float, error: float | None = None) -> dict:
    return {"accuracy": {"mean": mean, "error": error}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of bytes with random weights, a tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "Qwen2.5-0.5B-Instruct"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)} | {"<end>": 256}, merges=[]))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = dict(TINY, max_position_embeddings=1024, eos_token_id=256)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).save_pretrained(folder)
    return folder


@pytest.mark.long
@pytest.mark.slow
def test_a_model_is_put_beside_the_paper(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [str(model), "--dir", str(tmp_path / "out"), *SMALL, "--set", "fitness.max_length=800", "--set", "workers.count=1"]
    assert reproduce_table1.main([*words, "--iterations", "1"]) == 0
    head, _, *rows = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[:4])
    (*ours, used), paper = rows
    assert head == reproduce_table1.HEAD
    assert ours == ["es_lite, Qwen2.5-0.5B-Instruct", "0.0 ± 0.0", *"–––––", "0.0 ± 0.0"]
    assert used.startswith("4 completions (1 steps, ")
    figures = ["0.1", "0.3", "0.3", "0.5", "13.0", "13.5", "14.4"]
    assert paper == ["the paper, Qwen2.5-0.5B-Instruct", *figures, "3,000,000 completions (500 steps)"]
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (found["prompts"], found["step"]) == (2, 1)

    assert reproduce_table1.main([*words, "--iterations", "2"]) == 0, "continues"
    assert "| 8 completions (2 steps, " in capsys.readouterr().out
    assert [line["step"] for line in metrics(tmp_path / "out" / "run")] == [0, 1, 2]


def test_the_recipe_has_the_papers_problems_and_the_budget_that_was_asked_for(tmp_path: Path, monkeypatch) -> None:
    stopped = RuntimeError("nothing is trained here")

    def train(recipe: Recipe, options) -> None:
        assert recipe == Recipe.load(tmp_path / "recipe.toml", options.settings)
        assert (recipe.model.path, recipe.data.path, recipe.data.options) == ("some/model", "builtin:countdown", {})
        assert (recipe.es.population, recipe.fitness.samples, recipe.generation.max_new_tokens) == (2, 2, 3)
        assert (recipe.run.minutes, recipe.run.iterations, recipe.es.sigma) == (7.0, 500, 0.5)
        raise stopped

    monkeypatch.setattr(reproduce_table1, "train", train)
    with pytest.raises(RuntimeError) as raised:
        reproduce_table1.main(["some/model", "--dir", str(tmp_path), *SMALL, "--minutes", "7", "--set", "es.sigma=0.5"])
    assert raised.value is stopped


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--population", "3"], "es.population = 3: must be even"),
        (["--prompts", "0"], "fitness.samples = 0: expected at least 1"),
        (["--set", "es.sigm=1"], 'did you mean "sigma"'),
    ],
)
def test_a_recipe_that_is_not_valid_is_refused(words, message, tmp_path, capsys):
    assert reproduce_table1.main(["some/model", "--dir", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_command_that_fails_ends_it_with_its_code(tmp_path, capfd):
    assert reproduce_table1.main([str(tmp_path / "no-model"), "--dir", str(tmp_path), *SMALL]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("no-model") >= 1


@pytest.mark.parametrize(
    ("model", "known", "same"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", ["Qwen2.5-0.5B-Instruct"], True),
        ("~/.cache/es_lite/qwen2.5-1.5b-instruct", ["Qwen2.5-1.5B-Instruct"], True),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", ["Llama-3.1-8B-Instruct"], True),
        ("Qwen/Qwen2.5-3B", ["Qwen2.5-3B-Instruct", "Llama-3.2-3B-Instruct"], False),
        ("qwen2.5-coder-0.5b-instruct/", ["Qwen2.5-0.5B-Instruct"], False),
        ("Qwen/Qwen2.5-14B-Instruct", [], False),
        ("~/.cache/es_lite/smollm2-135m-instruct", [], False),
    ],
)
def test_the_papers_models_are_found_by_name_or_by_size(model, known, same):
    assert reproduce_table1.papers_models(model) == (known, same)


def test_what_is_not_known_is_left_out():
    trained = reproduce_table1.Trained(steps=3, generations=1200, tokens=5000, hours=0.5)
    found = {"against": {"figures": figure(0.005, 0.0025)}, "figures": figure(0.125)}
    _, ours, paper = reproduce_table1.rows("smollm2-135m-instruct", found, trained)
    assert ours == [
        "es_lite, smollm2-135m-instruct", "0.5 ± 0.2", *"–––––", "12.5", "1,200 completions (3 steps, 5,000 tokens, 0.50 h)"
    ]  # fmt: skip
    assert paper == ["the paper has no model of this size", *"––––––––"]


def test_a_step_that_a_crash_wrote_twice_counts_once(tmp_path):
    lines = [{"step": 0, "eval_score": 0.0}, *({"step": 1, "generated_tokens": 10, "step_seconds": 1800.0},) * 2, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert reproduce_table1.Trained.of(tmp_path, 4, 5) == reproduce_table1.Trained(2, 40, 10, 0.5)
    assert reproduce_table1.Trained.of(tmp_path / "nowhere", 4, 5).generations == 0
