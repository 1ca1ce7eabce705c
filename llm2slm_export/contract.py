"""The tensor contract: names, axes and types of the three graphs' inputs and outputs. The only definition of them.

Exporters name graph inputs and outputs by it, the manifest stores it, runtimes bind tensors by it. Axis names:

    batch             rows
    prompt            LLM prompt tokens, padded on the right
    sequence_length   token ids of one decoder call
    embeds_length     prompt embeddings of one decoder-only decoder call: `context` in the prompt pass, 0 in a step
    context           positions the decoder is conditioned on: `prompt`, or 2 · `prompt` with the fusion `prefix`
    capacity          positions the KV cache has room for: at least each row's `past_length` plus the call's positions
    num_logits        positions of each row for which a decoder-only decoder returns logits
    encoder_hidden_size, hidden_size, num_key_value_heads, head_dim, vocab_size   fixed sizes, written as numbers

Names follow optimum's ONNX convention (`past_key_values.{i}.decoder.key`, `present.{i}.decoder.key`, …).
"""

from dataclasses import dataclass
from typing import Literal

SlmKind = Literal["encoder-decoder", "decoder-only"]
Fusion = Literal["add", "replace", "prefix", "cross_attention"]
TokenizerStrategy = Literal["shared", "llm"]
GraphName = Literal["encoder", "projector", "decoder"]
HeadGraph = Literal["projector", "decoder"]  # the graphs that each head has of its own
# w8a8: int8 weights and int8 activations in linear layers. Encoder only.
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "w8a8"]
HeadPrecision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
FloatType = Literal["float32", "float16"]  # of the KV cache and of cross-attention keys and values
Runtime = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
TensorRtVariant = Literal["tensorrt", "tensorrt-rtx"]
EnginePrecision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Bits = Literal[4, 8]
# Precisions with weight-only quantization, with the bits of a weight.
WEIGHT_BITS: dict[Precision, Bits] = {"int8": 8, "int4": 4}
Axis = str | int

BLOCK_SIZES = (16, 32, 64, 128, 256)  # supported by ONNX Runtime's operators for int8 and int4 weights
DEFAULT_BLOCK_SIZES: dict["Bits", int] = {8: 128, 4: 32}

MAIN = "main"  # the name of a bundle's only head, and of the pair beside the LLM head
LLM_HEAD = "llm"  # the name of the head that is the LLM's own decoder
GRAPHS: tuple[GraphName, ...] = ("encoder", "projector", "decoder")
HEAD_GRAPHS: tuple[GraphName, ...] = ("projector", "decoder")  # those of `HeadGraph`
INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
ENCODER_ATTENTION_MASK = "encoder_attention_mask"
HIDDEN_STATES = "hidden_states"
PROMPT_EMBEDS = "prompt_embeds"
LOGITS_TO_KEEP = "logits_to_keep"
PAST_LENGTH = "past_length"
LOGITS = "logits"

# Additional outputs of a TensorRT decoder engine, per row and position: the id with the highest logit, and that logit.
ARGMAX_IDS = "argmax_ids"
MAX_LOGITS = "max_logits"


@dataclass(frozen=True)
class WeightQuantization:
    """Options of int8 and int4 weight-only quantization.

    Args:
        block_size: weights along the input axis that share a scale (None: 128 at int8, 32 at int4). If it does not divide
            the axis, it is halved until it does.
        quantize_lm_head: at int4, quantize the LM head to 4 bits, and with it an embedding table tied to it
            (False: 8 bits).
    """

    block_size: int | None = None
    quantize_lm_head: bool = False

    def blocks(self, bits: Bits) -> int:
        """The block size of weights with this number of bits."""
        return self.block_size or DEFAULT_BLOCK_SIZES[bits]


DEFAULT_WEIGHT_QUANTIZATION = WeightQuantization()


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output. In `axes` a name is a dynamic axis, a number a fixed one."""

    name: str
    dtype: Literal["int64", "int32", "float32", "float16", "bfloat16"]
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class StateSpec:
    """One tensor of the decoder state: the input `past`, and the output `present`, `past` with the call's positions added.

    Both may share memory: a call writes its positions before it reads any. The first axis is `batch`, and one axis, of any
    place, is `capacity`: setting a row back, on which drafts and joined rows depend, forgets positions of it. The initial
    value is zero.
    """

    past: TensorSpec
    present: TensorSpec

    @property
    def growing_axis(self) -> int:
        """The index of the axis `capacity`."""
        return self.past.axes.index("capacity")


@dataclass(frozen=True)
class GraphSpec:
    """The inputs and outputs of one graph, in graph order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def input_names(self) -> list[str]:
        return [t.name for t in self.inputs]

    @property
    def output_names(self) -> list[str]:
        return [t.name for t in self.outputs]


def reads_ids(fusion: Fusion) -> bool:
    """Whether a fusion needs the SLM's embeddings of the prompt beside the projected states."""
    return fusion in ("add", "prefix")


