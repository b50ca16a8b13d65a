"""What README.md says of the project's shape is true."""

import re

import pytest
from support import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree_in_readme() -> dict[str, str]:
    """The comment of each path in the tree that README prints; folders have a trailing slash."""
    block = re.search(r"```text\n(es_lite/\n.*?)```", README, re.DOTALL)
    assert block, "README.md has no tree of es_lite/"
    comments, folders = {}, []
    for line in block[1].splitlines():
        name, _, comment = line.partition("#")
        depth = (len(name) - len(name.lstrip())) // 2
        path = "".join(folders[:depth]) + name.strip()
        if path.endswith("/"):
            folders[depth:] = [name.strip()]
        comments[path] = comment.strip()
    return comments


def test_the_tree_in_the_readme_is_the_package() -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "es_lite").rglob("*.py") if path.name != "__init__.py"}
    assert {path for path in tree_in_readme() if path.endswith(".py")} == modules


def test_everything_in_the_tree_exists_and_every_module_has_a_comment() -> None:
    tree = tree_in_readme()
    assert [path for path in tree if not (ROOT / path).exists()] == []
    assert [path for path, comment in tree.items() if path.endswith(".py") and not comment] == []


def test_every_recipe_is_in_the_readme() -> None:
    assert [path.name for path in (ROOT / "recipes").glob("*.toml") if path.name not in README] == []


@pytest.mark.parametrize("target", ["train", "test"])
def test_the_two_commands_of_the_readme_are_in_the_makefile(target: str) -> None:
    assert re.search(rf"^make {target}\b", README, re.MULTILINE)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_commands_of_the_readme_are_those_of_es_lite() -> None:
    from es_lite.__main__ import COMMANDS

    assert set(re.findall(r"\bes-lite (\w+) (?:RECIPE|runs/NAME)", README)) == COMMANDS.keys()
