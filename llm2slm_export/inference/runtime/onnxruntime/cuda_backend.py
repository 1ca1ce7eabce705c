"""A bundle's graphs on ONNX Runtime's CUDA provider. Only ids and logits cross between host and device.

The KV cache is created, grown and gathered on the device. A step of one token runs on tensors at fixed addresses
(`cuda_graphs.py`) and is replayed as a CUDA graph: launching a small SLM's kernels one by one takes longer than running them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.contract import (
    ATTENTION_MASK,
    ENCODER_ATTENTION_MASK,
    GRAPHS,
    INPUT_IDS,
    LOGITS_TO_KEEP,
    PAST_LENGTH,
    PROMPT_EMBEDS,
    GraphName,
)
from llm2slm_export.errors import DeviceError, UsageError
from llm2slm_export.inference.runtime.backend import Conditioning, Hidden, Ids, Logits
from llm2slm_export.inference.runtime.forks import ForkSafeLock
from llm2slm_export.inference.runtime.onnxruntime.backend import OrtBackend, OrtState, failures, find_device
from llm2slm_export.inference.runtime.onnxruntime.cuda_graphs import (
    BorrowedStep,
    CapturedStep,
    StepPool,
    StepShape,
    run_options,
)
from llm2slm_export.inference.runtime.onnxruntime.cuda_libraries import free_bytes
from llm2slm_export.inference.runtime.onnxruntime.device_tensors import DeviceTensors, stretched
from llm2slm_export.inference.runtime.onnxruntime.node_placement import RECORD, require_placement

# Lengths are rounded up to few shapes: reading the padding costs less than capturing another graph.
CONTEXT_STEP = 64  # context positions of an encoder-decoder SLM are padded to a multiple of it
LEAST_CAPACITY = 128  # positions of the smallest cache; doubled as needed
KEPT_STEPS = 16  # unused steps that are kept; each holds a cache
_REFUSED_CAPTURE = "graph capture feature"  # in ONNX Runtime's message for a graph that cannot be captured
# In ONNX Runtime's messages for refused memory: two of its arena, and CUDA's own.
_MEMORY = re.compile(
    r"requested buffer of size (\d+)|smaller than requested bytes of (\d+)|CUDA failure 2|CUDNN_STATUS_ALLOC_FAILED|"
    r"CUBLAS_STATUS_ALLOC_FAILED|out of memory",
    re.IGNORECASE,
)

_REASON = re.compile(r"(Failed to allocate|Available memory of|CUDA failure|CUBLAS failure|This session cannot).*")


@dataclass(frozen=True)
class CudaOptions:
    """Options of a CUDA device.

    Args:
        memory_bytes: maximum device memory of each graph's session for weights and intermediate tensors; None: unlimited.
            KV caches, and tensors kept for reuse, are not counted.
        graphs: replay steps as CUDA graphs if the decoder can be captured.
    """

    memory_bytes: int | None = None
    graphs: bool = True


class CudaState(OrtState):
    """A decoder's state. With a lease, its cache is that of the borrowed step, and `bound` is not used.

    Args:
        binding, attention_mask: as `OrtState`.
    """

    lease: BorrowedStep | None = None

    def __init__(self, binding: Any, attention_mask: Ids) -> None:
        super().__init__(binding, attention_mask)
        # The borrowed step's row of each row of the state. Dropped rows keep running until they are half of the step.
        self.rows: Ids = np.arange(len(attention_mask))
        self.conditioned = object()  # identifies the conditioning


class CudaBackend(OrtBackend):
    """The `Backend` on ONNX Runtime's CUDA provider.

    Args:
        bundle, threads, graphs, encoder: as `OrtBackend`. The threads compute shapes on the CPU; the default is 1.
        device: `cuda` or `cuda:n`. `cpu` runs the same code without a GPU and without CUDA graphs.
        options: options of the device.

    Raises:
        DeviceError: the device is not available, lacks a kernel for a node, or has too little memory.
        UsageError, BundleError, MissingExtraError: as `OrtBackend`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str,
        threads: int | None,
        graphs: Sequence[GraphName] = GRAPHS,
        encoder: Any = None,
        options: CudaOptions = CudaOptions(),
    ) -> None:
        if options.memory_bytes is not None and options.memory_bytes < 1:
            raise UsageError(
                f"memory_bytes is {options.memory_bytes}.", remedy="give at least 1, or nothing for all there is"
            )
        self._bundle, self._options, self._warnings, self._captures = bundle, options, list[str](), False
        self._steps = StepPool(KEPT_STEPS, self._release_graph)
        # One decoder call at a time: a captured graph's intermediate tensors are in memory that its session considers free.
        self._decoder_lock = ForkSafeLock()
        self._run_options = run_options(None)
        super().__init__(bundle, device=device, threads=threads, graphs=graphs, encoder=encoder)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about fewer threads than requested, and about CUDA graphs that are off."""
        return (*super().warnings, *self._warnings)

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size], an OrtValue on the device."""
        with self._described_out_of_memory("encoder", input_ids.shape):
            return super().encode(input_ids, attention_mask)

    def project(self, hidden: Hidden, input_ids: Ids, attention_mask: Ids) -> Conditioning:
        """The projector's outputs on the device."""
        with self._described_out_of_memory("projector", input_ids.shape):
            return super().project(hidden, input_ids, attention_mask)

    def prefill(self, conditioning: Conditioning) -> tuple[OrtState, Logits]:
        """The first decoder call. It is not captured, because its shape is rarely repeated."""
        with self._decoder_lock, self._described_out_of_memory("decoder", conditioning.attention_mask.shape):
            return super().prefill(conditioning)

    def step(self, state: OrtState, input_ids: Ids) -> Logits:
        """One decoder call on ids [batch, sequence_length]. With one token per row it is replayed as a CUDA graph."""
        assert isinstance(state, CudaState)
        with self._decoder_lock, self._described_out_of_memory("decoder", (len(state.sources), state.length)):
            if input_ids.shape[1] != 1:
                self._leave_step(state)
                return super().step(state, input_ids)
            if state.lease is None or state.length == state.lease.step.shape.capacity:
                self._move_to_step(state, np.arange(len(state.sources)), state.length + 1)
            return self._fixed(state, input_ids)

    def select(self, state: OrtState, rows: Ids) -> None:
        """Select rows of the state. Rows dropped from a borrowed step keep running until they are half of it."""
        assert isinstance(state, CudaState)
        self._require_home()
        if state.lease is None:
            super().select(state, rows)
            state.rows = np.arange(len(rows))
            return
        if np.array_equal(rows, np.arange(len(state.sources))):
            return
        with self._described_out_of_memory("decoder", (len(rows), state.length)):
            dropped = bool((np.diff(rows) > 0).all()) and 2 * len(rows) > state.lease.step.shape.batch
            sources = state.sources[rows]
            if not np.array_equal(sources, state.sources):
                state.attention_mask = state.attention_mask[rows]
            state.sources = sources
            if dropped:
                state.rows = state.rows[rows]
            else:
                self._move_to_step(state, rows, state.length)

    def head(self, bundle: Bundle) -> "CudaBackend":
        """A backend for another head of the bundle, sharing the encoder. Its session lives until the last backend is closed."""
        encoder = self._open("encoder") if "encoder" in self._graphs else None
        return CudaBackend(
            bundle,
            device=self.device,
            threads=self._asked_threads,
            graphs=self._graphs,
            encoder=encoder,
            options=self._options,
        )

    def close(self) -> None:
        """Release the sessions and the memory of unused steps."""
        if not self._home.inherited:
            self._steps.clear()
        super().close()

    # --- fixed steps -------------------------------------------------------------------------------------------------

    def _fixed(self, state: CudaState, input_ids: Ids) -> Logits:
        """One token per row on the borrowed step: logits [batch, vocab_size]."""
        assert state.lease is not None
        step = state.lease.step
        ids = np.zeros((step.shape.batch, 1), np.int64)
        ids[state.rows] = input_ids
        step.inputs[INPUT_IDS].update_inplace(ids)
        step.inputs[PAST_LENGTH].update_inplace(np.array([state.length]))
        try:
            step.run(captured=self._captures)
        except _refusals() as error:
            if not self._captures or step.steps or _MEMORY.search(str(error)):
                raise
            self._disable_graphs(error)
            step.bind(self._open("decoder"), self._aliases)
            step.run(captured=False)
        state.length += 1
        logits: Logits = step.read()[state.rows, -1]
        return logits

    def _disable_graphs(self, error: Exception) -> None:
        """Reopen the decoder without CUDA graphs: a failed capture leaves its session's stream in capture mode."""
        self._warnings.append(f"CUDA graphs are off: {_sentence(error)}")
        self._options = replace(self._options, graphs=False)
        self._steps.clear()
        self._sessions["decoder"] = self._session(self._bundle, "decoder")

    def _move_to_step(self, state: CudaState, rows: Ids, needed: int) -> None:
        """Move rows of the state to a borrowed step with room for `needed` positions."""
        context = 0 if self._is_decoder_only else _rounded(state.attention_mask.shape[1], CONTEXT_STEP)
        shape = StepShape(len(rows), context, fixed_capacity(needed))
        holds = state.conditioned, state.sources.tobytes()
        lease = self._steps.borrow(shape, holds) or self._new_step(shape)
        before = state.lease.step.inputs if state.lease is not None else state.bound
        picked = state.rows[rows] if state.lease is not None else rows
        names = [spec.past.name for spec in self._manifest.cache.state]
        self._gather(before, names, picked, stretched(state.length, shape.capacity), lease.step)
        if lease.step.holds != holds:
            if not self._is_decoder_only:
                crossed = self._outputs["projector"]
                held = before[crossed[0]].shape()[2]
                self._gather(before, crossed, picked, stretched(held, context), lease.step)
            lease.step.inputs[self._mask].update_inplace(self._padded_mask(state, shape))
            lease.step.holds = holds
        if state.lease is None:
            # The bound tensors have been copied, so they can be released.
            state.binding = None
            state.bound.clear()
        state.lease, state.rows, state.capacity = lease, np.arange(len(rows)), shape.capacity

    def _new_step(self, shape: StepShape) -> BorrowedStep:
        """A new step. If memory is short, unused steps are released first."""
        try:
            return self._steps.lend(self._create_step(shape))
        except _refusals() as error:
            if not _MEMORY.search(str(error)):
                raise
            self._steps.clear()
            return self._steps.lend(self._create_step(shape))

    def _leave_step(self, state: CudaState) -> None:
        """Copy the state from its borrowed step to tensors bound for calls of any shape, and return the step."""
        if state.lease is None:
            return
        before, lease = state.lease.step.inputs, state.lease
        state.binding = self._open("decoder").io_binding()
        state.bound.clear()
        specs = self._manifest.cache.state
        for spec, value in zip(specs, self._memory.take([before[s.past.name] for s in specs], state.rows), strict=True):
            self._bind_cache(state, spec, value)
        if self._is_decoder_only:
            state.bind(ATTENTION_MASK, self._value(self._cache_mask(state)))
            state.bind(PROMPT_EMBEDS, self._no_embeds(len(state.rows)))
            state.bind(LOGITS_TO_KEEP, self._value(np.array([0])))
        else:
            names, most = self._outputs["projector"], np.arange(state.attention_mask.shape[1])
            values = self._device_memory.gathered([before[name] for name in names], state.rows, most)
            for name, value in zip(names, values, strict=True):
                state.bind(name, value)
            state.bind(ENCODER_ATTENTION_MASK, self._value(state.attention_mask))
        state.lease, state.rows = None, np.arange(len(state.rows))
        lease.give_back()

    def _gather(
        self, before: Mapping[str, Any], names: Sequence[str], rows: Ids, positions: Ids, to: CapturedStep
    ) -> None:
        self._device_memory.gathered(
            [before[name] for name in names], rows, positions, into=[to.inputs[name] for name in names]
        )

    def _create_step(self, shape: StepShape) -> CapturedStep:
        """A step with bound tensors. Its cache and conditioning are not written yet."""
        memory = self._device_memory
        sizes = {
            "batch": shape.batch, "context": shape.context, "capacity": shape.capacity, "sequence_length": 1, "num_logits": 1, "embeds_length": 0,
        }  # fmt: skip
        inputs: dict[str, Any] = {}
        for spec in self._manifest.graphs["decoder"].inputs:
            sized = [axis if isinstance(axis, int) else sizes[axis] for axis in spec.axes]
            integers = spec.dtype == "int64" or 0 in sized
            inputs[spec.name] = memory.put(np.zeros(sized, spec.dtype)) if integers else memory.empty(sized, spec.dtype)
        logits = memory.empty([shape.batch, 1, self._manifest.shape.vocab_size], "float32")
        step = CapturedStep(shape, inputs, logits, self._steps.number())
        step.bind(self._open("decoder"), self._aliases)
        return step

    @property
    def _aliases(self) -> dict[str, str]:
        """The input that shares memory with each output of the cache, by output name."""
        return {state.present.name: state.past.name for state in self._manifest.cache.state}

    def _release_graph(self, number: int) -> None:
        """Release a captured graph. ONNX Runtime before 1.31 keeps it, a few KB, until its session is closed."""
        release = getattr(self._sessions.get("decoder"), "release_captured_graph", None)
        if release is not None and self._captures:
            release(number)

    @property
    def _mask(self) -> str:
        return ATTENTION_MASK if self._is_decoder_only else ENCODER_ATTENTION_MASK

    def _padded_mask(self, state: CudaState, shape: StepShape) -> Ids:
        """The state's mask for a step: [batch, capacity] with 1 for new positions (decoder-only), or [batch, context] with 0
        for padding."""
        positions, value = (shape.capacity, 1) if self._is_decoder_only else (shape.context, 0)
        batch, given = state.attention_mask.shape
        rest = np.full((batch, positions - given), value, np.int64)
        return np.concatenate([state.attention_mask, rest], axis=1)

    # --- the device --------------------------------------------------------------------------------------------------

    @property
    def _device_memory(self) -> DeviceTensors:
        assert isinstance(self._memory, DeviceTensors)
        return self._memory

    def _own_memory(self) -> DeviceTensors:
        return DeviceTensors(self._device.kind, self._device.index, [self._provider()])

    def _new_state(self, attention_mask: Ids) -> CudaState:
        return CudaState(self._open("decoder").io_binding(), attention_mask)

    def _provider(self, *, captures: bool = False) -> Any:
        """The execution provider and its options."""
        if self._device.kind == "cpu":
            return self._device.provider
        options = {
            "device_id": str(self._device.index),
            # Exact sizes, not powers of two, because device memory is scarce.
            "arena_extend_strategy": "kSameAsRequested",
            # TF32 would round float32 to a mantissa of ten bits, below the bundle's precision.
            "use_tf32": "0",
            "enable_cuda_graph": "1" if captures else "0",
        }
        if self._options.memory_bytes is not None:
            options["gpu_mem_limit"] = str(self._options.memory_bytes)
        return self._device.provider, options

    def _opened(self, name: GraphName, path: str, options: Any) -> Any:
        """A graph's session with all nodes on the device. A decoder's session supports capture if possible."""
        options.add_session_config_entry(*RECORD)
        if self._threads is None:
            options.intra_op_num_threads = 1
        captures = name == "decoder" and self._options.graphs and self._device.kind != "cpu"
        with self._described_out_of_memory(name, ()):
            try:
                session = self._create_session(path, options, captures=captures)
            except failures() as error:
                if not captures or _REFUSED_CAPTURE not in str(error):
                    raise
                self._warnings.append(f"CUDA graphs are off: {_sentence(error)}")
                captures = False
                session = self._create_session(path, options, captures=False)
        require_placement(session, self._device.provider, self._manifest.graphs[name].file, self.device)
        if name == "decoder":
            self._captures = captures
        return session

    def _create_session(self, path: str, options: Any, *, captures: bool) -> Any:
        import onnxruntime

        # With its default fallback the Python package would retry without the device.
        return onnxruntime.InferenceSession(
            path, options, providers=[self._provider(captures=captures)], enable_fallback=0
        )

    @contextmanager
    def _described_out_of_memory(self, graph: GraphName, shape: Sequence[int]) -> Iterator[None]:
        """Raise out-of-memory failures as `DeviceError` with the requested and free bytes and the option to lower."""
        try:
            yield
        except _refusals() as error:
            found = _MEMORY.search(str(error))
            if found is None:
                raise
            asked = next((int(group) for group in found.groups() if group), None)
            raise self._out_of_memory_error(graph, shape, asked, error) from error

    def _failed(self, name: GraphName, rows: int, tokens: int, error: Exception) -> Exception:
        # `_described_out_of_memory` adds details.
        return error if _MEMORY.search(str(error)) else super()._failed(name, rows, tokens, error)

    def _out_of_memory_error(
        self, graph: GraphName, shape: Sequence[int], asked: int | None, error: Exception
    ) -> DeviceError:
        wanted = "a buffer" if asked is None else f"{asked:,} bytes more"
        where = f" for {' × '.join(map(str, shape))} (rows × tokens)" if shape else ", for its weights"
        free = free_bytes(self._device.index) if self._device.kind != "cpu" else None
        limit = self._options.memory_bytes
        evidence = [
            f"requested: {wanted}{where}",
            "free on the device: " + ("unknown" if free is None else f"{free[0]:,} of {free[1]:,} bytes"),
            *([] if limit is None else [f"limit of each graph: {limit:,} bytes"]),
            f"ONNX Runtime: {_sentence(error)}",
        ]
        lower = "use a smaller batch_size (--batch-size) or shorter prompts" if shape else "build the bundle at fp16"
        raised = "" if limit is None else ", raise memory_bytes (--gpu-memory-mb)"
        return DeviceError(
            f"{self.device} has too little memory for the {graph}.",
            *evidence,
            remedy=f"{lower}{raised}, or use device 'cpu'",
        )


