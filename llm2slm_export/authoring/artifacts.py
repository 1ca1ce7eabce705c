"""Kinds of directories that commands write and may replace, and the check that all their entries are known.

The check does not require a valid artifact: a damaged one, or one of an older release, may be replaced too.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from llm2slm_export.authoring.composition import COMPOSITION_FILE, PROJECTOR_FILE, SLM_DIRECTORY, TRAINING_FILE
from llm2slm_export.bundle.manifest import MANIFEST_FILE
from llm2slm_export.files.output_target import Kind, foreign_entries

# Files that save_pretrained of a model and of a tokenizer writes.
_SAVED = re.compile(
    r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja|"
    r"vocab\.(json|txt)|merges\.txt|spiece\.model|tokenizer\.model|(source|target)\.spm"
)


def _json(path: Path) -> dict[str, Any]:
    """The file's JSON mapping; empty if there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not path.is_symlink() else None
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _foreign_to_bundle(directory: Path) -> Iterable[str]:
    manifest = _json(directory / MANIFEST_FILE)
    if manifest.get("format") != "llm2slm-bundle":
        return [f"it is not a bundle: it holds no {MANIFEST_FILE} of one"]
    entries = manifest.get("files")
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return _foreign_to_files(directory, [MANIFEST_FILE, *paths])


def _foreign_to_trained(directory: Path) -> Iterable[str]:
    training = _json(directory / TRAINING_FILE)
    if "recipe" not in training:
        return [f"it is not an output of `train`: it holds no {TRAINING_FILE} of a run"]
    if isinstance(listed := training.get("files"), list):
        return _foreign_to_files(directory, [TRAINING_FILE, *listed])
    return foreign_entries(directory, _known_to_trained)


def _known_to_trained(path: str, is_directory: bool) -> bool:
    """Known entries of runs whose training.json does not list files (older releases)."""
    if is_directory:
        return path == SLM_DIRECTORY
    inside = path.removeprefix(f"{SLM_DIRECTORY}/")
    return path in (COMPOSITION_FILE, PROJECTOR_FILE, TRAINING_FILE) or _SAVED.fullmatch(inside) is not None


def _foreign_to_files(directory: Path, listed: Iterable[object]) -> list[str]:
    files = {path for path in listed if isinstance(path, str)}
    parents = {str(parent) for path in files for parent in PurePosixPath(path).parents}
    return foreign_entries(directory, lambda path, is_directory: path in (parents if is_directory else files))


BUNDLE = Kind("a bundle", _foreign_to_bundle)
TRAINED = Kind("an output of `train`", _foreign_to_trained)
# Copied recipes are edited by hand, so none is replaced.
RECIPE = Kind("an empty file", lambda _: ["it exists already"], is_file=True)
