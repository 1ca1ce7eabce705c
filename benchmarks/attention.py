"""The attention of one decoder step in ONNX Runtime: which operator, and which layout of the cache.

A step's keys and values either grow (past in, past and one more out: copied every step) or stay where they are in a
buffer of a fixed capacity, written in place. The scale is 1: with another one `Attention` first multiplies the keys, all
of them, by its root. Times are per layer, over a chain of layers, each with a cache of its own; medians, the variants in
turns.

Usage: python benchmarks/attention.py [--threads 1] [--repeats 60] [--json FILE]
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from llm2slm_export.environment.hardware import processor

LAYERS = 12
SHAPES = {"T5-small": (8, 8, 64), "SmolLM2-135M": (9, 3, 64), "demo": (5, 5, 32)}  # heads, key/value heads, head_dim
# batch, tokens in the cache, capacity of the buffer
CASES = [(1, 8, 32), (1, 64, 128), (1, 64, 640), (1, 120, 128), (1, 500, 512), (1, 1900, 2048), (8, 64, 128)]
Nodes = Callable[[int, str, int, int], list[Any]]


def _attention(layer: int, query: str, heads: int, kv_heads: int) -> list[Any]:
    return [helper.make_node(
        "Attention", [query, "k", "v", "", f"past_k{layer}", f"past_v{layer}"],
        [f"y{layer}", f"present_k{layer}", f"present_v{layer}"], q_num_heads=heads, kv_num_heads=kv_heads, scale=1.0,
    )]  # fmt: skip


def _multi_head(layer: int, query: str, heads: int, kv_heads: int) -> list[Any]:  # noqa: ARG001
    return [helper.make_node(
        "MultiHeadAttention", [query, "k", "v", "", "", "", f"past_k{layer}", f"past_v{layer}"],
        [f"y{layer}", f"present_k{layer}", f"present_v{layer}"], domain="com.microsoft", num_heads=heads, scale=1.0,
    )]  # fmt: skip


def _grouped_query(layer: int, query: str, heads: int, kv_heads: int) -> list[Any]:
    return [helper.make_node(
        "GroupQueryAttention", [query, "k", "v", f"past_k{layer}", f"past_v{layer}", "last", "total"],
        [f"y{layer}", f"present_k{layer}", f"present_v{layer}"], domain="com.microsoft",
        num_heads=heads, kv_num_heads=kv_heads, scale=1.0,
    )]  # fmt: skip


def _scattered(layer: int, query: str, heads: int, kv_heads: int) -> list[Any]:  # noqa: ARG001
    """One token: a Reshape is the transpose."""
    scatter = [
        helper.make_node(
            "TensorScatter", [f"past_{n}{layer}", f"{n}_heads", "index"], [f"present_{n}{layer}"], axis=2, mode="linear"
        )
        for n in "kv"
    ]
    return [
        *scatter,
        helper.make_node("Reshape", [query, "query_shape"], [f"q{layer}"]),
        helper.make_node(
            "Attention",
            [f"q{layer}", f"present_k{layer}", f"present_v{layer}", "", "", "", "written"],
            [f"a{layer}"],
            scale=1.0,
        ),
        helper.make_node("Reshape", [f"a{layer}", "joined_shape"], [f"y{layer}"]),
    ]


VARIANTS: dict[str, tuple[Nodes, bool]] = {  # and whether the cache is written in place
    "Attention, growing": (_attention, False),
    "MultiHeadAttention, growing": (_multi_head, False),
    "GroupQueryAttention, growing": (_grouped_query, False),
    "GroupQueryAttention, in place": (_grouped_query, True),
    "TensorScatter + Attention, in place": (_scattered, True),
}


def model(nodes: Nodes, heads: int, kv_heads: int, head_dim: int) -> bytes:
    """A chain of layers: each attends with what the one before it gave."""

    def value(name: str, kind: int, shape: list[int | str]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    floats, ints = TensorProto.FLOAT, TensorProto.INT64
    inputs = [value("q", floats, ["batch", 1, heads * head_dim])]
    inputs += [value(n, floats, ["batch", 1, kv_heads * head_dim]) for n in "kv"]
    inputs += [value("last", TensorProto.INT32, ["batch"]), value("total", TensorProto.INT32, [1])]
    inputs += [value(name, ints, ["batch"]) for name in ("index", "written")]
    inputs += [value("query_shape", ints, [4]), value("new_shape", ints, [4]), value("joined_shape", ints, [3])]
    chain = [helper.make_node("Reshape", [n, "new_shape"], [f"{n}_heads"]) for n in "kv"] if nodes is _scattered else []
    query, outputs = "q", []
    for layer in range(LAYERS):
        chain += nodes(layer, query, heads, kv_heads)
        query = f"y{layer}"
        inputs += [value(f"past_{n}{layer}", floats, ["batch", kv_heads, "past", head_dim]) for n in "kv"]
        outputs += [value(f"present_{n}{layer}", floats, ["batch", kv_heads, "present", head_dim]) for n in "kv"]
    outputs.append(value(query, floats, ["batch", 1, heads * head_dim]))
    read = {name for node in chain for name in node.input}
    graph = helper.make_graph(chain, "attention", [i for i in inputs if i.name in read], outputs)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    serialized: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return serialized


class Variant:
    """One variant's session, bound to the tensors of a case."""

    def __init__(self, session: Any, feeds: dict[str, Any], *, capacity: int | None) -> None:
        self.session, self.binding, self._kept = session, session.io_binding(), []
        named = {i.name for i in session.get_inputs()}
        for name, array in feeds.items():
            if name not in named:
                continue
            past = name.startswith("past_")
            if past and capacity is not None:
                buffer = np.zeros((*array.shape[:2], capacity, array.shape[3]), np.float32)
                buffer[:, :, : array.shape[2]] = array
                array = buffer
            bound = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            self._kept += [array, bound]
            self.binding.bind_ortvalue_input(name, bound)
            if past and capacity is not None:
                self.binding.bind_ortvalue_output(name.replace("past", "present"), bound)
            elif past:
                self.binding.bind_output(name.replace("past", "present"), "cpu")
        self.binding.bind_output(session.get_outputs()[-1].name, "cpu")

    def run(self) -> float:
        """Microseconds per layer."""
        started = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return (time.perf_counter() - started) / LAYERS * 1e6

    def result(self) -> Any:
        """What the last layer gave."""
        return self.binding.get_outputs()[-1].numpy()


