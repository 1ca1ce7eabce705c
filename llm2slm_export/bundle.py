"""The bundle: an exported pair on disk, and the waist of the package. Exporters write it, runtimes read it.

    <dir>/manifest.json                       Manifest
          encoder.onnx  projector.onnx  decoder.onnx   and *.onnx.data where weights are large or shared
          tokenizer/llm/tokenizer.json  tokenizer/slm/tokenizer.json
          tensorrt/<key>/<graph>.engine   once they are built
    with several heads, for each   <head>.projector.onnx  <head>.decoder.onnx  tokenizer/slm-<head>/tokenizer.json

Tokenizers that say the same are one file, the first of them; a manifest names the file of each.

A bundle written by this release loads with every later 1.x release: fields are only ever added, with a default.

Schema 2: the manifest has a digest of itself. Schema 1 had none, and is refused.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from llm2slm_export.bounded_json import MOST_BYTES, JsonError, parse_json
from llm2slm_export.bundle_files import file_problems, graph_problems
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
from llm2slm_export.manifest_rules import manifest_problems, text_problems
from llm2slm_export.names import NAME
from llm2slm_export.prompt_template import PromptTemplate
from llm2slm_export.regular_file import read_regular
from llm2slm_export.strict_model import WHOLE_NUMBER, StrictModel

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION: Literal[2] = 2

_AGAIN = "copy the bundle again, or build it again"

_DIGEST = re.compile(rb'"digest":\s*"([0-9a-f]{64})"')


# Most tokens of a response, and most beams, or responses, to a prompt: beyond it memory ends before the work does.
MOST_NEW_TOKENS = 1_000_000
MOST_ROWS = 1_024
PROBLEMS_SHOWN = 10

Size = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Bytes = Annotated[int, Field(ge=0, lt=2**62)]
Version = Annotated[str, Field(max_length=64)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Source(StrictModel):
    """Where a model came from. `revision` is the hub's resolved commit, where there was one."""

    model: str
    revision: str | None
    model_type: str
    parameters: Annotated[int, Field(ge=0, lt=2**62)]
    weights: Literal["pretrained", "random"]
    seed: int | None = None


class GraphEntry(StrictModel):
    """A graph. `data` names the files that hold its large weights; a weight that graphs share lies in one of theirs.

    `bytes_read`: of weights, by one call; of a table that is only looked up in a few rows, which count for nothing. None
    where an earlier version built the bundle. `block_size`, `all_layers`: of int8 and int4, as asked for (`Rounding`); None
    where an earlier version built the bundle.
    """

    file: str
    data: tuple[str, ...] = ()
    precision: Precision
    block_size: Size | None = None
    all_layers: bool = False
    opset: Size
    minimum_runtime: dict[str, Version]
    bytes_read: Bytes | None = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class FileEntry(StrictModel):
    path: str
    bytes: Bytes
    sha256: str


class Bounds(StrictModel):
    """What an engine's optimisation profile covers of one input: the shapes that it takes, and those it is fastest at."""

    minimum: tuple[Count, ...]
    optimum: tuple[Count, ...]
    maximum: tuple[Count, ...]


class EngineEntry(StrictModel):
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
    aliases: dict[str, str] = Field(default_factory=dict)


class EngineLimits(StrictModel):
    """The largest request that a set of engines takes. `capacity`: positions of the decoder's cache, a fixed number.
    `prompt_buckets`: lengths of prompts, ascending, up to which an engine has a profile of its own before that of the longest."""

    batch: Size
    prompt: Size
    new: Size
    capacity: Count
    prompt_buckets: tuple[Size, ...] = ()


class EngineSet(StrictModel):
    """A pair's engines, and what may run them. `compute_capabilities`: `8.9`, …; none: of the device that built it alone, whose
    name `device` is. `driver`: the oldest that the flavour's release takes."""

    flavour: Flavour
    version: Version
    compute_capabilities: tuple[Version, ...]
    device: str | None = None
    driver: Version
    limits: EngineLimits
    graphs: dict[GraphName, EngineEntry]


class CacheEntry(StrictModel):
    """Decoder state. `static`: past and present have room for `capacity` positions, of which the first `past_length` are
    taken; a call writes those after them, in place where present is bound to past."""

    layout: Literal["static"]
    state: tuple[StateSpec, ...]

    @property
    def bytes_each(self) -> int:
        """Bytes of a number in it."""
        return 2 if self.state[0].past.dtype in ("float16", "bfloat16") else 4


class TokenizerEntry(StrictModel):
    """`llm`, `slm`: their files, one where both say the same. `slm_size`: ids that the SLM's tokenizer can produce; logits
    at and beyond it belong to no token."""

    strategy: TokenizerStrategy
    llm: str
    slm: str
    slm_size: Size
    stand_in: bool = False


class SpecialIds(StrictModel):
    """`prompt_pad` fills LLM prompts, `pad` fills finished rows; `decoder_start` is None for decoder-only SLMs."""

    prompt_pad: Id
    pad: Id
    eos: tuple[Id, ...]
    decoder_start: Id | None


