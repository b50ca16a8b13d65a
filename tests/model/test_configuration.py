"""A model's configuration, from each of the places that a recipe can name."""

import json
import math
from pathlib import Path

import pytest
from architectures import COMMON
from transformers import AutoConfig, Qwen3Config

from es_lite.errors import UserError
from es_lite.model.configuration import SIZES, configuration, intermediate_size, locate, read_json, size_of
from es_lite.model.layout import Layout, skeleton

KEYS = {"model_type": "qwen3", **COMMON}


def save(path: Path, document: object) -> str:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return str(path)


# Where it comes from


def test_a_table_of_keys():
    keys = dict(KEYS)
    config = configuration("", keys)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen3", 64, 2)
    assert keys == KEYS, "the recipe's table is not changed"


def test_a_json_file(tmp_path, monkeypatch):
    path = save(tmp_path / "my-model.json", KEYS)
    assert configuration("", path).to_dict() == configuration("", KEYS).to_dict()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configuration("", "~/my-model.json").to_dict() == configuration("", KEYS).to_dict()


def test_a_models_folder(tmp_path):
    save(tmp_path / "config.json", KEYS)
    assert configuration(str(tmp_path), "").to_dict() == configuration("", KEYS).to_dict()


def parameters_of(size: dict) -> int:
    """Parameters of a Qwen3 model, by hand."""
    hidden, heads, kv, head = size["hidden_size"], size["num_attention_heads"], size["num_key_value_heads"], size["head_dim"]
    attention = 2 * hidden * heads * head + 2 * hidden * kv * head + 2 * head
    block = attention + 3 * hidden * size["intermediate_size"] + 2 * hidden
    embeddings = (1 if size["tie_word_embeddings"] else 2) * size["vocab_size"] * hidden
    return size["num_hidden_layers"] * block + embeddings + hidden


@pytest.mark.parametrize("name", SIZES)
def test_a_size_of_the_paper_has_its_parameters_and_layers(name):
    layout = Layout.of(skeleton(configuration("", name)))
    assert layout.size == parameters_of(SIZES[name])
    assert len(layout.layers) == SIZES[name]["num_hidden_layers"] + 2
    assert layout.tied is SIZES[name]["tie_word_embeddings"]
    last = ["model.norm.weight"] if layout.tied else ["model.norm.weight", "lm_head.weight"]
    assert [tensor.name for tensor in layout.layers[-1].tensors] == last


# Refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("qwen3-0.6b", r"^model\.config = 'qwen3-0\.6b': expected qwen3-0\.5b, .*, a \.json file or a table$"),
        ({"hidden_size": 64}, r"^model\.config: has no model_type, for instance \"qwen3\"$"),
        (KEYS | {"model_type": "quen3"}, r"^model\.config: not a configuration that transformers accepts: "),
        (KEYS | {"hidden_size": "wide"}, r"^model\.config: not a configuration that transformers accepts: "),
        ("gone.json", r"^gone\.json: missing; "),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        configuration("", config)


CODE = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}


def test_a_type_that_only_the_models_folder_has_code_for_is_refused(tmp_path):
    save(tmp_path / "config.json", KEYS | CODE | {"model_type": "evil"})
    save(tmp_path / "evil.py", "raise AssertionError('this was run')")
    with pytest.raises(UserError, match=rf"^model\.path = '{tmp_path}': needs code from the model's folder, which es_lite never"):
        configuration(str(tmp_path), "")


def test_code_of_a_type_that_transformers_has_is_never_run(tmp_path):
    """Many folders of Phi-3, Falcon or DeepSeek still bring some."""
    save(tmp_path / "config.json", KEYS | CODE)
    save(tmp_path / "evil.py", "raise AssertionError('this was run')")
    assert type(configuration(str(tmp_path), "")) is Qwen3Config


def test_numbers_that_json_does_not_know_are_read_as_transformers_writes_them(tmp_path):
    save(tmp_path / "config.json", KEYS | {"initializer_range": {"__float__": "Infinity"}})
    assert configuration(str(tmp_path), "").initializer_range == math.inf


def test_quantised_weights_are_refused(tmp_path):
    save(tmp_path / "config.json", KEYS | {"quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(UserError, match=r"its weights are quantised \(mxfp4\), which es_lite does not read"):
        configuration(str(tmp_path), "")


# JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"x\.json: cannot be read as JSON"),
        ("[1]", r"x\.json: expected a JSON object"),
        (b"\xff\xfe{}", r"x\.json: cannot be read as JSON"),
        (None, r"x\.json: missing; a model folder has config\.json and safetensors files"),
    ],
    ids=str,
)
def test_json_that_cannot_be_used_is_refused_by_file(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "x.json")


def test_a_folder_in_the_place_of_json_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be read as JSON"):
        read_json(tmp_path)


# Finding the folder


def test_a_local_folder_is_found(tmp_path, monkeypatch):
    assert locate(str(tmp_path)) == tmp_path
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/models") == tmp_path / "models"


@pytest.mark.parametrize("path", ["gone", "./gone/there", "/gone/there", "~/gone", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused_without_asking_the_hub(monkeypatch, path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=rf"^model\.path = '{path}': no such folder \(and not a hub name such as "):
        locate(path)


def test_a_hub_name_is_downloaded_without_pickles(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **keys: asked.append((args, keys)) or str(tmp_path))
    assert locate("somebody/something") == tmp_path
    assert asked == [(("somebody/something",), {"allow_patterns": ["*.safetensors", "*.json", "*.txt", "*.model"]})]


@pytest.mark.parametrize(("error", "reason"), [(OSError("no network\nmore"), "no network"), (ValueError(), "ValueError")])
def test_a_model_that_cannot_be_downloaded_is_refused_in_one_line(monkeypatch, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError) as raised:
        locate("somebody/something")
    assert str(raised.value).startswith("model.path = 'somebody/something': no such folder, and it cannot be downloaded ")
    assert str(raised.value).endswith(f": {reason}")


@pytest.mark.parametrize(
    ("kind", "keys", "head", "intermediate"),
    [
        ("llama", {"head_dim": 16, "intermediate_size": 96}, 16, 96),
        ("gpt2", {"n_embd": 64}, 0, 256),  # it names neither
        ("gemma3n_text", {"intermediate_size": [96, 128], "num_hidden_layers": 2}, 256, 128),
        ("gemma4_text", {"head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 2, "intermediate_size": 96}, 32, 96),
    ],
)
def test_a_size_is_the_greatest_of_all_layers(kind, keys, head, intermediate):
    """Some configurations have lists of sizes, others refuse to name one if layers differ."""
    config = AutoConfig.for_model(kind, **keys)
    assert (size_of(config, "head_dim"), intermediate_size(config)) == (head, intermediate)
    assert size_of(config, "no_such_size", 3) == 3
