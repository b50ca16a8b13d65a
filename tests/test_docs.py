"""What the pages say of recipes, metrics, the journal and the modules is true of the code, and complete."""

import dataclasses
import json
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, finished_run, write_recipe, write_reward_recipe
from test_floors import FLOORS

from es_lite.algorithm.noise import kinds as noise_kinds
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.algorithm.record import Record
from es_lite.fitness import kinds as fitness_kinds
from es_lite.model.origin import Origin
from es_lite.recipe import Recipe
from es_lite.runs.directory import CHANGEABLE
from es_lite.runs.journal import OTHER_KEYS

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def tables(page: str, section: str) -> list[list[list[str]]]:
    """The tables below a heading, without their header rows: cells of text."""
    below = re.split(rf"^#+ {re.escape(section)}$", read(page), flags=re.MULTILINE)
    assert len(below) == 2, f"{page} has no section {section!r}, or more than one"
    text = re.split(r"^#+ ", below[1], flags=re.MULTILINE)[0]
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]] for table in found]


def names(table: list[list[str]]) -> list[str]:
    """The first cells, without their backticks."""
    return [row[0].strip("| `") for row in table]


def keys() -> dict[str, tuple[Any, Any]]:
    """Type and default of each key of a recipe."""
    found = {}
    for table in dataclasses.fields(Recipe):
        hints = typing.get_type_hints(table.type)
        defaults = dataclasses.asdict(table.type())
        found |= {f"{table.name}.{name}": (hint, defaults[name]) for name, hint in hints.items()}
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the real command, with evaluations and code of its own, whose records have a rank, an anchor and estimates."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "own.py").write_text("")
    keys = {
        "model": {"code": str(folder / "own.py")},
        "eval": {"every": 1},
        "noise": {"kind": "lowrank"},
        "es": {"alpha": "auto", "anchor": 1.0},
    }
    return finished_run(write_recipe(folder, run={"iterations": 2}, **keys), folder / "run")


# docs/recipe.md


def test_every_key_of_a_recipe_is_documented_once_in_the_codes_order() -> None:
    (table,) = tables("docs/recipe.md", "Keys")
    assert names(table) == list(keys())


@pytest.mark.parametrize("key", keys())
def test_the_default_of_a_key_is_the_codes_and_its_choices_are_named(key: str) -> None:
    (table,) = tables("docs/recipe.md", "Keys")
    row = next(row for row in table if row[0].strip("| `") == key)
    hint, default = keys()[key]
    documented = tomllib.loads(f"value = {row[1].strip('`')}")["value"]
    assert documented == (list(default) if isinstance(default, tuple) else default)
    assert type(documented) is (list if isinstance(default, tuple) else type(default))
    if typing.get_origin(hint) is typing.Literal:
        assert [choice for choice in typing.get_args(hint) if f'"{choice}"' not in " ".join(row[1:])] == []


def test_what_may_change_on_resume_is_what_the_code_lets_change() -> None:
    (table,) = tables("docs/recipe.md", "What may change on --resume")
    assert sorted(names(table)) == sorted(CHANGEABLE)


def test_every_metric_is_documented_and_every_documented_metric_is_written(run: Path, tmp_path: Path) -> None:
    (table,) = tables("docs/recipe.md", "metrics.jsonl")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    recipe = write_reward_recipe(tmp_path, run={"iterations": 1}, eval={"every": 1})
    (tmp_path / "right.py").write_text("def accuracy(completions, **_):\n    return [1.0 for _ in completions]\n")
    functions = [str(tmp_path / "right.py") + ":accuracy", str(tmp_path / "rewards.py") + ":even_format"]
    rewarded = finished_run(recipe, tmp_path / "run", f"reward.functions={json.dumps(functions)}")
    lines += [json.loads(line) for line in (rewarded / "metrics.jsonl").read_text().splitlines()]
    on_several_machines = {"network_kib"}  # invariants/test_ray.py
    assert sorted(names(table)) == sorted(set().union(*lines) | on_several_machines)


@pytest.mark.parametrize(
    ("key", "known"),
    [("noise.kind", [*noise_kinds.FULL, LowRank.NAME]), ("fitness.kind", list(fitness_kinds.KNOWN))],
    ids=["noise", "fitness"],
)
def test_a_recipe_takes_the_kinds_that_the_code_knows(key: str, known: list[str]) -> None:
    assert sorted(typing.get_args(keys()[key][0])) == sorted(known)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_begins_with_the_command_that_runs_it(recipe: Path) -> None:
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# python -m es_lite.train recipes/{recipe.name}"
    Recipe.load(recipe)


# docs/journal.md


def test_every_key_of_the_journal_is_documented(run: Path) -> None:
    header, origin, record = tables("docs/journal.md", "journal.jsonl")
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert sorted([*names(header), "check"]) == sorted(lines[0])
    assert sorted(names(origin)) == sorted(lines[0]["origin"]) == sorted(Origin.__dataclass_fields__)
    assert sorted([*names(record), "check"]) == sorted(lines[1]) == sorted([*Record.__dataclass_fields__, *OTHER_KEYS, "check"])


# docs/design.md


def test_the_house_in_the_design_has_every_module_on_its_floor() -> None:
    numbers = {name: str(number) for number, floor in enumerate(FLOORS[:7], start=1) for name in floor}
    numbers |= dict.fromkeys(FLOORS[-1], "9") | {"hosts": "8", "runs": "1–4", "planning": "1–7"}
    expected = {}
    for path in (ROOT / "es_lite").rglob("*.py"):
        module = str(path.relative_to(ROOT / "es_lite"))
        if path.name != "__init__.py":
            expected[module] = numbers[module.partition("/")[0].removesuffix(".py")]
    (table,) = tables("docs/design.md", "The house")
    assert {row[1].strip("`"): row[0].strip("| ") for row in table} == expected


def test_every_test_of_an_invariant_is_in_the_design() -> None:
    files = [f"tests/invariants/{path.name}" for path in (ROOT / "tests" / "invariants").glob("test_*.py")]
    assert [file for file in files if f"`{file}`" not in read("docs/design.md")] == []


# All pages


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_has_no_gaps_and_its_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z]+@|TODO", text) == []
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert [anchor for anchor in re.findall(r"\]\(#([^)]+)\)", text) if anchor not in anchors] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    """In text, such as `tests/test_docs.py`; a path with capitals, `*` or `…` stands for several."""
    named = re.findall(r"`((?:es_lite|tests|tools|recipes|docs|benchmarks)/[a-z0-9_./]*)`", page.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []
