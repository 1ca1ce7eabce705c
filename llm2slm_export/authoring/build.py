"""Build of a bundle: export the three graphs and check their parity; the directory gets its name only if they pass."""

import gc
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from llm2slm_export import contract
from llm2slm_export.authoring.artifacts import BUNDLE
from llm2slm_export.authoring.build_engines import EngineBuilder, EngineChoice
from llm2slm_export.authoring.exporters.onnx.export import MINIMUM_ONNXRUNTIME, export_graph, transpose_weights
from llm2slm_export.authoring.exporters.onnx.external_data import WeightStore, bytes_read
from llm2slm_export.authoring.exporters.onnx.fusions import require_fused_attention
from llm2slm_export.authoring.exporters.quantization.calibration import input_ranges, second_moments
from llm2slm_export.authoring.exporters.quantization.half_precision import cast_outputs, convert_to_half, store_bfloat16
from llm2slm_export.authoring.exporters.quantization.smoothquant import smooth
from llm2slm_export.authoring.exporters.quantization.static_int8 import quantize_static_int8
from llm2slm_export.authoring.exporters.quantization.weight_only import quantize
from llm2slm_export.authoring.graphs.factory import make_graph
from llm2slm_export.authoring.graphs.graph import kept_in_float32
from llm2slm_export.authoring.models.generation_config import EXPORTED, require_exportable
from llm2slm_export.authoring.models.pairing import LoadedPair, positions_known, prompt_rows
from llm2slm_export.authoring.models.reference import digest
from llm2slm_export.authoring.parity.compare import Gate, compare
from llm2slm_export.authoring.parity.reference_outputs import (
    PROMPTS,
    ReferenceBatch,
    gate_batches,
    many_prompts,
    reference_batches,
    special_ids,
)
from llm2slm_export.authoring.parity.teacher_forcing import whole_responses
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.files import file_entries
from llm2slm_export.bundle.manifest import (
    CacheEntry,
    EngineEntry,
    EngineLimits,
    EngineSet,
    GenerationDefaults,
    GraphEntry,
    Manifest,
    Source,
    TokenizerEntry,
)
from llm2slm_export.bundle.manifest_file import write_manifest
from llm2slm_export.bundle.parity_report import ParityError, ParityReport, ParityRow
from llm2slm_export.contract import DEFAULT_WEIGHT_QUANTIZATION, Bits, GraphName, Precision, WeightQuantization
from llm2slm_export.errors import CompositionError, UsageError
from llm2slm_export.files.atomic import replaced_directory

LLM_TOKENIZER = "tokenizer/llm/tokenizer.json"
_BITS: dict[Precision, Bits] = {"int8": 8, "int4": 4}
TOOLS = ("llm2slm-export", "torch", "transformers", "onnx", "onnxscript", "tokenizers")


@dataclass(frozen=True)
class Stage:
    """A finished stage of a build: its name, duration, and bytes written (None for stages without files)."""

    name: str
    seconds: float
    bytes: int | None = None


@dataclass
class _Progress:
    on_start: Callable[[str], None]
    on_stage: Callable[[Stage], None]

    @contextmanager
    def stage(self, name: str, directory: Path | None = None) -> Iterator[None]:
        self.on_start(name)
        started, before = time.monotonic(), _size(directory)
        yield
        written = _size(directory) - before if directory else None
        self.on_stage(Stage(name, time.monotonic() - started, written))


def _size(directory: Path | None) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) if directory else 0


def build(
    pair: LoadedPair,
    out: Path,
    *,
    precision: Mapping[GraphName, Precision],
    weight_quantization: WeightQuantization = DEFAULT_WEIGHT_QUANTIZATION,
    force: bool,
    inputs: Iterable[Path] = (),
    gate: Gate | None = None,
    calibration: Sequence[str] = (),
    engines: EngineChoice | None = None,
    on_start: Callable[[str], None] = lambda _: None,
    on_stage: Callable[[Stage], None] = lambda _: None,
) -> Manifest:
    """Export a pair into a bundle at `out`: `build_heads` with one head."""
    return build_heads(
        {contract.MAIN: lambda: pair}, out, precision=precision, weight_quantization=weight_quantization, force=force, inputs=inputs, gate=gate,
        calibration=calibration, engines=engines, on_start=on_start, on_stage=on_stage,
    )  # fmt: skip


