"""Recipes: defaults, overrides, and every mistake reported with its key and the nearest right name."""

import dataclasses
from pathlib import Path

import pytest
from support import ROOT

from es_lite.errors import UserError
from es_lite.recipe import Recipe
from es_lite.tables import ESTable, Group

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))

DEFAULTS = {
    "run": {
        "dir": "runs/mine",
        "seed": 0,
        "iterations": 100,
        "minutes": 0.0,
        "checkpoint_every": 0,
        "checkpoint_dtype": "bf16",
        "verify_every": 10,
    },
    "model": {"path": "some/model", "config": "", "code": ""},
    "data": {
        "path": "builtin:python-reference",
        "lines": 0,
        "samples": "joined",
        "tokenizer": "",
        "bos": "auto",
        "vocab_size": 8192,
        "system": "",
        "template": "",
        "chat": False,
        "options": {},
    },
    "fitness": {"kind": "logprob", "samples": 5000, "max_length": 256, "micro_batch": 16},
    "reward": {"functions": (), "weights": (), "seconds": 10.0},
    "generation": {"max_new_tokens": 128},
    "es": {
        "population": 30,
        "sigma": 1e-3,
        "alpha": 5e-4,
        "alpha_start": 5e-4,
        "shaping": "zscore",
        "baseline": "member",
        "scale": "standard",
        "antithetic": False,
        "alpha_decay": 1.0,
        "alpha_decay_every": 0,
        "sigma_decay": 1.0,
        "sigma_decay_every": 0,
        "weight_decay": 0.0,
        "anchor": 0.0,
        "groups": (),
    },
    "noise": {"kind": "gaussian", "rank": "auto", "shared": False},
    "workers": {"count": "auto", "threads": "auto", "deadline": 0.0, "compute": "auto", "device": "cpu"}
    | {"engine": "local", "address": "local", "hosts": 1, "host_dir": "~/.cache/es_lite/hosts"},
    "memory": {"limit": "", "weights": "bf16", "master": "fp32", "residency": "auto"},
    "eval": {"path": "", "fraction": 0.05, "every": 0, "samples": 64, "best": True},
    "log": {"tensorboard": True},
}


@pytest.fixture
def path(tmp_path) -> Path:
    """A recipe that sets nothing but the model."""
    path = tmp_path / "mine.toml"
    path.write_text('[model]\npath = "some/model"\n')
    return path


@pytest.fixture
def loads(path):
    """The recipe that `text` is, with a model if it gives none."""

    def loads(text: str, *overrides: str) -> Recipe:
        path.write_text(text if "[model" in text else '[model]\npath = "some/model"\n' + text)
        return Recipe.load(path, overrides)

    return loads


@pytest.fixture
def problems(path, loads):
    """The problems of a recipe, one line each."""

    def problems(text: str, *overrides: str) -> list[str]:
        with pytest.raises(UserError) as error:
            loads(text, *overrides)
        first, *lines = str(error.value).split("\n")
        assert first == f"{path}: {len(lines)} problem{'s' * (len(lines) > 1)}"
        assert all(line.startswith("  ") for line in lines)
        return [line[2:] for line in lines]

    return problems


def test_every_default(path):
    assert dataclasses.asdict(Recipe.load(path)) == DEFAULTS


def test_the_run_directory_is_named_after_the_recipe_unless_given(path, loads):
    assert Recipe.load(path).run.dir == "runs/mine"
    assert loads('[run]\ndir = "elsewhere"').run.dir == "elsewhere"


def test_every_key_can_be_set(loads):
    recipe = loads("""
        [model]
        config = "qwen3-0.5b"
        [data]
        tokenizer = "bpe"
        [es]
        population = 4
        sigma = 0.5
        antithetic = true
        groups = [{pattern = "embed", sigma = 2, alpha = 0.5}, {pattern = 'norm\\.weight$'}]
        [workers]
        count = 3
        threads = "auto"
        deadline = 5
        [memory]
        limit = "8 GiB"
    """)
    assert recipe.es.groups == (Group("embed", 2.0, 0.5), Group(r"norm\.weight$", 1.0, 1.0))
    assert (recipe.es.population, recipe.es.sigma, recipe.es.antithetic) == (4, 0.5, True)
    assert (recipe.workers.count, recipe.workers.threads, recipe.memory.limit) == (3, "auto", "8 GiB")
    assert recipe.workers.deadline == 5.0 and isinstance(recipe.workers.deadline, float)