def measure(heads: int, kv_heads: int, head_dim: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    sessions = {
        name: onnxruntime.InferenceSession(model(nodes, heads, kv_heads, head_dim), options)
        for name, (nodes, _) in VARIANTS.items()
        if nodes is not _multi_head or heads == kv_heads
    }
    random = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> Any:
        return (random.standard_normal(shape) * head_dim**-0.25).astype(np.float32)  # scores of a deviation of 1

    rows = []
    for batch, past, capacity in CASES:
        feeds: dict[str, Any] = {"q": draw((batch, 1, heads * head_dim))}
        feeds |= {n: draw((batch, 1, kv_heads * head_dim)) for n in "kv"}
        feeds |= {
            "last": np.full(batch, past, np.int32), "total": np.array([past + 1], np.int32),
            "index": np.full(batch, past), "written": np.full(batch, past + 1),
            "query_shape": np.array([batch, heads, 1, head_dim]), "new_shape": np.array([batch, kv_heads, 1, head_dim]),
            "joined_shape": np.array([batch, 1, heads * head_dim]),
        }  # fmt: skip
        for layer in range(LAYERS):
            feeds |= {f"past_{n}{layer}": draw((batch, kv_heads, past, head_dim)) for n in "kv"}
        variants = {
            name: Variant(session, feeds, capacity=capacity if VARIANTS[name][1] else None)
            for name, session in sessions.items()
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(repeats + 1):
            for name, variant in variants.items():
                taken = variant.run()
                if turn:  # the first one allocates
                    times[name].append(taken)
        expected = variants["Attention, growing"].result()
        for name, variant in variants.items():
            error = float(np.abs(variant.result() - expected).max())
            if error > 1e-4:
                raise SystemExit(f"{name} gives something else than Attention: {error:.1e}")
        us = {name: round(median(taken), 1) for name, taken in times.items()}
        rows.append({"batch": batch, "past": past, "capacity": capacity, "us_per_layer": us})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    report = {
        "processor": processor(), "python": platform.python_version(), "onnxruntime": onnxruntime.__version__,
        "threads": given.threads, "repeats": given.repeats, "layers": LAYERS,
        "shapes": {name: measure(*shape, given.threads, given.repeats) for name, shape in SHAPES.items()},
    }  # fmt: skip
    print(f"{report['processor']}, onnxruntime {report['onnxruntime']}, {given.threads} thread(s), µs per layer")
    for name, rows in report["shapes"].items():
        print(f"\n| {name}: batch, past, capacity | " + " | ".join(VARIANTS) + " |")
        print("|---" * (len(VARIANTS) + 1) + "|")
        for row in rows:
            cells = [str(row["us_per_layer"].get(variant, "")) for variant in VARIANTS]
            print(f"| {row['batch']}, {row['past']}, {row['capacity']} | " + " | ".join(cells) + " |")
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
