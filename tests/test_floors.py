"""The house: every module is on a floor and imports only from its own floor and those below; there are no circles."""

import ast
import graphlib
import re
from pathlib import Path

import pytest
from support import ROOT

FLOORS = (
    ("compiled", "errors", "files", "python_file", "quantities", "system", "terminal", "typed_toml", "watching"),
    ("algorithm",),
    ("data", "model", "recipe", "tables"),
    ("weights",),
    ("scoring",),
    ("fitness",),
    ("engine",),
    ("planning", "runs"),
    ("hosts",),
    ("evaluate", "evaluation", "plan", "replay", "run", "train", "__main__"),
)
"""docs/design.md numbers them from 1, without that of `runs` and `planning`, which have rules of their own below."""

OPTIONAL = {
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "latex2sympy2_extended",
    "math_verify",
    "matplotlib",
    "pyarrow",
    "reasoning_gym",
    "sympy",
    "tensorboard",
    "torch.utils.tensorboard",
    "trl",
}
"""Packages that are imported only where they are used."""


def modules() -> dict[str, Path]:
    """Path by name within the package: "weights.store"; a package's __init__ has the package's name."""
    found = {}
    for path in (ROOT / "es_lite").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / "es_lite").with_suffix("").parts)
        found[name.removesuffix(".__init__") if name != "__init__" else ""] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules of the package that `path` imports, anywhere in it, by their name within the package."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "es_lite" or name.startswith("es_lite."):
                inside = name.removeprefix("es_lite").removeprefix(".")
                while inside not in known:  # a name that a module defines
                    inside = inside.rpartition(".")[0]
                found.add(inside)
    return found


def floor(module: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if module.partition(".")[0] in names)


MODULES = sorted(name for name in modules() if name)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_on_a_floor_and_imports_nothing_from_above(module: str) -> None:
    own = floor(module)  # StopIteration: add it to FLOORS and to docs/design.md
    above = [other for other in imports(modules()[module]) if other and floor(other) > own]
    assert not above, f"{module} is on floor {own + 1} and imports {above}"


def test_the_package_itself_imports_nothing_of_its_own() -> None:
    assert imports(modules()[""]) == set()


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("runs")])
def test_runs_imports_only_the_first_four_floors_and_itself(module: str) -> None:
    foreign = [other for other in imports(modules()[module]) if other and floor(other) > 3 and not other.startswith("runs")]
    assert not foreign


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("planning")])
def test_planning_imports_neither_runs_nor_what_is_above(module: str) -> None:
    assert not [other for other in imports(modules()[module]) if other.startswith("runs") or (other and floor(other) > 7)]


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("hosts")])
def test_hosts_import_nothing_of_runs(module: str) -> None:
    assert not [other for other in imports(modules()[module]) if other.startswith("runs")]


def test_one_module_knows_ray() -> None:
    known = [name for name, path in modules().items() if re.search(r"^ *(import|from) ray\b", path.read_text(), re.MULTILINE)]
    assert known == ["hosts.cluster"]


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("algorithm")])
def test_the_algorithm_touches_no_file_process_or_model(module: str) -> None:
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not names & {"os", "pathlib", "subprocess", "multiprocessing", "transformers", "safetensors", "shutil"}


def test_there_is_no_circle() -> None:
    graph = {name: {other for other in imports(path) if other and other != name} for name, path in modules().items() if name}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_used(module: str) -> None:
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {node.module}
        else:
            continue
        assert not names & OPTIONAL, f"{module} imports {names & OPTIONAL} at its top"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_at_most_300_lines_and_says_what_it_is_for(module: str) -> None:
    text = modules()[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text))
