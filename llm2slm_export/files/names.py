"""Names of pairs. They are also directory names, so they contain no path separators and do not begin with a dot."""

import re
from pathlib import Path

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"


def safe_name(text: str) -> str:
    """A name that matches `NAME`: other characters of `text` become hyphens."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-")[:200]
    return kept or "pair"


def joined_name(llm: str, slm: str) -> str:
    """The name of a pair of two models, given as aliases, hub ids or directories."""
    return safe_name(f"{Path(llm).name}_{Path(slm).name}")