def context_per_token(fusion: Fusion) -> int:
    """Context positions per prompt token. `prefix` has two: the projected states, then the prompt's embeddings."""
    return 2 if fusion == "prefix" else 1


@dataclass(frozen=True)
class PairShape:
    """The sizes of a pair that the contract depends on.

    Args:
        encoder_hidden_size: width of `hidden_states`: the LLM's hidden size times the number of layers read.
        hidden_size: width of the states the SLM is conditioned on.
        num_hidden_layers, num_key_value_heads, head_dim: of the SLM's decoder. With grouped-query attention
            `num_key_value_heads` is smaller than the number of query heads.
        vocab_size: width of the decoder's logits.
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
        """Whether the fusion needs the SLM's embeddings of the prompt, and therefore its ids."""
        return reads_ids(self.fusion)

    @property
    def context_per_token(self) -> int:
        """Context positions per prompt token; see the function of the same name."""
        return context_per_token(self.fusion)


def cache_type(decoder: Precision) -> FloatType:
    """The type of keys and values for a decoder precision: float16 at fp16, float32 at every other."""
    return "float16" if decoder == "fp16" else "float32"


def _f32(name: str, *axes: Axis) -> TensorSpec:
    return TensorSpec(name, "float32", axes)


def _i64(name: str, *axes: Axis) -> TensorSpec:
    return TensorSpec(name, "int64", axes)


CONTEXT_AXIS = 2  # of cross-attention keys and values: the index of `context`


def cross_attention(shape: PairShape, dtype: FloatType = "float32") -> tuple[TensorSpec, ...]:
    """The encoder-decoder SLM's cross-attention keys and values, [batch, num_key_value_heads, context, head_dim].

    They are outputs of the projector and inputs of the decoder. The decoder does not return them.
    """
    return tuple(
        TensorSpec(
            f"past_key_values.{i}.encoder.{kv}", dtype, ("batch", shape.num_key_value_heads, "context", shape.head_dim)
        )
        for i in range(shape.num_hidden_layers)
        for kv in ("key", "value")
    )


def state(shape: PairShape, dtype: FloatType = "float32") -> tuple[StateSpec, ...]:
    """The decoder's state (the KV cache), [batch, num_key_value_heads, capacity, head_dim], in graph order."""
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
    """The encoder graph: `input_ids` and `attention_mask` → `hidden_states`."""
    return GraphSpec(
        inputs=(_i64(INPUT_IDS, "batch", "prompt"), _i64(ATTENTION_MASK, "batch", "prompt")),
        outputs=(_f32(HIDDEN_STATES, "batch", "prompt", shape.encoder_hidden_size),),
    )


def projector_spec(shape: PairShape, dtype: FloatType = "float32") -> GraphSpec:
    """The projector graph: `hidden_states` → cross-attention keys and values, or `prompt_embeds` (decoder-only)."""
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
    """The decoder graph: one call on `sequence_length` token ids with the KV cache.

    `past_length` is each row's number of occupied cache positions. The call writes the row's positions after them, and
    its token i sees the cache positions up to past_length + i. A row whose length is set back forgets what was written
    behind it.

    Decoder-only: the sequence of a call is `embeds_length` prompt embeddings followed by `sequence_length` embedded ids.
    Either may be 0: the prompt pass has `sequence_length` 0, a step has `embeds_length` 0. Shorter prompts are padded on
    the right; the row's next call overwrites the padding. `logits_to_keep` holds each row's indices into the sequence.
    """
    past = tuple(s.past for s in state(shape, dtype))
    present = tuple(s.present for s in state(shape, dtype))
    if shape.slm_kind == "encoder-decoder":
        return GraphSpec(
            inputs=(
                _i64(INPUT_IDS, "batch", "sequence_length"),
                _i64(ENCODER_ATTENTION_MASK, "batch", "context"),
                _i64(PAST_LENGTH, "batch"),
                *past,
                *cross_attention(shape, dtype),
            ),
            outputs=(_f32(LOGITS, "batch", "sequence_length", shape.vocab_size), *present),
        )
    return GraphSpec(
        inputs=(
            _i64(INPUT_IDS, "batch", "sequence_length"),
            _f32(PROMPT_EMBEDS, "batch", "embeds_length", shape.hidden_size),
            _i64(PAST_LENGTH, "batch"),
            _i64(LOGITS_TO_KEEP, "batch", "num_logits"),
            *past,
        ),
        outputs=(_f32(LOGITS, "batch", "num_logits", shape.vocab_size), *present),
    )


def graph_specs(shape: PairShape, dtype: FloatType = "float32") -> dict[GraphName, GraphSpec]:
    """The specification of every graph. `dtype` is the type of keys and values (`cache_type`); other floats are float32."""
    return {
        "encoder": encoder_spec(shape),
        "projector": projector_spec(shape, dtype),
        "decoder": decoder_spec(shape, dtype),
    }