def test_the_keys_of_rewards_can_be_set(loads):
    overrides = [
        "fitness.kind=reward",
        "data.path=builtin:countdown",
        "data.options.numbers=[3, 4]",
        'reward.functions=["m.f", "g.py:h"]',
        "reward.weights=[1, 0.5]",
    ]
    recipe = loads("[data.options]\ntrain = 9\n[generation]\nmax_new_tokens = 5\n[reward]\nseconds = 2", *overrides)
    assert recipe.data.options == {"train": 9, "numbers": [3, 4]}
    assert (recipe.reward.functions, recipe.reward.weights) == (("m.f", "g.py:h"), (1.0, 0.5))
    assert (recipe.reward.seconds, recipe.generation.max_new_tokens) == (2.0, 5)


def test_a_models_configuration_can_be_a_table(loads):
    recipe = loads('[model.config]\nmodel_type = "qwen3"\nhidden_size = 64\n[data]\ntokenizer = "bpe"')
    assert recipe.model.config == {"model_type": "qwen3", "hidden_size": 64}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[es]\nsgima = 1", 'es.sgima: unknown key; did you mean "sigma"?'),
        ("[es]\npopulaton = 2", 'es.populaton: unknown key; did you mean "population"?'),
        ("[run]\niteration = 2", 'run.iteration: unknown key; did you mean "iterations"?'),
        ("[fitnes]\nsamples = 2", 'fitnes: unknown table; did you mean "fitness"?'),
        ("[es]\ngroups = [{patern = 'x'}]", 'es.groups[0].patern: unknown key; did you mean "pattern"?'),
        ('[es]\nshaping = "ranks"', "es.shaping = 'ranks': expected 'zscore' or 'rank'; did you mean \"rank\"?"),
        (
            '[workers]\ncompute = "bf-16"',
            "workers.compute = 'bf-16': expected 'auto' or 'bf16' or 'fp32'; did you mean \"bf16\"?",
        ),
    ],
)
def test_the_error_for_a_wrong_name_suggests_the_nearest_right_one(problems, text, expected):
    assert problems(text) == [expected]


def test_the_error_for_a_name_like_no_other_lists_all(problems):
    assert problems("[log]\nxyzzy = 1") == ["log.xyzzy: unknown key; known here: tensorboard"]
    assert problems("[xyzzy]") == [f"xyzzy: unknown table; known here: {', '.join(DEFAULTS)}"]


def test_all_problems_are_reported_at_once(problems):
    found = problems("""
        [run]
        seed = -1
        iterations = "many"
        [es]
        sgima = 1
        alpha = -2
        shaping = "median"
        groups = [{pattern = "("}, {pattern = "x", sigma = -1}]
        [workers]
        count = 0
        [memory]
        limit = "much"
        [nose]
    """)
    keys = [line.partition(":")[0].partition(" = ")[0] for line in found]
    assert keys == [
        "run.seed",
        "run.iterations",
        "es.sgima",
        "es.alpha",
        "es.shaping",
        "es.groups[0].pattern",
        "es.groups[1].sigma",
        "workers.count",
        "memory.limit",
        "nose",
    ]


