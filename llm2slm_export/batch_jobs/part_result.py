"""The rows of a part that is answered, as the lines of its file, and their counts."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_REASONS = 5  # kept of each part, for messages


@dataclass
class Tally:
    """Counts of answered rows.

    Args:
        rows: number of rows, of which `failed` have no response.
        prompt_tokens, new_tokens: number of tokens of the prompts and of the responses.
        reasons: the first reasons of failed rows, with their indices.
    """

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    reasons: list[str] = field(default_factory=list)

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Count a row."""
        self.rows += 1
        if "error" in row:
            self.failed += 1
            if len(self.reasons) < _REASONS:
                self.reasons.append(f"row {row['index']}: {row['error']}")
            return
        self.prompt_tokens += row["prompt_tokens"]
        self.new_tokens += sum(response["new_tokens"] for response in row.get("responses", (row,)))

    def add(self, other: "Tally") -> None:
        """Count another tally's rows."""
        self.rows += other.rows
        self.failed += other.failed
        self.prompt_tokens += other.prompt_tokens
        self.new_tokens += other.new_tokens
        self.reasons = [*self.reasons, *other.reasons][:_REASONS]


@dataclass(frozen=True)
class PartResult:
    """A part that is answered.

    Args:
        number: the part's.
        content: its file's.
    """

    number: int
    content: bytes
    tally: Tally


def part_result(number: int, rows: Iterable[Mapping[str, Any]]) -> PartResult:
    """The result of a part's rows, in the input's order."""
    lines, tally = [], Tally()
    for row in rows:
        tally.add_row(row)
        lines.append(json.dumps(row, ensure_ascii=False))
    # In JSON the escape of a lone surrogate, which an identifier may have, is the one that backslashreplace writes.
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
    return PartResult(number, content, tally)