def build_heads(
    sources: Mapping[str, Callable[[], LoadedPair]],
    out: Path,
    *,
    precision: Mapping[GraphName, Precision],
    weight_quantization: WeightQuantization = DEFAULT_WEIGHT_QUANTIZATION,
    force: bool,
    inputs: Iterable[Path] = (),
    gate: Gate | None = None,
    calibration: Sequence[str] = (),
    engines: EngineChoice | None = None,
    on_start: Callable[[str], None] = lambda _: None,
    on_stage: Callable[[Stage], None] = lambda _: None,
) -> Manifest:
    """Export one LLM encoder, and a projector and a decoder for each source, into a bundle at `out`.

    Pairs are loaded one after the other. Each pair's LLM weights are released once the encoder graph is written: its
    `reference` cannot encode afterwards.

    Args:
        sources: loads each head's pair, by head name; the first head is the bundle's default.
        out: the bundle's directory.
        precision: precision of each graph; fp32 by default.
        weight_quantization: of int8 and int4 weights.
        force: replace the bundle at `out` once the new one is complete.
        inputs: files and directories that the pairs and prompts are read from; `out` must not overlap them.
        gate: held-out prompts to measure a reduced precision on, in addition to the parity check.
        calibration: prompts to calibrate int8 and int4 decoders and w8a8 encoders on; empty: the parity check's
            prompts.
        engines: TensorRT engines to compile; None: none.
        on_start: called with the name of each stage that starts.
        on_stage: called with each finished stage.

    Raises:
        UsageError: `out` exists without `force`, or must not be replaced (`atomic.Replacement`), or the gate shares
            prompts with the calibration.
        Llm2SlmError: `out` appeared or changed during the build. It is kept, and the new bundle is beside it.
        CompositionError: the heads have different LLMs.
        ParityError: a graph does not match the reference; the error holds the report. Nothing is left on disk.
        EngineError: an engine cannot be built. Nothing is left on disk.
    """
    _require_held_out(gate, calibration)
    precisions: dict[GraphName, Precision] = {name: precision.get(name, "fp32") for name in contract.GRAPHS}
    with replaced_directory(out, BUNDLE, force=force, inputs=inputs) as directory:
        making = _BundleBuilder(
            directory, precisions, weight_quantization, gate, calibration, _Progress(on_start, on_stage), several=len(sources) > 1,
            engines=EngineBuilder(engines, weight_quantization, directory) if engines else None,
        )  # fmt: skip
        try:
            manifests = {name: making.head(name, load) for name, load in sources.items()}
        finally:
            if making.engines:
                making.engines.close()
        (first, whole), *others = manifests.items()
        with making.progress.stage("manifest", directory):
            manifest = whole.model_copy(update={
                "head": first, "heads": dict(others), "files": file_entries(directory),
            })  # fmt: skip
            written = write_manifest(directory, manifest)
    return written