def test_all_contradictions_are_reported_at_once(problems):
    found = problems("""
        [model]
        path = "a"
        config = "qwen3-0.5b"
        [es]
        population = 5
        antithetic = true
        groups = [{sigma = 2.0}, {pattern = "x", sigma = 0}]
        [eval]
        every = 1
        fraction = 0
        [noise]
        rank = 2
    """)
    assert [line.partition(":")[0] for line in found] == [
        "model",
        "es.population = 5",
        "data.tokenizer",
        "es.groups[0].pattern",
        "es.groups[1]",
        "noise.rank = 2",
        "eval.fraction = 0",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[es]\npopulation = true", "es.population = True: expected a whole number"),
        ("[es]\npopulation = 4.0", "es.population = 4.0: expected a whole number"),
        ('[es]\npopulation = "4"', "es.population = '4': expected a whole number"),
        ('[es]\nsigma = "1e-3"', "es.sigma = '1e-3': expected \"auto\" or a number greater than 0"),
        ("[es]\nsigma = false", 'es.sigma = False: expected "auto" or a number greater than 0'),
        ("[es]\nantithetic = 1", "es.antithetic = 1: expected true or false"),
        ('[es]\nantithetic = "yes"', "es.antithetic = 'yes': expected true or false"),
        ("[es]\ngroups = 3", "es.groups = 3: expected a list"),
        ("[es]\ngroups = [3]", "es.groups[0]: expected a table, got 3"),
        ("[es]\nshaping = 1", "es.shaping = 1: expected 'zscore' or 'rank'"),
        ("[run]\ndir = 5", "run.dir = 5: expected a string"),
        ("[workers]\ncount = true", 'workers.count = True: expected "auto" or a whole number of at least 1'),
        ("[workers]\ncount = 1.5", 'workers.count = 1.5: expected "auto" or a whole number of at least 1'),
        ("[noise]\nrank = true", 'noise.rank = True: expected "auto" or a whole number of at least 1'),
        ("[noise]\nrank = 1.5", 'noise.rank = 1.5: expected "auto" or a whole number of at least 1'),
        ("[noise]\nkind = 1", "noise.kind = 1: expected 'gaussian' or 'rademacher' or 'lowrank'"),
        ("[memory]\nlimit = 8", "memory.limit = 8: expected a string"),
        ("[data]\ntokenizer = ['bpe']", "data.tokenizer = ['bpe']: expected a string"),
        ("[data]\noptions = 5", "data.options = 5: expected a table"),
        ("[data]\nchat = 1", "data.chat = 1: expected true or false"),
        ("[reward]\nfunctions = 'm.f'", "reward.functions = 'm.f': expected a list"),
        ("[reward]\nfunctions = [1]", "reward.functions[0] = 1: expected a string"),
        ("[reward]\nweights = [1, 'a']", "reward.weights[1] = 'a': expected a number"),
        ("[reward]\nweights = [1, inf]", "reward.weights[1] = inf: expected a finite number"),
        ("[generation]\nmax_new_tokens = 1.5", "generation.max_new_tokens = 1.5: expected a whole number"),
        ("es = 5", "es: expected a table, got 5"),
        ("[model]\nconfig = 5", "model.config = 5: expected a string or a table"),
    ],
)
def test_a_wrong_type_is_refused(problems, text, expected):
    text = text + "\n[model]\npath = 'x'" if text.startswith("es") else text
    assert problems(text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[es]\nsigma = 0", 'es.sigma = 0.0: expected "auto" or a number greater than 0'),
        ("[es]\nsigma = -0.001", 'es.sigma = -0.001: expected "auto" or a number greater than 0'),
        ("[es]\nsigma = nan", 'es.sigma = nan: expected "auto" or a number greater than 0'),
        ("[es]\nsigma = inf", 'es.sigma = inf: expected "auto" or a number greater than 0'),
        ("[es]\nalpha = 0", 'es.alpha = 0.0: expected "auto" or a number greater than 0'),
        ("[es]\nalpha = nan", 'es.alpha = nan: expected "auto" or a number greater than 0'),
        ("[es]\npopulation = 1", "es.population = 1: expected at least 2"),
        ("[es]\nalpha_decay = 0", "es.alpha_decay = 0.0: expected greater than 0 and at most 1"),
        ("[es]\nsigma_decay = 1.01", "es.sigma_decay = 1.01: expected greater than 0 and at most 1"),
        ("[es]\nalpha_decay_every = -1", "es.alpha_decay_every = -1: expected at least 0"),
        ("[es]\nweight_decay = -0.1", "es.weight_decay = -0.1: expected at least 0"),
        ("[es]\npopulation = 5\nantithetic = true", "es.population = 5: must be even with es.antithetic = true"),
        ("[es]\nalpha = 'automatic'", "es.alpha = 'automatic': expected \"auto\" or a number greater than 0"),
        ("[es]\nanchor = -1", "es.anchor = -1.0: expected at least 0"),
        (
            "[es]\nanchor = 0.1\nweight_decay = 0.1",
            "es.anchor and es.weight_decay: parameters can decay towards θ₀ or towards 0, not both; set one of them to 0",
        ),
        (
            "[es]\nbaseline = 'item'\nshaping = 'rank'",
            'es.baseline = "item": ranks do not depend on it; remove it, or set es.shaping = "zscore"',
        ),
        (
            "[es]\nbaseline = 'items'",
            "es.baseline = 'items': expected 'member' or 'item'; did you mean \"item\"?",
        ),
        (
            "[es]\nalpha_start = 0.1",
            'es.alpha_start = 0.1: only es.alpha = "auto" begins there; remove it, or set that',
        ),
        ("[es]\nalpha = 'auto'\nalpha_start = 0", "es.alpha_start = 0.0: expected greater than 0"),
        (
            "[es]\nalpha = 'auto'\nalpha_decay_every = 5",
            'es.alpha_decay_every = 5: es.alpha = "auto" has no decay of its own; remove it, or give a number',
        ),
        (
            "[es]\nsigma = 'auto'\nsigma_decay_every = 5",
            'es.sigma_decay_every = 5: es.sigma = "auto" has no decay of its own; remove it, or give a number',
        ),
        (
            "[es]\nalpha = 'auto'\n[fitness]\nsamples = 1",
            'fitness.samples = 1: es.alpha = "auto" compares samples with each other; take at least 2, or give a number',
        ),
        (
            "[es]\nalpha = 'auto'\nantithetic = true\npopulation = 2",
            'es.population = 2: es.alpha = "auto" needs at least 4 members; or give a number',
        ),
        (
            "[es]\nalpha = 'auto'\npopulation = 2",
            'es.population = 2: es.alpha = "auto" needs at least 3 members; or give a number',
        ),
        ("[run]\nseed = -1", "run.seed = -1: expected from 0 to 2**64 - 1"),
        (f"[run]\nseed = {2**64}", f"run.seed = {2**64}: expected from 0 to 2**64 - 1"),
        ("[run]\niterations = -1", "run.iterations = -1: expected at least 0"),
        ("[run]\nminutes = -0.5", "run.minutes = -0.5: expected at least 0"),
        ("[run]\ncheckpoint_every = -1", "run.checkpoint_every = -1: expected at least 0"),
        ("[fitness]\nsamples = 0", "fitness.samples = 0: expected at least 1"),
        ("[fitness]\nmax_length = 1", "fitness.max_length = 1: expected at least 2"),
        ("[fitness]\nmicro_batch = 0", "fitness.micro_batch = 0: expected at least 1"),
        ("[reward]\nseconds = 0", "reward.seconds = 0.0: expected greater than 0"),
        ("[generation]\nmax_new_tokens = 0", "generation.max_new_tokens = 0: expected at least 1"),
        ("[data]\nvocab_size = 256", "data.vocab_size = 256: expected at least 257"),
        ("[data]\nlines = -1", "data.lines = -1: expected at least 0"),
        ("[workers]\ncount = 0", 'workers.count = 0: expected "auto" or a whole number of at least 1'),
        ("[workers]\nthreads = 'all'", "workers.threads = 'all': expected \"auto\" or a whole number of at least 1"),
        (
            "[noise]\nkind = 'low-rank'",
            "noise.kind = 'low-rank': expected 'gaussian' or 'rademacher' or 'lowrank'; did you mean \"lowrank\"?",
        ),
        ("[noise]\nrank = 0", 'noise.rank = 0: expected "auto" or a whole number of at least 1'),
        ("[noise]\nkind = 'lowrank'\nrank = -1", 'noise.rank = -1: expected "auto" or a whole number of at least 1'),
        ("[noise]\nrank = 'one'", "noise.rank = 'one': expected \"auto\" or a whole number of at least 1"),
        ("[noise]\nrank = 1", 'noise.rank = 1: "gaussian" noise has no rank; remove it, or set noise.kind = "lowrank"'),
        (
            "[noise]\nkind = 'rademacher'\nrank = 4",
            'noise.rank = 4: "rademacher" noise has no rank; remove it, or set noise.kind = "lowrank"',
        ),
        ("[workers]\ndeadline = -1", "workers.deadline = -1.0: expected at least 0"),
        ("[memory]\nlimit = '0 GiB'", 'memory.limit = \'0 GiB\': expected a size such as "8 GiB" or "512 MiB", or "" for none'),
        ("[memory]\nlimit = 'lots'", 'memory.limit = \'lots\': expected a size such as "8 GiB" or "512 MiB", or "" for none'),
        ("[eval]\nfraction = 1.0", "eval.fraction = 1.0: expected at least 0 and less than 1"),
        ("[eval]\nsamples = 0", "eval.samples = 0: expected at least 1"),
        ("[es]\ngroups = [{pattern = '('}]", "es.groups[0].pattern = '(': expected a regular expression"),
        ("[es]\ngroups = [{pattern = ''}]", "es.groups[0].pattern = '': expected a regular expression"),
        ("[es]\ngroups = [{alpha = 2}]", "es.groups[0].pattern: missing"),
        ("[es]\ngroups = [{pattern = 'x', alpha = -1}]", "es.groups[0].alpha = -1.0: expected at least 0"),
        ("[es]\ngroups = [{pattern = 'x', sigma = nan}]", "es.groups[0].sigma = nan: expected a finite number"),
        (
            "[es]\ngroups = [{pattern = 'x', sigma = 0}]",
            "es.groups[0]: sigma = 0 leaves nothing to learn from; set alpha = 0 too, which freezes the group",
        ),
        (
            "[model]\npath = 'a'\nconfig = 'b'\n[data]\ntokenizer = 'bpe'",
            "model: give one of model.path and model.config, not both",
        ),
        ("[model]\n", "model: give one of model.path and model.config"),
        (
            "[model]\nconfig = 'qwen3-0.5b'",
            'data.tokenizer: a model made from model.config has none of its own; give "bpe", a folder or a hub name',
        ),
        (
            "[eval]\nevery = 2\nfraction = 0",
            "eval.fraction = 0: nothing is held out for eval.every; give eval.path or a fraction",
        ),
    ],
)
def test_an_impossible_value_is_refused(problems, text, expected):
    assert problems(text) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "[es]\npopulation = 2",
        "[es]\nalpha_decay = 1",
        "[es]\npopulation = 5",
        "[es]\ngroups = [{pattern = 'x', sigma = 0, alpha = 0}]",
        f"[run]\nseed = {2**64 - 1}",
        "[run]\niterations = 0",
        "[fitness]\nmax_length = 2",
        "[data]\nvocab_size = 257",
        "[noise]\nkind = 'rademacher'\nrank = 'auto'",
        "[eval]\nfraction = 0",
        "[eval]\nevery = 2\nfraction = 0\npath = 'held-out.txt'",
    ],
)
def test_values_at_the_edge_are_accepted(loads, text):
    loads(text)


