"""The tensor contract: names, axes and types of what crosses the three graphs. The single source.

Exporters name graph inputs and outputs by it, the manifest stores it, runtimes bind by it. Axis names:

    batch      rows
    prompt     LLM prompt tokens (padded on the right)
    new        token ids given to one decoder call
    embedded   prompt embeddings given to one decoder-only decoder call (the prompt pass; 0 afterwards)
    memory     positions that the decoder is conditioned on: `prompt`, or twice that with the fusion `prefix`
    capacity   positions that the cache has room for: at least those that a call has behind it and adds
    kept       positions whose logits a decoder-only decoder returns
    d_llm, d_slm, heads, d_head, vocab   fixed sizes, written as numbers

Names follow optimum's ONNX convention (`past_key_values.{i}.decoder.key`, `present.{i}.decoder.key`, …).
"""

from dataclasses import dataclass
from typing import Literal

SlmKind = Literal["encoder-decoder", "decoder-only"]
Fusion = Literal["add", "replace", "prefix", "cross_attention"]
TokenizerStrategy = Literal["shared", "llm"]
GraphName = Literal["encoder", "projector", "decoder"]
# w8a8, of the encoder alone: its linear layers' inputs have eight bits too, not their weights alone.
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "w8a8"]
FloatType = Literal["float32", "float16"]  # of the cache, and of what an encoder-decoder SLM attends to
Runtime = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
TensorRtVariant = Literal["tensorrt", "tensorrt-rtx"]
EnginePrecision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Bits = Literal[4, 8]
Axis = str | int

BLOCK_SIZES = (16, 32, 64, 128, 256)  # that ONNX Runtime's operators for int8 and int4 weights have
DEFAULT_BLOCK_SIZES: dict["Bits", int] = {8: 128, 4: 32}

MAIN = "main"  # the head of a bundle that has only one
GRAPHS: tuple[GraphName, ...] = ("encoder", "projector", "decoder")
INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
ENCODER_ATTENTION_MASK = "encoder_attention_mask"
HIDDEN_STATES = "hidden_states"
PROMPT_EMBEDS = "prompt_embeds"
LOGITS_TO_KEEP = "logits_to_keep"
PAST_LENGTH = "past_length"
LOGITS = "logits"

# What a decoder's engine says besides, of each row and position: the id with the highest logit, and that logit.
ARGMAX_IDS = "argmax_ids"
MAX_LOGITS = "max_logits"


@dataclass(frozen=True)
class WeightQuantization:
    """How int8 and int4 weights are rounded.

    Args:
        block_size: weights along the input axis that share a scale; None: 128 at int8, 32 at int4. Where it does not
            divide the axis, the largest half, quarter, … of it that does.
        all_layers: at int4 the output layer has four bits too, and a table that is also looked up with it; else eight.
    """

    block_size: int | None = None
    all_layers: bool = False

    def blocks(self, bits: Bits) -> int:
        """The block size of a graph's weights of so many bits."""
        return self.block_size or DEFAULT_BLOCK_SIZES[bits]


DEFAULT_WEIGHT_QUANTIZATION = WeightQuantization()


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output. `axes` holds a name for a dynamic axis and a number for a fixed one."""

    name: str
    dtype: Literal["int64", "int32", "float32", "float16", "bfloat16"]
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class StateSpec:
    """One piece of decoder state: read as `past`, written as `present`, which is `past` with the call's positions in it.

    Both may be the same memory: a call writes its positions before it reads any.
    """

    past: TensorSpec
    present: TensorSpec


@dataclass(frozen=True)
class GraphSpec:
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def input_names(self) -> list[str]:
        return [t.name for t in self.inputs]

    @property
    def output_names(self) -> list[str]:
        return [t.name for t in self.outputs]


def reads_ids(fusion: Fusion) -> bool:
    """Whether a fusion needs the prompt's own embeddings beside the projected states."""
    return fusion in ("add", "prefix")


def memory_per_prompt(fusion: Fusion) -> int:
    """Positions the decoder is conditioned on for each prompt token: with `prefix` it sees Z, then E."""
    return 2 if fusion == "prefix" else 1


@dataclass(frozen=True)
class PairShape:
    """The sizes of a pair that the contract depends on.

    `d_llm` is the width of `hidden_states`: the LLM's, times the layers read where there are several. `d_slm` is the
    width of what the SLM is conditioned on. `layers`, `heads` and `d_head` are the SLM decoder's; `heads` counts
    key/value heads (grouped-query attention).
    """

    slm_kind: SlmKind
    fusion: Fusion
    d_llm: int
    d_slm: int
    layers: int
    heads: int
    d_head: int
    vocab: int

    @property
    def projector_reads_ids(self) -> bool:
        """Whether the fusion needs the prompt's own embeddings, and so its ids."""
        return reads_ids(self.fusion)

    @property
    def memory_per_prompt(self) -> int:
        """See the function of that name."""
        return memory_per_prompt(self.fusion)