class _BundleBuilder:
    """A bundle under construction."""

    def __init__(
        self,
        directory: Path,
        precision: dict[GraphName, Precision],
        weight_quantization: WeightQuantization,
        gate: Gate | None,
        calibration: Sequence[str],
        progress: _Progress,
        *,
        several: bool,
        engines: EngineBuilder | None,
    ) -> None:
        self.directory, self.precision, self.progress, self.several = directory, precision, progress, several
        self.gate, self.calibration, self.weight_quantization, self.engines = (
            gate,
            calibration,
            weight_quantization,
            engines,
        )
        self.store = WeightStore(directory)
        self.encoder: GraphEntry | None = None
        self.tokenizers: dict[str, str] = {}  # file by content
        self.encoder_facts: dict[str, str] = {}  # of the first head; other heads must have the same

    def head(self, name: str, load: Callable[[], LoadedPair]) -> Manifest:
        """Write a head's graphs, and the encoder for the first head; return its manifest once parity has passed."""
        prefix = f"{name}." if self.several else ""
        with self._stage(name, "load", counted=False):
            pair = load()
        self._require_same_encoder(name, pair)
        limits = self.engines.choice.limits(pair) if self.engines else None
        reference = pair.reference
        ids = special_ids(reference, pair.llm_tokenizer)
        rows = prompt_rows(reference.llm, reference.slm, pair.file)
        with self._stage(name, "reference", counted=False):
            cases = reference_batches(pair, ids, exact=self._is_float32("encoder"))
            held_out = gate_batches(pair, ids, self.gate.prompts) if self.gate else []
            fitted = cases
            if self.calibration and self._fits_decoder:
                fitted = gate_batches(pair, ids, self.calibration)
        if self.encoder is None:
            with self.progress.stage("encoder", self.directory):
                self.encoder = self._graph(pair, "encoder", "encoder.onnx")
                self._engine_graph(pair, "encoder", "encoder.onnx")
                self._tokenizer(pair.llm_tokenizer, LLM_TOKENIZER)
        # Releases, for example, 5 GB of a T5-XL encoder before the parity check maps its file.
        reference.llm = nn.Identity()
        gc.collect()
        graphs: dict[GraphName, GraphEntry] = {"encoder": self.encoder}
        for graph in contract.GRAPHS[1:]:
            with self._stage(name, graph):
                graphs[graph] = self._graph(pair, graph, f"{prefix}{graph}.onnx", fitted)
                self._engine_graph(pair, graph, f"{prefix}{graph}.onnx", fitted)
                gc.collect()
        with self._stage(name, "tokenizer"):
            own = f"tokenizer/slm-{name}/tokenizer.json" if self.several else "tokenizer/slm/tokenizer.json"
            tokenizer = self._tokenizer(pair.slm_tokenizer, own)
        # The manifest is written last: a directory without a manifest does not load.
        draft = _manifest(pair, graphs, tokenizer, rows).model_copy(update={"head": name})
        with self._stage(name, "parity", counted=False):
            report = compare(Bundle(self.directory, draft), reference, cases, self.gate, held_out)
        _require_parity(report, self.precision)
        draft = draft.model_copy(update={"parity": report})
        if self.engines is None or limits is None:
            return draft
        with self._stage(name, "engines' parity", counted=False):
            self.engines.check(draft, reference, cases, self.gate, held_out)
        # Engines need neither the pair nor its reference outputs; the builder needs the memory.
        del pair, reference, cases, held_out, fitted
        gc.collect()
        return draft.model_copy(update={"engines": self._compiled(name, prefix, draft, limits)})

    def _compiled(self, head: str, prefix: str, draft: Manifest, limits: EngineLimits) -> dict[str, EngineSet]:
        assert self.engines is not None
        key, made = self.engines.key(limits), dict[GraphName, EngineEntry]()
        for graph in contract.GRAPHS:
            own = "" if graph == "encoder" else prefix
            with self._stage(head, f"{graph} engine"):
                made[graph] = self.engines.compile(
                    graph, self.directory, f"tensorrt/{key}/{own}{graph}.engine", draft, limits
                )
        return {key: self.engines.made(made, limits)}

    def _stage(self, head: str, stage: str, *, counted: bool = True) -> AbstractContextManager[None]:
        label = f"{head}: {stage}" if self.several else stage
        return self.progress.stage(label, self.directory if counted else None)

    def _is_float32(self, graph: GraphName) -> bool:
        return "fp32" in (self.precision[graph], self.engines and self.engines.choice.of(graph))

    @property
    def _fits_decoder(self) -> bool:
        """Whether decoder weights are calibrated on responses, which take long to generate."""
        return bool({"int8", "int4"} & {self.precision["decoder"], self.engines and self.engines.choice.of("decoder")})

    def _graph(self, pair: LoadedPair, name: GraphName, file: str, fitted: Sequence[ReferenceBatch] = ()) -> GraphEntry:
        """Write a graph. `fitted`: batches that an int8 or int4 decoder is calibrated on."""
        precision, graph = self.precision[name], make_graph(name, pair.reference)
        # Half-precision graphs use standard operators, which have explicit types.
        model = export_graph(graph, contrib=precision != "fp16")
        if name == "decoder":
            slm: Any = pair.reference.slm
            config = slm.config.get_text_config(decoder=True)
            softcapped = getattr(config, "attn_logit_softcapping", None) is not None
            require_fused_attention(model, pair.reference.shape, softcapped=softcapped)
        if precision in _BITS:
            # Encoder and projector run once and are large: their weights are quantized without calibration.
            ids = special_ids(pair.reference, pair.llm_tokenizer)
            calls = whole_responses(pair.reference, ids, fitted)
            moments = second_moments(model, calls) if name == "decoder" else {}
            quantize(
                model, _BITS[precision], weight_quantization=self.weight_quantization, moments=smooth(model, moments)
            )
        if precision == "w8a8":
            # A Transpose between weight and product would prevent the runtimes' int8 fusion.
            transpose_weights(model)
            ids = special_ids(pair.reference, pair.llm_tokenizer)
            read = many_prompts(pair, ids, self.calibration or pair.prompts or PROMPTS)
            prompts = [call for batch in read for call in _prompts(*batch)]
            smooth(model, second_moments(model, prompts, diagonal=True))
            quantize_static_int8(model, input_ranges(model, prompts))
            quantize(model, 8)  # tables, and layers whose inputs lose too much in static int8
        transpose_weights(model)
        if precision == "bf16":
            store_bfloat16(model)
        if precision == "fp16":
            convert_to_half(model, ir.DataType.FLOAT16, keep=kept_in_float32(graph))
        spec = contract.graph_specs(pair.reference.shape, contract.cache_type(self.precision["decoder"]))[name]
        cast_outputs(model, spec.outputs)
        return GraphEntry(
            file=file,
            data=self.store.save(model, file),
            precision=precision,
            block_size=self._block_size(precision),
            quantize_lm_head=precision == "int4" and self.weight_quantization.quantize_lm_head,
            opset=model.opset_imports[""],
            minimum_runtime={"onnxruntime": MINIMUM_ONNXRUNTIME},
            bytes_read=bytes_read(model),
            inputs=spec.inputs,
            outputs=spec.outputs,
        )

    def _block_size(self, precision: Precision) -> int | None:
        if precision == "w8a8":
            return DEFAULT_WEIGHT_QUANTIZATION.blocks(8)
        return self.weight_quantization.blocks(_BITS[precision]) if precision in _BITS else None

    def _engine_graph(
        self, pair: LoadedPair, name: GraphName, file: str, fitted: Sequence[ReferenceBatch] = ()
    ) -> None:
        """Write the graph of an engine, if the build has engines."""
        if self.engines is None:
            return

        def moments(model: ir.Model) -> Mapping[str, Any]:
            if name != "decoder":
                return {}
            ids = special_ids(pair.reference, pair.llm_tokenizer)
            return smooth(model, second_moments(model, whole_responses(pair.reference, ids, fitted)))

        graph = make_graph(name, pair.reference)
        model = export_graph(graph, contrib=False)
        self.engines.write(model, name, file, pair.reference.shape, moments, keep=kept_in_float32(graph))

    def _tokenizer(self, tokenizer: PreTrainedTokenizerFast, file: str) -> str:
        """Write a tokenizer to `file`, unless the bundle has an equal one; return the path of its file."""
        backend: Any = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        content = backend.to_str()
        if content not in self.tokenizers:
            path = self.directory / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8", newline="")
            self.tokenizers[content] = file
        return self.tokenizers[content]

    def _require_same_encoder(self, name: str, pair: LoadedPair) -> None:
        """Refuse a head with another encoder than the first head's."""
        if not self.several:
            return
        tokenizer: Any = pair.llm_tokenizer.backend_tokenizer
        facts = {
            "LLM weights": digest(pair.reference.llm)[:16],
            "LLM layer": str(pair.file.llm.layer),
            "LLM tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16],
        }
        self.encoder_facts = self.encoder_facts or facts
        differing = [
            f"{fact}: {ours} of the first head, {facts[fact]} of {name!r}"
            for fact, ours in self.encoder_facts.items()
            if facts[fact] != ours
        ]
        if differing:
            raise CompositionError(
                f"The head {name!r} has another encoder than the first head.",
                *differing,
                remedy="heads share one encoder: give compositions that were trained on the same LLM",
            )


