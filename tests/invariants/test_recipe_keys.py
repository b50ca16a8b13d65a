"""Every key of a recipe does something: two of its values differ in the plan, the journal, the layers' files, the exports or the
metrics of a run of the real command; the few that cannot be shown so are listed with the reason."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w
from support import PROMPTS, RECIPE, REWARD_FUNCTIONS, TEXT, TINY, WRITER, digest, export_digest, metrics

from es_lite import train
from es_lite.fitness.kinds import fitness_of
from es_lite.model.origin import Origin
from es_lite.planning.plan import Plan
from es_lite.recipe import Recipe


class Probe(NamedTuple):
    value: Any
    """Differs from the base recipe's."""
    shows: str
    """The part of `Observed` that must differ."""
    base: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    """Other keys, "table.key", that both runs have."""


OTHER_TEXT = TEXT.replace("fox", "cat")
EVALUATED = {"eval.every": 1}
GROUPS = [{"pattern": "norm", "sigma": 0.5, "alpha": 2.0}]
LOW_RANK = {"noise.kind": "lowrank"}
NEAR, EVEN = "rewards.py:near", "rewards.py:even_format"
GENERATED = {
    "data.path": "prompts.jsonl",
    "reward.functions": [NEAR, EVEN],
    "generation.max_new_tokens": 4,
    "es.sigma": 0.1,
    "model.config": TINY | WRITER | {"vocab_size": 300},
}
REWARDED = GENERATED | {"fitness.kind": "reward"}
CHATTING = REWARDED | {"data.tokenizer": "chat-tokenizer", "fitness.max_length": 48}
PROBLEMS = {name: value for name, value in REWARDED.items() if name not in ("data.path", "reward.functions")} | {
    "data.path": "builtin:countdown",
    "data.tokenizer": "chat-tokenizer",
    "model.config": GENERATED["model.config"] | {"max_position_embeddings": 1024},
    "fitness.max_length": 1000,
}

PROBES = {
    "run.dir": Probe("elsewhere", "directory"),
    "run.seed": Probe(1, "journal"),
    "run.iterations": Probe(1, "journal"),
    "run.minutes": Probe(1e-6, "journal"),
    "run.checkpoint_every": Probe(2, "exports"),
    "run.checkpoint_dtype": Probe("fp32", "exports", {"run.checkpoint_every": 2}),
    "model.path": Probe("model", "journal"),
    "model.config": Probe(TINY | {"num_hidden_layers": 1}, "journal"),
    "model.code": Probe("code.py", "journal"),
    "data.path": Probe("other.txt", "journal"),
    "data.lines": Probe(30, "journal"),
    "data.samples": Probe("lines", "journal"),
    "data.tokenizer": Probe("tokenizer", "journal"),
    "data.bos": Probe("always", "journal", {"data.tokenizer": "chat-tokenizer", "model.config": TINY | {"vocab_size": 300}}),
    "data.vocab_size": Probe(280, "journal", {"model.config": TINY | {"vocab_size": 300}}),
    "data.system": Probe("Be brief.", "journal", CHATTING),
    "data.template": Probe("{wanted}?", "journal", REWARDED),
    "data.chat": Probe(True, "journal", CHATTING),
    "data.options": Probe({"train": 9, "largest": 20}, "journal", PROBLEMS | {"data.options": {"train": 9}}),
    "fitness.samples": Probe(3, "journal"),
    "fitness.max_length": Probe(16, "journal"),
    "fitness.micro_batch": Probe(4, "plan"),
    "reward.functions": Probe([NEAR], "journal", REWARDED),
    "reward.weights": Probe([1.0, 0.25], "journal", REWARDED),
    "generation.max_new_tokens": Probe(3, "journal", REWARDED),
    "es.population": Probe(6, "journal"),
    "es.sigma": Probe(1e-2, "journal"),
    "es.alpha": Probe(1e-2, "layers"),
    "es.alpha_start": Probe(1e-2, "layers", {"es.alpha": "auto"}),
    "es.baseline": Probe("item", "layers"),
    "es.anchor": Probe(0.5, "layers"),
    "es.shaping": Probe("rank", "layers"),
    "es.scale": Probe("nes", "layers"),
    "es.antithetic": Probe(False, "journal"),
    "es.alpha_decay": Probe(0.5, "layers", {"es.alpha_decay_every": 1}),
    "es.alpha_decay_every": Probe(1, "layers", {"es.alpha_decay": 0.5}),
    "es.sigma_decay": Probe(0.5, "journal", {"es.sigma_decay_every": 1}),
    "es.sigma_decay_every": Probe(1, "journal", {"es.sigma_decay": 0.5}),
    "es.weight_decay": Probe(0.1, "layers"),
    "es.groups": Probe(GROUPS, "layers"),
    "noise.kind": Probe("rademacher", "journal"),
    "noise.rank": Probe(2, "layers", LOW_RANK),
    "noise.shared": Probe(True, "layers"),
    "workers.count": Probe(2, "metrics"),
    "workers.threads": Probe(2, "plan"),
    "workers.compute": Probe("bf16", "journal"),
    "workers.device": Probe("torch", "plan"),
    "memory.limit": Probe("4 GiB", "plan"),
    "memory.weights": Probe("int8", "journal"),
    "memory.master": Probe("none", "layers"),
    "memory.residency": Probe("streamed", "plan"),
    "eval.path": Probe("other.txt", "journal", EVALUATED),
    "eval.fraction": Probe(0.5, "journal", EVALUATED),
    "eval.every": Probe(1, "metrics"),
    "eval.samples": Probe(1, "metrics", EVALUATED),
    "eval.best": Probe(False, "exports", EVALUATED),
}

