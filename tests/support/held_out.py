"""The demo's held-out sentences."""

from tests.support.paths import REPOSITORY


def prompts() -> list[str]:
    """500 English sentences of the demo's test split: none is in a training row."""
    lines = (REPOSITORY / "tests" / "data" / "held_out.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[0] for line in lines]
