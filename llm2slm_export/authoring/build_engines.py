"""TensorRT engines of a bundle under construction: their ONNX graphs are written, checked, and compiled.

The check runs each graph on the parity gate's prompts on ONNX Runtime's CPU provider, with the engine's roundings. A
graph whose outputs are not finite, or not close, is refused before anything is compiled.
"""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from llm2slm_export import contract
from llm2slm_export.authoring.exporters.onnx.external_data import WeightStore
from llm2slm_export.authoring.exporters.precision import PassInputs, lower_engine_precision
from llm2slm_export.authoring.exporters.tensorrt.builder import PORTABLE, Compiler, OnStep
from llm2slm_export.authoring.exporters.tensorrt.network import add_argmax, fix_axes, tensor_specs
from llm2slm_export.authoring.exporters.tensorrt.profiles import engine_limits, fixed_axes, profiles
from llm2slm_export.authoring.models.compatibility import positions_known
from llm2slm_export.authoring.models.pairing import LoadedPair
from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.authoring.parity.compare import compare_engine_graphs
from llm2slm_export.authoring.parity.gate import Gate
from llm2slm_export.authoring.parity.reference_outputs import ReferenceBatch
from llm2slm_export.authoring.parity.refusals import require_engine_parity
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.files import graph_digest, sha256
from llm2slm_export.bundle.manifest import Bounds, EngineEntry, EngineLimits, EngineSet, GraphEntry, Manifest
from llm2slm_export.contract import EnginePrecision, GraphName, PairShape, TensorRtVariant
from llm2slm_export.errors import DeviceError, UsageError

# Minimum driver by the CUDA release of the installed package, from TensorRT's prerequisites (11.4). TensorRT-RTX
# documents no minimum driver.
_DRIVERS = {"12": "535", "13": "580"}


