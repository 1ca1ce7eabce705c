"""Size and predicted speed of a pair, from configurations alone: no weights are downloaded.

Parameters are counted on models on torch's meta device, so counts are exact. A graph's weights are those that its
outputs depend on by autograd, which needs no family's attribute names. Times are a roofline prediction from the memory
bandwidth and matrix speed of this machine, not a benchmark.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from llm2slm_export.authoring.graphs.factory import make_graph
from llm2slm_export.authoring.graphs.graph import Graph, kept_in_float32
from llm2slm_export.authoring.models.aliases import architecture, hub_id
from llm2slm_export.authoring.models.architectures import LLM_ARCHITECTURES, SLM_ARCHITECTURES, check_types
from llm2slm_export.authoring.models.llm_head import LLM_HEAD_CONFIG, require_own_decoder
from llm2slm_export.authoring.models.loading import config_from, llm_from_config, load_config, model_from_config
from llm2slm_export.authoring.models.pairing import PairConfig, projector_entry
from llm2slm_export.authoring.models.projector import Projector
from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.authoring.recipe import ModelSource
from llm2slm_export.contract import (
    DEFAULT_BLOCK_SIZES,
    DEFAULT_WEIGHT_QUANTIZATION,
    GRAPHS,
    HEAD_GRAPHS,
    LLM_HEAD,
    Bits,
    Fusion,
    GraphName,
    PairShape,
    Precision,
    WeightQuantization,
    cache_type,
)
from llm2slm_export.environment.hardware import MachineLimits, probe
from llm2slm_export.errors import CompositionError

GB = 1e9
RUNTIME_BYTES = 0.1 * GB  # Python and ONNX Runtime without weights (70 MB measured on x86-64), and a margin for arenas


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. `llm` and `slm` are whole models; `*_step` is the number that one generated token reads.

    `llm_step` is None if the LLM does not generate, or is not supported as an SLM.
    """

    llm: int
    llm_encoder: int
    llm_step: int | None
    projector: int
    slm: int
    slm_step: int


@dataclass(frozen=True)
class GraphSize:
    """Weights of a graph. `bytes_read`: read by one call, without table lookups, which read a few rows."""

    graph: GraphName
    precision: Precision
    parameters: int
    bytes: int
    bytes_read: int


@dataclass(frozen=True)
class CacheSize:
    """Bytes of keys and values in the cache's type: per token, and for one row of the planned prompt and response."""

    self_per_token: int
    cross_per_prompt_token: int
    total: int


@dataclass(frozen=True)
class StageTime:
    """A predicted time, and the machine's limit that determines it."""

    stage: str
    ms: float
    bound: str


