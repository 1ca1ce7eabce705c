"""How a failure becomes a message on stderr and an exit code: 0 ok, 1 it failed, 2 wrong usage, 130 interrupted."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from llm2slm_export.errors import Llm2SlmError, ParityError

FULL_DISK = os.strerror(errno.ENOSPC)


class Commands(TyperGroup):
    """A group of commands in which nothing a user can cause shows a traceback; a bug still does."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except Llm2SlmError as error:
            if isinstance(error, ParityError):
                _show_misses(error)
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BrokenPipeError:
            # The reader has gone: nothing to say, and nothing more to flush when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            _fail(_os_message(error), 1)
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


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(code) from None


def _os_message(error: OSError) -> str:
    place = f": {error.filename}" if error.filename else ""
    remedy = "free some space and run again" if error.errno == errno.ENOSPC else "check the path and its permissions"
    return f"{error.strerror or error}{place}\n  → {remedy}"


def _show_misses(error: ParityError) -> None:
    """The comparisons that missed their tolerance."""
    from llm2slm_export import render

    render.console(stderr=True).print(render.parity_table(row for row in error.report.rows if not row.passed))
