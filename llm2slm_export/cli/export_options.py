"""The options of an export: precisions, weight quantization, engines and the gate, from what was typed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from llm2slm_export.contract import (
    BLOCK_SIZES,
    GRAPHS,
    EnginePrecision,
    GraphName,
    Precision,
    TensorRtVariant,
    WeightQuantization,
)
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.runtime.graph_values import parse_graph_values

if TYPE_CHECKING:
    from llm2slm_export.authoring.build_engines import EngineChoice
    from llm2slm_export.authoring.parity.compare import Gate
    from llm2slm_export.authoring.recipe import EngineSettings

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
ENGINE_PRECISIONS: tuple[EnginePrecision, ...] = get_args(EnginePrecision)
BUILD_MODULES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "safetensors")
P = TypeVar("P", Precision, EnginePrecision)


def parse_precision(
    text: str | None, default: Mapping[GraphName, Precision], *, option: str = "--precision"
) -> dict[GraphName, Precision]:
    """`int8`, or `encoder=int8,decoder=int8`; graphs not named keep `default`, and fp32 where that says nothing.

    Raises:
        UsageError: with every part that is not a precision or not a graph; or a graph that cannot have its precision.
    """
    chosen = _by_graph(option, text, PRECISIONS, {graph: default.get(graph, "fp32") for graph in GRAPHS})
    wrong = [graph for graph in GRAPHS if chosen[graph] == "w8a8" and graph != "encoder"]
    if wrong:
        raise UsageError(
            f"w8a8 is a precision of the encoder, not of {' and '.join(wrong)}.",
            "a step of the decoder has one row, and takes as long as reading the weights does",
            remedy=f"{option} encoder=w8a8,{','.join(f'{graph}=int8' for graph in wrong)}",
        )
    return chosen


def _by_graph(
    option: str, text: str | None, known: tuple[P, ...], default: Mapping[GraphName, P]
) -> dict[GraphName, P]:
    """`P`, or `GRAPH=P,…`, of the precisions `known`."""
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
) -> WeightQuantization:
    """What was given, and `default` where nothing was.

    Args:
        precision, engines: of the graphs, and of the engines.

    Raises:
        UsageError: a block size that no operator has, or something given that no graph's precision has use for.
    """
    problems, used = [], {*precision.values(), *engines.values()}
    if block_size is not None and block_size not in BLOCK_SIZES:
        problems.append(f"--block-size {block_size}: block sizes are {', '.join(map(str, BLOCK_SIZES))}")
    if block_size is not None and not {"int8", "int4"} & used:
        problems.append(f"--block-size {block_size}: no graph is int8 or int4")
    if quantize_lm_head and "int4" not in used:
        problems.append("--quantize-lm-head: no graph is int4")
    if problems:
        raise UsageError(
            "The weights cannot be rounded so.", *problems, f"precision: {_spelled(precision)}",
            remedy="change what is named, or --precision",
        )  # fmt: skip
    return WeightQuantization(
        default.block_size if block_size is None else block_size,
        default.quantize_lm_head if quantize_lm_head is None else quantize_lm_head,
    )


@dataclass(frozen=True)
class EngineRequest:
    """What the user asked for of engines; None where nothing was said, and the recipe's settings count."""

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
        """Of the engines; None: none are built."""
        if self.backend is None:
            return self.recipe.backend if self.recipe else None
        return None if self.backend == "onnx" else self.backend

    def precisions(self) -> dict[GraphName, EnginePrecision]:
        """Of each graph's engine; none where no engine is asked for.

        Raises:
            UsageError: a precision that means nothing, or options of engines without any.
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
                    f"{names} {'is' if len(options) == 1 else 'are'} of engines, and none is asked for.",
                    remedy="add --backend tensorrt-rtx or --backend tensorrt",
                )
            return {}
        said = self.recipe.precision if self.recipe else {}
        default = {graph: said.get(graph, "fp16") for graph in GRAPHS}
        return _by_graph("--engine-precision", self.precision, ENGINE_PRECISIONS, default)

    def choice(self, on_step: Callable[[str, int, int], None]) -> "EngineChoice | None":
        """The engines to build, with the variant's module loaded; None where none is asked for.

        Raises:
            MissingExtraError, EngineError: the variant is not installed, or does not load.
            UsageError: compute capabilities that it does not have, or buckets that are no numbers.
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
        _ = choice.compiler  # what it does not have is said before a model is loaded
        return choice

    def _settings(self, variant: TensorRtVariant) -> "EngineSettings":
        """What was said; else what the recipe says; else the defaults."""
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
    """Raise `UsageError` for a share without prompts."""
    if not prompts:
        if differing is not None:
            raise UsageError(
                f"--max-differing {differing} is of a gate's tokens.", remedy="add --gate FILE, or leave it out"
            )
        return None
    from llm2slm_export.authoring.parity.compare import Gate

    return Gate(prompts, differing)


def parse_baseline_precision(text: str | None) -> dict[GraphName, Precision] | None:
    return None if text is None else parse_precision(text, {}, option="--baseline-precision")