@dataclass(frozen=True)
class LlmHeadSize:
    """The LLM head's own graphs, and its keys and values."""

    graphs: tuple[GraphSize, ...]
    cache: CacheSize


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes and predicted times of a pair, and of the LLM head beside it."""

    llm: str
    slm: str
    fusion: Fusion
    shape: PairShape
    parameters: Parameters
    graphs: tuple[GraphSize, ...]
    bundle_bytes: int
    cache: CacheSize
    prompt_tokens: int
    new_tokens: int
    build_ram_bytes: int
    run_ram_bytes: int
    machine: MachineLimits
    stages: tuple[StageTime, ...]
    llm_head: LlmHeadSize | None = None


# Use of a weight in a graph: matrices and the LM head are multiplied, tables are only looked up, the rest stays in
# float32. At fp16, kept matrices stay in float32 too.
_Use = Literal["matrix", "kept", "head", "table", "rest"]
_MULTIPLIED: tuple[_Use, ...] = ("matrix", "kept", "head")
_Held = dict[nn.Parameter, _Use]


def plan(
    llm: ModelSource,
    slm: ModelSource,
    *,
    precision: Mapping[GraphName, Precision],
    weight_quantization: WeightQuantization = DEFAULT_WEIGHT_QUANTIZATION,
    pair_config: PairConfig | None = None,
    llm_head: Mapping[GraphName, Precision] | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
) -> Plan:
    """Size a pair and predict its times on this machine.

    Args:
        llm, slm: the models.
        precision: precision of each graph.
        weight_quantization: of int8 and int4 weights.
        pair_config: fusion, tokenizer and projector; None: the defaults.
        llm_head: precision of the LLM head's projector and decoder; None: no such head.
        prompt_tokens, new_tokens: planned lengths.

    Raises:
        CompositionError: a configuration is not available, a model type is not supported, or the two models cannot be
            combined; or the LLM cannot be a head.
    """
    pair_config = pair_config or PairConfig()
    llm_config, slm_config = _config(llm), _config(slm)
    check_types(llm_config, slm_config)
    if llm_head is not None:
        require_own_decoder(llm_config, pair_config.layer, pair_config.max_new_tokens)
    with torch.device("meta"):
        writes = LLM_ARCHITECTURES[llm_config.model_type] != "encoder-only"
        whole_llm, slm_model = _whole(llm, llm_config) if writes else None, _whole(slm, slm_config)
        # The encoder within the whole LLM shares its embedding table with the LLM's decoder.
        within: Any = whole_llm if llm_head is not None else None
        llm_model: nn.Module = llm_from_config(llm_config) if within is None else within.get_encoder()
        # transformers reads values of meta tensors (is this mask all ones?), but not of fake tensors.
        with FakeTensorMode(allow_non_fake_inputs=True):
            projector = Projector(projector_entry(llm_model, slm_model, pair_config))
            reference = Reference(llm_model, projector, slm_model, pair_config.fusion, pair_config.layer)
            held = {graph: _held(make_graph(graph, reference)) for graph in GRAPHS}
            llm_step = (
                _own_step(llm_model, whole_llm) if whole_llm and llm_config.model_type in SLM_ARCHITECTURES else None
            )
            head = None if within is None else _llm_head(llm_model, within)
            head_held = {} if head is None else {graph: _held(make_graph(graph, head)) for graph in HEAD_GRAPHS}
    shape = reference.shape
    sizes = _sizes(held, precision, weight_quantization)
    parts = [(held[g], precision[g]) for g in GRAPHS]
    cache = _cache(shape, prompt_tokens, new_tokens, precision["decoder"])
    machine = probe()
    stages = _stages(reference, held, sizes, llm_step, machine, prompt_tokens, new_tokens)
    beside: LlmHeadSize | None = None
    if head is not None and llm_head is not None:
        own = {g: llm_head.get(g, precision[g]) for g in HEAD_GRAPHS}
        beside = LlmHeadSize(
            _sizes(head_held, own, weight_quantization),
            _cache(head.shape, prompt_tokens, new_tokens, own["decoder"]),
        )
        parts += [(head_held[g], own[g]) for g in HEAD_GRAPHS]
        alone = _stages(
            head, held | head_held, (sizes[0], *beside.graphs), None, machine, prompt_tokens, new_tokens
        )  # fmt: skip
        stages += tuple(replace(stage, stage=f"{LLM_HEAD}: {stage.stage}") for stage in alone[1:])
    # Graphs share equal weights at equal precision.
    stored = {(p, _bytes(p, use, kept, weight_quantization)) for part, kept in parts for p, use in part.items()}
    bundle_bytes = round(sum(size for _, size in stored))
    built = _count(llm_model if whole_llm is None or beside is None else whole_llm)
    caches = cache.total + (0 if beside is None else beside.cache.total)
    return Plan(
        llm=_label(llm), slm=_label(slm), fusion=pair_config.fusion, shape=shape,
        parameters=Parameters(
            llm=_count(whole_llm or llm_model), llm_encoder=_count(llm_model), llm_step=_read(llm_step) if llm_step else None,
            projector=_count(projector), slm=_count(slm_model), slm_step=_read(held["decoder"]),
        ),
        graphs=sizes, bundle_bytes=bundle_bytes, cache=cache, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        build_ram_bytes=round(2 * 4 * built + GB),
        run_ram_bytes=round(bundle_bytes + caches + RUNTIME_BYTES),
        machine=machine, stages=stages, llm_head=beside,
    )  # fmt: skip


def _sizes(
    held: Mapping[GraphName, _Held], precision: Mapping[GraphName, Precision], weight_quantization: WeightQuantization
) -> tuple[GraphSize, ...]:
    return tuple(
        GraphSize(
            g, precision[g], sum(p.numel() for p in part),
            bytes=round(sum(_bytes(p, use, precision[g], weight_quantization) for p, use in part.items())),
            bytes_read=_bytes_read(part, precision[g], weight_quantization),
        )
        for g, part in held.items()
    )  # fmt: skip


def _config(source: ModelSource) -> PreTrainedConfig:
    """The configuration to size; a recipe's `config` takes precedence, because `model` may not be trained yet."""
    if source.config is not None:
        return config_from(source.config)
    return load_config(_label(source), source.revision)


