"""Compilation of graphs to engines, with TensorRT or TensorRT-RTX: one code path for both modules.

TensorRT-RTX (1.7+) and TensorRT (10.15+, 11) share the names used here, except `ComputeCapability`, which only RTX has.
TensorRT compiles on the target device; TensorRT-RTX compiles on any machine.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2slm_export.bundle.manifest import Bounds
from llm2slm_export.contract import TensorRtVariant
from llm2slm_export.environment.tensorrt_modules import MODULES, OLDEST, tensorrt_logger
from llm2slm_export.environment.versions import at_least
from llm2slm_export.errors import EngineError, UsageError, require_extra
from llm2slm_export.files.atomic import cached_file

# TensorRT-RTX's default targets (its support matrix: "by default portable across").
PORTABLE = ("8.6", "8.9", "12.0")

OnStep = Callable[[str, int, int], None]  # phase, completed steps, total steps


@dataclass(frozen=True)
class Compiled:
    """A compiled engine.

    `plan`: the serialized engine. `aliases`: the input whose memory an in-place output must share, by output. `layers`:
    the inspector's JSON; None if this machine cannot deserialize the engine.
    """

    plan: Any
    aliases: dict[str, str]
    layers: str | None


def load_tensorrt(variant: TensorRtVariant) -> Any:
    """Import a variant's module.

    Raises:
        MissingExtraError: the module is not installed.
        EngineError: the module does not load, or is too old.
    """
    require_extra(variant, MODULES[variant], purpose=f"Building engines with {variant}")
    try:
        trt: Any = __import__(MODULES[variant])
    except (ImportError, OSError) as error:
        raise EngineError(
            f"{variant} is installed but does not load.", str(error),
            remedy=f"pip install --force-reinstall 'llm2slm-export[{variant}]'; `llm2slm-export doctor` shows what is installed",
        ) from error  # fmt: skip
    if not at_least(trt.__version__, OLDEST[variant]):
        raise EngineError(
            f"{variant} {trt.__version__} is too old for these graphs.", f"needed: {OLDEST[variant]} or later (TensorScatter)",
            remedy=f"pip install --upgrade 'llm2slm-export[{variant}]'",
        )  # fmt: skip
    return trt


class Compiler:
    """Compiles graphs with one variant.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        compute_capabilities: target devices of TensorRT-RTX, as `8.9`; empty: `PORTABLE`. With TensorRT it must be
            empty: the target is this machine's device.
        timing_cache: TensorRT's timing cache file, read and updated; TensorRT-RTX has none.
        on_step: progress callback.

    Raises:
        UsageError: the variant does not support a compute capability.
    """

    def __init__(
        self,
        trt: Any,
        *,
        compute_capabilities: Sequence[str] = (),
        timing_cache: Path | None = None,
        on_step: OnStep = lambda *_: None,
    ) -> None:
        self.trt, self.rtx, self.on_step = trt, trt.__name__ == MODULES["tensorrt-rtx"], on_step
        self.timing_cache = None if self.rtx else timing_cache
        self.targets = [_target(trt, capability) for capability in compute_capabilities]
        self.logger = tensorrt_logger(trt)

    def compile(self, graph: Path, profiles: Sequence[Mapping[str, Bounds]]) -> Compiled:
        """Parse an ONNX file and build its engine.

        Args:
            graph: the ONNX file.
            profiles: bounds of the inputs by name; the engine's profiles have the same order.

        Raises:
            EngineError: the parser or the builder failed; the message has their errors.
        """
        trt, builder = self.trt, self.trt.Builder(self.logger)
        # TensorRT 11 and RTX are always strongly typed; RTX's value of the flag is 0.
        typed = (
            0 if self.rtx or at_least(trt.__version__, "11") else int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        )
        network = builder.create_network(1 << typed if typed else 0)
        parser = trt.OnnxParser(network, self.logger)
        self.logger.lines.clear()
        if not parser.parse_from_file(str(graph)):
            raise EngineError(
                f"{trt.__name__} {trt.__version__} cannot parse {graph.name}.",
                *_parser_errors(parser),
                remedy="report this pair, with these lines",
            )
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        self._decomposable(layers)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        monitor = _monitor(trt, self.on_step)
        config.progress_monitor = monitor
        self._devices(config)
        cache = self._timing(config)
        for number, bounds in enumerate(profiles):
            self._add_profile(builder, config, bounds, f"{graph.name}, profile {number}")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(
                f"{trt.__name__} {trt.__version__} cannot build {graph.name}.",
                *(self.logger.lines or ["no reason given"])[:8],
                remedy="try another --engine-precision, or report this pair with these lines",
            )
        if cache is not None:
            self._keep_timing(config)
        return Compiled(plan, self._aliases(layers), self._layers(plan))

    def _decomposable(self, layers: Sequence[Any]) -> None:
        """Allow decomposition of attention into several layers. Without it, builds fail for attention without a fused
        kernel (float32 with a dynamic number of queries). ONNX's checker and ONNX Runtime refuse it as an attribute."""
        for layer in layers:
            if layer.type == self.trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = self.trt.IAttentionInputLayer
                layer.attention.decomposable = True

    def _devices(self, config: Any) -> None:
        if not self.targets:
            return
        config.num_compute_capabilities = len(self.targets)
        for index, target in enumerate(self.targets):
            config.set_compute_capability(target, index)

    def _timing(self, config: Any) -> Any:
        if self.timing_cache is None:
            return None
        known = self.timing_cache.read_bytes() if self.timing_cache.is_file() else b""
        cache = config.create_timing_cache(known)
        config.set_timing_cache(cache, False)
        return cache

    def _keep_timing(self, config: Any) -> None:
        assert self.timing_cache is not None
        with cached_file(self.timing_cache) as new:
            new.write_bytes(bytes(config.get_timing_cache().serialize()))

    def _add_profile(self, builder: Any, config: Any, bounds: Mapping[str, Bounds], what: str) -> None:
        profile = builder.create_optimization_profile()
        for name, of in bounds.items():
            profile.set_shape(name, of.minimum, of.optimum, of.maximum)
        # An invalid profile returns -1 and raises no exception.
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(
                f"{self.trt.__name__} does not accept the shapes of {what}.",
                *(f"{name}: {of.minimum} to {of.maximum}, optimum {of.optimum}" for name, of in bounds.items()),
                remedy="change --max-batch, --max-prompt or --max-new",
            )

    def _aliases(self, layers: Sequence[Any]) -> dict[str, str]:
        """Outputs of the network's cache updates, and the inputs that they alias."""
        updates = [layer for layer in layers if layer.type == self.trt.LayerType.KV_CACHE_UPDATE]
        return {layer.get_output(0).name: layer.get_input(0).name for layer in updates}

    def _layers(self, plan: Any) -> str | None:
        """The inspector's JSON; None without a device, which deserialization needs."""
        engine = self.trt.Runtime(self.logger).deserialize_cuda_engine(plan) if _has_device() else None
        if engine is None:
            return None
        inspected: str = engine.create_engine_inspector().get_engine_information(self.trt.LayerInformationFormat.JSON)
        return inspected


def _target(trt: Any, capability: str) -> Any:
    """The variant's constant for a compute capability such as `8.9`."""
    known = getattr(trt, "ComputeCapability", None)
    names = [name for name in dir(known) if re.fullmatch(r"SM\d+", name)] if known is not None else []
    wanted = "SM" + capability.replace(".", "")
    if wanted not in names:
        have = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in names)
        raise UsageError(
            f"{trt.__name__} has no compute capability {capability!r}.",
            f"it has: {have}" if have else "it builds for this machine's device only",
            remedy="change --compute-capability" if have else "leave out --compute-capability",
        )
    return getattr(known, wanted)


def _has_device() -> bool:
    import torch

    return torch.cuda.is_available()


def _parser_errors(parser: Any) -> list[str]:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [f"{error.node_operator()} {error.node_name()!r}: {error.desc()}" for error in errors] or ["no reason given"]


def _monitor(trt: Any, on_step: OnStep) -> Any:
    """A monitor that reports a build's phases to `on_step`."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:  # noqa: ARG002
            self.steps[phase] = steps
            on_step(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            on_step(phase, step + 1, self.steps.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()
