"""What README.md says of the project's shape is true."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def tree_in_readme() -> set[str]:
    """Paths of the tree that README prints, folders with a trailing slash."""
    block = re.search(r"```text\nes_lite/\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block, "README.md has no tree of es_lite/"
    paths, folder = set(), ""
    for line in block[1].splitlines():
        name = line.split("#")[0].strip()
        if not name:
            continue
        inside = line.startswith("      ")
        folder = folder if inside else name if name.endswith("/") else ""
        paths.add(folder + name if inside else name)
    return paths


def test_the_tree_in_the_readme_is_the_package():
    package = ROOT / "es_lite"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert {path for path in tree_in_readme() if path.endswith(".py")} == modules


def test_modules_stay_small():
    assert {path.name: n for path in ROOT.glob("es_lite/**/*.py") if (n := len(path.read_text().splitlines())) > 310} == {}


def test_every_recipe_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "recipes").glob("*.toml") if path.name not in text] == []


def test_every_key_of_a_recipe_is_documented():
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    tables = tomllib.loads(dumped_defaults())
    assert [f"{table}.{key}" for table, keys in tables.items() for key in keys if f"`{table}.{key}`" not in text] == []


def dumped_defaults() -> str:
    from es_lite import recipe

    return recipe.dumps(recipe.Recipe())


def test_floors_are_kept():
    """algorithm imports nothing of the project; nothing imports a floor above its own."""
    floors = ["algorithm", "weights", "scoring", "workers"]
    wrong = []
    for level, floor in enumerate(floors):
        for path in (ROOT / "es_lite" / floor).glob("*.py"):
            imported = re.findall(r"^\s*from es_lite\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            above = [name for name in imported if name in floors[level + 1 :] or name in ("train", "plan")]
            if floor == "algorithm":
                above = imported_outside(path)
            wrong += [f"{path.name} imports {name}" for name in above]
    assert wrong == []


def imported_outside(path: Path) -> list[str]:
    names = re.findall(r"^\s*from es_lite(?:\.(\w+))?", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for name in names if name != "algorithm"]


def test_pages_have_no_gaps_and_their_links_lead_somewhere():
    wrong = []
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        wrong += [f"{page.name}: {gap}" for gap in re.findall(r"@[A-Z]+@|TODO", text)]
        links = re.findall(r"\]\(([^)#]+)\)", text)
        wrong += [f"{page.name}: {link}" for link in links if "://" not in link and not (page.parent / link).exists()]
    assert wrong == []