def _label(source: ModelSource) -> str:
    return source.model or str((source.config or {})["model_type"])


def _whole(source: ModelSource, config: PreTrainedConfig) -> nn.Module:
    """A model with its language-model head, untied from the embedding table if the published model's is."""
    try:
        model: Any = model_from_config(config.to_dict())
    except (ValueError, AttributeError, RuntimeError) as error:
        raise CompositionError(
            f"The {config.model_type} configuration is invalid.",
            str(error),
            remedy="fix the configuration",
        ) from error
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is table.weight and _published_untied(source):
        head.weight = nn.Parameter(torch.empty_like(table.weight))
    whole: nn.Module = model
    return whole


def _published_untied(source: ModelSource) -> bool:
    """Whether a published model's configuration unties the LM head from the embedding table.

    transformers 5 ties both in every T5, mT5 and umT5 created from a configuration; it unties them if the checkpoint
    has both.
    """
    if source.config is not None:
        return False
    name = _label(source)
    published = architecture(name) if not Path(name).is_dir() else None
    if published is None:
        # In the local directory or in the hub's cache, because `load_config` has read it.
        published, _ = PreTrainedConfig.get_config_dict(hub_id(name), revision=source.revision, local_files_only=True)
    # transformers moves T5's `tie_word_embeddings` to `scale_decoder_outputs`.
    return any(published.get(name) is False for name in ("tie_word_embeddings", "scale_decoder_outputs"))


def _held(graph: Graph) -> _Held:
    """The weights that a graph's outputs depend on, with their use; these are the exported ones."""
    graph.requires_grad_(requires_grad=True)
    with torch.enable_grad():
        outputs = graph(*graph.example_inputs())
    held: _Held = {}
    names = kept_in_float32(graph)
    kept = {weight for name, weight in graph.named_parameters() if not names.isdisjoint(name.split("."))}
    vocab = outputs[0].shape[-1] if graph.name == "decoder" else None
    pending, seen = [output.grad_fn for output in outputs if output.grad_fn is not None], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        for source, _ in node.next_functions:
            weight = getattr(source, "variable", None)
            if source is not None and weight is None:
                pending.append(source)
            elif weight is not None and held.get(weight) not in _MULTIPLIED:
                # A tied table counts as a matrix, because the LM head reads all of it.
                looked_up = node.name().startswith("EmbeddingBackward")
                matrix: _Use = "head" if weight.shape[0] == vocab else "kept" if weight in kept else "matrix"
                held[weight] = "table" if looked_up else matrix if weight.ndim >= 2 else "rest"
    return held


def _own_step(llm_model: nn.Module, whole: nn.Module) -> _Held:
    """The weights of the LLM's own decoder: the decoder graph of a pair of the LLM with itself."""
    projector = Projector(projector_entry(llm_model, whole, PairConfig()))
    return _held(make_graph("decoder", Reference(llm_model, projector, whole, "add")))


