"""What several commands print with: the console, tables, progress and sizes. rich is loaded when something is printed."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self, TextIO

from llm2slm_export.cli.terminal import is_unicode
from llm2slm_export.contract import LLM_HEAD
from llm2slm_export.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.progress import TaskID
    from rich.table import Table as RichTable

    from llm2slm_export.bundle.manifest import Manifest
    from llm2slm_export.bundle.parity_report import ParityRow
    from llm2slm_export.evaluation.report import BreakEven


def console(*, stderr: bool = False) -> "Console":
    """A console on stdout or stderr, as wide as the terminal. Without a terminal no line is wrapped or padded."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    terminal = stream.isatty()
    return Console(
        stderr=stderr, highlight=False, markup=False, force_terminal=terminal, soft_wrap=not terminal,
        width=_width(stream) if terminal else None, height=25 if terminal else None,  # rich ignores one without the other
    )  # fmt: skip


def _width(terminal: TextIO) -> int:
    """The width by COLUMNS or the terminal. rich itself takes 80 where TERM is dumb or unknown."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(terminal.fileno()).columns or 80
    except OSError:
        return 80


class Table:
    """A title and rows of cells: columns that fit the terminal's width, or, without a terminal, tabs between cells.

    Args:
        columns: the names of the columns; None: the rows are names and values.
        right: the indices of right-aligned columns.
    """

    def __init__(
        self,
        title: str | None,
        columns: Sequence[str] | None,
        rows: Iterable[Sequence[object]],
        *,
        right: Sequence[int] = (),
    ) -> None:
        self._title, self._columns, self._right = title, columns, right
        self._rows = [[printable(str(cell)) for cell in row] for row in rows]

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """The lines, as rich asks for them."""
        from rich.segment import Segment
        from rich.text import Text

        title = [] if self._title is None else [printable(self._title)]
        if options.is_terminal:
            yield from (Text(line, style="bold") for line in title)
            yield self._columned()
            return
        named = [] if self._columns is None else [self._columns]
        escapes = str.maketrans({"\t": "\\t", "\n": "\\n"})
        for line in (*title, *("\t".join(cell.translate(escapes) for cell in row) for row in (*named, *self._rows))):
            yield Segment(f"{line}\n")

    def _columned(self) -> "RichTable":
        from rich.table import Table as RichTable
        from rich.text import Text

        made = RichTable(box=None, pad_edge=False, show_header=self._columns is not None)
        for number in range(max(map(len, [*self._rows, self._columns or ()]), default=0)):
            name = self._columns[number] if self._columns is not None else ""
            made.add_column(name, justify="right" if number in self._right else "left", overflow="fold")
        for row in self._rows:
            made.add_row(*map(Text, row))
        return made


def size(count: float) -> str:
    """A number of bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def print_json(value: Any) -> None:
    """Print one JSON value on one line of stdout, with \\u escapes if its encoding lacks characters."""
    print(json.dumps(value, ensure_ascii=not is_unicode(sys.stdout)), flush=True)


class StageLog:
    """Progress of a build: one line per completed stage with time and size, and a spinner on a terminal."""

    def __init__(self, to: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = to
        self._status = to.status("") if to.is_terminal else None
        self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._task = self._bar.add_task("", total=None)
        self.stages: list[dict[str, Any]] = []

    def start(self, name: str) -> None:
        if self._status is not None:
            self._status.update(f"{name} …")
            self._status.start()

    def step(self, phase: str, done: int, of: int) -> None:
        """Show the progress of a compiler phase in the current stage."""
        if self._status is not None:
            self._bar.update(self._task, description=phase, completed=done, total=of or None)
            self._status.update(self._bar)

    def done(self, name: str, seconds: float, count: int | None) -> None:
        self.stop()
        self.stages.append({"name": name, "seconds": round(seconds, 3), "bytes": count})
        took, made = f"{seconds:.1f} s", size(count) if count is not None else ""
        if self._console.is_terminal:
            self._console.print(f"{name:<32}{took:>10}{made:>12}".rstrip())
        else:
            self._console.print(Table(None, None, [(name, took, made) if made else (name, took)]))

    def stop(self) -> None:
        if self._status is not None:
            self._status.stop()


class WorkLog:
    """Progress of training or an evaluation: one line per task as it begins, and a progress bar on a terminal."""

    def __init__(self, to: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = to
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=to,
            transient=True, disable=not to.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, what: str, total: int | None = None) -> None:
        """Begin a task of `total` steps; None: their number is unknown."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._bar.start()
        self._task = self._bar.add_task(what, total=total)
        self._console.print(f"{what} …")

    def advance(self, count: int) -> None:
        """Count further steps as done."""
        if self._task is not None:
            self._bar.advance(self._task, count)


def parity_table(rows: "Iterable[ParityRow]") -> Table:
    """The comparisons with the reference, with their tolerances."""
    return Table(
        "Parity with the composition",
        ("graph", "case", "tensor", "measure", "value", "tolerance", "ok"),
        ((r.graph, r.case, r.tensor, r.measure, f"{r.value:.3g}", f"{r.tolerance:.3g}", "yes" if r.passed else "NO") for r in rows),
        right=(4, 5),
    )  # fmt: skip


def break_even_line(entry: "BreakEven") -> str:
    """A system's speed beside the pair's, and the response lengths at which the pair is faster."""
    return f"Against {entry.against}: {entry.speed_up_per_token:.2f} times its speed per token; {_faster(entry)}."


def _faster(entry: "BreakEven") -> str:
    if entry.never:
        return "slower end to end at every response length"
    if entry.last is not None:
        return f"faster end to end up to {entry.last} tokens"
    return (
        "faster end to end at every response length"
        if entry.first == 1
        else f"faster end to end from {entry.first} tokens on"
    )


def untrained_effect(manifest: "Manifest") -> str:
    """What an untrained head does, as the end of a sentence."""
    if manifest.fusion == "add" and manifest.tokenizer.strategy == "shared":
        return "the LLM adds nothing until `train` has run"
    if manifest.head == LLM_HEAD:
        return "the LLM has random weights"
    return "its projector has random weights"


def facts_table(facts: Iterable[tuple[str, object]]) -> Table:
    return Table(None, None, facts)
