"""Checks of a bundle's files: paths inside the bundle, sizes, hashes, and the graphs' external data."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from llm2slm_export.bundle.external_data import OnnxError, external_data
from llm2slm_export.bundle.manifest import MANIFEST_FILE, FileEntry, GraphEntry
from llm2slm_export.files.regular_file import open_regular

MOST_PATH = 512


def path_problem(path: str) -> str | None:
    """The reason why a manifest's path is invalid or leaves the bundle; None if it is valid."""
    pure = PurePosixPath(path)
    if not path or len(path) > MOST_PATH or not path.isprintable() or "\\" in path:
        return "is not the path of a file"
    if pure.is_absolute() or ".." in pure.parts:
        return "leaves the bundle"
    if pure.as_posix() != path or path == ".":
        return f"is not written in its shortest form, {pure.as_posix()!r}"
    return None


def file_problems(directory: Path, files: Iterable[FileEntry]) -> list[str]:
    """Problems of a bundle's files, one line each: missing, outside the bundle, wrong size, wrong hash."""
    top = directory.resolve()
    return [f"{entry.path}: {problem}" for entry in files if (problem := _problem(top, entry)) is not None]


def graph_problems(directory: Path, graphs: Iterable[GraphEntry]) -> list[str]:
    """Graphs whose external data differs from their manifest entry, one line each.

    Args:
        directory: of a bundle without `file_problems`.
    """
    # The encoder is an entry of every head: check it once.
    different = dict.fromkeys((graph.file, graph.data) for graph in graphs)
    problems = (_data_problem(directory, file, data) for file, data in different)
    return [problem for problem in problems if problem is not None]


def _problem(top: Path, entry: FileEntry) -> str | None:
    try:
        path = (top / entry.path).resolve(strict=True)
        if not path.is_relative_to(top):
            return "is a link that leaves the bundle"
        with open_regular(path) as file:
            size = file.seek(0, 2)
            if size != entry.bytes:
                return f"expected {entry.bytes} bytes, got {size}"
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if digest != entry.sha256:
        return f"expected sha256 {entry.sha256[:16]}…, got {digest[:16]}…"
    return None


def _data_problem(directory: Path, file: str, data: Sequence[str]) -> str | None:
    try:
        named = external_data(directory / file)
    except OnnxError as error:
        return f"{file} is not an ONNX model: {error}"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror or error}"
    beside = PurePosixPath(file).parent
    # Names that are not in their shortest form stay as written and never match: `./x` would name the same file as `x`.
    read = {(beside / name).as_posix() if path_problem(name) is None else name for name in named}
    unlisted, unread = sorted(read - set(data)), sorted(set(data) - read)
    if unlisted:
        return f"{file} reads weights from {', '.join(map(repr, unlisted[:3]))}, which is not in its `data`"
    if unread:
        return f"{file} reads nothing from {', '.join(map(repr, unread[:3]))}, which is in its `data`"
    return None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def graph_digest(graph: GraphEntry, hashes: Mapping[str, str]) -> str:
    """A SHA-256 over a graph's file and its external data files.

    Args:
        hashes: the SHA-256 of each of the bundle's files, by path.
    """
    return hashlib.sha256("".join(hashes[file] for file in (graph.file, *graph.data)).encode()).hexdigest()


def file_entries(directory: Path) -> tuple[FileEntry, ...]:
    """Every file of a directory except the manifest, with its size and hash, sorted by path."""
    return tuple(
        FileEntry(path=path.relative_to(directory).as_posix(), bytes=path.stat().st_size, sha256=sha256(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    )
