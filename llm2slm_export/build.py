"""Building a bundle: export the three graphs, gate them on parity, and only then let the directory take its name."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from llm2slm_export import contract
from llm2slm_export.atomic import replaced_directory
from llm2slm_export.bundle import (
    Bundle,
    CacheEntry,
    GenerationDefaults,
    GraphEntry,
    Manifest,
    ParityReport,
    Source,
    TokenizerEntry,
    file_entries,
    write_manifest,
)
from llm2slm_export.contract import GraphName, Precision
from llm2slm_export.errors import ParityError
from llm2slm_export.exporters.onnx import MINIMUM_ONNXRUNTIME, OPSET, export_graph, transpose_weights
from llm2slm_export.exporters.quantize import quantize_int8
from llm2slm_export.exporters.weights import WeightStore
from llm2slm_export.graphs.pair import make_graph
from llm2slm_export.models.loading import LoadedPair
from llm2slm_export.verify import compare, reference_cases, special_ids

LLM_TOKENIZER, SLM_TOKENIZER = "tokenizer/llm/tokenizer.json", "tokenizer/slm/tokenizer.json"
TOOLS = ("llm2slm-export", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tokenizers")


@dataclass(frozen=True)
class Stage:
    """A finished stage of a build: its name, how long it took, and what it wrote where it wrote something."""

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
    precision: dict[GraphName, Precision],
    force: bool,
    on_start: Callable[[str], None] = lambda _: None,
    on_stage: Callable[[Stage], None] = lambda _: None,
) -> Manifest:
    """Export a pair into a bundle at `out`.

    The LLM's weights are let go of once its graph is written: `pair.reference` cannot encode afterwards.

    Args:
        precision: of each graph; fp32 where nothing is said.
        force: replace what is at `out`, once the new bundle is complete.
        on_start: called with a stage's name when it begins.
        on_stage: called when it is done.

    Raises:
        UsageError: `out` exists and `force` is not set.
        ParityError: a graph does not match the reference, with the whole report; nothing is left on disk.
    """
    progress = _Progress(on_start, on_stage)
    reference = pair.reference
    precisions: dict[GraphName, Precision] = {name: precision.get(name, "fp32") for name in contract.GRAPHS}
    ids = special_ids(reference, pair.llm_tokenizer)
    with replaced_directory(out, force=force) as directory:
        with progress.stage("reference"):
            cases = reference_cases(pair, ids)
        store = WeightStore(directory)
        for name in contract.GRAPHS:
            with progress.stage(name, directory):
                _write_graph(pair, name, precisions[name], store)
                if name == "encoder":
                    # A T5-XL encoder is 5 GB, and the parity gate is about to map its file.
                    reference.llm = nn.Identity()
                gc.collect()
        with progress.stage("tokenizers", directory):
            _save_tokenizer(pair.llm_tokenizer, directory / LLM_TOKENIZER)
            _save_tokenizer(pair.slm_tokenizer, directory / SLM_TOKENIZER)
        # The manifest stays in memory until the gate has passed: a directory without one does not load.
        draft = _manifest(pair, precisions)
        with progress.stage("parity"):
            report = compare(Bundle(directory, draft), reference, cases)
        if not report.passed:
            failed = [row for row in report.rows if not row.passed]
            raise ParityError(
                f"The bundle does not match the composition: {len(failed)} of {len(report.rows)} comparisons failed.",
                *(
                    f"{row.graph}, {row.case}, {row.tensor}: {row.measure} {row.value:.2e}, tolerance {row.tolerance:.0e}"
                    for row in failed[:5]
                ),
                remedy="nothing was written; try a higher --precision for the graphs named, or report this pair",
                report=report,
            )
        with progress.stage("manifest", directory):
            manifest = draft.model_copy(update={"parity": report, "files": file_entries(directory)})
            write_manifest(directory, manifest)
    return manifest


def _write_graph(pair: LoadedPair, name: GraphName, precision: Precision, store: WeightStore) -> None:
    model = export_graph(make_graph(name, pair.reference))
    if precision == "int8":
        quantize_int8(model)
    transpose_weights(model)
    store.save(model, f"{name}.onnx")


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    backend: Any = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(path))


def _manifest(pair: LoadedPair, precision: dict[GraphName, Precision]) -> Manifest:
    """The manifest but for what is known last: the parity report and the files."""
    shape = pair.reference.shape
    specs = contract.graph_specs(shape)
    slm: Any = pair.reference.slm
    ids = special_ids(pair.reference, pair.llm_tokenizer)
    chosen = slm.generation_config
    return Manifest(
        name=pair.file.name,
        sources={"llm": Source.model_validate(pair.sources["llm"]), "slm": Source.model_validate(pair.sources["slm"])},
        trained=pair.trained,
        shape=shape,
        fusion=pair.file.fusion,
        llm_layer=pair.file.llm.layer,
        prompt_template=pair.file.prompt_template,
        max_prompt_tokens=pair.file.max_prompt_tokens,
        # Relative positions (T5) have no end; the prompt is in the decoder's sequence only where there is no encoder.
        max_total_tokens=getattr(slm.config, "max_position_embeddings", None)
        if shape.slm_kind == "decoder-only"
        else None,
        tokenizer=TokenizerEntry(
            strategy=pair.file.tokenizer,
            llm=LLM_TOKENIZER,
            slm=SLM_TOKENIZER,
            slm_size=min(len(pair.slm_tokenizer), shape.vocab),
            stand_in=pair.stand_in_tokenizer,
        ),
        special_ids=ids,
        generation=GenerationDefaults(
            max_new_tokens=pair.file.max_new_tokens,
            do_sample=bool(chosen.do_sample),
            temperature=chosen.temperature or 1.0,
            top_k=chosen.top_k if chosen.top_k is not None else 50,
            top_p=chosen.top_p or 1.0,
            repetition_penalty=chosen.repetition_penalty or 1.0,
        ),
        graphs={
            name: GraphEntry(
                file=f"{name}.onnx",
                precision=precision[name],
                opset=OPSET,
                minimum_runtime={"onnxruntime": MINIMUM_ONNXRUNTIME},
                inputs=specs[name].inputs,
                outputs=specs[name].outputs,
            )
            for name in contract.GRAPHS
        },
        cache=CacheEntry(state=contract.state(shape)),
        parity=ParityReport(rows=()),
        tool_versions={tool: version(tool) for tool in TOOLS},
        files=(),
    )
