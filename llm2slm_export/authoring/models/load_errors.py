"""Conversion of exceptions from transformers' loaders and their dependencies to `CompositionError`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2slm_export.authoring.models.aliases import hub_id
from llm2slm_export.errors import CompositionError, Llm2SlmError

_LONGEST = 300  # characters kept of a library's message


@contextmanager
def explained(name: str, what: str = "model", remedy: str | None = None) -> Iterator[None]:
    """Convert any exception of the block to an error that names the model.

    transformers' loaders raise OSError and ValueError. Their dependencies raise ImportError (a quantizer that is not
    installed), RuntimeError (a table of another size), UnpicklingError, KeyError, tokenizers' plain Exception and its
    PanicException, which is a BaseException.

    Args:
        name: a hub id, an alias, a local directory or a model type.
        what: `model`, `tokenizer` or `configuration`.
        remedy: None: derived from where the model was looked for.

    Raises:
        CompositionError: the block raised an exception.
    """
    try:
        yield
    except (Llm2SlmError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise load_failure(name, error, what, remedy) from error


def load_failure(name: str, error: BaseException, what: str = "model", remedy: str | None = None) -> CompositionError:
    """The error for a model, tokenizer or configuration that failed to load."""
    known, directory = hub_id(name), Path(name)
    if what == "configuration":
        evidence = []
    elif directory.is_dir():
        evidence = [f"looked in {directory.absolute()}"]
        remedy = remedy or f"check the {what}'s files there: they must be complete, and of one model"
    else:
        evidence = [f"not a local directory: {directory.absolute()}"]
    return CompositionError(
        f"The {what} {name!r} cannot be loaded" + (f" (hub id {known})." if known != name else "."),
        *evidence,
        _first_line(error),
        remedy=remedy
        or "check the name and the network, give a local directory, or use --random-weights for a dry run of an architecture",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A first line that ends in a colon needs the second line.
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    text = line if isinstance(error, OSError | ValueError) and line else f"{type(error).__name__}: {line}".rstrip(": ")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
