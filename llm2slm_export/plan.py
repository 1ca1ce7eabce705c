"""What a pair will weigh and roughly how fast it will be, from configurations alone: no weights are downloaded.

Parameters are counted on models built on torch's meta device, so they are exact. Bytes follow from them. Times are a
prediction (a roofline over the memory bandwidth and matrix speed measured here), never a benchmark.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForTextEncoding, PreTrainedConfig

from llm2slm_export.contract import GRAPHS, Fusion, GraphName, PairShape, Precision
from llm2slm_export.errors import CompositionError
from llm2slm_export.models.loading import check_types, config_from, load_config, model_from_config
from llm2slm_export.models.projector import Projector
from llm2slm_export.models.reference import pair_shape
from llm2slm_export.recipe import ModelSource

INT8_BYTES = 1 + 4 / 128  # a byte and its share of one float32 scale per 128 weights
GB = 1e9
RUNTIME_BYTES = 0.1 * GB  # Python and ONNX Runtime before any weight (70 MB measured on x86-64), and some for arenas


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. `llm` and `slm` are whole models; `*_step` is what one generated token reads."""

    llm: int
    llm_encoder: int
    llm_step: int
    projector: int
    slm: int
    slm_step: int


@dataclass(frozen=True)
class GraphSize:
    """A graph's weights: how many it holds, how many one call reads (a lookup reads a few rows of its table)."""

    graph: GraphName
    precision: Precision
    parameters: int
    bytes: int
    bytes_read: int


@dataclass(frozen=True)
class CacheSize:
    """Key and value bytes in float32: per token, and for one row of the prompt and response lengths planned for."""

    self_per_token: int
    cross_per_prompt_token: int
    total: int


@dataclass(frozen=True)
class Machine:
    """What the probe measured: bytes/s of matrix-vector products, float operations/s of matrix products."""

    bandwidth: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class StageTime:
    """A predicted time, and which of the machine's two limits sets it."""

    stage: str
    ms: float
    bound: str


@dataclass(frozen=True)
class Plan:
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
    machine: Machine
    stages: tuple[StageTime, ...]


@dataclass(frozen=True)
class _Weights:
    """Weights of one part: `matrices` are multiplied with, `tables` looked up in, `rest` stays float32."""

    matrices: int = 0
    tables: int = 0
    rest: int = 0

    @property
    def count(self) -> int:
        return self.matrices + self.tables + self.rest

    def __add__(self, other: "_Weights") -> "_Weights":
        return _Weights(self.matrices + other.matrices, self.tables + other.tables, self.rest + other.rest)

    def bytes(self, precision: Precision) -> int:
        return round((self.matrices + self.tables) * _bytes_each(precision) + self.rest * 4)

    def bytes_read(self, precision: Precision) -> int:
        return round(self.matrices * _bytes_each(precision) + self.rest * 4)


def _bytes_each(precision: Precision) -> float:
    return INT8_BYTES if precision == "int8" else 4