@pytest.mark.parametrize(
    ("text", "kind", "rank"),
    [
        ("", "gaussian", 0),
        ("kind = 'rademacher'", "rademacher", 0),
        ("kind = 'lowrank'", "lowrank", 1),
        ("kind = 'lowrank'\nrank = 'auto'", "lowrank", 1),
        ("kind = 'lowrank'\nrank = 16", "lowrank", 16),
    ],
)
def test_only_low_rank_noise_has_a_rank(loads, text, kind, rank):
    """As a number: 0 stands for none."""
    noise = loads(f"[noise]\n{text}").noise
    assert (noise.kind, noise.rank_number) == (kind, rank)


@pytest.mark.parametrize(
    ("override", "table", "key", "value"),
    [
        ("es.sigma=2e-3", "es", "sigma", 2e-3),
        ("es.sigma = 2", "es", "sigma", 2.0),
        ("es.population=8", "es", "population", 8),
        ("es.antithetic=true", "es", "antithetic", True),
        ("es.shaping=rank", "es", "shaping", "rank"),
        ('es.shaping="rank"', "es", "shaping", "rank"),
        ("run.dir=runs/a=b", "run", "dir", "runs/a=b"),
        ("run.dir='5'", "run", "dir", "5"),
        ("memory.limit=8 GiB", "memory", "limit", "8 GiB"),
        ("memory.limit=", "memory", "limit", ""),
        ("workers.count=auto", "workers", "count", "auto"),
        ("workers.count=2", "workers", "count", 2),
        ('es.groups=[{pattern="norm", sigma=0.5}]', "es", "groups", (Group("norm", 0.5, 1.0),)),
        ("es.groups=[]", "es", "groups", ()),
    ],
)
def test_an_override(path, override, table, key, value):
    found = getattr(getattr(Recipe.load(path, [override]), table), key)
    assert found == value and type(found) is type(value)


