"""The manifest as a file: what it says of itself, and what is refused on reading."""

import hashlib
import json
from pathlib import Path

import pytest

from llm2slm_export.bundle.manifest import MANIFEST_FILE
from llm2slm_export.bundle.manifest_file import read_manifest, stamped, write_manifest
from llm2slm_export.errors import BundleError
from tests.support.small_bundle import write_small_bundle


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_small_bundle(tmp_path / "small", heads={"fr": {}, "de": {}})
    return tmp_path / "small"


def test_the_digest_is_that_of_the_file_with_zeros_in_its_place(small: Path) -> None:
    text = (small / MANIFEST_FILE).read_text(encoding="utf-8")
    digest = json.loads(text)["digest"]
    assert list(json.loads(text))[:3] == ["format", "schema_version", "digest"]
    assert text.count('"digest"') == 1
    assert hashlib.sha256(text.replace(digest, "0" * 64).encode()).hexdigest() == digest
    assert read_manifest(small).digest == digest


def test_writing_what_was_read_gives_the_same_file(small: Path) -> None:
    before = (small / MANIFEST_FILE).read_bytes()
    read = read_manifest(small)
    assert write_manifest(small, read.model_copy(update={"digest": "0" * 64})) == read
    assert (small / MANIFEST_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"trained": true', b'"trained":  true', "has changed"), (b'"small"', b'"smell"', "has changed"),
        (b'"digest": "', b'"digest": "0', "has no valid digest"),
    ],
)  # fmt: skip
def test_an_altered_manifest_is_refused(small: Path, old: bytes, new: bytes, message: str) -> None:
    path = small / MANIFEST_FILE
    altered = path.read_bytes().replace(old, new, 1)
    path.write_bytes(altered[: len(path.read_bytes())] if new.startswith(b'"digest') else altered)
    with pytest.raises(BundleError, match=f"manifest.json {message}") as caught:
        read_manifest(small)
    assert "copy the bundle again" in str(caught.value)


def test_an_earlier_schema_is_refused_with_what_to_do(small: Path) -> None:
    path = small / MANIFEST_FILE
    raw = json.loads(path.read_text(encoding="utf-8")) | {"schema_version": 1}
    del raw["digest"]
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(BundleError, match=r"has schema version 1; this release reads 4(.|\n)*build the bundle again"):
        read_manifest(small)


@pytest.mark.parametrize("versions", [["a"], 7, None, {"llm2slm-export": 3}, {"llm2slm-export": "9.0"}])
def test_a_newer_schema_is_refused_whatever_else_it_says(small: Path, versions: object) -> None:
    path = small / MANIFEST_FILE
    raw = json.loads(path.read_text(encoding="utf-8")) | {"schema_version": 5, "tool_versions": versions}
    path.write_text(json.dumps(raw), encoding="utf-8")
    writer = "llm2slm-export 9.0" if versions == {"llm2slm-export": "9.0"} else "a newer release"
    with pytest.raises(BundleError, match=f"reads up to 4(.|\n)*written by {writer}"):
        read_manifest(small)


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{}", b"{", b"[" * 100_000, b"1" * 5000, b"\xff", b"null"])
def test_what_is_no_manifest_is_refused(small: Path, content: bytes) -> None:
    (small / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(BundleError):
        read_manifest(small)


def test_stamping_again_accepts_a_change_that_is_meant(small: Path) -> None:
    path = small / MANIFEST_FILE
    path.write_bytes(stamped(path.read_bytes().replace(b'"max_prompt_tokens": 64', b'"max_prompt_tokens": 65', 1)))
    assert read_manifest(small).max_prompt_tokens == 65
