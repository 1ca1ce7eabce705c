"""The base class of exportable graphs: modules whose inputs and outputs are those of the tensor contract."""

import inspect
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from llm2slm_export.contract import Axis, GraphName, GraphSpec, TensorSpec

# Example sizes are at least 2, because torch.export specializes on 0 and 1. They are distinct primes, so that a size
# baked in as a constant or a swapped axis fails the parity check, which uses other sizes.
EXAMPLE_SIZES: dict[Axis, int] = {
    "batch": 3, "prompt": 7, "context": 17, "sequence_length": 2, "embeds_length": 5, "capacity": 23, "num_logits": 13,
}  # fmt: skip

EXAMPLE_PAST_LENGTH = 11

Inputs = tuple[Tensor | list[Tensor], ...]


class Graph(nn.Module, ABC):
    """A graph to export.

    `spec` names its inputs and outputs. `forward` takes the leading inputs one by one and the state tensors in lists.
    `groups` holds the lengths of those lists: with (2, 4), the last six inputs of the spec arrive as a list of two and
    a list of four.
    """

    name: GraphName
    groups: tuple[int, ...] = ()

    def __init__(self, spec: GraphSpec) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def example_tensors(self) -> dict[str, Tensor]:
        """One tensor per input of the spec, at EXAMPLE_SIZES."""

    def arguments(self, tensors: dict[str, Tensor]) -> Inputs:
        """Arrange named tensors as the arguments of `forward`."""
        flat = [tensors[t.name] for t in self.spec.inputs]
        return tuple(self._grouped(flat))

    def example_inputs(self) -> Inputs:
        """The example tensors as arguments of `forward`."""
        return self.arguments(self.example_tensors())

    def dynamic_shapes(self) -> tuple[object, ...]:
        """Dynamic axes for torch.export: the contract's axis names, in the structure of `forward`'s arguments."""
        axes = [{i: str(a) for i, a in enumerate(t.axes) if isinstance(a, str)} for t in self.spec.inputs]
        return tuple(self._grouped(axes))

    def _grouped(self, flat: list) -> list:  # type: ignore[type-arg]
        single = len(flat) - sum(self.groups)
        grouped = flat[:single]
        start = single
        for size in self.groups:
            grouped.append(flat[start : start + size])
            start += size
        return grouped


def kept_in_float32(graph: nn.Module) -> frozenset[str]:
    """Names of the modules whose products overflow float16, from transformers' attributes (T5's `wo`)."""
    attributes = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    named = (getattr(module, attribute, None) or () for module in graph.modules() for attribute in attributes)
    return frozenset(name for names in named for name in names)


def positions(
    module: nn.Module, mask: Tensor, past: Tensor | None = None, *, name: str = "position_ids"
) -> dict[str, Tensor]:
    """Explicit position ids past, past + 1, … [batch, length] for a module with rotary embeddings; else empty.

    transformers' own position ids are [1, length]; ONNX RotaryEmbedding requires the batch axis.

    Args:
        mask: a tensor [batch, length, …] of the call's size.
        past: positions before the call, [batch]; None: 0.
        name: the argument of the module's `forward`.
    """
    rotary = any("rotary" in part for part, _ in module.named_modules())
    if not rotary or name not in inspect.signature(module.forward).parameters:
        return {}
    count = torch.arange(mask.shape[1])[None, :]
    return {name: count.expand(mask.shape[0], -1) if past is None else count + past[:, None]}


def zeros(tensor: TensorSpec, sizes: dict[Axis, int]) -> Tensor:
    """A zero tensor of a spec's type at the given axis sizes."""
    shape = [sizes[a] if isinstance(a, str) else a for a in tensor.axes]
    return torch.zeros(shape, dtype=torch.int64 if tensor.dtype == "int64" else torch.float32)
