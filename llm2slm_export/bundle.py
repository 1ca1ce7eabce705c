"""The bundle: an exported pair on disk, and the waist of the package. Exporters write it, runtimes read it.

    <dir>/manifest.json                       Manifest
          encoder.onnx  projector.onnx  decoder.onnx   and *.onnx.data where weights are large or shared
          tokenizer/llm/tokenizer.json  tokenizer/slm/tokenizer.json
          tensorrt/<key>/<graph>.engine   once they are built
    with several heads, for each   <head>.projector.onnx  <head>.decoder.onnx  tokenizer/slm-<head>/tokenizer.json

Tokenizers that say the same are one file, the first of them; a manifest names the file of each.

A bundle written by this release loads with every later 1.x release: fields are only ever added, with a default.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llm2slm_export.contract import (
    MAIN,
    EnginePrecision,
    Flavour,
    Fusion,
    GraphName,
    PairShape,
    Precision,
    StateSpec,
    TensorSpec,
    TokenizerStrategy,
)
from llm2slm_export.errors import BundleError, UsageError

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Part):
    """Where a model came from. `revision` is the hub's resolved commit, where there was one."""

    model: str
    revision: str | None
    model_type: str
    parameters: int
    weights: Literal["pretrained", "random"]
    seed: int | None = None


class GraphEntry(_Part):
    """A graph. `data` names the files that hold its large weights; a weight that graphs share lies in one of theirs.

    `bytes_read`: of weights, by one call; of a table that is only looked up in a few rows, which count for nothing. None
    where an earlier version built the bundle. `block_size`, `all_layers`: of int8 and int4, as asked for (`Rounding`); None
    where an earlier version built the bundle.
    """

    file: str
    data: tuple[str, ...] = ()
    precision: Precision
    block_size: int | None = None
    all_layers: bool = False
    opset: int
    minimum_runtime: dict[str, str]
    bytes_read: int | None = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class FileEntry(_Part):
    path: str
    bytes: int
    sha256: str


class Bounds(_Part):
    """What an engine's optimisation profile covers of one input: the shapes that it takes, and those it is fastest at."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


class EngineEntry(_Part):
    """A graph compiled for a device.

    `source`: the digest of the bundle's ONNX graph that says the same (`graph_digest`). `inputs`, `outputs`: as the engine has them: names of the
    contract, fixed sizes for fixed axes, floating types of its precision. `profiles`: by input, in the order of the engine's
    own profiles. `aliases`: outputs that are written in place, by output name: the input whose memory they must have.
    """

    file: str
    source: str
    precision: EnginePrecision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[dict[str, Bounds], ...]
    aliases: dict[str, str] = {}


class EngineLimits(_Part):
    """The largest request that a set of engines takes. `capacity`: positions of the decoder's cache, a fixed number.
    `prompt_buckets`: lengths of prompts, ascending, up to which an engine has a profile of its own before that of the longest."""

    batch: int
    prompt: int
    new: int
    capacity: int
    prompt_buckets: tuple[int, ...] = ()


class EngineSet(_Part):
    """A pair's engines, and what may run them. `compute_capabilities`: `8.9`, …; none: of the device that built it alone, whose
    name `device` is. `driver`: the oldest that the flavour's release takes."""

    flavour: Flavour
    version: str
    compute_capabilities: tuple[str, ...]
    device: str | None = None
    driver: str
    limits: EngineLimits
    graphs: dict[GraphName, EngineEntry]


class CacheEntry(_Part):
    """Decoder state. `static`: past and present have room for `capacity` positions, of which the first `past_length` are
    taken; a call writes those after them, in place where present is bound to past."""

    layout: Literal["static"]
    state: tuple[StateSpec, ...]

    @property
    def bytes_each(self) -> int:
        """Bytes of a number in it."""
        return 2 if self.state[0].past.dtype in ("float16", "bfloat16") else 4


class TokenizerEntry(_Part):
    """`llm`, `slm`: their files, one where both say the same. `slm_size`: ids that the SLM's tokenizer can produce; logits
    at and beyond it belong to no token."""

    strategy: TokenizerStrategy
    llm: str
    slm: str
    slm_size: int
    stand_in: bool = False


class SpecialIds(_Part):
    """`prompt_pad` fills LLM prompts, `pad` fills finished rows; `decoder_start` is None for decoder-only SLMs."""

    prompt_pad: int
    pad: int
    eos: tuple[int, ...]
    decoder_start: int | None


class GenerationDefaults(_Part):
    """transformers' names and meanings; what a caller does not say. Values that switch an option off are its defaults."""

    max_new_tokens: int
    min_new_tokens: int = 0
    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None


class ParityRow(_Part):
    """One comparison with the reference: `value` against `tolerance`, of tensor `tensor` in case `case`.

    `float32_error`: where the tolerance follows from it, what transformers' own float32 is off by, in the same measure.
    """

    graph: GraphName | Literal["pair"]
    case: str
    tensor: str
    measure: str
    value: float
    tolerance: float
    passed: bool
    float32_error: float | None = None

    @property
    def of_gate(self) -> bool:
        """Whether it is of the held-out prompts that a build was given."""
        return self.case.startswith("gate, ")


