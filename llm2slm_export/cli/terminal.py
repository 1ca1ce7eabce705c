"""The standard streams: characters that their encoding lacks, and streams that are closed or cannot be written."""

import codecs
import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import IO, TextIO

from llm2slm_export.errors import Llm2SlmError

# ASCII substitutes for the signs in the program's own messages and tables.
_SIGNS = {"→": "->", "…": "...", "–": "-", "≥": ">=", "≤": "<=", "×": "x"}
_lacking: set[str] = set()


def prepare() -> None:
    """Configure the standard streams so that no character ends a command. Called once, before anything is printed.

    Raises:
        Llm2SlmError: standard output is closed.
    """
    _lacking.clear()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    _reconfigure(sys.stderr, "llm2slm.signs")
    if sys.stdout is None:
        raise Llm2SlmError("Standard output is closed.", remedy="redirect it to a file, or to /dev/null")
    _reconfigure(sys.stdout, "llm2slm.counted")


def lacking_note() -> str | None:
    """A note about the characters that standard output's encoding lacked; None if it lacked none."""
    if not _lacking:
        return None
    codes = [f"U+{ord(character):04X}" for character in sorted(_lacking)]
    more = f" and {len(codes) - 5} more" if len(codes) > 5 else ""
    return (
        f"Standard output's encoding, {sys.stdout.encoding}, lacks {', '.join(codes[:5])}{more}. They are written as ASCII "
        "signs or \\ escapes.\n  → set PYTHONIOENCODING=utf-8"
    )


def is_unicode(stream: TextIO) -> bool:
    """Whether a stream's encoding has every character."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    return codecs.lookup(encoding).name.startswith("utf")


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """`warnings.showwarning` of the command line: a warning of this package is printed without its place in the code."""
    own = Path(filename).is_relative_to(Path(__file__).parents[1])
    text = f"Warning: {message}\n" if own else warnings.formatwarning(message, category, filename, lineno, line)
    stream = file or sys.stderr
    if stream is not None:
        stream.write(text)


def standard_input() -> IO[bytes]:
    """The bytes of standard input.

    Raises:
        Llm2SlmError: it is closed.
    """
    if sys.stdin is None:
        raise Llm2SlmError("Standard input is closed.", remedy="give prompts as arguments or with --file")
    return sys.stdin.buffer


@contextmanager
def stdout_to_stderr(wanted: bool) -> Iterator[None]:
    """Keep what libraries print out of the JSON on standard output."""
    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield


def unwritable(stream: TextIO) -> OSError | None:
    """Flush a standard stream, and return the error of a failure, after which the rest is dropped; None: all is written."""
    try:
        stream.flush()
    except OSError as error:
        _drop(stream)
        return error
    except ValueError:  # it is closed: nothing is left in it
        return None
    return None


def _drop(stream: TextIO) -> None:
    """Send the rest to the null device: the interpreter flushes once more when it ends."""
    with suppress(OSError, ValueError, io.UnsupportedOperation):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _reconfigure(stream: TextIO, errors: str) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=errors)


def _signs(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    written = (_SIGNS.get(character) or character.encode("ascii", "backslashreplace").decode() for character in lacking)
    return "".join(written), error.end


def _counted(error: UnicodeError) -> tuple[str, int]:
    if isinstance(error, UnicodeEncodeError):
        _lacking.update(error.object[error.start : error.end])
    return _signs(error)


codecs.register_error("llm2slm.signs", _signs)
codecs.register_error("llm2slm.counted", _counted)
