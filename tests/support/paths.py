"""Directories of the repository that tests read."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "engines" / "demo"
DEMO_COMPOSITION = REPOSITORY / "compositions" / "tatoeba-en-fr"
RECIPES = REPOSITORY / "recipes"
