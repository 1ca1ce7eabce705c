"""`recipes`: list, print and copy the recipes that come with the package."""

import itertools
import re
from pathlib import Path
from typing import Annotated

import typer

from llm2slm_export.cli import console

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of a recipe, from `recipes ls`.")]

LIST_EXAMPLES = "llm2slm-export recipes ls"
SHOW_EXAMPLES = "llm2slm-export recipes show tatoeba-en-fr"
COPY_EXAMPLES = "llm2slm-export recipes cp tatoeba-en-fr my-pair.yaml"
EXAMPLES = "\n".join((LIST_EXAMPLES, SHOW_EXAMPLES, COPY_EXAMPLES))


def list_recipes() -> None:
    """List the recipes, with the first sentence of each."""
    from llm2slm_export.authoring import recipe_file

    rows = ((path.stem, _first_sentence(path)) for path in recipe_file.list_recipes())
    console.console().print(console.Table(None, ("recipe", "description"), rows))


def show_recipe(
    name: NameArgument,
) -> None:
    """Print a recipe."""
    from llm2slm_export.authoring.recipe_file import find_recipe

    print(find_recipe(name).read_text(encoding="utf-8"), end="")


def copy_recipe(
    name: NameArgument,
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="DEST", help="File or directory to copy to (default: <name>.yaml, here)."),
    ] = None,
) -> None:
    """Copy a recipe to edit it."""
    from llm2slm_export.authoring.recipe_file import find_recipe

    source = find_recipe(name)
    target = destination or Path(source.name)
    target = target / source.name if target.is_dir() else target
    from llm2slm_export.authoring.artifacts import RECIPE
    from llm2slm_export.files.atomic import Replacement
    from llm2slm_export.files.names import safe_name

    # The copy is a pair of its own, with directories of its own name.
    text = re.sub(
        r"^name: .*$",
        f"name: {safe_name(target.stem)}",
        source.read_text(encoding="utf-8"),
        count=1,
        flags=re.MULTILINE,
    )
    with Replacement(target, RECIPE, option="DEST").written() as new:
        new.write_text(text, encoding="utf-8")
    from llm2slm_export.cli.next_command import after_copying

    print(f"Next: edit {target}, then llm2slm-export {after_copying(target)}")


def _first_sentence(path: Path) -> str:
    """The first sentence of the comment at a recipe's top."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.lstrip("# ").strip() for line in lines)
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
