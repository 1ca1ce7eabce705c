"""Documents that cannot rot: links resolve, the commands CI runs are there, every module is on the map; the demo's size."""

import re
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

DOCUMENTS = sorted(
    p for p in REPOSITORY.rglob("*.md") if not {".venv", "runs", "node_modules"} & set(p.relative_to(REPOSITORY).parts)
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_relative_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("name", ["serve", "main", "test"])
def test_the_readme_holds_the_one_line_commands_that_ci_runs(name: str) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = re.search(rf"<!-- ci: {name} -->\n```bash\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    assert len(block[1].strip().splitlines()) == 1


def test_every_folder_is_on_the_map_and_every_file_named_exists() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = REPOSITORY / "llm2slm_export"
    folders = {path.parent for path in package.rglob("*.py")} - {package}
    assert [folder.name for folder in folders if f"`{folder.name}/`" not in text] == []
    files = {p.relative_to(REPOSITORY).as_posix() for top in (package, REPOSITORY / "tests") for p in top.rglob("*.py")}
    named = re.findall(r"`([\w/]+\.py)", text)
    assert named
    assert [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)] == []


def test_the_demo_stays_within_30_mb() -> None:
    places = (REPOSITORY / "compositions" / "tatoeba-en-fr", REPOSITORY / "engines" / "demo")
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6
