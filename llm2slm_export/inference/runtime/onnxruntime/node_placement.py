"""Which of a graph's nodes ONNX Runtime put where: on a device, every one but the arithmetic on shapes.

ONNX Runtime keeps on the CPU what only computes shapes, by design: `Shape` gives its result in host memory, and what is
computed from such results alone stays there, so that no copy and no wait comes between two kernels
(`GetCpuPreferredNodes`, onnxruntime/core/framework/fallback_cpu_capability.cc). Any other node on the CPU is one for which
the device has no kernel, of its type or at all: it would be carried to host memory and back in every call. Its option
`session.disable_cpu_ep_fallback` is no help: it refuses the arithmetic on shapes too.
"""

from collections.abc import Sequence
from typing import Any

from llm2slm_export.errors import DeviceError

RECORD = ("session.record_ep_graph_assignment_info", "1")  # before a session is made
# What arithmetic on shapes consists of in graphs of ours. None of them multiplies, attends, normalises or looks weights up.
SHAPE_ARITHMETIC = frozenset({
    "Add", "Cast", "Concat", "Constant", "Div", "Identity", "Max", "Min", "Mul", "Reshape", "Shape", "Size", "Slice",
    "Squeeze", "Sub", "Unsqueeze",
})  # fmt: skip


def nodes_on_other_provider(session: Any, provider: str) -> list[str]:
    """The nodes that another provider than this one has, and that are no arithmetic on shapes: `name (type)`, `provider`.

    Args:
        session: made with the option `RECORD`.
    """
    return [
        f"{node.name or 'a node'} ({f'{node.domain}.' if node.domain else ''}{node.op_type}): {subgraph.ep_name}"
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name != provider
        for node in subgraph.get_nodes()
        if node.op_type not in SHAPE_ARITHMETIC or node.domain not in ("", "ai.onnx")
    ]


def require_placement(session: Any, provider: str, file: str, device: str) -> None:
    """Refuse a graph that does not run where it was asked to.

    Raises:
        DeviceError: the provider is not in use, or has not all of the graph; every such node is named.
    """
    in_use: Sequence[str] = session.get_providers()
    if in_use[0] != provider:
        raise DeviceError(
            f"ONNX Runtime could not use {device} for {file}.",
            f"wanted {provider}, got {', '.join(in_use)}",
            remedy="check the driver and the CUDA libraries with `llm2slm-export doctor`, or use device 'cpu'",
        )
    if surprises := nodes_on_other_provider(session, provider):
        raise DeviceError(
            f"ONNX Runtime puts {len(surprises)} nodes of {file} somewhere else than on {device}.",
            *surprises[:20],
            *([f"and {len(surprises) - 20} more"] if len(surprises) > 20 else []),
            remedy="update onnxruntime-gpu, build the bundle at another precision, or use device 'cpu'",
        )