def _require_held_out(gate: Gate | None, calibration: Sequence[str]) -> None:
    shared = sorted(set(gate.prompts) & set(calibration)) if gate else []
    if shared:
        raise UsageError(
            f"{len(shared)} of the gate's prompts are also calibration prompts.",
            *(repr(prompt) for prompt in shared[:5]),
            remedy="give --gate and --calibrate different prompts",
        )


def _require_parity(report: ParityReport, precision: Mapping[GraphName, Precision]) -> None:
    if report.passed:
        return
    failed = [row for row in report.rows if not row.passed]
    raise ParityError(
        f"The bundle does not match the composition: {len(failed)} of {len(report.rows)} comparisons failed.",
        *(
            f"{row.graph}, {row.case}, {row.tensor}: {row.measure} {row.value:.2e}, tolerance {row.tolerance:.1e}"
            + (f", transformers' own float32 {row.float32_error:.1e}" if row.float32_error is not None else "")
            for row in failed[:5]
        ),
        remedy=f"nothing was written; {_parity_remedy(failed, precision)}",
        report=report,
    )


def _parity_remedy(failed: Sequence[ParityRow], precision: Mapping[GraphName, Precision]) -> str:
    """The remedy for failed comparisons; at fp32 there is none but a report."""
    graphs = {row.graph for row in failed}
    reduced = {
        name: used for name, used in precision.items() if used != "fp32" and ("pair" in graphs or name in graphs)
    }
    remedies = []
    if reduced:
        finer = ",".join(f"{name}=fp32" for name in reduced)
        used = ", ".join(f"{name} is at {used}" for name, used in reduced.items())
        remedies.append(f"use a finer precision ({used}), at the finest --precision {finer}")
    if any(row.of_gate for row in failed):
        remedies.append("allow more with --max-differing")
    remedies.append("report this pair: the graphs and transformers disagree" if not remedies else "report this pair")
    return ", or ".join(remedies)


