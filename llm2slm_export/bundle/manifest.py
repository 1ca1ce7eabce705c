"""The schema of a bundle's manifest. Exporters write it, runtimes read it.

    <dir>/manifest.json                       Manifest
          encoder.onnx  projector.onnx  decoder.onnx   and *.onnx.data for large or shared weights
          tokenizer/llm/tokenizer.json  tokenizer/slm/tokenizer.json
          tensorrt/<key>/<graph>.engine   after `build --backend`
    with several heads, for each   <head>.projector.onnx  <head>.decoder.onnx  tokenizer/slm-<head>/tokenizer.json

Tokenizers with equal content are stored once, under the first one's name; a manifest names the file of each.

Every later 1.x release loads a bundle written by this release: fields are only added, with a default.

Schema 4: contract 2, rows of their own length. Bundles of earlier schemas are refused.
"""

from functools import cached_property
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
SCHEMA_VERSION: Literal[4] = 4


# Limits of new tokens per response, and of beams or responses per prompt. Larger requests would exhaust memory.
MOST_NEW_TOKENS = 1_000_000
MOST_ROWS = 1_024

Size = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Bytes = Annotated[int, Field(ge=0, lt=2**62)]
Version = Annotated[str, Field(max_length=64)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Source(StrictModel):
    """The source of a model. `revision` is the resolved commit on the hub; None for a local directory."""

    model: str
    revision: str | None
    model_type: str
    parameters: Annotated[int, Field(ge=0, lt=2**62)]
    weights: Literal["pretrained", "random"]
    seed: int | None = None


class GraphEntry(StrictModel):
    """An ONNX graph.

    Args:
        data: the files of its external data. Graphs that share a weight name the same file.
        block_size, quantize_lm_head: the requested `WeightQuantization` of an int8 or int4 graph. A `block_size` of None:
            unknown, from an earlier version.
        minimum_runtime: the oldest version of each runtime that loads the graph.
        bytes_read: weight bytes that one call reads. Embedding lookups, which read a few rows, are not counted. None:
            unknown, from an earlier version.
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
    """A file of the bundle: its relative path, size and SHA-256."""

    path: str
    bytes: Bytes
    sha256: str


class Bounds(StrictModel):
    """The shapes of one input in a TensorRT optimization profile: minimum, optimum (the fastest) and maximum."""

    minimum: tuple[Count, ...]
    optimum: tuple[Count, ...]
    maximum: tuple[Count, ...]


class EngineEntry(StrictModel):
    """A TensorRT engine: a graph compiled for a device.

    Args:
        source: the digest of the bundle's ONNX graph that it was compiled from (`graph_digest`).
        inputs, outputs: the contract's names, with the engine's fixed sizes and floating-point types.
        profiles: the bounds of each input, in the order of the engine's optimization profiles.
        aliases: of each output that is written in place, the input that it shares memory with.
    """

    file: str
    source: str
    precision: EnginePrecision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[dict[str, Bounds], ...]
    aliases: dict[str, str] = Field(default_factory=dict)


class EngineLimits(StrictModel):
    """The largest request that a set of engines accepts.

    Args:
        batch: rows.
        prompt: LLM tokens of a prompt.
        new: new tokens of a response.
        capacity: positions of the decoder's KV cache, a fixed number.
        prompt_buckets: prompt lengths, ascending, each with an optimization profile up to it. The last profile, up to
            `prompt`, is not listed.
    """

    batch: Size
    prompt: Size
    new: Size
    capacity: Count
    prompt_buckets: tuple[Size, ...] = ()


class EngineSet(StrictModel):
    """A pair's TensorRT engines, and the GPUs and drivers that they run on.

    Args:
        version: release of TensorRT or TensorRT-RTX that built them.
        compute_capabilities: supported ones, `8.9`, …; empty: only GPUs named `device`, on which they were built.
        driver: the oldest NVIDIA driver that the release supports.
    """

    variant: TensorRtVariant
    version: Version
    compute_capabilities: tuple[Version, ...]
    device: str | None = None
    driver: Version
    limits: EngineLimits
    graphs: dict[GraphName, EngineEntry]


class CacheEntry(StrictModel):
    """The decoder's state: past and present, with room for `capacity` positions of each row.

    The first `past_length` of a row's are occupied. A call writes its positions after them, in place if present is bound
    to past.
    """

    state: tuple[StateSpec, ...]

    @cached_property
    def kinds(self) -> tuple[tuple[StateSpec, ...], ...]:
        """The state's tensors, those of equal axes and type together."""
        kinds: dict[object, list[StateSpec]] = {}
        for spec in self.state:
            kinds.setdefault((spec.past.axes, spec.past.dtype), []).append(spec)
        return tuple(map(tuple, kinds.values()))

    @property
    def bytes_each(self) -> int:
        """Bytes per element."""
        return 2 if self.state[0].past.dtype in ("float16", "bfloat16") else 4


class TokenizerEntry(StrictModel):
    """The tokenizers.

    Args:
        llm, slm: their files; equal tokenizers share one.
        slm_size: number of ids of the SLM's tokenizer. Logits at higher ids belong to no token.
        stand_in: whether they are the byte tokenizer that replaces missing ones.
    """

    strategy: TokenizerStrategy
    llm: str
    slm: str
    slm_size: Size
    stand_in: bool = False


class SpecialIds(StrictModel):
    """Special token ids: `prompt_pad` pads LLM prompts, `pad` follows finished rows.

    `decoder_start` is None for decoder-only SLMs.
    """

    prompt_pad: Id
    pad: Id
    eos: tuple[Id, ...]
    decoder_start: Id | None


class GenerationDefaults(StrictModel):
    """Default generation options of a pair, with transformers' names and meanings. The fields' own defaults disable them."""

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
    """The manifest of a bundle: its pair, graphs and files.

    In a bundle with several heads it is the first head's. `heads` holds a complete manifest of each other head, with the
    same encoder. `files` and `digest` are set at the top level only; `files` lists the files of all heads. `digest` is the
    SHA-256 of the file's bytes with the 64 digits of the digest as zeros (`write_manifest`).
    """

    format: Literal["llm2slm-bundle"] = "llm2slm-bundle"
    schema_version: Annotated[Literal[4], WHOLE_NUMBER] = SCHEMA_VERSION
    digest: str = "0" * 64
    name: str = Field(pattern=NAME)  # also used for directories
    sources: dict[Literal["llm", "slm"], Source]
    trained: bool
    shape: PairShape
    fusion: Fusion
    llm_layer: int | tuple[int, ...] = -1
    prompt_template: str
    # `PromptTemplate.special_tokens` and `strip`.
    prompt_special_tokens: bool = True
    prompt_strip: bool = False
    # Rows of the embedding tables that prompt ids are looked up in. Ids from here on are refused. None: unknown.
    prompt_vocab: Size | None = None
    max_prompt_tokens: Size
    # Maximum positions of the SLM's decoder: the response's and, in a decoder-only SLM, the context's. None: unlimited.
    max_total_tokens: Size | None = None
    tokenizer: TokenizerEntry
    special_ids: SpecialIds
    generation: GenerationDefaults
    graphs: dict[GraphName, GraphEntry]
    cache: CacheEntry
    parity: ParityReport
    tool_versions: dict[str, str]
    files: tuple[FileEntry, ...]
    # SHA-256 of the composition's weights, to identify the composition that the bundle was built from.
    weights: dict[Literal["projector", "slm"], str] = Field(default_factory=dict)
    # The sets by their directory's name under tensorrt/.
    engines: dict[str, EngineSet] = Field(default_factory=dict)
    head: str = MAIN
    heads: dict[str, "Manifest"] = Field(default_factory=dict)

    @property
    def template(self) -> PromptTemplate:
        """The prompt template."""
        return PromptTemplate(self.prompt_template, self.prompt_special_tokens, self.prompt_strip)

    @property
    def by_head(self) -> dict[str, "Manifest"]:
        """The manifest of every head by name, this one first."""
        return {self.head: self, **self.heads}
