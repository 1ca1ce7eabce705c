"""Checks that ONNX Runtime placed all nodes of a graph on the device, except shape arithmetic.

ONNX Runtime deliberately runs nodes that only compute shapes on the CPU: `Shape` returns its result in host memory, and nodes
that depend on such results only stay there, which avoids copies and waits between kernels (`GetCpuPreferredNodes`,
onnxruntime/core/framework/fallback_cpu_capability.cc). Any other node on the CPU lacks a kernel on the device; its tensors
would be copied to host memory and back in every call. The option `session.disable_cpu_ep_fallback` does not help, because it
also refuses shape arithmetic.
"""

from collections.abc import Sequence
from typing import Any

from llm2slm_export.errors import DeviceError

RECORD = ("session.record_ep_graph_assignment_info", "1")  # set before the session is created
# Operators of shape arithmetic in this package's graphs. None of them computes with weights.
SHAPE_ARITHMETIC = frozenset({
    "Add", "Cast", "Concat", "Constant", "Div", "Identity", "Max", "Min", "Mul", "Reshape", "Shape", "Size", "Slice",
    "Squeeze", "Sub", "Unsqueeze",
})  # fmt: skip


def nodes_on_other_provider(session: Any, provider: str) -> list[str]:
    """The nodes on another provider, except shape arithmetic, as `name (type): provider`.

    Args:
        session: a session created with the option `RECORD`.
    """
    return [
        f"{node.name or 'a node'} ({f'{node.domain}.' if node.domain else ''}{node.op_type}): {subgraph.ep_name}"
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name != provider
        for node in subgraph.get_nodes()
        if node.op_type not in SHAPE_ARITHMETIC or node.domain not in ("", "ai.onnx")
    ]


def require_placement(session: Any, provider: str, file: str, device: str) -> None:
    """Check that a graph runs on its provider.

    Raises:
        DeviceError: the provider is not in use, or nodes are on another one; the first 20 are named.
    """
    in_use: Sequence[str] = session.get_providers()
    if in_use[0] != provider:
        raise DeviceError(
            f"ONNX Runtime could not use {device} for {file}.",
            f"wanted {provider}, got {', '.join(in_use)}",
            remedy="check the driver and the CUDA libraries with `llm2slm-export doctor`, or use device 'cpu'",
        )
    if others := nodes_on_other_provider(session, provider):
        raise DeviceError(
            f"ONNX Runtime does not place {len(others)} nodes of {file} on {device}.",
            *others[:20],
            *([f"and {len(others) - 20} more"] if len(others) > 20 else []),
            remedy="update onnxruntime-gpu, build the bundle at another precision, or use device 'cpu'",
        )