def plan(
    llm: ModelSource,
    slm: ModelSource,
    *,
    precision: Mapping[GraphName, Precision],
    d_hidden: int | None = None,
    fusion: Fusion = "add",
    prompt_tokens: int = 64,
    new_tokens: int = 128,
) -> Plan:
    """Size a pair and predict its times on this machine.

    Args:
        precision: of each graph.
        d_hidden: the projector's hidden width; the SLM's width where it is not given.

    Raises:
        CompositionError: a configuration that cannot be had without its model, or types that are not supported.
    """
    llm_config, slm_config = _config(llm), _config(slm)
    check_types(llm_config, slm_config)
    with torch.device("meta"):
        whole_llm, whole_slm = _whole(llm_config), _whole(slm_config)
        encoder = AutoModelForTextEncoding.from_config(llm_config)
        d_slm = slm_config.hidden_size
        projector = Projector(llm_config.hidden_size, d_hidden or d_slm, d_slm)
    shape = pair_shape(projector, whole_slm, fusion)
    weights = _graph_weights(encoder, projector, whole_slm, shape, separate_head=_separate_head(slm))
    llm_step = _step_weights(whole_llm, separate_head=_separate_head(llm))
    slm_step = weights["decoder"]
    sizes = tuple(
        GraphSize(
            g, precision[g], weights[g].count, weights[g].bytes(precision[g]), weights[g].bytes_read(precision[g])
        )
        for g in GRAPHS
    )
    shared = _shared_bytes(whole_slm, shape, precision)
    bundle_bytes = sum(size.bytes for size in sizes) - shared
    cache = _cache(shape, prompt_tokens, new_tokens)
    machine = probe()
    return Plan(
        llm=_label(llm), slm=_label(slm), fusion=fusion, shape=shape,
        parameters=Parameters(
            llm=_count(whole_llm) + _head(llm, llm_config), llm_encoder=_count(encoder),
            llm_step=llm_step.matrices + llm_step.rest, projector=_count(projector),
            slm=_count(whole_slm) + _head(slm, slm_config), slm_step=slm_step.matrices + slm_step.rest,
        ),
        graphs=sizes, bundle_bytes=bundle_bytes, cache=cache, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        build_ram_bytes=round(2 * 4 * _count(encoder) + GB),
        run_ram_bytes=round(bundle_bytes + cache.total + RUNTIME_BYTES),
        machine=machine, stages=_stages(shape, weights, sizes, llm_step, machine, prompt_tokens, new_tokens),
    )  # fmt: skip


def probe(megabytes: int = 128, width: int = 768) -> Machine:
    """Measure this machine for well under a second: the best of three matrix-vector and matrix-matrix products.

    Args:
        megabytes: of the matrix that is streamed; well beyond any last-level cache, as a model's weights are.
    """
    started = time.perf_counter()
    rows = megabytes * 2**20 // (4 * 4096)
    streamed, vector = np.ones((rows, 4096), np.float32), np.ones(4096, np.float32)
    square = np.ones((width, width), np.float32)
    bandwidth = streamed.nbytes / _best(lambda: streamed @ vector)
    flops = 2 * width**3 / _best(lambda: square @ square)
    return Machine(bandwidth, flops, time.perf_counter() - started)


def _best(work: Any) -> float:
    times = []
    for _ in range(4):  # the first one pays for page faults and thread start, and is never the best
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _config(source: ModelSource) -> PreTrainedConfig:
    """The configuration to size. One in the recipe describes the model even where `model` is yet to be trained."""
    if source.config is not None:
        return config_from(source.config)
    return load_config(_label(source), source.revision)


def _label(source: ModelSource) -> str:
    return source.model or str((source.config or {})["model_type"])


def _whole(config: PreTrainedConfig) -> nn.Module:
    try:
        return model_from_config(config.to_dict())
    except (ValueError, AttributeError, RuntimeError) as error:
        raise CompositionError(
            f"No model can be made of the {config.model_type} configuration.",
            str(error),
            remedy="mend the configuration",
        ) from error


def _separate_head(source: ModelSource) -> bool:
    """Whether a published model's output head is not its embedding table.

    transformers 5 ties the two for every T5 made from a configuration, and unties them on finding both in a
    checkpoint: T5 1.1 (which does not scale the decoder's output), mT5 and umT5 have both.
    """
    if source.config is not None:
        return False
    config: Any = load_config(_label(source), source.revision)
    if config.model_type == "t5":
        return not config.scale_decoder_outputs
    return config.model_type in {"mt5", "umt5"}


def _head(source: ModelSource, config: Any) -> int:
    return config.vocab_size * config.hidden_size if _separate_head(source) else 0


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _weights(module: nn.Module, *, table: nn.Parameter | None = None, without: tuple[str, ...] = ()) -> _Weights:
    """A module's parameters by use, each once; `table` is its embedding table, names holding `without` are left out."""
    matrices = tables = rest = 0
    for name, p in module.named_parameters():
        if any(part in name for part in without):
            continue
        if p is table or name.endswith(("wpe.weight", "relative_attention_bias.weight")):
            tables += p.numel()
        elif p.ndim >= 2:
            matrices += p.numel()
        else:
            rest += p.numel()
    return _Weights(matrices, tables, rest)


