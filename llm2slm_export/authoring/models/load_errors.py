"""Exceptions of transformers' loaders, and of the libraries under them, as `CompositionError`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2slm_export.authoring.models.aliases import hub_id
from llm2slm_export.errors import CompositionError, Llm2SlmError

_LONGEST = 300  # characters of a library's message


@contextmanager
def explained(name: str, what: str = "model", remedy: str | None = None) -> Iterator[None]:
    """Turn whatever the block raises into an error that names the model.

    transformers' loaders raise OSError and ValueError, and whatever the libraries under them raise: ImportError for a quantiser
    that is not installed, RuntimeError for a table of another size, UnpicklingError, KeyError, tokenizers' plain Exception and
    its PanicException, which is a BaseException.

    Args:
        name: a hub id, an alias, a local directory or a model type.
        what: `model`, `tokenizer` or `configuration`.
        remedy: what to do; None: by where the model was looked for.

    Raises:
        CompositionError: the block raised.
    """
    try:
        yield
    except (Llm2SlmError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise load_failure(name, error, what, remedy) from error


def load_failure(name: str, error: BaseException, what: str = "model", remedy: str | None = None) -> CompositionError:
    """The error of a model, tokenizer or configuration that a library could not load."""
    known, directory = hub_id(name), Path(name)
    if what == "configuration":
        evidence = []
    elif directory.is_dir():
        evidence = [f"looked in {directory.absolute()}"]
        remedy = remedy or f"check the {what}'s files there: they must be whole, and of one model"
    else:
        evidence = [f"not a local directory: {directory.absolute()}"]
    return CompositionError(
        f"The {what} {name!r} cannot be loaded" + (f" (hub id {known})." if known != name else "."),
        *evidence,
        _first_line(error),
        remedy=remedy
        or "check the name and the network, give a local directory, or try --random-weights for a dry run of an architecture",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # One that ends in a colon says nothing without the next.
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    said = line if isinstance(error, OSError | ValueError) and line else f"{type(error).__name__}: {line}".rstrip(": ")
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}…"