def _llm_head(encoder: nn.Module, whole: nn.Module) -> Reference:
    """The LLM head: the pair of an LLM's encoder with the whole LLM."""
    projector = Projector(projector_entry(encoder, whole, LLM_HEAD_CONFIG))
    return Reference(encoder, projector, whole, LLM_HEAD_CONFIG.fusion)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(weight: nn.Parameter, use: _Use, precision: Precision, weight_quantization: WeightQuantization) -> float:
    if use == "rest" or precision == "fp32" or (use == "kept" and precision == "fp16"):
        return 4 * weight.numel()
    if precision in ("bf16", "fp16"):
        return 2 * weight.numel()
    if precision in ("int8", "w8a8"):
        return weight.numel() * bytes_of_weight(8, weight_quantization.blocks(8))
    # At int4, tables and, by default, the LM head have 8 bits.
    four = use in ("matrix", "kept") or (use == "head" and weight_quantization.quantize_lm_head)
    return weight.numel() * (
        bytes_of_weight(4, weight_quantization.blocks(4)) if four else bytes_of_weight(8, DEFAULT_BLOCK_SIZES[8])
    )


def bytes_of_weight(bits: Bits, block: int) -> float:
    """Bytes per weight, including its share of the block's float32 scale."""
    return bits / 8 + 4 / block


def _bytes_read(
    held: _Held, precision: Precision, weight_quantization: WeightQuantization = DEFAULT_WEIGHT_QUANTIZATION
) -> int:
    """Bytes that one call reads; table lookups are neglected."""
    return round(sum(_bytes(p, use, precision, weight_quantization) for p, use in held.items() if use != "table"))


def _read(held: _Held) -> int:
    return sum(p.numel() for p, use in held.items() if use != "table")


def _cache(shape: PairShape, prompt: int, new: int, decoder: Precision) -> CacheSize:
    each = 2 if cache_type(decoder) == "float16" else 4
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * each
    per_prompt_token = per_token * shape.context_per_token
    crossed = per_prompt_token if shape.slm_kind == "encoder-decoder" else 0
    return CacheSize(per_token, crossed, per_prompt_token * prompt + per_token * new)


def _stages(
    reference: Reference,
    held: Mapping[GraphName, _Held],
    sizes: tuple[GraphSize, ...],
    llm_step: _Held | None,
    machine: MachineLimits,
    prompt: int,
    new: int,
) -> tuple[StageTime, ...]:
    shape = reference.shape
    context = prompt * shape.context_per_token
    # In the projector graph, the projector runs over the prompt, everything else over the context.
    over_prompt = set(reference.projector.parameters())

    def call(stage: str, graph: GraphName, multiplied: int) -> StageTime:
        return _roofline(stage, read[graph], multiplied, machine)

    read = {size.graph: size.bytes_read for size in sizes}
    matrices = {graph: [p for p, use in held[graph].items() if use in _MULTIPLIED] for graph in GRAPHS}
    projecting = sum(p.numel() * (prompt if p in over_prompt else context) for p in matrices["projector"])
    decoding = sum(p.numel() for p in matrices["decoder"])
    once = [
        call("encode", "encoder", sum(p.numel() for p in matrices["encoder"]) * prompt),
        call("project", "projector", projecting),
    ]
    if shape.slm_kind == "decoder-only":
        once.append(call("prefill", "decoder", decoding * context))

    step = call("step", "decoder", decoding)
    total = StageTime("total", sum(stage.ms for stage in once) + step.ms * new, step.bound)
    if llm_step is None:
        return *once, step, total
    multiplied = sum(p.numel() for p, use in llm_step.items() if use in _MULTIPLIED)
    alone = _roofline("LLM's own step (fp32)", _bytes_read(llm_step, "fp32"), multiplied, machine)
    return *once, step, total, alone


def _roofline(stage: str, read: int, multiplied: int, machine: MachineLimits) -> StageTime:
    memory, compute = read / machine.bandwidth, 2 * multiplied / machine.flops
    return StageTime(stage, 1000 * max(memory, compute), "memory" if memory >= compute else "compute")
