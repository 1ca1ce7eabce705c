"""The files of a bundle on disk: inside it, as listed, and nothing besides. It opens no graph and no tokenizer."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from llm2slm_export.onnx_data import OnnxError, external_data
from llm2slm_export.regular_file import open_regular

if TYPE_CHECKING:
    from llm2slm_export.bundle import FileEntry, GraphEntry

MOST_PATH = 512


def path_problem(path: str) -> str | None:
    """Why a manifest's path is not one of a file inside the bundle; None where it is."""
    pure = PurePosixPath(path)
    if not path or len(path) > MOST_PATH or not path.isprintable() or "\\" in path:
        return "is not the path of a file"
    if pure.is_absolute() or ".." in pure.parts:
        return "leaves the bundle"
    if pure.as_posix() != path or path == ".":
        return f"is not written in its shortest form, {pure.as_posix()!r}"
    return None


def file_problems(directory: Path, files: Iterable["FileEntry"]) -> list[str]:
    """What is wrong with a bundle's files, one line each: missing, outside, of another size or content."""
    top = directory.resolve()
    return [f"{entry.path}: {problem}" for entry in files if (problem := _problem(top, entry)) is not None]


def graph_problems(directory: Path, graphs: Mapping[str, "GraphEntry"]) -> list[str]:
    """Where graphs read other files than the manifest says that they do, one line each.

    Args:
        directory: of a bundle whose files have no problems.
        graphs: by what they are to be called.
    """
    return [
        f"{name}: {problem}"
        for name, graph in graphs.items()
        if (problem := _data_problem(directory / graph.file, graph)) is not None
    ]


def _problem(top: Path, entry: "FileEntry") -> str | None:
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


def _data_problem(path: Path, graph: "GraphEntry") -> str | None:
    try:
        named = external_data(path)
    except OnnxError as error:
        return f"{graph.file} is not an ONNX model: {error}"
    beside = PurePosixPath(graph.file).parent
    # As they are written: `./x` and `x` are one file to a runtime, and would be two here.
    read = {(beside / name).as_posix() if path_problem(name) is None else name for name in named}
    unlisted, unread = sorted(read - set(graph.data)), sorted(set(graph.data) - read)
    if unlisted:
        return f"{graph.file} reads weights from {', '.join(map(repr, unlisted[:3]))}, which is not in its `data`"
    if unread:
        return f"{graph.file} reads nothing from {', '.join(map(repr, unread[:3]))}, which is in its `data`"
    return None