@dataclass(frozen=True)
class EngineChoice:
    """The engines that a build adds.

    Args:
        variant: TensorRT or TensorRT-RTX.
        trt: the variant's module (`exporters.tensorrt.builder.load_tensorrt`).
        precision: precision of each graph; fp16 by default.
        batch: maximum batch size.
        prompt, new: maximum prompt and response length in tokens; None: the pair's own.
        prompt_buckets: see `EngineLimits`.
        compute_capabilities, timing_cache: see `Compiler`.
        on_step: progress callback of the builder.
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
        """The precision of a graph."""
        return self.precision.get(name, "fp16")

    @cached_property
    def compiler(self) -> Compiler:
        """The compiler for these engines."""
        return Compiler(
            self.trt,
            compute_capabilities=self.compute_capabilities,
            timing_cache=self.timing_cache,
            on_step=self.on_step,
        )

    def limits(self, pair: LoadedPair) -> EngineLimits:
        """The limits of a pair's engines.

        Raises:
            UsageError: the pair does not allow these limits; the message lists every problem.
        """
        shape, most, positions = pair.reference.shape, pair.file.max_prompt_tokens, positions_known(pair.reference.slm)
        prompt = most if self.prompt is None else self.prompt
        new = pair.file.max_new_tokens if self.new is None else self.new
        buckets = tuple(sorted(set(self.prompt_buckets)))
        # Values below 1 are reported with the other problems below.
        limits = engine_limits(
            shape, batch=max(1, self.batch), prompt=max(1, prompt), new=max(1, new),
            prompt_buckets=tuple(bucket for bucket in buckets if bucket >= 1), positions=positions,
        )  # fmt: skip
        given = {"--max-batch": self.batch, "--max-prompt": prompt, "--max-new": new}
        problems = [f"{option} is {value}" for option, value in given.items() if value < 1]
        outside = [str(bucket) for bucket in buckets if not 1 <= bucket < prompt]
        if outside:
            problems.append(
                f"--prompt-buckets {','.join(outside)}: must be between 1 and {prompt - 1}, below --max-prompt"
            )
        if prompt > most:
            problems.append(f"--max-prompt {prompt}: the pair's maximum is {most} tokens")
        if shape.slm_kind == "decoder-only" and prompt * shape.context_per_token >= limits.capacity:
            problems.append(
                f"--max-prompt {prompt}: the SLM has {positions} positions, and a response needs some of them"
            )
        if problems:
            raise UsageError("Engines cannot have these limits.", *problems, remedy="change these options")
        return limits


class EngineBuilder:
    """Builds a head's engines: writes temporary ONNX graphs, then compiles them.

    Args:
        choice: the requested engines.
        partial: the directory of the bundle under construction; the graphs are written beside it.
    """

    def __init__(self, choice: EngineChoice, partial: Path) -> None:
        self.choice = choice
        # Within the build's working directory, which the next build removes if this one is killed.
        self.directory = partial.with_name("engines")
        self.directory.mkdir()
        self.store, self.graphs = WeightStore(self.directory), dict[GraphName, GraphEntry]()
        self.compiled: dict[str, EngineEntry] = {}  # by graph digest, because heads share the encoder

    def close(self) -> None:
        """Remove the temporary graphs."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def write(
        self,
        model: ir.Model,
        name: GraphName,
        file: str,
        shape: PairShape,
        inputs: PassInputs,
    ) -> None:
        """Write the ONNX graph of an engine.

        Args:
            model: exported without contrib operators; changed in place.
            name: which of the three graphs.
            file: its file name.
            shape: the pair's sizes.
            inputs: inputs of the precision passes.
        """
        precision = self.choice.of(name)
        lower_engine_precision(model, precision, inputs)
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
    ) -> None:
        """Compare the graphs with the reference, with the engines' roundings.

        Raises:
            ParityError: outputs are not finite, or not close; the message names them.
        """
        bundle = Bundle(self.directory, draft.model_copy(update={"graphs": self.graphs}))
        report = compare_engine_graphs(bundle, reference, cases, gate, held_out)
        require_engine_parity(report, {name: self.choice.of(name) for name in contract.GRAPHS})

    def compile(self, name: GraphName, target: Path, file: str, draft: Manifest, limits: EngineLimits) -> EngineEntry:
        """Compile an engine into the bundle, and write the inspector's JSON if this machine can read the engine.

        Args:
            name: which of the three graphs.
            target: the bundle's directory.
            file: the engine's path in it.
            draft: the bundle's manifest without engines.
            limits: of the engine.

        Raises:
            EngineError: TensorRT cannot parse or build the graph.
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
        """The target compute capabilities of TensorRT-RTX, or the name of this machine's device for TensorRT.

        Raises:
            DeviceError: TensorRT needs a device, and this machine has none.
        """
        if self.choice.variant == "tensorrt-rtx":
            return self.choice.compute_capabilities or PORTABLE, None
        if not torch.cuda.is_available():
            raise DeviceError(
                "TensorRT compiles on the target device, and this machine has none.",
                "no NVIDIA GPU was found",
                remedy="build on the target device, or use --backend tensorrt-rtx, which needs no GPU",
            )
        return (), torch.cuda.get_device_name()

    def made(self, graphs: Mapping[GraphName, EngineEntry], limits: EngineLimits) -> EngineSet:
        """The manifest's entry of the compiled engines."""
        capabilities, device = self.devices()
        return EngineSet(
            variant=self.choice.variant, version=self.choice.trt.__version__, compute_capabilities=capabilities, device=device,
            driver=_DRIVERS[_cuda(self.choice.variant)], limits=limits, graphs=dict(graphs),
        )  # fmt: skip


def _cuda(variant: TensorRtVariant) -> str:
    """The CUDA release of the installed package, from its name; the newest if there are several or none."""
    installed = [cuda for cuda in _DRIVERS if _is_installed(f"{variant}-cu{cuda}")]
    return installed[-1] if installed else max(_DRIVERS)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
