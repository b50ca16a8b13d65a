"""Recipes that are missing, not TOML, or ask for something impossible."""

from pathlib import Path

import pytest
from refusals import message_of, refused
from support import train, write_recipe


def test_all_mistakes_of_a_recipe_are_listed_at_once(tmp_path: Path) -> None:
    """Unknown tables and keys, wrong types, impossible values, each with what to do; by the command in a process of its own."""
    recipe = write_recipe(
        tmp_path, es={"sigmma": 1e-3, "alpha": "fast", "population": 3}, fittness={"samples": 4}, noise={"kind": "gausian"}
    )
    finished = train(recipe, tmp_path / "run", "workers.cont=2", "es.sigma=0")
    message = message_of(finished.err)
    assert finished.code == 2
    assert f"{recipe}: 6 problems" in message
    assert 'es.sigmma: unknown key; did you mean "sigma"?' in message
    assert "es.alpha = 'fast': expected \"auto\" or a number greater than 0" in message
    assert 'fittness: unknown table; did you mean "fitness"?' in message
    assert "noise.kind = 'gausian': expected 'gaussian' or 'rademacher' or 'lowrank'; did you mean \"gaussian\"?" in message
    assert 'workers.cont: unknown key; did you mean "count"?' in message
    assert 'es.sigma = 0.0: expected "auto" or a number greater than 0' in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("es.sigma=-1e-3", "es.sigma = -0.001"),
        ("es.sigma=nan", "es.sigma = nan"),
        ("es.alpha=inf", "es.alpha = inf"),
        ("es.alpha=1" + "0" * 400, "es.alpha = inf"),
        ("es.alpha=" + "1" * 5000, "es.alpha = '1111"),
        ("es.population=1", "es.population = 1"),
        ("es.population=5", "es.population = 5: must be even with es.antithetic"),
        ("es.population=true", "es.population = True"),
        ("es.population=4.5", "es.population = 4.5"),
        ("es.alpha_decay=0", "es.alpha_decay = 0.0"),
        ("es.shaping=rnk", "es.shaping = 'rnk'"),
        ("run.seed=-1", "run.seed = -1"),
        ("run.seed=18446744073709551616", "run.seed = 18446744073709551616"),
        ("run.iterations=-1", "run.iterations = -1"),
        ("run.minutes=-1", "run.minutes = -1.0"),
        ("run.minutes=soon", "run.minutes = 'soon'"),
        ("fitness.samples=0", "fitness.samples = 0"),
        ("fitness.max_length=1", "fitness.max_length = 1"),
        ("fitness.micro_batch=0", "fitness.micro_batch = 0"),
        ("noise.kind=low_rank", "noise.kind = 'low_rank'"),
        ("noise.rank=0", "noise.rank = 0"),
        ("noise.rank=1.5", 'noise.rank = 1.5: expected "auto" or a whole number of at least 1'),
        ("noise.rank=one", "noise.rank = 'one'"),
        ("noise.rank=2", 'noise.rank = 2: "gaussian" noise has no rank; remove it'),
        ("data.vocab_size=256", "data.vocab_size = 256"),
        ("workers.count=0", "workers.count = 0"),
        ("workers.count=many", "workers.count = 'many'"),
        ("workers.device=tpu", "workers.device = 'tpu'"),
        ("memory.limit=lots", "memory.limit = 'lots'"),
        ("eval.fraction=1", "eval.fraction = 1.0"),
        ('es.groups=[{pattern="("}]', "es.groups[0].pattern = '('"),
        ('es.groups=[{patern="mlp"}]', "es.groups[0].patern"),
        ("model.path=some/model", "model: give one of model.path and model.config, not both"),
        ("model.config=qwen3-1b", "model.config = 'qwen3-1b'"),
        ("data.tokenizer=", "data.tokenizer"),
        ("es=3", "--set es=3"),
        ("es.sigma", "--set es.sigma"),
    ],
)
def test_impossible_values_are_refused_by_name(recipe: Path, tmp_path: Path, override: str, named: str) -> None:
    assert named in refused(recipe, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_missing_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/gone.toml: no such recipe" in refused(tmp_path / "gone.toml", tmp_path / "run")


@pytest.mark.parametrize("content", [b"[es\nsigma = 1", b"\xff\xfe", b"\x7fELF\0\0"])
def test_a_recipe_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_bytes(content)
    assert f"{recipe}: not valid TOML" in refused(recipe, tmp_path / "run")


def test_a_recipe_that_is_a_folder_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}: cannot be read" in refused(tmp_path, tmp_path / "run")


def test_a_group_that_matches_no_parameter_is_refused(recipe: Path, tmp_path: Path) -> None:
    message = refused(recipe, tmp_path / "run", 'es.groups=[{pattern = "norms", sigma = 0, alpha = 0}]')
    assert "es.groups[0].pattern = 'norms': matches no parameter" in message
    assert not (tmp_path / "run").exists()


def test_an_override_inside_something_that_is_not_a_table_is_refused(recipe: Path, tmp_path: Path) -> None:
    overrides = ("model.config=qwen3-0.5b", "model.config.hidden_size=32")
    assert "config is not a table" in refused(recipe, tmp_path / "run", *overrides)


def test_a_rank_that_a_matrix_is_too_small_for_is_refused(recipe: Path, tmp_path: Path) -> None:
    """The matrix is named with its shape, and so is what to change."""
    message = refused(recipe, tmp_path / "run", "noise.kind=lowrank", "noise.rank=17")
    assert "noise.rank = 17: model.layers.0.self_attn.k_proj.weight is 16 x 32, so its noise has a rank of at most 16" in message
    assert "lower noise.rank, or freeze this tensor with es.groups" in message
    assert not (tmp_path / "run").exists()


def test_low_rank_noise_without_a_matrix_to_perturb_is_refused(recipe: Path, tmp_path: Path) -> None:
    groups = 'es.groups=[{pattern="norm"}, {pattern="proj|embed", sigma=0, alpha=0}]'
    message = refused(recipe, tmp_path / "run", "noise.kind=lowrank", groups)
    assert 'noise.kind = "lowrank": the model has no matrix that is perturbed (es.groups may freeze them all)' in message
    assert 'set noise.kind = "gaussian"' in message
    assert not (tmp_path / "run").exists()
