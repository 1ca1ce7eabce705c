"""How a failure becomes a message on stderr and an exit code: 0 ok, 1 it failed, 2 wrong usage, 130 interrupted.

No traceback is printed, whatever was raised, unless the environment has `LLM2SLM_TRACEBACK=1`.
"""

import errno
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from llm2slm_export.cli import terminal
from llm2slm_export.errors import Llm2SlmError, printable

FULL_DISK = os.strerror(errno.ENOSPC)
TRACEBACK = "LLM2SLM_TRACEBACK"
_LONGEST = 300  # characters of an unexpected exception's message
# The parser's own, which it turns into usage, exit codes and messages itself.
_PASSED_ON: tuple[type[BaseException], ...] = (
    typer.Exit, typer.Abort, SystemExit, GeneratorExit, *(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"),
)  # fmt: skip


class Commands(TyperGroup):
    """A group of commands that end in a message and an exit code, never in a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line, from the arguments to the last character of standard output."""
        code: Any = 1
        try:
            terminal.prepare()
            return super().main(*args, **kwargs)
        except SystemExit as end:
            code = end.code
            raise
        except BaseException as error:  # noqa: BLE001 - the last place where one can be told of
            code = _told(error)
            raise SystemExit(code) from None
        finally:
            _end(code)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except _PASSED_ON:
            raise
        except BaseException as error:  # noqa: BLE001 - PanicException of Rust's libraries is no Exception
            raise typer.Exit(_told(error)) from None
        return result


@contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """Say so when the disk is full while `out` is written, whichever library ran into it and whatever it raised.

    Raises:
        Llm2SlmError: the disk is full.
    """
    try:
        yield
    except Llm2SlmError:
        raise
    except Exception as error:
        if FULL_DISK not in str(error):
            raise
        place = next((parent for parent in out.absolute().parents if parent.exists()), Path("/"))
        raise Llm2SlmError(
            f"{FULL_DISK} while writing {out}.",
            f"{shutil.disk_usage(place).free / 1e6:.0f} MB are free where {place} is",
            f"what was at {out} before is as it was; nothing half-written has taken its name",
            remedy="free some space, or give --out on another disk, and run again",
        ) from error


def _told(error: BaseException) -> int:
    """Say on stderr what happened; the exit code."""
    if os.environ.get(TRACEBACK, "0") not in {"", "0"}:
        _tell("".join(traceback.format_exception(error)))
    if isinstance(error, Llm2SlmError):
        _show_misses(error)
        _tell(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        _tell("interrupted")
        return 130
    if isinstance(error, OSError):
        unwritten = terminal.unwritable(sys.stdout)
        _tell(_unwritten_message(unwritten) if unwritten else _os_message(error))
    elif isinstance(error, MemoryError):
        _tell(_message("There is not enough memory.", str(error), remedy="give it less at once, or more memory"))
    else:
        _tell(_bug_message(error))
    return 1


def _end(code: Any) -> None:
    """Write what is left, and the note on what standard output could not show.

    Raises:
        SystemExit: standard output cannot be written, after a command that otherwise went well.
    """
    error = terminal.unwritable(sys.stdout) if sys.stdout is not None else None
    if error is not None:
        _tell(_unwritten_message(error))
    elif note := terminal.lacking_note():
        _tell(note)
    terminal.unwritable(sys.stderr)
    if error is not None and not code:
        raise SystemExit(1)


def _tell(message: str) -> None:
    if not message:
        return
    with suppress(OSError):  # nobody reads it
        print(printable(message), file=sys.stderr, flush=True)


def _message(fact: str, *evidence: str, remedy: str) -> str:
    return str(Llm2SlmError(fact, *filter(None, evidence), remedy=remedy))


def _unwritten_message(error: OSError) -> str:
    """Empty where the reader has gone: that is no failure to tell of."""
    if error.errno == errno.EPIPE:
        return ""
    return _message(
        f"Standard output cannot be written: {error.strerror or error}.",
        remedy="free some space and run again"
        if error.errno == errno.ENOSPC
        else "send it somewhere else and run again",
    )


def _os_message(error: OSError) -> str:
    """Empty where the reader of standard output has gone."""
    if isinstance(error, BrokenPipeError) and not error.filename:
        return ""
    place = f": {error.filename}" if error.filename else ""
    remedy = (
        "check the path and its permissions" if place else "check where the input and the output of the command are"
    )
    if error.errno == errno.ENOSPC:
        remedy = "free some space, there or where standard output goes, and run again"
    return f"{error.strerror or error}{place}\n  → {remedy}"


def _bug_message(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    shown = first if len(first) <= _LONGEST else f"{first[: _LONGEST - 1]}…"
    return _message(
        f"An unexpected {type(error).__name__}: {shown}" if shown else f"An unexpected {type(error).__name__}.",
        "this is a fault of the program, or of a library that it calls",
        remedy=f"run the same with {TRACEBACK}=1 in the environment, and report what it prints",
    )


def _show_misses(error: Llm2SlmError) -> None:
    """Print the comparisons that missed their tolerance, if the error is about such."""
    from llm2slm_export.bundle.parity_report import ParityError
    from llm2slm_export.cli import console

    if not isinstance(error, ParityError):
        return
    console.console(stderr=True).print(console.parity_table(row for row in error.report.rows if not row.passed))
