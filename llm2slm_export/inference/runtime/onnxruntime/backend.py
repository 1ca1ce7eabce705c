"""A bundle's graphs on ONNX Runtime. The KV cache is updated in place on the device: present is bound to past.

A step allocates nothing outside ONNX Runtime: ids and the past's length are written into bound tensors, and logits are read
from one. Tensors are bound anew when the number of rows or of new tokens changes, and when the cache grows.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import GraphEntry
from llm2slm_export.contract import (
    ATTENTION_MASK,
    ENCODER_ATTENTION_MASK,
    GRAPHS,
    HIDDEN_STATES,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    PAST_LENGTH,
    PROMPT_EMBEDS,
    EnginePrecision,
    GraphName,
    Precision,
    Runtime,
    StateSpec,
    TensorSpec,
)
from llm2slm_export.environment.cores import thread_notes, usable_threads
from llm2slm_export.environment.versions import release
from llm2slm_export.errors import BundleError, DeviceError, Llm2SlmError, UsageError, require_extra
from llm2slm_export.inference.runtime.backend import Array, Conditioning, Hidden, Ids, Logits, context_mask
from llm2slm_export.inference.runtime.forks import HomeProcess, keep_in_children
from llm2slm_export.inference.runtime.onnxruntime.cuda_libraries import require_cuda_device, require_cuda_libraries
from llm2slm_export.inference.runtime.onnxruntime.device_tensors import HostMemory, Memory
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
_FAILURES = (
    "EPFail",
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoModel",
    "NoSuchFile",
    "NotImplemented",
    "RuntimeException",
)


@dataclass(frozen=True)
class ExecutionDevice:
    """The device of sessions and tensors, by ONNX Runtime's names."""

    kind: str
    index: int
    provider: str

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def find_device(device: str) -> ExecutionDevice:
    """The device with the name `cpu`, `cuda` or `cuda:n`.

    Raises:
        UsageError: the name is invalid.
        DeviceError: the machine does not have the device, or ONNX Runtime does not support it.
        MissingExtraError: ONNX Runtime is not installed.
    """
    require_extra("cpu", "onnxruntime", purpose="Running a bundle")
    if device == "cpu":
        return ExecutionDevice("cpu", 0, "CPUExecutionProvider")
    if match := re.fullmatch(r"cuda(?::(\d+))?", device):
        _require_cuda(device)
        require_cuda_libraries(device)
        require_cuda_device(device, int(match[1] or 0))
        return ExecutionDevice("cuda", int(match[1] or 0), "CUDAExecutionProvider")
    raise UsageError(
        f"There is no device {device!r}.",
        "devices: cpu, cuda, cuda:n, tensorrt, tensorrt:n",
        remedy="choose one of these, for example 'cpu'",
    )


def _require_cuda(device: str) -> None:
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in providers:
        raise DeviceError(
            f"The device {device!r} needs an ONNX Runtime with CUDAExecutionProvider.",
            f"found: onnxruntime {onnxruntime.__version__} with {', '.join(providers)}",
            # Both packages install the module `onnxruntime`. If both are installed, either may be imported.
            remedy="pip uninstall -y onnxruntime, then pip install 'llm2slm-export[gpu]'",
        )


class OrtState:
    """A decoder's state: the tensors bound to its next call.

    Args:
        binding: an IOBinding of the decoder session.
        attention_mask: the conditioning's mask, [batch, context].
    """

    def __init__(self, binding: Any, attention_mask: Ids) -> None:
        self.binding, self.attention_mask = binding, attention_mask
        # [batch]: the row of the conditioning of each row of the state.
        self.sources: Ids = np.arange(len(attention_mask))
        # Occupied positions of the cache, and all positions.
        self.length = self.capacity = 0
        # The bound values by input name. A value made from an array borrows its memory, and not every release's binding
        # keeps the array alive.
        self.bound: dict[str, Any] = {}
        self.logits: Array = np.zeros((0, 0, 0), np.float32)
        keep_in_children(self)

    def bind(self, name: str, value: Any) -> None:
        """Bind an input for the next calls."""
        self.binding.bind_ortvalue_input(name, value)
        self.bound[name] = value


