"""Options of a build."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from llm2slm_export import contract
from llm2slm_export.authoring.build_engines import EngineChoice
from llm2slm_export.authoring.parity.gate import Gate
from llm2slm_export.contract import DEFAULT_WEIGHT_QUANTIZATION, GraphName, Precision, WeightQuantization


@dataclass(frozen=True)
class BuildOptions:
    """How a pair is exported.

    Args:
        precision: precision of each graph; fp32 by default.
        head_precision: precision of single heads' own graphs, by head, where it is not `precision`.
        weight_quantization: of int8 and int4 weights.
        gate: held-out prompts to measure a reduced precision on, in addition to the parity check.
        calibration: prompts to calibrate int8 and int4 decoders and w8a8 encoders on; empty: the parity check's
            prompts.
        engines: TensorRT engines to compile; None: none.

    Raises:
        UsageError: the gate shares prompts with the calibration.
    """

    precision: Mapping[GraphName, Precision] = field(default_factory=dict)
    weight_quantization: WeightQuantization = DEFAULT_WEIGHT_QUANTIZATION
    gate: Gate | None = None
    calibration: Sequence[str] = ()
    engines: EngineChoice | None = None
    head_precision: Mapping[str, Mapping[GraphName, Precision]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gate:
            self.gate.require_held_out(self.calibration)

    def of(self, name: GraphName) -> Precision:
        """The precision of a graph."""
        return self.precision.get(name, "fp32")

    def for_head(self, head: str) -> "BuildOptions":
        """The options of one head. The encoder, which heads share, has the same precision for all."""
        own: dict[GraphName, Precision] = {
            graph: p for graph, p in self.head_precision.get(head, {}).items() if graph != "encoder"
        }
        return replace(self, precision={**self.precision, **own}, head_precision={}) if own else self

    @property
    def precisions(self) -> dict[GraphName, Precision]:
        """The precision of every graph."""
        return {name: self.of(name) for name in contract.GRAPHS}

    def includes_float32(self, name: GraphName) -> bool:
        """Whether a graph, or its engine, is at fp32."""
        return "fp32" in (self.of(name), self.engines and self.engines.of(name))

    @property
    def calibrates_decoder(self) -> bool:
        """Whether decoder weights are calibrated on responses, which take long to generate."""
        return self.of("decoder") in contract.WEIGHT_BITS or bool(
            self.engines and self.engines.of("decoder") in contract.WEIGHT_BITS
        )


DEFAULT_BUILD_OPTIONS = BuildOptions()