class ParityReport(_Part):
    """How a bundle was compared with the unpatched composition when it was built."""

    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """Whether something was compared, and all of it passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)


class Manifest(_Part):
    """A bundle's pair. With several heads over one encoder it is the first head's, and `heads` holds one complete
    manifest for each of the others, with the same encoder; `files` lists everybody's files, at the top level only."""

    format: Literal["llm2slm-bundle"] = "llm2slm-bundle"
    schema_version: int = SCHEMA_VERSION
    name: str
    sources: dict[Literal["llm", "slm"], Source]
    trained: bool
    shape: PairShape
    fusion: Fusion
    llm_layer: int | tuple[int, ...] = -1
    prompt_template: str
    max_prompt_tokens: int
    # The positions that the SLM's decoder knows, where it knows a limited number: for the response, and in a decoder-only
    # SLM for the `memory` before it.
    max_total_tokens: int | None = None
    tokenizer: TokenizerEntry
    special_ids: SpecialIds
    generation: GenerationDefaults
    graphs: dict[GraphName, GraphEntry]
    cache: CacheEntry
    patches: tuple[str, ...] = ()
    parity: ParityReport
    tool_versions: dict[str, str]
    files: tuple[FileEntry, ...]
    # The sha256 of what the composition's weights were: which composition a bundle was built from.
    weights: dict[Literal["projector", "slm"], str] = {}
    # By the name of their folder under tensorrt/.
    engines: dict[str, EngineSet] = {}
    head: str = MAIN
    heads: dict[str, "Manifest"] = {}

    @property
    def by_head(self) -> dict[str, "Manifest"]:
        """The manifest of every head, by name, this one first."""
        return {self.head: self, **self.heads}


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked against the manifest's hashes."""

    directory: Path
    manifest: Manifest

    def path(self, relative: str) -> Path:
        return self.directory / relative

    def select(self, head: str) -> "Bundle":
        """The bundle as its head of that name.

        Raises:
            UsageError: no head has that name.
        """
        manifest = self.manifest
        if head == manifest.head:
            return self
        if head not in manifest.heads:
            raise UsageError(
                f"The bundle {self.directory} has no head {head!r}.",
                f"its heads: {', '.join([manifest.head, *manifest.heads])}",
                remedy="choose one of these",
            )
        return Bundle(self.directory, manifest.heads[head].model_copy(update={"files": manifest.files}))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def graph_digest(graph: GraphEntry, hashes: Mapping[str, str]) -> str:
    """What identifies a graph and its weights.

    Args:
        hashes: the sha256 of the bundle's files, by path.
    """
    return hashlib.sha256("".join(hashes[file] for file in (graph.file, *graph.data)).encode()).hexdigest()


def file_entries(directory: Path) -> tuple[FileEntry, ...]:
    """Every file of a directory but the manifest, with its size and hash, by path."""
    return tuple(
        FileEntry(path=path.relative_to(directory).as_posix(), bytes=path.stat().st_size, sha256=sha256(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Read and validate the manifest alone; no other file is looked at.

    Raises:
        BundleError: no manifest, not a bundle, a newer schema, or fields that do not validate (all of them named).
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise BundleError(
            f"{directory} is not a bundle: it has no {MANIFEST_FILE}.",
            remedy="give a directory that `llm2slm-export build` wrote",
        )
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not JSON.", str(error), remedy="build the bundle again") from error
    schema = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(schema, int) and schema > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {schema}; this release reads up to {SCHEMA_VERSION}.",
            f"it was written by {raw.get('tool_versions', {}).get('llm2slm-export', 'a newer release')}",
            remedy="pip install --upgrade llm2slm-export",
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise BundleError(
            f"{path} is not a manifest this release can read.",
            *(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:10]),
            remedy="build the bundle again",
        ) from error


def open_bundle(directory: Path) -> Bundle:
    """Read the manifest and check every file it names.

    Raises:
        BundleError: see `read_manifest`; or files that are missing, truncated or altered, every one named.
    """
    manifest = read_manifest(directory)
    problems = []
    for entry in manifest.files:
        path = directory / entry.path
        if not path.is_file():
            problems.append(f"{entry.path}: missing")
        elif (size := path.stat().st_size) != entry.bytes:
            problems.append(f"{entry.path}: expected {entry.bytes} bytes, got {size}")
        elif (digest := sha256(path)) != entry.sha256:
            problems.append(f"{entry.path}: expected sha256 {entry.sha256[:16]}…, got {digest[:16]}…")
    if problems:
        raise BundleError(
            f"The bundle {directory} is not what was built.", *problems, remedy="copy it again, or build it again"
        )
    return Bundle(directory, manifest)