def test_an_override_wins_over_the_file_and_a_later_one_over_an_earlier(loads):
    assert loads("[es]\nsigma = 0.5").es.sigma == 0.5
    assert loads("[es]\nsigma = 0.5", "es.sigma=0.25").es.sigma == 0.25
    assert loads("[es]\nsigma = 0.5", "es.sigma=0.25", "es.sigma=0.125").es.sigma == 0.125


def test_an_override_keeps_the_other_keys_of_its_table(loads):
    recipe = loads("[es]\nsigma = 0.5\npopulation = 4", "es.sigma=0.25")
    assert recipe.es.population == 4


@pytest.mark.parametrize("override", ["es.sigma", "sigma=1", "es.=1", "", "=", "es=1"])
def test_a_malformed_override_is_refused(problems, override):
    assert problems("", override) == [f"--set {override}: expected table.key=value, for instance es.sigma=2e-3"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("es.sgima=1", 'es.sgima: unknown key; did you mean "sigma"?'),
        ("foo.sigma=1", f"foo: unknown table; known here: {', '.join(DEFAULTS)}"),
        ("es.sigma=0", 'es.sigma = 0.0: expected "auto" or a number greater than 0'),
        ("es.sigma=nan", 'es.sigma = nan: expected "auto" or a number greater than 0'),
        ("es.sigma=small", "es.sigma = 'small': expected \"auto\" or a number greater than 0"),
        ("es.population=1_0.5", "es.population = 10.5: expected a whole number"),
        ("es.population=31.", "es.population = '31.': expected a whole number"),
    ],
)
def test_an_override_goes_through_the_same_checks(problems, override, expected):
    assert problems("", override) == [expected]