FOUND = {"es.alpha": Probe("auto", "layers"), "es.sigma": Probe("auto", "journal", {"run.iterations": 3})}
"""Keys that also have a word for a value that is found."""

WITH_LOW_RANK = {
    "noise.kind": Probe("rademacher", "layers", LOW_RANK),
    "noise.shared": Probe(True, "layers", LOW_RANK),
    "es.groups": Probe(GROUPS, "layers", LOW_RANK),
    "es.scale": Probe("nes", "layers", LOW_RANK),
    "es.antithetic": Probe(False, "layers", LOW_RANK),
    "es.weight_decay": Probe(0.1, "layers", LOW_RANK),
}
"""Keys that also do something under low-rank noise, which is scored and applied by other code."""

WITH_REWARDS = {
    "run.seed": Probe(1, "journal", REWARDED),
    "data.path": Probe("other.jsonl", "journal", REWARDED),
    "fitness.samples": Probe(3, "journal", REWARDED),
    "fitness.micro_batch": Probe(1, "plan", REWARDED),
    "noise.kind": Probe("lowrank", "journal", REWARDED),
    "eval.path": Probe("other.jsonl", "metrics", REWARDED | EVALUATED),
    "eval.fraction": Probe(0.5, "journal", REWARDED | EVALUATED),
    "eval.samples": Probe(1, "metrics", REWARDED | EVALUATED | {"eval.fraction": 0.5}),
}
"""Keys that also do something for rewards on what the model writes."""

