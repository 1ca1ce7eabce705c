"""The ONNX Runtime sessions of a bundle's graphs: opening, checks, and calls."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import GraphEntry
from llm2slm_export.contract import ATTENTION_MASK, GraphName, TensorSpec
from llm2slm_export.environment.cores import thread_notes, usable_threads
from llm2slm_export.environment.versions import release
from llm2slm_export.errors import BundleError, Llm2SlmError, UsageError
from llm2slm_export.inference.runtime.forks import HomeProcess
from llm2slm_export.inference.runtime.onnxruntime.devices import ExecutionDevice
from llm2slm_export.inference.runtime.onnxruntime.exceptions import run_failures
from llm2slm_export.inference.runtime.onnxruntime.huge_pages import huge_pages

_LOG_ERRORS_ONLY = 3
# Idle threads of a session spin for tens of milliseconds and take cores from the next session. Encoder and projector stop
# spinning after a run; the decoder spins for 500 µs, enough to bridge two steps.
_SPIN_OPTIONS: dict[GraphName, dict[str, str]] = {
    "encoder": {"session.force_spinning_stop": "1"},
    "projector": {"session.force_spinning_stop": "1"},
    "decoder": {"session.intra_op.spin_duration_us": "500"},  # ignored by ONNX Runtime 1.25
}
_NO_MEMORY = re.compile("(?i)failed to allocate memory|out of memory|bad allocation|bad_alloc")


class GraphSessions:
    """The open sessions of a bundle's graphs. `create` and `call_error` are overridden for other devices than the CPU.

    Args:
        bundle: an opened bundle.
        device: the device of the sessions. There is no fallback to another device.
        threads: threads per operator, at most one per core (see `warnings`); None: ONNX Runtime's choice.
        graphs: the graphs to open. Calls that need another one are refused.
        encoder: an open encoder session to share; None: the bundle's is opened.

    Attributes:
        threads: threads per operator in use.
        outputs: the names of each graph's outputs, in order.

    Raises:
        UsageError: an invalid number of threads.
        BundleError: ONNX Runtime is too old, or cannot load a graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: ExecutionDevice,
        *,
        threads: int | None,
        graphs: Sequence[GraphName],
        encoder: Any = None,
    ) -> None:
        self.bundle, self.manifest, self.device = bundle, bundle.manifest, device
        self.graphs, self.requested_threads = graphs, threads
        self.threads = usable_threads(threads)
        # Read once: the number of cores takes a millisecond, and every response has the warnings.
        self._warnings = thread_notes(threads)
        self._home = HomeProcess(self)
        _check_version(bundle)
        self.outputs = {name: [t.name for t in graph.outputs] for name, graph in bundle.manifest.graphs.items()}
        self._open: dict[GraphName, Any] = {
            name: encoder if name == "encoder" and encoder is not None else self._load(name) for name in graphs
        }

    @property
    def names(self) -> tuple[GraphName, ...]:
        """The open graphs."""
        return tuple(self._open)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A warning if fewer threads are used than requested."""
        return self._warnings

    @property
    def inherited(self) -> bool:
        """Whether this process is a forked child of the one that opened the sessions."""
        return self._home.inherited

    def get(self, name: GraphName) -> Any:
        """The session of a graph.

        Raises:
            UsageError: it was not opened, has been closed, or was opened before this process was forked.
        """
        self.require_home()
        if name not in self._open:
            raise UsageError(
                f"The {name} graph is not open.",
                f"open: {', '.join(self._open) or 'none'}",
                remedy="load the bundle again",
            )
        return self._open[name]

    def find(self, name: GraphName) -> Any | None:
        """The session of a graph, or None if it is not open. Unlike `get` it does not check the process."""
        return self._open.get(name)

    def require_home(self) -> None:
        """Refuse use in a forked child, unless the session runs on the CPU with one thread, the caller's."""
        if self.threads != 1 or self.device.kind != "cpu":
            self._home.require(single_thread=self.device.kind == "cpu")

    def encoder_to_share(self) -> Any:
        """The encoder's session for another head, or None if the encoder is not one of `graphs`."""
        return self.get("encoder") if "encoder" in self.graphs else None

    def reopen(self, name: GraphName) -> None:
        """Replace the session of a graph by a new one."""
        self._open[name] = self._load(name)

    def close(self) -> None:
        """Release the sessions. In a forked child they are kept, but cannot be used."""
        if not self._home.inherited:
            self._open.clear()

    def run(self, name: GraphName, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run a graph on OrtValues. Returns its outputs by name, on the device."""
        session = self.get(name)
        binding = session.io_binding()
        for input_name, value in feeds.items():
            binding.bind_ortvalue_input(input_name, value)
        for output_name in self.outputs[name]:
            binding.bind_output(output_name, self.device.kind, self.device.index)
        with self.described_failures(name, *feeds[ATTENTION_MASK].shape()):
            session.run_with_iobinding(binding)
        outputs = dict(zip(self.outputs[name], binding.get_outputs(), strict=True))
        # Outputs keep their binding alive, and a binding its inputs. This releases the hidden states early.
        binding.clear_binding_inputs()
        return outputs

    @contextmanager
    def described_failures(self, name: GraphName, rows: int, tokens: int) -> Iterator[None]:
        """Raise failures of a call as `call_error`, with the graph's name and the shape of its inputs."""
        try:
            yield
        # Calls with an IOBinding raise RuntimeError.
        except run_failures() as error:
            raise self.call_error(name, rows, tokens, error) from error

    def call_error(self, name: GraphName, rows: int, tokens: int, error: Exception) -> Exception:
        """The error for a failed call on inputs [rows, tokens]."""
        import onnxruntime

        text = " ".join(str(error).split())[:500]
        evidence = (
            f"given: {rows} × {tokens} (rows × tokens)",
            f"onnxruntime {onnxruntime.__version__}: {text or 'out of memory'}",
        )
        if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
            return Llm2SlmError(
                f"There is too little memory for the {name}.", *evidence,
                remedy="use a smaller batch_size (--batch-size), fewer beams, or shorter prompts",
            )  # fmt: skip
        return BundleError(
            f"ONNX Runtime cannot run {self.manifest.graphs[name].file} on {self.device}.", *evidence,
            remedy="run `llm2slm-export verify` on the bundle, or build it again",
        )  # fmt: skip

    def create(self, name: GraphName, path: str, options: Any) -> Any:
        """Create a graph's session from its file and SessionOptions."""
        import onnxruntime

        # Encoder and projector multiply many rows with each weight, and gain nothing from huge pages.
        with huge_pages() if name == "decoder" else nullcontext():
            return onnxruntime.InferenceSession(path, options, providers=[self.device.provider])

    def _load(self, name: GraphName) -> Any:
        import onnxruntime

        entry = self.manifest.graphs[name]
        path = self.bundle.path(entry.file)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_ERRORS_ONLY
        for key, value in _SPIN_OPTIONS[name].items():
            options.add_session_config_entry(key, value)
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            session = self.create(name, str(path), options)
            _check_signature(session, name, entry)
            return session
        except run_failures() as error:
            raise BundleError(
                f"ONNX Runtime cannot load {entry.file} on {self.device}.",
                f"file: {path}",
                f"onnxruntime {onnxruntime.__version__}: {error}",
                remedy="run `llm2slm-export verify` on the bundle, or build it again",
            ) from error


def _check_signature(session: Any, name: GraphName, entry: GraphEntry) -> None:
    """Check that a graph's inputs and outputs are those of the manifest.

    Raises:
        BundleError: they differ.
    """
    problems = []
    for side, specs, found in (
        ("input", entry.inputs, session.get_inputs()), ("output", entry.outputs, session.get_outputs()),
    ):  # fmt: skip
        by_name = {node.name: node for node in found}
        problems += [f"{side} {spec.name}: is missing" for spec in specs if spec.name not in by_name]
        problems += [
            f"{side} {more}: is not in the manifest" for more in by_name.keys() - {spec.name for spec in specs}
        ]
        for spec in specs:
            node = by_name.get(spec.name)
            if node is not None and not _agrees(spec, node):
                problems.append(
                    f"{side} {spec.name}: expected {spec.dtype} {list(spec.axes)}, got {node.type} {node.shape}"
                )
    if problems:
        raise BundleError(
            f"{entry.file} is not the {name} that the manifest describes.", *problems[:5],
            remedy="build the bundle again",
        )  # fmt: skip


def _agrees(spec: TensorSpec, node: Any) -> bool:
    types = {"int64": "int64", "int32": "int32", "float32": "float", "float16": "float16", "bfloat16": "bfloat16"}
    if node.type != f"tensor({types[spec.dtype]})":
        return False
    # Axes that are fixed in only one of the two are dynamic.
    sizes = zip(spec.axes, node.shape or (), strict=False)
    fixed = all(own == other for own, other in sizes if isinstance(own, int) and isinstance(other, int))
    return fixed and (not node.shape or len(node.shape) == len(spec.axes))


def _check_version(bundle: Bundle) -> None:
    """Raise `BundleError` if a graph needs a newer ONNX Runtime than the installed one."""
    import onnxruntime

    installed = onnxruntime.__version__
    needs = {g.file: g.minimum_runtime.get("onnxruntime", "0") for g in bundle.manifest.graphs.values()}
    too_new = {file: version for file, version in needs.items() if release(version) > release(installed)}
    if too_new:
        raise BundleError(
            f"The bundle {bundle.directory} needs a newer ONNX Runtime than {installed}.",
            *(f"{file}: needs onnxruntime {version}, found {installed}" for file, version in too_new.items()),
            remedy=f"pip install 'onnxruntime>={max(too_new.values(), key=release)}'",
        )