def cache_type(decoder: Precision) -> FloatType:
    """What keys and values are in, by the decoder's precision: half where it multiplies in half."""
    return "float16" if decoder == "fp16" else "float32"


def _f32(name: str, *axes: Axis) -> TensorSpec:
    return TensorSpec(name, "float32", axes)


def _i64(name: str, *axes: Axis) -> TensorSpec:
    return TensorSpec(name, "int64", axes)


def cross_attention(shape: PairShape, dtype: FloatType = "float32") -> tuple[TensorSpec, ...]:
    """The encoder-decoder SLM's cross-attention keys and values: projector outputs, decoder inputs, never echoed."""
    return tuple(
        TensorSpec(f"past_key_values.{i}.encoder.{kv}", dtype, ("batch", shape.heads, "memory", shape.d_head))
        for i in range(shape.layers)
        for kv in ("key", "value")
    )


def state(shape: PairShape, dtype: FloatType = "float32") -> tuple[StateSpec, ...]:
    """The decoder's state (the KV cache), in graph order."""
    part = ".decoder" if shape.slm_kind == "encoder-decoder" else ""
    axes: tuple[Axis, ...] = ("batch", shape.heads, "capacity", shape.d_head)
    return tuple(
        StateSpec(
            past=TensorSpec(f"past_key_values.{i}{part}.{kv}", dtype, axes),
            present=TensorSpec(f"present.{i}{part}.{kv}", dtype, axes),
        )
        for i in range(shape.layers)
        for kv in ("key", "value")
    )


def encoder_spec(shape: PairShape) -> GraphSpec:
    return GraphSpec(
        inputs=(_i64(INPUT_IDS, "batch", "prompt"), _i64(ATTENTION_MASK, "batch", "prompt")),
        outputs=(_f32(HIDDEN_STATES, "batch", "prompt", shape.d_llm),),
    )


def projector_spec(shape: PairShape, dtype: FloatType = "float32") -> GraphSpec:
    ids = (_i64(INPUT_IDS, "batch", "prompt"),) if shape.projector_reads_ids else ()
    outputs: tuple[TensorSpec, ...]
    if shape.slm_kind == "encoder-decoder":
        outputs = cross_attention(shape, dtype)
    else:
        outputs = (_f32(PROMPT_EMBEDS, "batch", "memory", shape.d_slm),)
    return GraphSpec(
        inputs=(
            _f32(HIDDEN_STATES, "batch", "prompt", shape.d_llm),
            _i64(ATTENTION_MASK, "batch", "prompt"),
            *ids,
        ),
        outputs=outputs,
    )


def decoder_spec(shape: PairShape, dtype: FloatType = "float32") -> GraphSpec:
    """One decoder call: `new` token ids (and, decoder-only, `embedded` prompt embeddings before them) with past KV.

    `past_length` is how many of the cache's positions are taken; the call writes those after them.

    Decoder-only: the attention mask is 1 for every position of the cache but the padding before a prompt, those that
    are yet to be written among them. The sequence of a call is the prompt embeddings followed by the embedded ids;
    either may have length 0, so the prompt pass is a call with `new` = 0 and a step one with `embedded` = 0.
    `logits_to_keep` holds indices into that sequence, as in transformers.
    """
    past = tuple(s.past for s in state(shape, dtype))
    present = tuple(s.present for s in state(shape, dtype))
    if shape.slm_kind == "encoder-decoder":
        return GraphSpec(
            inputs=(
                _i64(INPUT_IDS, "batch", "new"),
                _i64(ENCODER_ATTENTION_MASK, "batch", "memory"),
                _i64(PAST_LENGTH, 1),
                *past,
                *cross_attention(shape, dtype),
            ),
            outputs=(_f32(LOGITS, "batch", "new", shape.vocab), *present),
        )
    return GraphSpec(
        inputs=(
            _i64(INPUT_IDS, "batch", "new"),
            _f32(PROMPT_EMBEDS, "batch", "embedded", shape.d_slm),
            _i64(ATTENTION_MASK, "batch", "capacity"),
            _i64(PAST_LENGTH, 1),
            _i64(LOGITS_TO_KEEP, "kept"),
            *past,
        ),
        outputs=(_f32(LOGITS, "batch", "kept", shape.vocab), *present),
    )


def graph_specs(shape: PairShape, dtype: FloatType = "float32") -> dict[GraphName, GraphSpec]:
    """Of every graph; `dtype`: of keys and values (`cache_type`). All other floats that cross a graph are float32."""
    return {
        "encoder": encoder_spec(shape),
        "projector": projector_spec(shape, dtype),
        "decoder": decoder_spec(shape, dtype),
    }
