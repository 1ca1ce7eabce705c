"""Selection of each graph's runtime: chosen by the caller, or measured once and cached."""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.contract import ATTENTION_MASK, GRAPHS, HIDDEN_STATES, INPUT_IDS, GraphName, Runtime
from llm2slm_export.environment.hardware import processor
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.runtime.backend import Backend, Ids, hidden_tensor
from llm2slm_export.inference.runtime.graph_values import parse_graph_values
from llm2slm_export.inference.runtime.measurement_file import MeasurementFile, measurement_key
from llm2slm_export.inference.runtime.onnxruntime.backend import OrtBackend
from llm2slm_export.inference.runtime.onnxruntime.cuda_backend import open_ort
from llm2slm_export.inference.runtime.onnxruntime.cuda_sessions import CudaOptions
from llm2slm_export.inference.runtime.onnxruntime.devices import find_device
from llm2slm_export.inference.runtime.openvino import OpenVinoBackend, OpenVinoGraph
from llm2slm_export.inference.runtime.tensorrt.backend import find_libraries, open_tensorrt, require_library

RuntimeChoice = Runtime | Literal["auto"]

READING: tuple[GraphName, ...] = ("encoder", "projector")  # the graphs that OpenVINO can run
PROMPT_TOKENS = 64
ROUNDS = 7


@dataclass(frozen=True)
class Measured:
    """The latency of a graph on each installed runtime.

    Args:
        ms: milliseconds for one prompt of `PROMPT_TOKENS` tokens, by runtime.
        cache_file: the cache file with the measurement; None: it could not be written.
    """

    graph: GraphName
    ms: Mapping[Runtime, float]
    cache_file: Path | None

    @property
    def fastest(self) -> Runtime:
        return min(self.ms, key=lambda runtime: self.ms[runtime])


def parse_runtime(text: str) -> dict[GraphName, RuntimeChoice]:
    """Parse `onnxruntime`, `openvino`, `auto`, or one runtime per graph, `encoder=openvino,projector=auto`.

    A single `openvino` or `auto` applies to the encoder and the projector. ONNX Runtime runs the decoder and all graphs not
    named.

    Raises:
        UsageError: parts are invalid, all of them named.
    """
    known: tuple[RuntimeChoice, ...] = ("onnxruntime", "openvino", "auto")
    chosen, problems = parse_graph_values(text, known, noun="runtime", unnamed=READING, objection=_objection)
    if problems:
        raise UsageError(
            f"The runtime {text!r} cannot be read.", *problems,
            remedy=f"use {', '.join(known)}, or GRAPH=RUNTIME,… with the graphs {', '.join(READING)}",
        )  # fmt: skip
    return {graph: chosen.get(graph, "onnxruntime") for graph in GRAPHS}


def _objection(graph: GraphName, runtime: RuntimeChoice) -> str | None:
    """The reason why a runtime cannot run a graph, or None."""
    if graph == "decoder" and runtime in ("openvino", "auto"):
        return "OpenVINO has no TensorScatter, which decoders need"
    return None


def tensorrt_index(device: str) -> int | None:
    """The GPU index of a device name: 0 for `tensorrt`, n for `tensorrt:n`, None for other devices."""
    match = re.fullmatch(r"tensorrt(?::(\d+))?", device)
    return int(match[1] or 0) if match else None


def check_device(device: str) -> None:
    """Check that a device name is valid and that this installation supports the device.

    Raises:
        UsageError: the name is invalid.
        DeviceError: ONNX Runtime does not support the device.
        MissingExtraError: the device's runtime is not installed.
    """
    if tensorrt_index(device) is None:
        find_device(device)
    else:
        require_library(device, find_libraries())


def open_backend(
    bundle: Bundle,
    *,
    device: str = "cpu",
    threads: int | None = None,
    graphs: Sequence[GraphName] = GRAPHS,
    runtime: str = "onnxruntime",
    cuda: CudaOptions | None = None,
) -> Backend:
    """Open a bundle's graphs on their runtimes, or with device `tensorrt[:n]` its engines.

    Args:
        graphs: the graphs to open. Calls that need another one are refused.
        runtime: see `parse_runtime`.
        cuda: options of a CUDA device; None: the defaults.

    Raises:
        UsageError: an invalid device, runtime or number of threads, or an invalid combination of them.
        DeviceError: the device is not available.
        BundleError: a graph cannot be loaded.
        MissingExtraError: a runtime is not installed.
    """
    index = tensorrt_index(device)
    on_cpu = index is None and find_device(device).kind == "cpu"
    if not on_cpu and set(parse_runtime(runtime).values()) != {"onnxruntime"}:
        raise UsageError(
            f"The runtime {runtime!r} needs the device 'cpu'; the device is {device!r}.",
            remedy="leave out the runtime, or use device 'cpu'",
        )
    if index is not None:
        if threads is not None:
            raise UsageError(
                f"threads is {threads}; the device is {device!r}.",
                remedy="leave out threads, which are for the CPU only",
            )
        return open_tensorrt(bundle, index=index, graphs=graphs)
    chosen = chosen_runtimes(bundle, runtime, graphs=graphs, threads=threads)
    on_openvino = [name for name, own in chosen.items() if own == "openvino"]
    others = [name for name in graphs if name not in on_openvino]
    rest = open_ort(bundle, device=device, threads=threads, graphs=others, cuda=cuda)
    return OpenVinoBackend(bundle, threads=threads, graphs=on_openvino, rest=rest) if on_openvino else rest


