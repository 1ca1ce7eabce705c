"""The tensor contract: names, axes and types of what crosses the three graphs. The single source.

Exporters name graph inputs and outputs by it, the manifest stores it, runtimes bind by it. Axis names:

    batch      rows
    prompt     LLM prompt tokens (padded on the right)
    sequence_length   token ids given to one decoder call
    embeds_length     prompt embeddings given to one decoder-only decoder call (the prompt pass; 0 afterwards)
    context    positions that the decoder is conditioned on: `prompt`, or twice that with the fusion `prefix`
    capacity   positions that the cache has room for: at least those that a call has behind it and adds
    num_logits positions whose logits a decoder-only decoder returns
    encoder_hidden_size, hidden_size, num_key_value_heads, head_dim, vocab_size   fixed sizes, written as numbers

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
        quantize_lm_head: at int4 the output layer has four bits too, and a table that is also looked up with it; else eight.
    """

    block_size: int | None = None
    quantize_lm_head: bool = False

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


def context_per_token(fusion: Fusion) -> int:
    """Positions the decoder is conditioned on for each prompt token: with `prefix` it sees Z, then E."""
    return 2 if fusion == "prefix" else 1


@dataclass(frozen=True)
class PairShape:
    """The sizes of a pair that the contract depends on.

    `encoder_hidden_size` is the width of `hidden_states`: the LLM's, times the layers read where there are several. `hidden_size` is the
    width of what the SLM is conditioned on. `num_hidden_layers`, `num_key_value_heads` and `head_dim` are the SLM decoder's; `num_key_value_heads` counts
    key/value heads (grouped-query attention).
    """

    slm_kind: SlmKind
    fusion: Fusion
    encoder_hidden_size: int
    hidden_size: int
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @property
    def projector_reads_ids(self) -> bool:
        """Whether the fusion needs the prompt's own embeddings, and so its ids."""
        return reads_ids(self.fusion)

    @property
    def context_per_token(self) -> int:
        """See the function of that name."""
        return context_per_token(self.fusion)


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
        TensorSpec(
            f"past_key_values.{i}.encoder.{kv}", dtype, ("batch", shape.num_key_value_heads, "context", shape.head_dim)
        )
        for i in range(shape.num_hidden_layers)
        for kv in ("key", "value")
    )


def state(shape: PairShape, dtype: FloatType = "float32") -> tuple[StateSpec, ...]:
    """The decoder's state (the KV cache), in graph order."""
    part = ".decoder" if shape.slm_kind == "encoder-decoder" else ""
    axes: tuple[Axis, ...] = ("batch", shape.num_key_value_heads, "capacity", shape.head_dim)
    return tuple(
        StateSpec(
            past=TensorSpec(f"past_key_values.{i}{part}.{kv}", dtype, axes),
            present=TensorSpec(f"present.{i}{part}.{kv}", dtype, axes),
        )
        for i in range(shape.num_hidden_layers)
        for kv in ("key", "value")
    )


def encoder_spec(shape: PairShape) -> GraphSpec:
    return GraphSpec(
        inputs=(_i64(INPUT_IDS, "batch", "prompt"), _i64(ATTENTION_MASK, "batch", "prompt")),
        outputs=(_f32(HIDDEN_STATES, "batch", "prompt", shape.encoder_hidden_size),),
    )


def projector_spec(shape: PairShape, dtype: FloatType = "float32") -> GraphSpec:
    ids = (_i64(INPUT_IDS, "batch", "prompt"),) if shape.projector_reads_ids else ()
    outputs: tuple[TensorSpec, ...]
    if shape.slm_kind == "encoder-decoder":
        outputs = cross_attention(shape, dtype)
    else:
        outputs = (_f32(PROMPT_EMBEDS, "batch", "context", shape.hidden_size),)
    return GraphSpec(
        inputs=(
            _f32(HIDDEN_STATES, "batch", "prompt", shape.encoder_hidden_size),
            _i64(ATTENTION_MASK, "batch", "prompt"),
            *ids,
        ),
        outputs=outputs,
    )


def decoder_spec(shape: PairShape, dtype: FloatType = "float32") -> GraphSpec:
    """One decoder call: `sequence_length` token ids (and, decoder-only, `embeds_length` prompt embeddings before them) with past KV.

    `past_length` is how many of the cache's positions are taken; the call writes those after them.

    Decoder-only: the attention mask is 1 for every position of the cache but the padding before a prompt, those that
    are yet to be written among them. The sequence of a call is the prompt embeddings followed by the embedded ids;
    either may have length 0, so the prompt pass is a call with `sequence_length` = 0 and a step one with `embeds_length` = 0.
    `logits_to_keep` holds indices into that sequence, as in transformers.
    """
    past = tuple(s.past for s in state(shape, dtype))
    present = tuple(s.present for s in state(shape, dtype))
    if shape.slm_kind == "encoder-decoder":
        return GraphSpec(
            inputs=(
                _i64(INPUT_IDS, "batch", "sequence_length"),
                _i64(ENCODER_ATTENTION_MASK, "batch", "context"),
                _i64(PAST_LENGTH, 1),
                *past,
                *cross_attention(shape, dtype),
            ),
            outputs=(_f32(LOGITS, "batch", "sequence_length", shape.vocab_size), *present),
        )
    return GraphSpec(
        inputs=(
            _i64(INPUT_IDS, "batch", "sequence_length"),
            _f32(PROMPT_EMBEDS, "batch", "embeds_length", shape.hidden_size),
            _i64(ATTENTION_MASK, "batch", "capacity"),
            _i64(PAST_LENGTH, 1),
            _i64(LOGITS_TO_KEEP, "num_logits"),
            *past,
        ),
        outputs=(_f32(LOGITS, "batch", "num_logits", shape.vocab_size), *present),
    )


def graph_specs(shape: PairShape, dtype: FloatType = "float32") -> dict[GraphName, GraphSpec]:
    """Of every graph; `dtype`: of keys and values (`cache_type`). All other floats that cross a graph are float32."""
    return {
        "encoder": encoder_spec(shape),
        "projector": projector_spec(shape, dtype),
        "decoder": decoder_spec(shape, dtype),
    }