class GenerationDefaults(StrictModel):
    """transformers' names and meanings; what a caller does not say. Values that switch an option off are its defaults."""

    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)]
    min_new_tokens: Annotated[int, Field(ge=0, le=MOST_NEW_TOKENS)] = 0
    do_sample: bool = False
    num_beams: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 1
    num_return_sequences: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 1
    length_penalty: Finite = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: Finite = 1.0
    top_k: Count = 50
    top_p: Finite = 1.0
    min_p: Finite = 0.0
    typical_p: Finite = 1.0
    repetition_penalty: Finite = 1.0
    no_repeat_ngram_size: Count = 0
    bad_words_ids: tuple[tuple[Id, ...], ...] = ()
    forced_bos_token_id: Id | None = None
    forced_eos_token_id: Id | None = None


class ParityRow(StrictModel):
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


class ParityReport(StrictModel):
    """How a bundle was compared with the unpatched composition when it was built."""

    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """Whether something was compared, and all of it passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)


class Manifest(StrictModel):
    """A bundle's pair. With several heads over one encoder it is the first head's, and `heads` holds one complete
    manifest for each of the others, with the same encoder; `files` lists everybody's files, at the top level only.

    `digest`: the sha256 of the file's bytes with these 64 digits as zeros, at the top level only; `write_manifest` sets it.
    """

    format: Literal["llm2slm-bundle"] = "llm2slm-bundle"
    schema_version: Annotated[Literal[2], WHOLE_NUMBER] = SCHEMA_VERSION
    digest: str = "0" * 64
    name: str = Field(pattern=NAME)  # of directories, too
    sources: dict[Literal["llm", "slm"], Source]
    trained: bool
    shape: PairShape
    fusion: Fusion
    llm_layer: int | tuple[int, ...] = -1
    prompt_template: str
    # `PromptTemplate.special_tokens` and `strip`.
    prompt_special_tokens: bool = True
    prompt_strip: bool = False
    # Rows of the tables that a prompt's ids are looked up in: an id at or beyond it has none. None where it is not known.
    prompt_vocab: Size | None = None
    max_prompt_tokens: Size
    # The positions that the SLM's decoder knows, where it knows a limited number: for the response, and in a decoder-only
    # SLM for the `memory` before it.
    max_total_tokens: Size | None = None
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
    weights: dict[Literal["projector", "slm"], str] = Field(default_factory=dict)
    # By the name of their folder under tensorrt/.
    engines: dict[str, EngineSet] = Field(default_factory=dict)
    head: str = MAIN
    heads: dict[str, "Manifest"] = Field(default_factory=dict)

    @property
    def template(self) -> PromptTemplate:
        """The text around a prompt."""
        return PromptTemplate(self.prompt_template, self.prompt_special_tokens, self.prompt_strip)

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


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with the digest of what is written, whatever digest it has; as written, it is returned."""
    undigested = manifest.model_copy(update={"digest": "0" * 64})
    text = undigested.model_dump_json(indent=1, exclude={"heads": {"__all__": {"digest"}}})
    content = stamped(text.encode() + b"\n")
    (directory / MANIFEST_FILE).write_bytes(content)
    found = _DIGEST.search(content)
    assert found is not None
    return manifest.model_copy(update={"digest": found.group(1).decode()})


def stamped(content: bytes) -> bytes:
    """The bytes of a manifest, which have some digest, with the digest that they should have."""
    found = _DIGEST.search(content)
    if found is None:
        raise ValueError("a manifest without a digest")
    return content[: found.start(1)] + _digest(content, found).encode() + content[found.end(1) :]


def _digest(content: bytes, place: re.Match[bytes]) -> str:
    """The digest of a manifest's bytes, which lies at `place` in them."""
    return hashlib.sha256(content[: place.start(1)] + b"0" * 64 + content[place.end(1) :]).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Read and validate the manifest alone; no other file is looked at.

    Raises:
        BundleError: no manifest, not a bundle, another schema, altered, or fields that do not validate (all of them named).
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
        # Types as JSON has them: no number in quotes, and no true for a 1.
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
    """Refuse a manifest of another schema, which may have other fields."""
    schema = raw.get("schema_version") if isinstance(raw, dict) else None
    if type(schema) is not int or schema == SCHEMA_VERSION:
        return
    if schema < SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {schema}; this release reads {SCHEMA_VERSION}.",
            "a manifest of that schema has no digest of itself",
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
    """Refuse a manifest that was altered, or damaged, after it was written."""
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


def open_bundle(directory: Path) -> Bundle:
    """Read the manifest and check every file it names, and that its graphs read no others.

    Raises:
        BundleError: see `read_manifest`; or files that are missing, truncated, altered, or not in the bundle; every one named.
    """
    manifest = read_manifest(directory)
    problems = file_problems(directory, manifest.files)
    if not problems:
        heads = manifest.by_head.values()
        problems = graph_problems(directory, (entry for head in heads for entry in head.graphs.values()))
    if problems:
        raise BundleError(
            f"The bundle {directory} is not what was built.", *problems, remedy="copy it again, or build it again"
        )
    return Bundle(directory, manifest)
