"""A bundle's graphs on ONNX Runtime. The cache stays where it is, on the device: its present is bound to its past.

A step binds nothing and allocates nothing but what ONNX Runtime does inside: ids and the length of the past are written
into tensors that stay bound, and logits are read from one. What they are bound to changes with the number of rows, with
that of new tokens, and when the cache needs more room.
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
# A session's threads wait for work in a busy loop, tens of milliseconds long, in the way of the next session's. What reads
# is done for now; the decoder's threads wait for its next step, which comes soon or not at all.
_WAITING: dict[GraphName, dict[str, str]] = {
    "encoder": {"session.force_spinning_stop": "1"},
    "projector": {"session.force_spinning_stop": "1"},
    "decoder": {"session.intra_op.spin_duration_us": "500"},  # ONNX Runtime 1.25 does not know it, and ignores it
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
    """Where sessions run and tensors live."""

    kind: str
    index: int
    provider: str

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def find_device(device: str) -> ExecutionDevice:
    """The device a name asks ONNX Runtime for: `cpu`, `cuda` or `cuda:n`.

    Raises:
        UsageError: no such device name.
        DeviceError: a device that this machine, this installation or this release does not have.
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
            # Both packages install the module `onnxruntime`; side by side, either may win.
            remedy="pip uninstall -y onnxruntime, then pip install 'llm2slm-export[gpu]'",
        )


class OrtState:
    """A decoder's state: what is bound to the calls to come.

    Args:
        binding: an IOBinding of the decoder session.
        attention_mask: [batch, context] of the conditioning.
    """

    def __init__(self, binding: Any, attention_mask: Ids) -> None:
        self.binding, self.attention_mask = binding, attention_mask
        # [batch]: the row of the conditioning that each row of the state reads.
        self.sources: Ids = np.arange(len(attention_mask))
        # Positions of the cache that are taken, and those that there are.
        self.length = self.capacity = 0
        # By input name. A value made from an array borrows its memory, and not every release's binding keeps the array
        # alive.
        self.bound: dict[str, Any] = {}
        self.logits: Array = np.zeros((0, 0, 0), np.float32)
        keep_in_children(self)

    def bind(self, name: str, value: Any) -> None:
        """Bind an input for the calls to come."""
        self.binding.bind_ortvalue_input(name, value)
        self.bound[name] = value


