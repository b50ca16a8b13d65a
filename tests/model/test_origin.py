"""What a journal's header says of the model and the meaning of its records, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import pytest
from architectures import COMMON
from support import write_recipe

from es_lite.algorithm.jit import Threads
from es_lite.errors import UserError
from es_lite.model.layout import Factors
from es_lite.model.origin import Origin
from es_lite.model.random_weights import Random
from es_lite.recipe import Recipe

CONFIG = {"model_type": "qwen3", **COMMON, "tie_word_embeddings": True}
ORIGIN = Origin("", CONFIG, 5, (Factors("norm", 0.5, 2.0), Factors("mlp", 0.0, 0.0)), False, False, "bf16")
JOURNAL = Path("run/journal.jsonl")


def header_of(origin: Origin) -> dict:
    """As it comes back from a journal's line."""
    model, layout = origin.skeleton()
    return json.loads(json.dumps(origin.header(layout, origin.source(model, layout, Threads(1)))))


@pytest.fixture(scope="module")
def header() -> dict:
    return header_of(ORIGIN)


def check(origin: Origin, header: dict) -> None:
    model, layout = origin.skeleton()
    origin.check(header, JOURNAL, layout, origin.source(model, layout, Threads(1)))


# From a recipe


def test_the_origin_of_a_recipe(tmp_path):
    groups = [{"pattern": "norm", "sigma": 0.5, "alpha": 2.0}, {"pattern": "mlp", "sigma": 0.0, "alpha": 0.0}]
    tables = {"run": {"seed": 7}, "es": {"groups": groups, "scale": "nes"}, "noise": {"shared": True}}
    memory = {"master": "none", "weights": "int8"}
    recipe = Recipe.load(write_recipe(tmp_path, model={"config": CONFIG}, memory=memory, **tables))
    groups = (Factors("norm", 0.5, 2.0), Factors("mlp", 0.0, 0.0))
    assert Origin.of_recipe(recipe) == Origin("", CONFIG, 7, groups, True, True, "int8")


@pytest.mark.parametrize(
    ("memory", "storage"),
    [
        ({}, "fp32"),
        ({"weights": "int8"}, "fp32"),
        ({"master": "none"}, "bf16"),
        ({"master": "none", "weights": "int8"}, "int8"),
    ],
    ids=str,
)
def test_updates_are_applied_to_the_master_if_there_is_one(tmp_path, memory, storage):
    assert Origin.of_recipe(Recipe.load(write_recipe(tmp_path, memory=memory))).storage == storage


# Its model


def test_the_model_of_an_origin_has_its_groups():
    model, layout = ORIGIN.skeleton()
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert {tensor.sigma_factor for tensor in layout.tensors} == {0.5, 0.0, 1.0}
    assert isinstance(ORIGIN.source(model, layout, Threads(1)), Random)


def test_nes_and_shared_noise_reach_the_layout():
    origin = dataclasses.replace(ORIGIN, nes=True, shared_noise=True)
    _, layout = origin.skeleton()
    assert {tensor.coefficient_factor for tensor in layout.tensors} == {4.0, 0.0, 1.0}
    assert len({tensor.number for tensor in layout.tensors}) == len({tensor.shape for tensor in layout.tensors})


def test_the_generation_settings_of_a_models_folder_are_kept(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    origin = dataclasses.replace(ORIGIN, path=str(tmp_path), config="")
    assert origin.skeleton()[0].generation_config.top_k != 7
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 7, "do_sample": True}))
    assert origin.skeleton()[0].generation_config.top_k == 7


@pytest.mark.parametrize("damaged", ["[]", "{", "null", '{"top_k": {'])
def test_generation_settings_that_are_damaged_are_left_out_with_a_warning(tmp_path, capsys, damaged):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "generation_config.json").write_text(damaged)
    dataclasses.replace(ORIGIN, path=str(tmp_path), config="").skeleton()
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path}/generation_config.json cannot be used (")


# The header


def test_a_header_is_read_back(header):
    assert Origin.of_header(header, JOURNAL) == ORIGIN


def test_the_header_identifies_the_model_by_its_structure_and_its_weights(header):
    model, layout = ORIGIN.skeleton()
    fingerprint = {"structure": layout.structure(), "weights": ORIGIN.source(model, layout, Threads(1)).fingerprint()}
    assert header["fingerprint"] == fingerprint


def test_reading_a_header_does_not_change_it(header):
    before = json.dumps(header)
    Origin.of_header(header, JOURNAL)
    assert json.dumps(header) == before


def test_a_header_from_before_there_were_other_storages_means_fp32(header):
    older = {**header, "origin": {key: value for key, value in header["origin"].items() if key != "storage"}}
    assert Origin.of_header(older, JOURNAL) == dataclasses.replace(ORIGIN, storage="fp32")


def test_an_unknown_key_is_refused_by_name(header):
    newer = {**header, "origin": header["origin"] | {"rank": 4, "adapter": "lora"}}
    message = rf"^{JOURNAL}: its origin has adapter, rank, which this version of es_lite does not know"
    with pytest.raises(UserError, match=message):
        Origin.of_header(newer, JOURNAL)
    with pytest.raises(UserError, match=message):
        check(ORIGIN, newer)


# Checking


def test_the_same_origin_passes(header):
    check(ORIGIN, header)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": CONFIG | {"hidden_size": 32}}, "tensors of other names or shapes"),
        ({"config": CONFIG | {"tie_word_embeddings": False}}, "tensors of other names or shapes"),
        ({"config": CONFIG | {"model_type": "llama"}}, "tensors of other names or shapes"),
        ({"seed": 6}, "the same shapes, but different values"),
        ({"config": CONFIG | {"initializer_range": 0.03}}, "the same shapes, but different values"),
    ],
    ids=["size", "untied", "type", "seed", "initial range"],
)
def test_another_model_is_refused(header, changes, words):
    message = rf"^{JOURNAL}: this is the journal of another model \({words}\); provide the model that the run started from$"
    with pytest.raises(UserError, match=message):
        check(dataclasses.replace(ORIGIN, **changes), header)


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": ()},
        {"groups": ORIGIN.groups[::-1]},
        {"groups": (Factors("norm", 0.5, 1.0), ORIGIN.groups[1])},
        {"nes": True},
        {"storage": "fp32"},
        {"storage": "int8"},
    ],
    ids=["no groups", "another order", "another factor", "nes", "fp32", "int8"],
)
def test_records_that_would_mean_something_else_are_refused(header, changes):
    with pytest.raises(UserError, match=rf"^{JOURNAL}: was written with another es\.groups, es\.scale, .*restore the recipe's$"):
        check(dataclasses.replace(ORIGIN, **changes), header)


def test_shared_noise_is_refused_as_another_structure(header):
    """It changes the tensors' numbers, and so the structure."""
    with pytest.raises(UserError, match=rf"^{JOURNAL}: this is the journal of another model"):
        check(dataclasses.replace(ORIGIN, shared_noise=True), header)


def test_the_same_model_by_another_name_passes(header, tmp_path):
    """The fingerprint counts, not where the recipe takes the model from."""
    (tmp_path / "same.json").write_text(json.dumps(CONFIG))
    check(dataclasses.replace(ORIGIN, config=str(tmp_path / "same.json")), header)
