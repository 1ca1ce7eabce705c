"""One call of decoder graphs on one token, by how many tokens came before it.

Takes the decoder.onnx of bundles of any age: the cache may have a capacity (written in place; as much room as the loop
gives it) or grow (past in, past and one more out, which older releases built). Weights are the graphs'; ids are ones, keys and
values random. ms, medians, the graphs in turns of several calls each, since a session's threads go on spinning for a
while after a call; only ONNX Runtime's time, none of the loop's.

Usage: python benchmarks/decoder.py NAME=DECODER.onnx … [--past 8 64 500] [--threads 1] [--repeats 150] [--json FILE]
"""

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime

from llm2slm_export.environment.hardware import probe, processor
from llm2slm_export.inference.runtime.onnxruntime.decoder import capacity_for

TURNS = 5  # of each graph, at each length
WARM_UP = 10  # calls at the start of each
PAUSE = 0.1  # seconds, until the threads of the graph before have stopped
MEMORY = 16  # prompt tokens that an encoder-decoder SLM attends to


class Graph:
    """A decoder's session.

    Args:
        path: with its weights beside it.
    """

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = onnxruntime.InferenceSession(path, options)
        self.in_place = any(i.name == "past_length" for i in self.session.get_inputs())

    def bound(self, past: int) -> tuple[Any, list[Any]]:
        """A binding for one token after `past` others, and what it borrows."""
        random, binding, kept = np.random.default_rng(0), self.session.io_binding(), []
        sizes = {
            "batch": 1, "sequence_length": 1, "context": MEMORY, "embeds_length": 0, "num_logits": 1, "past": past, "total": past + 1,
            "capacity": capacity_for(past + 1),
        }  # fmt: skip
        values = {}
        for tensor in self.session.get_inputs():
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
            if tensor.name == "past_length":
                array = np.full(shape, past, np.int64)
            elif tensor.name == "logits_to_keep":
                array = np.zeros(shape, np.int64)
            elif "int64" in tensor.type:
                array = np.ones(shape, np.int64)
            else:
                array = random.standard_normal(shape).astype(np.float32) * np.float32(0.3)
            values[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            kept += [array, values[tensor.name]]
            binding.bind_ortvalue_input(tensor.name, values[tensor.name])
        for tensor in self.session.get_outputs():
            if self.in_place and tensor.name.startswith("present"):
                binding.bind_ortvalue_output(tensor.name, values[tensor.name.replace("present", "past_key_values")])
            else:
                binding.bind_output(tensor.name, "cpu")
        return binding, kept


def measure(graphs: dict[str, Graph], past: int, repeats: int) -> dict[str, float]:
    """ms of every graph's step."""
    bound = {name: graph.bound(past) for name, graph in graphs.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(TURNS):
        for name, graph in graphs.items():
            time.sleep(PAUSE)
            for call in range(WARM_UP + -(-repeats // TURNS)):
                started = time.perf_counter()
                graph.session.run_with_iobinding(bound[name][0])
                if call >= WARM_UP:
                    times[name].append((time.perf_counter() - started) * 1e3)
    return {name: round(median(taken), 4) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", nargs="+", metavar="NAME=DECODER.onnx")
    parser.add_argument("--past", type=int, nargs="+", default=[8, 64, 500])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=150)
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    named = dict(one.split("=", 1) for one in given.graphs)
    graphs = {name: Graph(Path(path), given.threads) for name, path in named.items()}
    rows = {past: measure(graphs, past, given.repeats) for past in given.past}
    bandwidth = probe().bandwidth / 1e9
    print(
        f"{processor()}, onnxruntime {onnxruntime.__version__}, {given.threads} thread(s), {bandwidth:.0f} GB/s, ms\n"
    )
    print("| graph | " + " | ".join(f"{past} tokens before" for past in rows) + " |")
    print("|---" * (len(rows) + 1) + "|")
    for name in graphs:
        print(f"| {name} | " + " | ".join(f"{row[name]:.3f}" for row in rows.values()) + " |")
    if given.json:
        report = {
            "processor": processor(), "python": platform.python_version(), "onnxruntime": onnxruntime.__version__,
            "threads": given.threads, "repeats": given.repeats, "bandwidth": probe().bandwidth, "ms": rows,
        }  # fmt: skip
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