def test_problems_of_the_file_and_of_overrides_are_reported_together(problems):
    assert len(problems("[es]\nalpha = -1", "sigma", "es.population=1", "run.sed=1")) == 4


def test_a_file_that_is_not_toml_is_refused_by_name(path):
    path.write_text("[es\n")
    with pytest.raises(UserError, match="not valid TOML"):
        Recipe.load(path)
    path.write_bytes(b"# \xff\n")
    with pytest.raises(UserError, match=str(path)):
        Recipe.load(path)


def test_a_missing_recipe_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"absent\.toml: no such recipe"):
        Recipe.load(tmp_path / "absent.toml")
    with pytest.raises(UserError, match="cannot be read"):
        Recipe.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[es]\nsigma = 0.1\ngroups = [{pattern = 'a\\.b\"', sigma = 0, alpha = 0}, {pattern = 'c', alpha = 1e-30}]",
        f"[run]\nseed = {2**64 - 1}\ndir = 'ü \\ \" x'",
        "[model.config]\nmodel_type = 'qwen3'\nrope = {theta = 1e6, kinds = ['a', 'b']}\ntie = true\n[data]\ntokenizer = 'bpe'",
        "[workers]\ncount = 3\ndeadline = 0.30000000000000004",
        "[noise]\nkind = 'lowrank'\nrank = 3",
        "[data]\nsystem = 'a {b}'\ntemplate = '{q}'\nchat = true\noptions = {train = 3, numbers = [3, 4], whole = false}\n"
        "path = 'x.jsonl'\n[fitness]\nkind = 'reward'\n[reward]\nfunctions = ['a.b', 'c.py:d']\nweights = [1, -0.5]\nseconds = 2",
    ],
)
def test_a_dumped_recipe_loads_as_the_same(loads, tmp_path, text):
    recipe = loads(text)
    (tmp_path / "again.toml").write_text(recipe.dumps(), encoding="utf-8")
    assert Recipe.load(tmp_path / "again.toml") == recipe


