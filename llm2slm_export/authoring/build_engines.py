"""Adding engines to a bundle in the making: their graphs, checked like the bundle's own, and then compiled.

A graph that is not finite, or not close, in the engines' precision on the parity gate's prompts is refused before anything
is compiled: it is run on ONNX Runtime's CPU, which rounds where the engine's graph says so.
"""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from llm2slm_export import contract
from llm2slm_export.authoring.exporters.onnx.export import transpose_weights
from llm2slm_export.authoring.exporters.onnx.external_data import WeightStore
from llm2slm_export.authoring.exporters.tensorrt.builder import PORTABLE, Compiler, OnStep
from llm2slm_export.authoring.exporters.tensorrt.network import add_argmax, fix_axes, lower_precision, tensor_specs
from llm2slm_export.authoring.exporters.tensorrt.profiles import engine_limits, fixed_axes, profiles
from llm2slm_export.authoring.models.pairing import LoadedPair, positions_known
from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.authoring.parity.compare import Gate, compare_engine_graphs
from llm2slm_export.authoring.parity.reference_outputs import ReferenceBatch
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.files import graph_digest, sha256
from llm2slm_export.bundle.manifest import Bounds, EngineEntry, EngineLimits, EngineSet, GraphEntry, Manifest
from llm2slm_export.bundle.parity_report import ParityError, ParityReport
from llm2slm_export.contract import EnginePrecision, GraphName, PairShape, TensorRtVariant, WeightQuantization
from llm2slm_export.errors import DeviceError, UsageError

# The oldest driver, by the CUDA release that a package is built for: TensorRT's prerequisites (11.4). TensorRT-RTX's name no
# driver of their own.
_DRIVERS = {"12": "535", "13": "580"}