class OrtBackend:
    """The `Backend` on ONNX Runtime's CPU provider. `CudaBackend` extends it to CUDA.

    Args:
        bundle: an opened bundle.
        device: the device's name. There is no fallback to another device.
        threads: threads per operator, at most one per core (see `warnings`); None: ONNX Runtime's choice.
        graphs: the graphs to open. Calls that need another one are refused.
        encoder: an open encoder session to share; None: the bundle's is opened.

    Raises:
        UsageError: an invalid device name or number of threads.
        DeviceError: the device is not available.
        BundleError: ONNX Runtime cannot load a graph.
        MissingExtraError: ONNX Runtime is not installed.
    """

    _run_options: Any = None  # the decoder's RunOptions

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str,
        threads: int | None,
        graphs: Sequence[GraphName] = GRAPHS,
        encoder: Any = None,
    ) -> None:
        self._device = find_device(device)
        self._manifest, self._asked_threads, self._graphs = bundle.manifest, threads, graphs
        self._threads = usable_threads(threads)
        self._home = HomeProcess(self)
        self._memory = self._own_memory()
        _check_version(bundle)
        self._outputs = {name: [t.name for t in graph.outputs] for name, graph in bundle.manifest.graphs.items()}
        self._sessions: dict[GraphName, Any] = {
            name: encoder if name == "encoder" and encoder is not None else self._session(bundle, name)
            for name in graphs
        }

    @property
    def device(self) -> str:
        """The device in use."""
        return str(self._device)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A warning if fewer threads are used than requested."""
        return thread_notes(self._asked_threads)

    @property
    def runtimes(self) -> dict[GraphName, Runtime]:
        """ONNX Runtime, for each open graph."""
        return dict.fromkeys(self._sessions, "onnxruntime")

    @property
    def precisions(self) -> dict[GraphName, Precision | EnginePrecision]:
        """The precision of each open graph, from the manifest."""
        return {name: self._manifest.graphs[name].precision for name in self._sessions}

    @property
    def limits(self) -> None:
        """None: the graphs accept requests of any size."""
        return None

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size], an OrtValue, for ids and mask [batch, prompt]."""
        feeds = {INPUT_IDS: self._value(input_ids), ATTENTION_MASK: self._value(attention_mask)}
        return self._run("encoder", feeds)[HIDDEN_STATES]

    def project(self, hidden: Hidden, input_ids: Ids, attention_mask: Ids) -> Conditioning:
        """The projector's outputs for hidden states [batch, prompt, encoder_hidden_size], ids and mask [batch, prompt]."""
        feeds = {HIDDEN_STATES: hidden, ATTENTION_MASK: self._value(attention_mask)}
        if self._manifest.shape.projector_reads_ids:
            feeds[INPUT_IDS] = self._value(input_ids)
        return Conditioning(self._run("projector", feeds), context_mask(self._manifest.shape, attention_mask))

    def arrays(self, conditioning: Conditioning) -> dict[str, Array]:
        """The projector's outputs in host memory.

        They are [batch, num_key_value_heads, context, head_dim] or (decoder-only) [batch, context, hidden_size].
        """
        self._require_home()
        # Copies: `numpy` returns a view that does not keep the value's memory alive.
        return {name: value.numpy().copy() for name, value in conditioning.tensors.items()}

    def conditioning(self, arrays: Mapping[str, Array], attention_mask: Ids) -> Conditioning:
        """The conditioning of tensors in host memory and their mask [batch, context]."""
        self._require_home()
        return Conditioning({name: self._value(array) for name, array in arrays.items()}, attention_mask)

    def prefill(self, conditioning: Conditioning) -> tuple[OrtState, Logits]:
        """The first decoder call: the start token (encoder-decoder) or the prompt embeddings (decoder-only)."""
        batch, context = conditioning.attention_mask.shape
        state = self._new_state(conditioning.attention_mask)
        for name, value in conditioning.tensors.items():
            state.bind(name, value)
        if self._is_decoder_only:
            state.bind(LOGITS_TO_KEEP, self._value(np.array([context - 1])))
            logits = self._decode(state, np.zeros((batch, 0), np.int64), embedded=context)
            state.bind(PROMPT_EMBEDS, self._no_embeds(batch))
            state.bind(LOGITS_TO_KEEP, self._value(np.array([0])))
            return state, logits
        state.bind(ENCODER_ATTENTION_MASK, self._value(conditioning.attention_mask))
        start = self._manifest.special_ids.decoder_start
        return state, self._decode(state, np.full((batch, 1), start, np.int64))

    def step(self, state: OrtState, input_ids: Ids) -> Logits:
        """One decoder call on ids [batch, sequence_length].

        Returns:
            Logits [batch, vocab_size] of the last position, valid until the state's next call.
        """
        if self._is_decoder_only:
            state.bound[LOGITS_TO_KEEP].update_inplace(np.array([input_ids.shape[1] - 1]))
        return self._decode(state, input_ids)

    def step_argmax(self, state: OrtState, input_ids: Ids) -> None:
        """None: logits are in host memory anyway."""

    def select(self, state: OrtState, rows: Ids) -> None:
        """Select rows of the state. Unchanged tensors are not copied: when beams are reordered, only the cache changes."""
        self._require_home()
        if np.array_equal(rows, np.arange(len(state.sources))):
            return
        held = (state.bound[spec.past.name] for spec in self._manifest.cache.state)
        for spec, value in zip(self._manifest.cache.state, self._memory.take(held, rows), strict=True):
            self._bind_cache(state, spec, value)
        sources = state.sources[rows]
        if not np.array_equal(sources, state.sources):
            state.attention_mask = state.attention_mask[rows]
            if self._is_decoder_only:
                state.bind(ATTENTION_MASK, self._value(self._cache_mask(state)))
                state.bind(PROMPT_EMBEDS, self._no_embeds(len(rows)))
            else:
                names = self._outputs["projector"]
                crossed = (state.bound[name] for name in names)
                for name, value in zip(names, self._memory.take(crossed, rows), strict=True):
                    state.bind(name, value)
                state.bind(ENCODER_ATTENTION_MASK, self._value(state.attention_mask))
        state.sources = sources

    def head(self, bundle: Bundle) -> "OrtBackend":
        """A backend for another head of the bundle, sharing the encoder. Its session lives until the last backend is closed."""
        encoder = self._open("encoder") if "encoder" in self._graphs else None
        return OrtBackend(bundle, device=self.device, threads=self._asked_threads, graphs=self._graphs, encoder=encoder)

    def close(self) -> None:
        """Release the sessions. In a forked child they are kept, but cannot be used."""
        if not self._home.inherited:
            self._sessions.clear()

    def _open(self, name: GraphName) -> Any:
        """The session of a graph.

        Raises:
            UsageError: it was not opened, has been closed, or was opened before this process was forked.
        """
        self._require_home()
        if name not in self._sessions:
            raise UsageError(
                f"The {name} graph is not open.",
                f"open: {', '.join(self._sessions) or 'none'}",
                remedy="load the bundle again",
            )
        return self._sessions[name]

    def _require_home(self) -> None:
        """Refuse use in a forked child, unless the session runs on the CPU with one thread, the caller's."""
        if self._threads != 1 or self._device.kind != "cpu":
            self._home.require(single_thread=self._device.kind == "cpu")

    @property
    def _is_decoder_only(self) -> bool:
        """Whether the SLM is decoder-only."""
        return self._manifest.shape.slm_kind == "decoder-only"

    def _decode(self, state: OrtState, input_ids: Ids, *, embedded: int = 0) -> Logits:
        """One decoder call on `embedded` prompt embeddings and ids [batch, sequence_length]: logits [batch, vocab_size]."""
        self._make_room(state, embedded + input_ids.shape[1])
        self._feed(state, input_ids)
        with self._described_failures("decoder", *input_ids.shape):
            self._open("decoder").run_with_iobinding(state.binding, self._run_options)
        state.length += embedded + input_ids.shape[1]
        return state.logits[:, -1]

    def _make_room(self, state: OrtState, count: int) -> None:
        """Ensure room in the cache for `count` more positions.

        Unwritten positions are zeros: attention multiplies them by 0, and 0 times NaN or infinity is NaN.
        """
        needed = state.length + count
        if needed <= state.capacity:
            return
        state.capacity = capacity_for(needed)
        specs = self._manifest.cache.state
        sizes = {"batch": len(state.sources), "capacity": state.capacity}
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in specs[0].past.axes]
        held = (state.bound.get(spec.past.name) for spec in specs)
        for spec, value in zip(specs, self._memory.roomier(held, specs[0].past, shape, state.length), strict=True):
            self._bind_cache(state, spec, value)
        if self._is_decoder_only:
            state.bind(ATTENTION_MASK, self._value(self._cache_mask(state)))

    def _bind_cache(self, state: OrtState, spec: StateSpec, value: Any) -> None:
        """Bind a tensor of the cache as past and, in place, as present."""
        state.bind(spec.past.name, value)
        state.binding.bind_ortvalue_output(spec.present.name, value)

    def _cache_mask(self, state: OrtState) -> Ids:
        """The mask [batch, capacity] of a decoder-only SLM: 0 for padding, 1 for all other positions."""
        batch, context = state.attention_mask.shape
        rest = np.ones((batch, state.capacity - context), np.int64)
        return np.concatenate([state.attention_mask, rest], axis=1)

    def _feed(self, state: OrtState, input_ids: Ids) -> None:
        """Write ids [batch, sequence_length] and the past's length to the bound tensors, or bind new ones for a new shape."""
        ids = np.array(input_ids, np.int64)
        before = state.bound.get(INPUT_IDS)
        if before is not None and before.shape() == list(ids.shape):
            before.update_inplace(ids)
            state.bound[PAST_LENGTH].update_inplace(np.array([state.length]))
            return
        state.bind(INPUT_IDS, self._value(ids))
        state.bind(PAST_LENGTH, self._value(np.array([state.length])))
        batch, new = ids.shape
        state.logits = np.zeros(
            (batch, 1 if self._is_decoder_only else new, self._manifest.shape.vocab_size), np.float32
        )
        import onnxruntime

        state.binding.bind_ortvalue_output(LOGITS, onnxruntime.OrtValue.ortvalue_from_numpy(state.logits))

    def _run(self, name: GraphName, feeds: Mapping[str, Any]) -> dict[str, Any]:
        session = self._open(name)
        binding = session.io_binding()
        for input_name, value in feeds.items():
            binding.bind_ortvalue_input(input_name, value)
        for output_name in self._outputs[name]:
            binding.bind_output(output_name, self._device.kind, self._device.index)
        with self._described_failures(name, *feeds[ATTENTION_MASK].shape()):
            session.run_with_iobinding(binding)
        outputs = dict(zip(self._outputs[name], binding.get_outputs(), strict=True))
        # Outputs keep their binding alive, and a binding its inputs. This releases the hidden states early.
        binding.clear_binding_inputs()
        return outputs

    @contextmanager
    def _described_failures(self, name: GraphName, rows: int, tokens: int) -> Iterator[None]:
        """Raise failures of a call with the graph's name and the shape of its inputs."""
        try:
            yield
        # Calls with an IOBinding raise RuntimeError.
        except _run_failures() as error:
            raise self._failed(name, rows, tokens, error) from error

    def _failed(self, name: GraphName, rows: int, tokens: int, error: Exception) -> Exception:
        """The error for a failed call. Overridden for out-of-memory errors of a device."""
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
            f"ONNX Runtime cannot run {self._manifest.graphs[name].file} on {self.device}.", *evidence,
            remedy="run `llm2slm-export verify` on the bundle, or build it again",
        )  # fmt: skip

    def _value(self, array: Array) -> Any:
        return self._memory.put(array)

    def _no_embeds(self, batch: int) -> Any:
        """The empty prompt embeddings [batch, 0, hidden_size] of a step."""
        dtype = next(t.dtype for t in self._manifest.graphs["decoder"].inputs if t.name == PROMPT_EMBEDS)
        return self._value(np.zeros((batch, 0, self._manifest.shape.hidden_size), dtype))

    def _own_memory(self) -> Memory:
        return HostMemory()

    def _new_state(self, attention_mask: Ids) -> OrtState:
        return OrtState(self._open("decoder").io_binding(), attention_mask)

    def _session(self, bundle: Bundle, name: GraphName) -> Any:
        import onnxruntime

        entry = self._manifest.graphs[name]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_ERRORS_ONLY
        for key, value in _SPIN_OPTIONS[name].items():
            options.add_session_config_entry(key, value)
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        try:
            session = self._opened(name, str(bundle.path(entry.file)), options)
            _check_signature(session, name, entry)
            return session
        except _run_failures() as error:
            raise BundleError(
                f"ONNX Runtime cannot load {entry.file} on {self.device}.",
                f"file: {bundle.path(entry.file)}",
                f"onnxruntime {onnxruntime.__version__}: {error}",
                remedy="run `llm2slm-export verify` on the bundle, or build it again",
            ) from error

    def _opened(self, name: GraphName, path: str, options: Any) -> Any:
        """A graph's session. Overridden for other devices."""
        import onnxruntime

        # Encoder and projector multiply many rows with each weight, and gain nothing from huge pages.
        with huge_pages() if name == "decoder" else nullcontext():
            return onnxruntime.InferenceSession(path, options, providers=[self._device.provider])


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


def failures() -> tuple[type[Exception], ...]:
    """The exceptions that ONNX Runtime raises when it cannot load or run a graph."""
    from onnxruntime.capi import onnxruntime_pybind11_state

    return tuple(getattr(onnxruntime_pybind11_state, failure) for failure in _FAILURES)


def _run_failures() -> tuple[type[Exception], ...]:
    """The exceptions of `failures`, of calls with an IOBinding, and of exhausted memory."""
    return (*failures(), RuntimeError, MemoryError)


def capacity_for(needed: int) -> int:
    """The capacity of a cache that needs this many positions.

    A step reads the whole capacity, and growing copies the cache. Growth by a sixteenth to an eighth reads 5 % too much on
    average and copies a position about a dozen times, while every step reads it.
    """
    step = 1 << max(5, needed.bit_length() - 4)
    return -(-needed // step) * step


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