def test_every_default_is_dumped(path):
    text = Recipe.load(path).dumps()
    for table, keys in DEFAULTS.items():
        assert f"[{table}]" in text
        assert all(f"\n{key} = " in text or f"\n[{table}.{key}]\n" in text for key in keys)


def test_changes_name_each_key_with_both_values(path, loads):
    old = Recipe.load(path)
    new = Recipe.load(path, ["es.sigma=0.5", "run.dir=b", 'es.groups=[{pattern="x"}]'])
    assert old.changes(new) == [
        "run.dir: 'runs/mine' -> 'b'",
        "es.sigma: 0.001 -> 0.5",
        "es.groups: () -> (Group(pattern='x', sigma=1.0, alpha=1.0),)",
    ]
    assert old.changes(Recipe.load(path)) == []


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_of_the_project_loads_and_says_its_command(file):
    assert file.read_text(encoding="utf-8").splitlines()[0] == f"# python -m es_lite.train recipes/{file.name}"
    assert Recipe.load(file).run.dir == f"runs/{file.stem}"


def test_there_are_recipes():
    assert {"quickstart", "qwen3_0p5b_cpu", "smollm2_adapt"} <= {file.stem for file in RECIPES}


def test_every_key_is_documented():
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert not [f"{table}.{key}" for table, keys in DEFAULTS.items() for key in keys if f"`{table}.{key}`" not in text]


def test_tables_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ESTable().sigma = 1.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.template={q}", 'data.template: only fitness.kind = "reward" uses it; remove it, or set that'),
        ("generation.max_new_tokens=4", 'generation.max_new_tokens: only fitness.kind = "reward" uses it'),
        ('reward.functions=["puzzle"]', 'reward.functions: only fitness.kind = "reward" uses it'),
    ],
)
def test_keys_that_only_rewards_use_are_refused_without_them(tmp_path, setting, message):
    path = tmp_path / "recipe.toml"
    path.write_text('[model]\npath = "folder"\n')
    with pytest.raises(UserError) as caught:
        Recipe.load(path, [setting])
    assert message in str(caught.value)
    assert Recipe.load(path, [setting, "fitness.kind=reward", "data.path=x.jsonl"]).fitness.kind == "reward"


@pytest.mark.parametrize("setting", ["data.lines=3", "data.samples=lines"])
def test_keys_that_only_text_uses_are_refused_with_rewards(tmp_path, setting):
    path = tmp_path / "recipe.toml"
    path.write_text('[model]\npath = "folder"\n')
    with pytest.raises(UserError, match=r'only fitness\.kind = "logprob" uses it'):
        Recipe.load(path, [setting, "fitness.kind=reward"])
    Recipe.load(path, [setting])
