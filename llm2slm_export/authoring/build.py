"""Build of a bundle: export the three graphs and check their parity; the directory gets its name only if they pass."""

import gc
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn
from transformers import PreTrainedTokenizerFast

from llm2slm_export import contract
from llm2slm_export.authoring.artifacts import BUNDLE
from llm2slm_export.authoring.build_engines import EngineBuilder
from llm2slm_export.authoring.build_options import DEFAULT_BUILD_OPTIONS, BuildOptions
from llm2slm_export.authoring.calibration_calls import decoder_calls, encoder_calls
from llm2slm_export.authoring.exporters.onnx.export import MINIMUM_ONNXRUNTIME, export_graph
from llm2slm_export.authoring.exporters.onnx.external_data import WeightStore, bytes_read
from llm2slm_export.authoring.exporters.onnx.fusions import require_fused_attention
from llm2slm_export.authoring.exporters.precision import (
    PassInputs,
    block_size,
    lower_precision,
    uses_contrib_operators,
)
from llm2slm_export.authoring.exporters.quantization.half_precision import cast_outputs
from llm2slm_export.authoring.graphs.factory import make_graph
from llm2slm_export.authoring.graphs.graph import Graph, kept_in_float32
from llm2slm_export.authoring.models.compatibility import prompt_rows
from llm2slm_export.authoring.models.pairing import LoadedPair
from llm2slm_export.authoring.models.reference import digest
from llm2slm_export.authoring.pair_manifest import LLM_TOKENIZER, pair_manifest
from llm2slm_export.authoring.parity.compare import compare
from llm2slm_export.authoring.parity.reference_outputs import (
    PROMPTS,
    ReferenceBatch,
    gate_batches,
    reference_batches,
    special_ids,
)
from llm2slm_export.authoring.parity.refusals import require_parity
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.files import file_entries
from llm2slm_export.bundle.manifest import EngineEntry, EngineLimits, EngineSet, GraphEntry, Manifest
from llm2slm_export.bundle.manifest_file import write_manifest
from llm2slm_export.contract import GraphName
from llm2slm_export.errors import CompositionError
from llm2slm_export.files.atomic import replaced_directory


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
    pair: LoadedPair, out: Path, options: BuildOptions = DEFAULT_BUILD_OPTIONS, *, force: bool = False
) -> Manifest:
    """Export a pair into a bundle at `out`: `build_heads` with one head."""
    return build_heads({contract.MAIN: lambda: pair}, out, options, force=force)