class OrtBackend:
    """Three ONNX Runtime sessions behind the `Backend` protocol, on the CPU; `cuda_backend.py` has them on another device.

    Args:
        bundle: an opened bundle.
        device: never another one instead.
        threads: threads inside one operator, at most one per core (`warnings` says so); None leaves the choice to ONNX Runtime.
        graphs: those to open; what needs another one is refused.
        encoder: the session of an encoder that is open already; None opens the bundle's.

    Raises:
        UsageError: a device name or number of threads that means nothing.
        DeviceError: a device that cannot be had.
        BundleError: a graph that this ONNX Runtime cannot load.
        MissingExtraError: ONNX Runtime is not installed.
    """

    _run_options: Any = None  # of calls of the decoder

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
        """The device really in use."""
        return str(self._device)

    @property
    def warnings(self) -> tuple[str, ...]:
        """That there are fewer cores than threads were asked for."""
        return thread_notes(self._asked_threads)

    @property
    def runtimes(self) -> dict[GraphName, Runtime]:
        """ONNX Runtime, for every graph that is open."""
        return dict.fromkeys(self._sessions, "onnxruntime")

    @property
    def precisions(self) -> dict[GraphName, Precision | EnginePrecision]:
        """The manifest's, of every graph that is open."""
        return {name: self._manifest.graphs[name].precision for name in self._sessions}

    @property
    def limits(self) -> None:
        """None: the graphs take requests of any size."""
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
        """The projector's outputs in host memory: [batch, heads, context, head_dim] or [batch, context, hidden_size] each."""
        self._require_home()
        # Copies: what `numpy` gives is a view, and of a value made from an array it keeps nothing alive.
        return {name: value.numpy().copy() for name, value in conditioning.tensors.items()}

    def conditioning(self, arrays: Mapping[str, Array], attention_mask: Ids) -> Conditioning:
        """The projector's outputs from host memory, with their mask [batch, context]."""
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
        """One decoder call on ids [batch, sequence_length]: logits [batch, vocab] of the last position, until the state's next call."""
        if self._is_decoder_only:
            state.bound[LOGITS_TO_KEEP].update_inplace(np.array([input_ids.shape[1] - 1]))
        return self._decode(state, input_ids)

    def step_argmax(self, state: OrtState, input_ids: Ids) -> None:
        """None: logits are in host memory as it is."""

    def select(self, state: OrtState, rows: Ids) -> None:
        """Go on with these rows of the state: what does not change is not copied, and of beams only the cache changes."""
        self._require_home()
        if np.array_equal(rows, np.arange(len(state.sources))):
            return
        held = (state.bound[spec.past.name] for spec in self._manifest.cache.state)
        for spec, value in zip(self._manifest.cache.state, self._memory.take(held, rows), strict=True):
            self._hold(state, spec, value)
        sources = state.sources[rows]
        if not np.array_equal(sources, state.sources):
            state.attention_mask = state.attention_mask[rows]
            if self._is_decoder_only:
                state.bind(ATTENTION_MASK, self._value(self._over_cache(state)))
                state.bind(PROMPT_EMBEDS, self._no_embeds(len(rows)))
            else:
                names = self._outputs["projector"]
                crossed = (state.bound[name] for name in names)
                for name, value in zip(names, self._memory.take(crossed, rows), strict=True):
                    state.bind(name, value)
                state.bind(ENCODER_ATTENTION_MASK, self._value(state.attention_mask))
        state.sources = sources

    def head(self, bundle: Bundle) -> "OrtBackend":
        """A backend for another head of the bundle. The encoder's session lives until the last of them is closed."""
        encoder = self._open("encoder") if "encoder" in self._graphs else None
        return OrtBackend(bundle, device=self.device, threads=self._asked_threads, graphs=self._graphs, encoder=encoder)

    def close(self) -> None:
        """Release the sessions; in a forked child they stay, and cannot be used."""
        if not self._home.inherited:
            self._sessions.clear()

    def _open(self, name: GraphName) -> Any:
        """The session of a graph.

        Raises:
            UsageError: it was not asked for, has been closed, or belongs to the process that this one was forked from.
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
        """Refuse a forked child; one thread is the caller's own, and goes with it."""
        if self._threads != 1 or self._device.kind != "cpu":
            self._home.require(single_thread=self._device.kind == "cpu")

    @property
    def _is_decoder_only(self) -> bool:
        """Whether the decoder's positions hold the prompt too."""
        return self._manifest.shape.slm_kind == "decoder-only"

    def _decode(self, state: OrtState, input_ids: Ids, *, embedded: int = 0) -> Logits:
        """One call on prompt embeddings, where there are, and ids [batch, sequence_length]."""
        self._make_room(state, embedded + input_ids.shape[1])
        self._feed(state, input_ids)
        with self._failures_told("decoder", *input_ids.shape):
            self._open("decoder").run_with_iobinding(state.binding, self._run_options)
        state.length += embedded + input_ids.shape[1]
        return state.logits[:, -1]

    def _make_room(self, state: OrtState, count: int) -> None:
        """Have room in the cache for so many more positions, all of them zeros: what is not written is multiplied by 0."""
        needed = state.length + count
        if needed <= state.capacity:
            return
        state.capacity = capacity_for(needed)
        specs = self._manifest.cache.state
        sizes = {"batch": len(state.sources), "capacity": state.capacity}
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in specs[0].past.axes]
        held = (state.bound.get(spec.past.name) for spec in specs)
        for spec, value in zip(specs, self._memory.roomier(held, specs[0].past, shape, state.length), strict=True):
            self._hold(state, spec, value)
        if self._is_decoder_only:
            state.bind(ATTENTION_MASK, self._value(self._over_cache(state)))

    def _hold(self, state: OrtState, spec: StateSpec, value: Any) -> None:
        """Bind a part of the cache as past and, in place, as present."""
        state.bind(spec.past.name, value)
        state.binding.bind_ortvalue_output(spec.present.name, value)

    def _over_cache(self, state: OrtState) -> Ids:
        """[batch, capacity]: where a decoder-only SLM's positions are not padding."""
        batch, context = state.attention_mask.shape
        rest = np.ones((batch, state.capacity - context), np.int64)
        return np.concatenate([state.attention_mask, rest], axis=1)

    def _feed(self, state: OrtState, input_ids: Ids) -> None:
        """Give the ids [batch, sequence_length] and the length of the past, into what is bound where the shapes are those before."""
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
        with self._failures_told(name, *feeds[ATTENTION_MASK].shape()):
            session.run_with_iobinding(binding)
        outputs = dict(zip(self._outputs[name], binding.get_outputs(), strict=True))
        # Outputs keep their binding alive, and a binding its inputs: the hidden states need not live that long.
        binding.clear_binding_inputs()
        return outputs

    @contextmanager
    def _failures_told(self, name: GraphName, rows: int, tokens: int) -> Iterator[None]:
        """Say which graph a call failed in, and on what."""
        try:
            yield
        # RuntimeError: of calls on what is bound.
        except _run_failures() as error:
            raise self._failed(name, rows, tokens, error) from error

    def _failed(self, name: GraphName, rows: int, tokens: int, error: Exception) -> Exception:
        """What is raised for a failed call. Overridden where a device's memory can be the reason."""
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
        """Prompt embeddings [batch, 0, hidden_size] of a step."""
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
        for key, value in _WAITING[name].items():
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

        # What reads multiplies many rows with each weight, and gains nothing by it.
        with huge_pages() if name == "decoder" else nullcontext():
            return onnxruntime.InferenceSession(path, options, providers=[self._device.provider])


def _check_signature(session: Any, name: GraphName, entry: GraphEntry) -> None:
    """Refuse a graph with other inputs or outputs than the manifest says: calls would fail, or give something else."""
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
    # An axis that is a number in one of them only is as long as a call makes it.
    sizes = zip(spec.axes, node.shape or (), strict=False)
    fixed = all(own == other for own, other in sizes if isinstance(own, int) and isinstance(other, int))
    return fixed and (not node.shape or len(node.shape) == len(spec.axes))


def failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises where it cannot load or run a graph."""
    from onnxruntime.capi import onnxruntime_pybind11_state

    return tuple(getattr(onnxruntime_pybind11_state, failure) for failure in _FAILURES)


def _run_failures() -> tuple[type[Exception], ...]:
    """The same, of calls on what is bound and of memory."""
    return (*failures(), RuntimeError, MemoryError)


def capacity_for(needed: int) -> int:
    """How much room a cache of so many positions gets.

    A step reads all the room there is, and more room is a copy of what is held: in steps of a sixteenth to an eighth, it
    reads 5 % too much in the mean, and copies a position some dozen times in all, where it is read at every step.
    """
    step = 1 << max(5, needed.bit_length() - 4)
    return -(-needed // step) * step


def _check_version(bundle: Bundle) -> None:
    """Raise `BundleError` where a graph needs a newer ONNX Runtime than the one installed."""
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
