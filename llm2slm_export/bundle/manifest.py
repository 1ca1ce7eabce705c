"""The bundle: an exported pair on disk, and the waist of the package. Exporters write it, runtimes read it.

    <dir>/manifest.json                       Manifest
          encoder.onnx  projector.onnx  decoder.onnx   and *.onnx.data where weights are large or shared
          tokenizer/llm/tokenizer.json  tokenizer/slm/tokenizer.json
          tensorrt/<key>/<graph>.engine   once they are built
    with several heads, for each   <head>.projector.onnx  <head>.decoder.onnx  tokenizer/slm-<head>/tokenizer.json

Tokenizers that say the same are one file, the first of them; a manifest names the file of each.

A bundle written by this release loads with every later 1.x release: fields are only ever added, with a default.

Schema 3: axes and sizes have the names that they have in transformers. Bundles of earlier schemas are refused.
"""

from typing import Annotated, Literal

from pydantic import Field

from llm2slm_export.bundle.parity_report import ParityReport
from llm2slm_export.bundle.prompt_template import PromptTemplate
from llm2slm_export.contract import (
    MAIN,
    EnginePrecision,
    Fusion,
    GraphName,
    PairShape,
    Precision,
    StateSpec,
    TensorRtVariant,
    TensorSpec,
    TokenizerStrategy,
)
from llm2slm_export.files.names import NAME
from llm2slm_export.files.strict_model import WHOLE_NUMBER, StrictModel

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION: Literal[3] = 3


# Most tokens of a response, and most beams, or responses, to a prompt: beyond it memory ends before the work does.
MOST_NEW_TOKENS = 1_000_000
MOST_ROWS = 1_024

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
    where an earlier version built the bundle. `block_size`, `quantize_lm_head`: of int8 and int4, as asked for (`Rounding`); None
    where an earlier version built the bundle.
    """

    file: str
    data: tuple[str, ...] = ()
    precision: Precision
    block_size: Size | None = None
    quantize_lm_head: bool = False
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
    name `device` is. `driver`: the oldest that the variant's release takes."""

    variant: TensorRtVariant
    version: Version
    compute_capabilities: tuple[Version, ...]
    device: str | None = None
    driver: Version
    limits: EngineLimits
    graphs: dict[GraphName, EngineEntry]


class CacheEntry(StrictModel):
    """Decoder state: past and present have room for `capacity` positions, of which the first `past_length` are taken. A call
    writes those after them, in place where present is bound to past."""

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


class Manifest(StrictModel):
    """A bundle's pair. With several heads over one encoder it is the first head's, and `heads` holds one complete
    manifest for each of the others, with the same encoder; `files` lists everybody's files, at the top level only.

    `digest`: the sha256 of the file's bytes with these 64 digits as zeros, at the top level only; `write_manifest` sets it.
    """

    format: Literal["llm2slm-bundle"] = "llm2slm-bundle"
    schema_version: Annotated[Literal[3], WHOLE_NUMBER] = SCHEMA_VERSION
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
    # SLM for the `context` before it.
    max_total_tokens: Size | None = None
    tokenizer: TokenizerEntry
    special_ids: SpecialIds
    generation: GenerationDefaults
    graphs: dict[GraphName, GraphEntry]
    cache: CacheEntry
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
