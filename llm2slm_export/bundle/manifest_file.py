"""Reading and writing manifest.json. It holds a digest of itself, and an altered file is refused."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llm2slm_export.bundle.manifest import MANIFEST_FILE, SCHEMA_VERSION, Manifest
from llm2slm_export.bundle.manifest_rules import manifest_problems, text_problems
from llm2slm_export.errors import BundleError
from llm2slm_export.files.bounded_json import MOST_BYTES, JsonError, parse_json
from llm2slm_export.files.regular_file import read_regular

_AGAIN = "copy the bundle again, or build it again"


_DIGEST = re.compile(rb'"digest":\s*"([0-9a-f]{64})"')


PROBLEMS_SHOWN = 10


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with the digest of its bytes. Returns the manifest with that digest."""
    undigested = manifest.model_copy(update={"digest": "0" * 64})
    text = undigested.model_dump_json(indent=1, exclude={"heads": {"__all__": {"digest"}}})
    content = stamped(text.encode() + b"\n")
    (directory / MANIFEST_FILE).write_bytes(content)
    found = _DIGEST.search(content)
    assert found is not None
    return manifest.model_copy(update={"digest": found.group(1).decode()})


def stamped(content: bytes) -> bytes:
    """The bytes of a manifest with its digest replaced by the correct one.

    Raises:
        ValueError: the bytes hold no digest.
    """
    found = _DIGEST.search(content)
    if found is None:
        raise ValueError("a manifest without a digest")
    return content[: found.start(1)] + _digest(content, found).encode() + content[found.end(1) :]


def _digest(content: bytes, place: re.Match[bytes]) -> str:
    """The SHA-256 of a manifest's bytes with zeros at the digest's `place`."""
    return hashlib.sha256(content[: place.start(1)] + b"0" * 64 + content[place.end(1) :]).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Read and validate the manifest. No other file is read.

    Raises:
        BundleError: there is no manifest, its schema is another one, it was altered, or fields are invalid (all of them
            named).
    """
    path = directory / MANIFEST_FILE
    content = _content(directory, path)
    try:
        raw = parse_json(content)
    except JsonError as error:
        raise BundleError(f"{path} is not JSON of a manifest.", str(error), remedy=_AGAIN) from error
    _check_schema(path, raw)
    _check_digest(path, content, raw)
    try:
        # Strict: a quoted number is not a number, and true is not 1.
        manifest = Manifest.model_validate_json(content, strict=True)
    except ValidationError as error:
        problems = [f"{ascii('.'.join(map(str, e['loc'])))[1:-1]}: {e['msg']}" for e in error.errors(include_url=False)]
        raise _unreadable(path, problems) from error
    if problems := [*text_problems(raw), *manifest_problems(manifest)]:
        raise _unreadable(path, problems)
    return manifest


def _content(directory: Path, path: Path) -> bytes:
    try:
        return read_regular(path, most_bytes=MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(
            f"{directory} is not a bundle: it has no {MANIFEST_FILE}.",
            remedy="give a directory that `llm2slm-export build` wrote",
        ) from error
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read.", error.strerror or str(error), remedy="check the path and its permissions"
        ) from error


def _unreadable(path: Path, problems: Sequence[str]) -> BundleError:
    more = [f"and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
    return BundleError(
        f"{path} is not a manifest this release can read.",
        *problems[:PROBLEMS_SHOWN],
        *more,
        remedy="build the bundle again",
    )


def _check_schema(path: Path, raw: Any) -> None:
    """Refuse a manifest of another schema version."""
    schema = raw.get("schema_version") if isinstance(raw, dict) else None
    if type(schema) is not int or schema == SCHEMA_VERSION:
        return
    if schema < SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {schema}; this release reads {SCHEMA_VERSION}.",
            "names of axes and fields have changed since",
            remedy="build the bundle again",
        )
    raise BundleError(
        f"{path} has schema version {schema}; this release reads up to {SCHEMA_VERSION}.",
        f"it was written by {_writer(raw)}",
        remedy="pip install --upgrade llm2slm-export",
    )


def _writer(raw: dict[str, Any]) -> str:
    versions = raw.get("tool_versions")
    version = versions.get("llm2slm-export") if isinstance(versions, dict) else None
    return version if isinstance(version, str) else "a newer release"


def _check_digest(path: Path, content: bytes, raw: Any) -> None:
    """Refuse a manifest that was altered or damaged after it was written."""
    digest = raw.get("digest") if isinstance(raw, dict) else None
    found = _DIGEST.search(content)
    if found is None or found.group(1).decode() != digest:
        raise BundleError(
            f"{path} has no digest of itself.",
            "expected digest: 64 hexadecimal digits after schema_version",
            remedy=_AGAIN,
        )
    if digest != (got := _digest(content, found)):
        raise BundleError(
            f"{path} is not what was written.", f"expected sha256 {digest[:16]}…, got {got[:16]}…", remedy=_AGAIN
        )
