"""Messages on stderr and exit codes for failures: 0 success, 1 failure, 2 wrong usage, 130 interrupted.

A traceback is printed only with `LLM2SLM_TRACEBACK=1` in the environment.
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
# The parser handles these itself: usage, exit codes and messages.
_PASSED_ON: tuple[type[BaseException], ...] = (
    typer.Exit, typer.Abort, SystemExit, GeneratorExit, *(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"),
)  # fmt: skip


class Commands(TyperGroup):
    """A group of commands whose failures end in a message and an exit code, never in a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line, until all of standard output is written."""
        code: Any = 1
        try:
            terminal.prepare()
            return super().main(*args, **kwargs)
        except SystemExit as end:
            code = end.code
            raise
        except BaseException as error:  # noqa: BLE001 - nothing above this reports an error
            code = _report(error)
            raise SystemExit(code) from None
        finally:
            _end(code)

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and report what it raises."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except _PASSED_ON:
            raise
        except BaseException as error:  # noqa: BLE001 - the PanicException of Rust libraries is no Exception
            raise typer.Exit(_report(error)) from None
        return result


@contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """Report a disk that is full while `out` is written, whichever library raised the error.

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
            f"{shutil.disk_usage(place).free / 1e6:.0f} MB are free on the disk of {place}",
            f"{out} is unchanged",
            remedy="free some space, or give --out on another disk, and run again",
        ) from error


def _report(error: BaseException) -> int:
    """Print the error's message on stderr and return the exit code."""
    if os.environ.get(TRACEBACK, "0") not in {"", "0"}:
        _print_error("".join(traceback.format_exception(error)))
    if isinstance(error, Llm2SlmError):
        _show_misses(error)
        _print_error(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        _print_error("interrupted")
        return 130
    if isinstance(error, OSError):
        unwritten = terminal.unwritable(sys.stdout)
        _print_error(_unwritten_message(unwritten) if unwritten else _os_message(error))
    elif isinstance(error, MemoryError):
        _print_error(
            _message(
                "There is not enough memory.",
                str(error),
                remedy="reduce the batch size or the input, or use a machine with more memory",
            )
        )
    else:
        _print_error(_bug_message(error))
    return 1


def _end(code: Any) -> None:
    """Write the rest of standard output, and the note about characters that its encoding lacks.

    Raises:
        SystemExit: standard output cannot be written, and the command succeeded otherwise.
    """
    error = terminal.unwritable(sys.stdout) if sys.stdout is not None else None
    if error is not None:
        _print_error(_unwritten_message(error))
    elif note := terminal.lacking_note():
        _print_error(note)
    terminal.unwritable(sys.stderr)
    if error is not None and not code:
        raise SystemExit(1)


def _print_error(message: str) -> None:
    if not message:
        return
    with suppress(OSError):  # standard error is closed
        print(printable(message), file=sys.stderr, flush=True)


def _message(fact: str, *evidence: str, remedy: str) -> str:
    return str(Llm2SlmError(fact, *filter(None, evidence), remedy=remedy))


def _unwritten_message(error: OSError) -> str:
    """The message about standard output; empty if its reader has closed the pipe, which is no failure."""
    if error.errno == errno.EPIPE:
        return ""
    return _message(
        f"Standard output cannot be written: {error.strerror or error}.",
        remedy="free some space and run again"
        if error.errno == errno.ENOSPC
        else "redirect it elsewhere and run again",
    )


def _os_message(error: OSError) -> str:
    """The message about an error of the system; empty if the reader of standard output has closed the pipe."""
    if isinstance(error, BrokenPipeError) and not error.filename:
        return ""
    place = f": {error.filename}" if error.filename else ""
    remedy = "check the path and its permissions" if place else "check the command's input and output"
    if error.errno == errno.ENOSPC:
        remedy = "free some space on that disk, or on standard output's, and run again"
    return f"{error.strerror or error}{place}\n  → {remedy}"


def _bug_message(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    shown = first if len(first) <= _LONGEST else f"{first[: _LONGEST - 1]}…"
    return _message(
        f"An unexpected {type(error).__name__}: {shown}" if shown else f"An unexpected {type(error).__name__}.",
        "this is a bug in the program or in a library that it uses",
        remedy=f"run the command again with {TRACEBACK}=1 in the environment, and report the traceback",
    )


def _show_misses(error: Llm2SlmError) -> None:
    """Print the comparisons that missed their tolerance, if the error is a parity error."""
    from llm2slm_export.bundle.parity_report import ParityError
    from llm2slm_export.cli import console

    if not isinstance(error, ParityError):
        return
    console.console(stderr=True).print(console.parity_table(row for row in error.report.rows if not row.passed))
