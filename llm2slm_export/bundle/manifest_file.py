"""Reading and writing manifest.json. It holds a digest of itself, and an altered file is refused."""

import hashlib
import re
from pathlib import Path
from typing import Any

from llm2slm_export.bundle.manifest import MANIFEST_FILE, SCHEMA_VERSION, Manifest
from llm2slm_export.bundle.manifest_rules import manifest_problems, text_problems
from llm2slm_export.errors import BundleError
from llm2slm_export.files.bounded_json import MOST_BYTES
from llm2slm_export.files.json_format import JsonFormat
from llm2slm_export.files.regular_file import read_regular

_AGAIN = "copy the bundle again, or build it again"
_FORMAT = JsonFormat(
    "a manifest", Manifest, BundleError, if_damaged=_AGAIN, if_invalid="build the bundle again",
    version_field="schema_version", newest=SCHEMA_VERSION, strict=True,
)  # fmt: skip
_DIGEST = re.compile(rb'"digest":\s*"([0-9a-f]{64})"')


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
        BundleError: there is no manifest, its schema is another one, it was altered, or fields are invalid (the first ten are
            named, the rest are counted).
    """
    path = directory / MANIFEST_FILE
    content = _content(directory, path)
    raw = _FORMAT.parse(path, content)
    _refuse_older(path, raw)
    _check_digest(path, content, raw)
    manifest = _FORMAT.validate(path, content)
    if problems := [*text_problems(raw), *manifest_problems(manifest)]:
        raise _FORMAT.invalid(path, problems)
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


def _refuse_older(path: Path, raw: Any) -> None:
    schema = _FORMAT.version(raw)
    if schema is not None and schema < SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {schema}; this release reads {SCHEMA_VERSION}.",
            "axis and field names have changed since that version",
            remedy="build the bundle again",
        )


def _check_digest(path: Path, content: bytes, raw: Any) -> None:
    """Refuse a manifest that was altered or damaged after it was written."""
    digest = raw.get("digest") if isinstance(raw, dict) else None
    found = _DIGEST.search(content)
    if found is None or found.group(1).decode() != digest:
        raise BundleError(
            f"{path} has no valid digest.",
            "expected digest: 64 hexadecimal digits after schema_version",
            remedy=_AGAIN,
        )
    if digest != (got := _digest(content, found)):
        raise BundleError(
            f"{path} has changed since it was written.",
            f"expected sha256 {digest[:16]}…, got {got[:16]}…",
            remedy=_AGAIN,
        )