def open_ort(
    bundle: Bundle,
    *,
    device: str,
    threads: int | None,
    graphs: Sequence[GraphName] = GRAPHS,
    cuda: CudaOptions | None = None,
) -> OrtBackend:
    """Open a bundle's graphs on ONNX Runtime.

    Args:
        cuda: options of a CUDA device; None: the defaults.

    Raises:
        UsageError: `cuda` is given for another device.
        DeviceError, BundleError, MissingExtraError: as the backends.
    """
    if find_device(device).kind == "cuda":
        return CudaBackend(bundle, device=device, threads=threads, graphs=graphs, options=cuda or CudaOptions())
    if cuda is not None:
        raise UsageError(
            f"The options of a CUDA device do not apply to the device {device!r}.",
            str(cuda),
            remedy="leave out --gpu-memory-mb and --no-cuda-graph, or use device 'cuda'",
        )
    return OrtBackend(bundle, device=device, threads=threads, graphs=graphs)


def _refusals() -> tuple[type[Exception], ...]:
    """The exceptions for refused memory, of sessions and of tensors created outside one."""
    return (*failures(), RuntimeError)


def fixed_capacity(needed: int) -> int:
    """The capacity of a step that needs this many positions: powers of two from `LEAST_CAPACITY` on."""
    return max(LEAST_CAPACITY, 1 << (needed - 1).bit_length())


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step


def _sentence(error: Exception) -> str:
    """ONNX Runtime's message without its source location."""
    text = " ".join(str(error).split())
    reason = _REASON.search(text)
    return (reason[0] if reason else text.rpartition("[ONNXRuntimeError] : ")[2])[:300]