_CROSS_KV = ("EncDecAttention.k.", "EncDecAttention.v.")


def _table(model: Any) -> nn.Parameter:
    table: nn.Parameter = model.get_input_embeddings().weight
    return table


def _step_weights(model: Any, *, separate_head: bool) -> _Weights:
    """What the decoder graph of a model holds: cross-attention keys and values are computed once, elsewhere."""
    table = _table(model)
    head = model.get_output_embeddings().weight
    tied = head is table and not separate_head
    if not model.config.is_encoder_decoder:
        # A tied table is read whole by the output head, so it counts as a matrix.
        return _weights(model, table=None if tied else table)
    blocks = _weights(model.decoder, table=table, without=(*_CROSS_KV, "embed_tokens"))
    return blocks + (
        _Weights(matrices=table.numel()) if tied else _Weights(matrices=head.numel(), tables=table.numel())
    )


def _graph_weights(
    encoder: Any, projector: nn.Module, slm: Any, shape: PairShape, *, separate_head: bool
) -> dict[GraphName, _Weights]:
    fused = _weights(projector)
    if shape.projector_reads_ids:
        fused += _Weights(tables=_table(slm).numel())
    if shape.slm_kind == "encoder-decoder":
        cross = sum(p.numel() for name, p in slm.decoder.named_parameters() if any(part in name for part in _CROSS_KV))
        fused += _weights(slm.encoder, without=("embed_tokens",)) + _Weights(matrices=cross)
    return {
        "encoder": _weights(encoder, table=_table(encoder)),
        "projector": fused,
        "decoder": _step_weights(slm, separate_head=separate_head),
    }


def _shared_bytes(slm: Any, shape: PairShape, precision: Mapping[GraphName, Precision]) -> int:
    """The SLM's embedding table is in the projector graph and in the decoder graph; at one precision it is stored once."""
    if not shape.projector_reads_ids or precision["projector"] != precision["decoder"]:
        return 0
    return _Weights(tables=_table(slm).numel()).bytes(precision["projector"])


def _cache(shape: PairShape, prompt: int, new: int) -> CacheSize:
    per_token = 2 * shape.layers * shape.heads * shape.d_head * 4
    if shape.slm_kind == "encoder-decoder":
        return CacheSize(per_token, per_token, per_token * (prompt + new))
    return CacheSize(per_token, 0, per_token * (prompt + new))


def _stages(
    shape: PairShape,
    weights: Mapping[GraphName, _Weights],
    sizes: tuple[GraphSize, ...],
    llm_step: _Weights,
    machine: Machine,
    prompt: int,
    new: int,
) -> tuple[StageTime, ...]:
    def call(stage: str, graph: GraphName, tokens: int) -> StageTime:
        return _roofline(stage, read[graph], weights[graph].matrices * tokens, machine)

    read = {size.graph: size.bytes_read for size in sizes}
    once = [call("encode", "encoder", prompt), call("project", "projector", prompt)]
    if shape.slm_kind == "decoder-only":
        once.append(call("prefill", "decoder", prompt))
    step = call("step", "decoder", 1)
    total = StageTime("total", sum(stage.ms for stage in once) + step.ms * new, step.bound)
    alone = _roofline("LLM's own step (fp32)", llm_step.bytes_read("fp32"), llm_step.matrices, machine)
    return *once, step, total, alone


def _roofline(stage: str, read: int, multiplied: int, machine: Machine) -> StageTime:
    memory, compute = read / machine.bandwidth, 2 * multiplied / machine.flops
    return StageTime(stage, 1000 * max(memory, compute), "memory" if memory >= compute else "compute")