def build_heads(
    sources: Mapping[str, Callable[[], LoadedPair]],
    out: Path,
    options: BuildOptions = DEFAULT_BUILD_OPTIONS,
    *,
    force: bool = False,
    inputs: Iterable[Path] = (),
    on_start: Callable[[str], None] = lambda _: None,
    on_stage: Callable[[Stage], None] = lambda _: None,
) -> Manifest:
    """Export one LLM encoder, and a projector and a decoder for each source, into a bundle at `out`.

    Pairs are loaded one after the other. Each pair's LLM weights are released once the encoder graph is written: its
    `reference` cannot encode afterwards.

    Args:
        sources: loads each head's pair, by head name; the first head is the bundle's default.
        out: the bundle's directory.
        options: precision, quantization, calibration, gate and engines.
        force: replace the bundle at `out` once the new one is complete.
        inputs: files and directories that the pairs and prompts are read from; `out` must not overlap them.
        on_start: called with the name of each stage that starts.
        on_stage: called with each finished stage.

    Raises:
        UsageError: `out` exists without `force`, or must not be replaced (`atomic.Replacement`); or the pair does
            not allow the engines' limits.
        Llm2SlmError: `out` appeared or changed during the build. It is kept, and the new bundle is beside it.
        CompositionError: the heads have different LLMs.
        ParityError: a graph does not match the reference; the error holds the report. Nothing is left on disk.
        EngineError: an engine cannot be built. Nothing is left on disk.
    """
    with replaced_directory(out, BUNDLE, force=force, inputs=inputs) as directory:
        making = _BundleBuilder(directory, options, _Progress(on_start, on_stage), several=len(sources) > 1)
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

    def __init__(self, directory: Path, options: BuildOptions, progress: _Progress, *, several: bool) -> None:
        self.directory, self.options, self.progress, self.several = directory, options, progress, several
        self.engines = EngineBuilder(options.engines, directory) if options.engines else None
        self.store = WeightStore(directory)
        self.encoder: GraphEntry | None = None
        self.tokenizers: dict[str, str] = {}  # file by content
        self.encoder_facts: dict[str, str] = {}  # of the first head; other heads must have the same

    def head(self, name: str, load: Callable[[], LoadedPair]) -> Manifest:
        """Write a head's graphs, and the encoder for the first head; return its manifest once parity has passed."""
        prefix = f"{name}." if self.several else ""
        options = self.options.for_head(name)
        with self._stage(name, "load", counted=False):
            pair = load()
        self._require_same_encoder(name, pair)
        limits = self.engines.choice.limits(pair) if self.engines else None
        reference, gate = pair.reference, options.gate
        ids = special_ids(reference, pair.llm_tokenizer)
        rows = prompt_rows(reference.llm, reference.slm, pair.file)
        with self._stage(name, "reference", counted=False):
            cases = reference_batches(pair, ids, exact=options.includes_float32("encoder"))
            held_out = gate_batches(pair, ids, gate.prompts) if gate else []
            fitted = cases
            if options.calibration and options.calibrates_decoder:
                fitted = gate_batches(pair, ids, options.calibration)
        if self.encoder is None:
            with self.progress.stage("encoder", self.directory):
                self.encoder = self._graph(pair, "encoder", "encoder.onnx", options)
                self._engine_graph(pair, "encoder", "encoder.onnx")
                self._tokenizer(pair.llm_tokenizer, LLM_TOKENIZER)
        # Releases, for example, 5 GB of a T5-XL encoder before the parity check maps its file.
        reference.llm = nn.Identity()
        gc.collect()
        graphs: dict[GraphName, GraphEntry] = {"encoder": self.encoder}
        for graph in contract.GRAPHS[1:]:
            with self._stage(name, graph):
                graphs[graph] = self._graph(pair, graph, f"{prefix}{graph}.onnx", options, fitted)
                self._engine_graph(pair, graph, f"{prefix}{graph}.onnx", fitted)
                gc.collect()
        with self._stage(name, "tokenizer"):
            own = f"tokenizer/slm-{name}/tokenizer.json" if self.several else "tokenizer/slm/tokenizer.json"
            tokenizer = self._tokenizer(pair.slm_tokenizer, own)
        # The manifest is written last: a directory without a manifest does not load.
        draft = pair_manifest(pair, graphs, tokenizer, rows).model_copy(update={"head": name})
        with self._stage(name, "parity", counted=False):
            report = compare(Bundle(self.directory, draft), reference, cases, gate, held_out)
        require_parity(report, options.precisions)
        draft = draft.model_copy(update={"parity": report})
        if self.engines is None or limits is None:
            return draft
        with self._stage(name, "engines' parity", counted=False):
            self.engines.check(draft, reference, cases, gate, held_out)
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

    def _graph(
        self,
        pair: LoadedPair,
        name: GraphName,
        file: str,
        options: BuildOptions,
        fitted: Sequence[ReferenceBatch] = (),
    ) -> GraphEntry:
        """Write a graph. `fitted`: batches that an int8 or int4 decoder is calibrated on."""
        graph = make_graph(name, pair.reference)
        precision = options.of(name)
        model = export_graph(graph, contrib=uses_contrib_operators(precision))
        if name == "decoder":
            _check_attention(model, pair)
        lower_precision(model, precision, self._pass_inputs(pair, graph, fitted))
        spec = contract.graph_specs(pair.reference.shape, contract.cache_type(options.of("decoder")))[name]
        cast_outputs(model, spec.outputs)
        return GraphEntry(
            file=file,
            data=self.store.save(model, file),
            precision=precision,
            block_size=block_size(precision, options.weight_quantization),
            quantize_lm_head=precision == "int4" and options.weight_quantization.quantize_lm_head,
            opset=model.opset_imports[""],
            minimum_runtime={"onnxruntime": MINIMUM_ONNXRUNTIME},
            bytes_read=bytes_read(model),
            inputs=spec.inputs,
            outputs=spec.outputs,
        )

    def _engine_graph(
        self, pair: LoadedPair, name: GraphName, file: str, fitted: Sequence[ReferenceBatch] = ()
    ) -> None:
        """Write the graph of an engine, if the build has engines."""
        if self.engines is None:
            return
        graph = make_graph(name, pair.reference)
        model = export_graph(graph, contrib=False)
        self.engines.write(model, name, file, pair.reference.shape, self._pass_inputs(pair, graph, fitted))

    def _pass_inputs(self, pair: LoadedPair, graph: Graph, fitted: Sequence[ReferenceBatch]) -> PassInputs:
        # Encoder and projector run once and are large: their int8 and int4 weights are quantized without calibration.
        return PassInputs(
            keep=kept_in_float32(graph), weight_quantization=self.options.weight_quantization,
            responses=partial(decoder_calls, pair, fitted) if graph.name == "decoder" else None,
            prompts=partial(encoder_calls, pair, self.options.calibration or pair.prompts or PROMPTS),
        )  # fmt: skip

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


def _check_attention(model: ir.Model, pair: LoadedPair) -> None:
    slm: Any = pair.reference.slm
    config = slm.config.get_text_config(decoder=True)
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    require_fused_attention(model, pair.reference.shape, softcapped=softcapped)