def _prompts(input_ids: Tensor, attention_mask: Tensor) -> Iterator[tuple[dict[str, Any], dict[int, Any]]]:
    """The encoder's inputs for a batch of prompts, with masks of real positions; then for each prompt's first token.

    A single token has the largest attention outputs, because attention has nothing to average.
    """
    for length in {input_ids.shape[1], 1}:
        ids, mask = input_ids[:, :length].numpy(), attention_mask[:, :length].numpy()
        yield {contract.INPUT_IDS: ids, contract.ATTENTION_MASK: mask}, {length: mask.astype(bool)}


def _manifest(pair: LoadedPair, graphs: Mapping[GraphName, GraphEntry], slm_tokenizer: str, rows: int) -> Manifest:
    """The manifest without parity report and files. `rows`: of the tables that prompt ids index."""
    reference, shape = pair.reference, pair.reference.shape
    slm: Any = reference.slm
    return Manifest(
        name=pair.file.name,
        sources={"llm": Source.model_validate(pair.sources["llm"]), "slm": Source.model_validate(pair.sources["slm"])},
        trained=pair.trained,
        shape=shape,
        fusion=pair.file.fusion,
        llm_layer=pair.file.llm.layer,
        prompt_template=pair.file.prompt_template,
        prompt_special_tokens=pair.file.prompt_special_tokens,
        prompt_strip=pair.file.prompt_strip,
        prompt_vocab=rows,
        max_prompt_tokens=pair.file.max_prompt_tokens,
        max_total_tokens=positions_known(slm),
        tokenizer=TokenizerEntry(
            strategy=pair.file.tokenizer,
            llm=LLM_TOKENIZER,
            slm=slm_tokenizer,
            slm_size=min(len(pair.slm_tokenizer), shape.vocab_size),
            stand_in=pair.stand_in_tokenizer,
        ),
        special_ids=special_ids(reference, pair.llm_tokenizer),
        generation=generation_defaults(slm, pair.file.max_new_tokens),
        graphs=dict(graphs),
        cache=CacheEntry(state=contract.state(shape, contract.cache_type(graphs["decoder"].precision))),
        parity=ParityReport(rows=()),
        tool_versions={tool: version(tool) for tool in TOOLS} | {"onnxruntime": onnxruntime.__version__},
        files=(),
        weights={"projector": digest(reference.projector), "slm": digest(reference.slm)},
    )


def generation_defaults(slm: Any, max_new_tokens: int) -> GenerationDefaults:
    """The options of the SLM's generation_config, in the bundle's schema.

    transformers' `min_length` includes the start token of an encoder-decoder. For a decoder-only model it includes the
    prompt, whose length a bundle does not know in advance: it is not exported.
    """
    require_exportable(slm)
    chosen = slm.generation_config
    options = {name: getattr(chosen, name, None) for name in EXPORTED}
    options = {name: value for name, value in options.items() if value is not None}
    if slm.config.is_encoder_decoder and chosen.min_length:
        options.setdefault("min_new_tokens", max(0, min(chosen.min_length - 1, max_new_tokens)))
    try:
        return GenerationDefaults.model_validate({"max_new_tokens": max_new_tokens, **options})
    except ValidationError as error:
        raise CompositionError(
            "The SLM's generation_config has values that bundles do not support.",
            *(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()),
            remedy="fix the SLM's generation_config.json",
        ) from error
