"""The options of an export: precisions, weight quantization, engines and the gate, from what was typed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from llm2slm_export.contract import (
    BLOCK_SIZES,
    GRAPHS,
    HEAD_GRAPHS,
    WEIGHT_BITS,
    EnginePrecision,
    GraphName,
    HeadPrecision,
    Precision,
    TensorRtVariant,
    WeightQuantization,
)
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.runtime.graph_values import parse_graph_values

if TYPE_CHECKING:
    from llm2slm_export.authoring.build_engines import EngineChoice
    from llm2slm_export.authoring.parity.gate import Gate
    from llm2slm_export.authoring.recipe import EngineSettings

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
HEAD_PRECISIONS: tuple[HeadPrecision, ...] = get_args(HeadPrecision)
ENGINE_PRECISIONS: tuple[EnginePrecision, ...] = get_args(EnginePrecision)
BUILD_MODULES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "safetensors")
P = TypeVar("P", Precision, EnginePrecision)


def parse_precision(
    text: str | None, default: Mapping[GraphName, Precision], *, option: str = "--precision"
) -> dict[GraphName, Precision]:
    """The precision of each graph, from `int8` or `encoder=int8,decoder=int8`.

    Args:
        text: as it was typed; None: nothing.
        default: the precision of graphs without one in the text; fp32 for a graph that it lacks.
        option: the option's name, for messages.

    Raises:
        UsageError: parts that name no precision or no graph, all of them; or a graph that cannot have its precision.
    """
    chosen = _by_graph(option, text, PRECISIONS, {graph: default.get(graph, "fp32") for graph in GRAPHS})
    wrong = [graph for graph in GRAPHS if chosen[graph] == "w8a8" and graph != "encoder"]
    if wrong:
        raise UsageError(
            f"w8a8 is a precision of the encoder, not of {' and '.join(wrong)}.",
            "a decoder step has one row, and takes as long as reading the weights",
            remedy=f"{option} encoder=w8a8,{','.join(f'{graph}=int8' for graph in wrong)}",
        )
    return chosen


def parse_llm_head_precision(
    text: str | None, default: Mapping[GraphName, Precision] | None, pair: Mapping[GraphName, Precision]
) -> dict[GraphName, Precision]:
    """The precision of the LLM head's projector and decoder; empty if there is no such head.

    Args:
        text: as it was typed; None: nothing.
        default: the recipe's; None: there is no LLM head.
        pair: the precision of the pair's graphs, for graphs without one.

    Raises:
        UsageError: parts that name no precision or no graph of the head; or a precision without an LLM head.
    """
    option = "--llm-head-precision"
    if default is None:
        if text is not None:
            raise UsageError(
                f"{option} {text} has no effect without the LLM head.", remedy="add --llm-head, or leave it out"
            )
        return {}
    chosen: dict[GraphName, Precision] = {graph: default.get(graph, pair[graph]) for graph in HEAD_GRAPHS}
    if text is None:
        return chosen
    typed, problems = parse_graph_values(
        text, HEAD_PRECISIONS, noun="precision", unnamed=HEAD_GRAPHS,
        objection=lambda graph, _: None if graph in HEAD_GRAPHS else f"heads share the {graph}; give --precision {graph}=P",
    )  # fmt: skip
    if problems:
        raise UsageError(
            f"{option} {text!r} cannot be read.",
            *problems,
            remedy=f"use {' or '.join(HEAD_PRECISIONS)}, or GRAPH=PRECISION,… with the graphs {', '.join(HEAD_GRAPHS)}",
        )
    return chosen | typed


def _by_graph(
    option: str, text: str | None, known: tuple[P, ...], default: Mapping[GraphName, P]
) -> dict[GraphName, P]:
    """The precision of each graph, from `P` or `GRAPH=P,…` with the precisions `known`."""
    if text is None:
        return dict(default)
    chosen, problems = parse_graph_values(text, known, noun="precision")
    if problems:
        raise UsageError(
            f"{option} {text!r} cannot be read.",
            *problems,
            remedy=f"use {' or '.join(known)}, or GRAPH=PRECISION,… with the graphs {', '.join(GRAPHS)}",
        )
    return {**default, **chosen}


def chosen_weight_quantization(
    block_size: int | None,
    quantize_lm_head: bool | None,
    default: WeightQuantization,
    precision: Mapping[GraphName, Precision],
    engines: Mapping[GraphName, EnginePrecision],
    llm_head: Mapping[GraphName, Precision],
) -> WeightQuantization:
    """The weight quantization that was given, with `default` for what was not.

    Args:
        precision, engines, llm_head: the precisions of the graphs, of the engines, and of the LLM head's graphs.

    Raises:
        UsageError: a block size that the operators do not have, or an option without effect at these precisions.
    """
    problems, used = [], {*precision.values(), *engines.values(), *llm_head.values()}
    if block_size is not None and block_size not in BLOCK_SIZES:
        problems.append(f"--block-size {block_size}: block sizes are {', '.join(map(str, BLOCK_SIZES))}")
    if block_size is not None and WEIGHT_BITS.keys().isdisjoint(used):
        problems.append(f"--block-size {block_size}: no graph is int8 or int4")
    if quantize_lm_head and "int4" not in used:
        problems.append("--quantize-lm-head: no graph is int4")
    if problems:
        raise UsageError(
            "The weights cannot be quantized as asked.", *problems, f"precision: {_spelled(precision)}",
            remedy="change the options named, or --precision",
        )  # fmt: skip
    return WeightQuantization(
        default.block_size if block_size is None else block_size,
        default.quantize_lm_head if quantize_lm_head is None else quantize_lm_head,
    )


@dataclass(frozen=True)
class EngineRequest:
    """The options of engines as they were typed. The recipe's settings apply to those that are None."""

    backend: Literal["onnx", "tensorrt", "tensorrt-rtx"] | None = None
    precision: str | None = None
    max_batch: int | None = None
    max_prompt: int | None = None
    max_new: int | None = None
    prompt_buckets: str | None = None
    compute_capability: str | None = None
    recipe: "EngineSettings | None" = None

    @property
    def variant(self) -> TensorRtVariant | None:
        """The TensorRT variant of the engines; None: none are built."""
        if self.backend is None:
            return self.recipe.backend if self.recipe else None
        return None if self.backend == "onnx" else self.backend

    def precisions(self) -> dict[GraphName, EnginePrecision]:
        """The precision of each graph's engine; empty if no engines are built.

        Raises:
            UsageError: an unknown precision, or options of engines without a backend.
        """
        options = [
            name for name, value in vars(self).items() if name not in ("backend", "recipe") and value is not None
        ]
        if self.variant is None:
            if options:
                names = ", ".join(
                    "--engine-precision" if n == "precision" else f"--{n.replace('_', '-')}" for n in options
                )
                raise UsageError(
                    f"{names} {'is an option' if len(options) == 1 else 'are options'} of engines, and none are built.",
                    remedy="add --backend tensorrt-rtx or --backend tensorrt",
                )
            return {}
        said = self.recipe.precision if self.recipe else {}
        default = {graph: said.get(graph, "fp16") for graph in GRAPHS}
        return _by_graph("--engine-precision", self.precision, ENGINE_PRECISIONS, default)

    def choice(self, on_step: Callable[[str, int, int], None]) -> "EngineChoice | None":
        """The engines to build, with the variant's module loaded; None: none are built.

        Raises:
            MissingExtraError, EngineError: the variant is not installed, or does not load.
            UsageError: compute capabilities that the variant does not have, or buckets that are no numbers.
        """
        if self.variant is None:
            return None
        from llm2slm_export.authoring.build_engines import EngineChoice
        from llm2slm_export.authoring.exporters.tensorrt.builder import load_tensorrt
        from llm2slm_export.environment.hardware import cache_directory

        trt, settings = load_tensorrt(self.variant), self._settings(self.variant)
        choice = EngineChoice(
            self.variant, trt, settings.precision, batch=settings.max_batch, prompt=settings.max_prompt, new=settings.max_new,
            prompt_buckets=settings.prompt_buckets, compute_capabilities=settings.compute_capabilities,
            timing_cache=cache_directory() / f"{self.variant}-{trt.__version__}.timing", on_step=on_step,
        )  # fmt: skip
        _ = choice.compiler  # an unknown compute capability is refused before a model is loaded
        return choice

    def _settings(self, variant: TensorRtVariant) -> "EngineSettings":
        """The typed settings over the recipe's, over the defaults."""
        from llm2slm_export.authoring.recipe import EngineSettings

        capabilities = None if self.compute_capability is None else self.compute_capability.split(",")
        said = {
            "backend": variant, "precision": self.precisions(), "max_batch": self.max_batch, "max_prompt": self.max_prompt,
            "max_new": self.max_new, "prompt_buckets": self._buckets(),
            "compute_capabilities": capabilities and tuple(part.strip() for part in capabilities),
        }  # fmt: skip
        base = self.recipe or EngineSettings(backend=variant)
        return base.model_copy(update={name: value for name, value in said.items() if value is not None})

    def _buckets(self) -> tuple[int, ...] | None:
        if self.prompt_buckets is None:
            return None
        try:
            return tuple(int(part) for part in self.prompt_buckets.split(","))
        except ValueError:
            raise UsageError(
                f"--prompt-buckets {self.prompt_buckets!r} cannot be read.",
                remedy="give prompt lengths, in tokens: --prompt-buckets 64,256",
            ) from None


def _spelled(precision: Mapping[GraphName, Precision]) -> str:
    return ",".join(f"{graph}={value}" for graph, value in precision.items())


def parse_gate(prompts: tuple[str, ...], differing: float | None) -> "Gate | None":
    """The gate on held-out prompts; None without prompts.

    Raises:
        UsageError: a share without prompts.
    """
    if not prompts:
        if differing is not None:
            raise UsageError(
                f"--max-differing {differing} has no effect without --gate.", remedy="add --gate FILE, or leave it out"
            )
        return None
    from llm2slm_export.authoring.parity.gate import Gate

    return Gate(prompts, differing)


def parse_baseline_precision(text: str | None) -> dict[GraphName, Precision] | None:
    """The value of --baseline-precision; None: the bundle's precision."""
    return None if text is None else parse_precision(text, {}, option="--baseline-precision")