def chosen_runtimes(
    bundle: Bundle, runtime: str, *, graphs: Sequence[GraphName] = GRAPHS, threads: int | None = None
) -> dict[GraphName, Runtime]:
    """The runtime of each graph. `auto` is measured or read from the cache.

    Raises:
        UsageError, MissingExtraError: as `measure`.
    """
    measured = {entry.graph: entry.fastest for entry in measure(bundle, runtime, graphs=graphs, threads=threads)}
    wanted = parse_runtime(runtime)
    return {name: measured.get(name, "openvino" if wanted[name] == "openvino" else "onnxruntime") for name in graphs}


def measure(
    bundle: Bundle, runtime: str, *, graphs: Sequence[GraphName] = GRAPHS, threads: int | None = None
) -> list[Measured]:
    """Measure the graphs whose runtime is `auto` on each installed runtime, unless a measurement is cached.

    Measurements are cached per graph file, processor, runtime versions and number of threads, in
    `$XDG_CACHE_HOME/llm2slm-export/runtimes.json` (`~/.cache` by default).

    Raises:
        UsageError: an invalid runtime.
        MissingExtraError: ONNX Runtime is not installed.
    """
    wanted = parse_runtime(runtime)
    return [_measured(bundle, name, threads) for name in graphs if wanted[name] == "auto"]


def _measured(bundle: Bundle, name: GraphName, threads: int | None) -> Measured:
    file = MeasurementFile("runtimes.json", _are_times)
    key, cached = _key(bundle, name, threads), file.read()
    if key in cached:
        return Measured(name, cached[key], file.path)
    times: dict[Runtime, float] = {runtime: _ms(bundle, name, threads, runtime) for runtime in _installed()}
    return Measured(name, times, file.path if file.add(key, times) else None)


def _installed() -> list[Runtime]:
    return ["onnxruntime", "openvino"] if find_spec("openvino") is not None else ["onnxruntime"]


def _key(bundle: Bundle, name: GraphName, threads: int | None) -> str:
    import onnxruntime  # the module has the version: its package is one of two

    versions = [onnxruntime.__version__ if runtime == "onnxruntime" else version(runtime) for runtime in _installed()]
    return measurement_key(bundle, [(bundle.manifest, name)], facts=[processor(), threads, os.cpu_count(), *versions])


def _are_times(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == set(_installed())
        and all(isinstance(time, int | float) for time in value.values())
    )


def _ms(bundle: Bundle, name: GraphName, threads: int | None, runtime: Runtime) -> float:
    """The median milliseconds of calls on one prompt each, without the first. All lengths differ, as real prompts' do."""
    call, manifest = _caller(bundle, name, threads, runtime), bundle.manifest
    longest = min(PROMPT_TOKENS, manifest.max_prompt_tokens)
    times = []
    for shorter in range(ROUNDS + 1):
        ids = np.full((1, max(1, longest - shorter)), manifest.special_ids.prompt_pad)
        states = np.zeros((*ids.shape, manifest.shape.encoder_hidden_size), np.float32)
        started = time.perf_counter()
        call(ids, np.ones_like(ids), states)
        times.append(1e3 * (time.perf_counter() - started))
    return round(median(times[1:]), 3)


def _caller(
    bundle: Bundle, name: GraphName, threads: int | None, runtime: Runtime
) -> Callable[[Ids, Ids, Array], object]:
    """A function that runs a graph on ids, mask and hidden states."""
    if runtime == "openvino":
        graph = OpenVinoGraph(bundle, name, threads=threads)
        return lambda ids, mask, states: graph({INPUT_IDS: ids, ATTENTION_MASK: mask, HIDDEN_STATES: states})
    backend = OrtBackend(bundle, device="cpu", threads=threads, graphs=(name,))
    if name == "encoder":
        return lambda ids, mask, _: backend.encode(ids, mask)
    return lambda ids, mask, states: backend.project(hidden_tensor(backend, states), ids, mask)