NOT_PROBED = {
    "fitness.kind": "its values need keys that the other refuses; each of them has probes",
    "reward.seconds": "shows only when a reward function hangs: bad_input/test_rewards.py has one that does",
    "workers.deadline": "shows only when a worker hangs: test_workers.py stops one",
    "workers.engine": "no bit may change: test_ray.py",
    "workers.address": "shows only where there is a cluster: test_ray.py starts one",
    "workers.hosts": "bad_input/test_hosts.py has fewer",
    "workers.host_dir": "shows only on other hosts: test_ray.py",
    "run.verify_every": "shows only if a host's weights are wrong: test_ray.py has one",
    "log.tensorboard": "shows only if the package is installed: test_metrics.py replaces it",
}


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a person could see of a run."""

    directory: str
    plan: str
    journal: bytes
    layers: dict[str, str]
    """SHA-256 of the layers' files."""
    exports: dict[str, str]
    """SHA-256 of the files of checkpoint/ and best/."""
    metrics: list[dict[str, Any]]
    """Without times and memory."""


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two texts, two files of prompts, which are texts too, and reward functions; from a run of the base recipe, a
    model and a tokenizer, and the latter with a chat template."""
    folder = tmp_path_factory.mktemp("materials")
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(OTHER_TEXT)
    (folder / "rewards.py").write_text(REWARD_FUNCTIONS)
    (folder / "code.py").write_text("")
    prompts = [{**row, "text": row["prompt"] * 9} for row in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "other.jsonl").write_text("".join(json.dumps(row | {"wanted": 77}) + "\n" for row in prompts))
    observe(folder, folder, {"run.dir": "made", "run.checkpoint_every": 1, "run.iterations": 1, "data.vocab_size": 270})
    (folder / "made/tokenizer").rename(folder / "tokenizer")
    shutil.copytree(folder / "tokenizer", folder / "chat-tokenizer")
    settings = folder / "chat-tokenizer/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": "<|endoftext|>"}))
    (folder / "chat-tokenizer/chat_template.jinja").write_text(
        "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}{% endfor %}"
    )
    observe(folder, folder, {"run.dir": "model-run", "run.checkpoint_every": 1, "run.iterations": 1})
    (folder / "model-run/checkpoint").rename(folder / "model")
    return folder


def observe(folder: Path, materials: Path, keys: dict[str, Any]) -> Observed:
    """Runs the command with the tiny recipe and `keys` in `folder`."""
    document = {name: dict(table) for name, table in RECIPE.items()}
    document["run"] |= {"dir": "run", "iterations": 2}
    document["data"]["path"] = "text.txt"
    document["workers"] |= {"count": 1, "compute": "fp32"}
    document["model"] = {"config": TINY | {"vocab_size": 300}}
    for key, value in keys.items():
        table, _, name = key.partition(".")
        document.setdefault(table, {})[name] = value
    if "path" in document["model"]:
        del document["model"]["config"]
    paths = ("data", "path"), ("data", "tokenizer"), ("model", "path"), ("model", "code"), ("eval", "path")
    for table, name in paths:
        value = document.get(table, {}).get(name)
        if value and value != "bpe" and not value.startswith("builtin:"):
            document[table][name] = str(materials / value)
    reward = document.get("reward", {})
    if "functions" in reward:
        reward["functions"] = [str(materials / name) for name in reward["functions"]]
    document["run"]["dir"] = str(folder / document["run"]["dir"])
    path = folder / "probe.toml"
    path.write_text(tomli_w.dumps(document))
    assert train.main([str(path)]) == 0
    run, recipe = Path(document["run"]["dir"]), Recipe.load(path)
    model, layout = Origin.of_recipe(recipe).skeleton()
    plan = Plan.of(recipe, fitness_of(recipe.fitness.kind), model.config, layout)
    varying = ("seconds", "gib", "per_second")
    return Observed(
        directory=str(run),
        plan=str((plan.execution, plan.memory, plan.limit.source, plan.passes)),
        journal=(run / "journal.jsonl").read_bytes(),
        layers={name: value for name, value in digest(run).items() if name != "journal.jsonl"},
        exports=export_digest(run),
        metrics=[{name: value for name, value in line.items() if not name.endswith(varying)} for line in metrics(run)],
    )


@pytest.fixture(scope="module")
def observed_with(materials: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs with the same keys are made once."""
    seen: dict[str, Observed] = {}

    def observe_once(keys: dict[str, Any]) -> Observed:
        name = json.dumps(keys, sort_keys=True)
        if name not in seen:
            seen[name] = observe(tmp_path_factory.mktemp("probe"), materials, keys)
        return seen[name]

    return observe_once


@pytest.mark.parametrize(
    ("key", "probe"),
    [*PROBES.items(), *FOUND.items(), *WITH_LOW_RANK.items(), *WITH_REWARDS.items()],
    ids=[
        *PROBES,
        *(f"{key} auto" for key in FOUND),
        *(f"{key} with low rank" for key in WITH_LOW_RANK),
        *(f"{key} with rewards" for key in WITH_REWARDS),
    ],
)
def test_a_key_changes_what_can_be_observed(key: str, probe: Probe, observed_with) -> None:
    before, after = observed_with(probe.base), observed_with(probe.base | {key: probe.value})
    assert getattr(before, probe.shows) != getattr(after, probe.shows)


def test_the_base_recipe_observed_twice_is_the_same(materials: Path, tmp_path: Path) -> None:
    """Or differences would mean nothing."""
    first, second = (observe(tmp_path, materials, {"run.dir": name, "eval.every": 1}) for name in ("one", "two"))
    for part in ("plan", "journal", "layers", "exports", "metrics"):
        assert getattr(first, part) == getattr(second, part), part


def test_a_rank_that_is_left_to_the_program_is_1(observed_with) -> None:
    given, left_out = observed_with(LOW_RANK | {"noise.rank": 1}), observed_with(LOW_RANK)
    assert (given.journal, given.layers) == (left_out.journal, left_out.layers)


def test_every_key_is_probed_or_listed() -> None:
    keys = {f"{table.name}.{key.name}" for table in dataclasses.fields(Recipe) for key in dataclasses.fields(table.type)}
    assert keys == PROBES.keys() | NOT_PROBED.keys()
    assert not PROBES.keys() & NOT_PROBED.keys()