@dataclass(frozen=True)
class EngineChoice:
    """What engines a build adds.

    Args:
        trt: the variant's module (`exporters.tensorrt.load_tensorrt`).
        precision: of each graph.
        batch, prompt, new: the largest request; None: the pair's own longest prompt and response.
        prompt_buckets: see `EngineLimits`.
        compute_capabilities: see `Compiler`.
        on_step: told how far the builder is.
    """

    variant: TensorRtVariant
    trt: Any
    precision: Mapping[GraphName, EnginePrecision] = field(default_factory=dict)
    batch: int = 8
    prompt: int | None = None
    new: int | None = None
    prompt_buckets: tuple[int, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None
    on_step: OnStep = lambda *_: None

    def of(self, name: GraphName) -> EnginePrecision:
        """A graph's precision; fp16 where nothing is said."""
        return self.precision.get(name, "fp16")

    @cached_property
    def compiler(self) -> Compiler:
        return Compiler(
            self.trt,
            compute_capabilities=self.compute_capabilities,
            timing_cache=self.timing_cache,
            on_step=self.on_step,
        )

    def limits(self, pair: LoadedPair) -> EngineLimits:
        """The limits of a pair's engines.

        Raises:
            UsageError: limits that the pair cannot have, every one named.
        """
        shape, most, positions = pair.reference.shape, pair.file.max_prompt_tokens, positions_known(pair.reference.slm)
        prompt = most if self.prompt is None else self.prompt
        new = pair.file.max_new_tokens if self.new is None else self.new
        buckets = tuple(sorted(set(self.prompt_buckets)))
        # Sizes below 1 are named below, with what else is wrong; there are no limits of them.
        limits = engine_limits(
            shape, batch=max(1, self.batch), prompt=max(1, prompt), new=max(1, new),
            prompt_buckets=tuple(bucket for bucket in buckets if bucket >= 1), positions=positions,
        )  # fmt: skip
        given = {"--max-batch": self.batch, "--max-prompt": prompt, "--max-new": new}
        problems = [f"{option} is {value}" for option, value in given.items() if value < 1]
        outside = [str(bucket) for bucket in buckets if not 1 <= bucket < prompt]
        if outside:
            problems.append(
                f"--prompt-buckets {','.join(outside)}: they lie between 1 and {prompt - 1}, below --max-prompt"
            )
        if prompt > most:
            problems.append(f"--max-prompt {prompt}: the pair takes {most} tokens")
        if shape.slm_kind == "decoder-only" and prompt * shape.context_per_token >= limits.capacity:
            problems.append(f"--max-prompt {prompt}: the SLM knows {positions} positions, and a response needs some")
        if problems:
            raise UsageError("Engines cannot have these limits.", *problems, remedy="change what is named")
        return limits


class EngineBuilder:
    """A head's engines in the making: first their graphs, written where they are not kept, then the engines.

    Args:
        choice: what was asked for.
        weight_quantization: of int8 and int4.
        partial: the directory of the bundle in the making, in a working directory; the graphs lie beside it.
    """

    def __init__(self, choice: EngineChoice, weight_quantization: WeightQuantization, partial: Path) -> None:
        self.choice, self.weight_quantization = choice, weight_quantization
        # In the build's working directory, which the next build clears away should this one be killed.
        self.directory = partial.with_name("engines")
        self.directory.mkdir()
        self.store, self.graphs = WeightStore(self.directory), dict[GraphName, GraphEntry]()
        self.compiled: dict[str, EngineEntry] = {}  # of the encoder, which heads share: by its graph

    def close(self) -> None:
        """Remove the graphs."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def write(
        self,
        model: ir.Model,
        name: GraphName,
        file: str,
        shape: PairShape,
        moments: Callable[[ir.Model], Mapping[str, Any]],
        *,
        keep: Collection[str],
    ) -> None:
        """Write the graph of an engine.

        Args:
            model: exported without contrib operators; changed in place.
            keep: modules that stay float32 where products are in float16 (`graphs.graph.kept_in_float32`).
            moments: of what its linear layers are given, for four bits.
        """
        precision = self.choice.of(name)
        known = moments(model) if precision in ("int8", "int4") else {}
        transpose_weights(model)
        lower_precision(model, precision, keep=keep, weight_quantization=self.weight_quantization, moments=known)
        spec = contract.graph_specs(shape)[name]
        self.graphs[name] = GraphEntry.model_construct(
            file=file, data=self.store.save(model, file), precision=precision, opset=model.opset_imports[""],
            minimum_runtime={}, inputs=tensor_specs(spec.inputs, model.graph.inputs, {}),
            outputs=tensor_specs(spec.outputs, model.graph.outputs, {}),
        )  # fmt: skip

    def check(
        self,
        draft: Manifest,
        reference: Reference,
        cases: Sequence[ReferenceBatch],
        gate: Gate | None,
        held_out: Sequence[ReferenceBatch],
    ) -> ParityReport:
        """Compare the graphs with the reference, as an engine computes them.

        Raises:
            ParityError: values that are not finite, or not close, by name.
        """
        bundle = Bundle(self.directory, draft.model_copy(update={"graphs": self.graphs}))
        report = compare_engine_graphs(bundle, reference, cases, gate, held_out)
        failed = [row for row in report.rows if not row.passed]
        if failed:
            raise ParityError(
                f"The engines would not match the composition: {len(failed)} of {len(report.rows)} comparisons failed.",
                *(
                    f"{row.graph} at {self.choice.of(row.graph) if row.graph != 'pair' else 'all'}, {row.case}, "
                    f"{row.tensor}: {row.measure} {row.value:.2e}, tolerance {row.tolerance:.1e}"
                    for row in failed[:5]
                ),
                remedy=f"nothing was compiled; {self._remedy({row.graph for row in failed})}",
                report=report,
            )
        return report

    def _remedy(self, failed: Collection[str]) -> str:
        reduced = [n for n in contract.GRAPHS if self.choice.of(n) != "fp32" and ("pair" in failed or n in failed)]
        if not reduced:
            return "report this pair: the graphs and transformers disagree"
        finer = [n for n in reduced if self.choice.of(n) != "bf16"]
        return f"use --engine-precision {'bf16 or fp32' if finer else 'fp32'} for {', '.join(reduced)}"

    def compile(self, name: GraphName, target: Path, file: str, draft: Manifest, limits: EngineLimits) -> EngineEntry:
        """Write an engine, and what the inspector tells of it where this machine can read it.

        Args:
            target: the bundle's directory.
            file: the engine's path in it.

        Raises:
            EngineError: TensorRT does not take the graph, or cannot build it.
        """
        entry, graph = self.graphs[name], draft.graphs[name]
        source = graph_digest(graph, {part: sha256(target / part) for part in (graph.file, *graph.data)})
        if name == "encoder" and source in self.compiled:
            return self.compiled[source]
        model, fixed, outputs = ir.load(self.directory / entry.file), fixed_axes(name, limits), entry.outputs
        if name == "decoder":
            outputs += add_argmax(model, draft.tokenizer.slm_size)
        fix_axes(model, fixed)
        fixed_file = self.directory / f"fixed.{entry.file}"
        ir.save(model, fixed_file)
        inputs = tensor_specs(entry.inputs, model.graph.inputs, fixed)
        outputs = tensor_specs(outputs, model.graph.outputs, fixed)
        shapes: tuple[dict[str, Bounds], ...] = profiles(name, draft.shape, inputs, limits)
        made = self.choice.compiler.compile(fixed_file, shapes)
        path = target / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.write(made.plan)
        if made.layers is not None:
            path.with_suffix(".layers.json").write_text(made.layers, encoding="utf-8")
        self.compiled[source] = EngineEntry(
            file=file, source=source, precision=self.choice.of(name), inputs=inputs, outputs=outputs, profiles=shapes,
            aliases=made.aliases,
        )  # fmt: skip
        return self.compiled[source]

    def key(self, limits: EngineLimits) -> str:
        """The name of a set of engines: variant, version, devices, precision, and a hash of the limits."""
        precisions = [self.choice.of(name) for name in contract.GRAPHS]
        precision = precisions[0] if len(set(precisions)) == 1 else "-".join(precisions)
        capabilities, device = self.devices()
        where = "portable" if capabilities == PORTABLE else "-".join(f"sm{c.replace('.', '')}" for c in capabilities)
        where = where or "-".join(str(device).lower().split())
        digest = hashlib.sha256(json.dumps(limits.model_dump(), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.choice.variant}-{self.choice.trt.__version__}-{where}-{precision}-{digest}"

    def devices(self) -> tuple[tuple[str, ...], str | None]:
        """The compute capabilities that the engines are for; or none, and the name of the device that is here.

        Raises:
            DeviceError: TensorRT needs a device, and there is none.
        """
        if self.choice.variant == "tensorrt-rtx":
            return self.choice.compute_capabilities or PORTABLE, None
        if not torch.cuda.is_available():
            raise DeviceError(
                "TensorRT compiles on the device that an engine is for, and there is none here.",
                "no NVIDIA GPU was found",
                remedy="build on that device, or use --backend tensorrt-rtx, which needs none",
            )
        return (), torch.cuda.get_device_name()

    def made(self, graphs: Mapping[GraphName, EngineEntry], limits: EngineLimits) -> EngineSet:
        """The manifest's entry."""
        capabilities, device = self.devices()
        return EngineSet(
            variant=self.choice.variant, version=self.choice.trt.__version__, compute_capabilities=capabilities, device=device,
            driver=_DRIVERS[_cuda(self.choice.variant)], limits=limits, graphs=dict(graphs),
        )  # fmt: skip


def _cuda(variant: TensorRtVariant) -> str:
    """The CUDA release that the installed package is for, as its name says; the newest where several are, or none."""
    installed = [cuda for cuda in _DRIVERS if _is_installed(f"{variant}-cu{cuda}")]
    return installed[-1] if installed else max(_DRIVERS)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
