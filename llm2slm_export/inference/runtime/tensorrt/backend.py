"""A bundle's TensorRT engines behind the `Backend` protocol.

All calls run on one stream, one after another. Threads wait for each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import RLock

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import EngineLimits
from llm2slm_export.contract import (
    ATTENTION_MASK,
    GRAPHS,
    HIDDEN_STATES,
    INPUT_IDS,
    EnginePrecision,
    GraphName,
    Precision,
    Runtime,
    TensorRtVariant,
)
from llm2slm_export.environment.tensorrt_modules import TENSORRT_VARIANTS
from llm2slm_export.errors import DeviceError, EncodingError, MissingExtraError, PromptError, UsageError
from llm2slm_export.inference.runtime.backend import Conditioning, Hidden, Ids, Logits, context_mask
from llm2slm_export.inference.runtime.forks import HomeProcess
from llm2slm_export.inference.runtime.tensorrt.compatibility import (
    EngineCandidate,
    check_engines,
    choose_engines,
    preferred,
    rebuild,
)
from llm2slm_export.inference.runtime.tensorrt.cuda_device import CudaDevice, cuda_runtime
from llm2slm_export.inference.runtime.tensorrt.decoder import EngineDecoder, EngineState
from llm2slm_export.inference.runtime.tensorrt.device_protocol import GpuDevice
from llm2slm_export.inference.runtime.tensorrt.engine import Bound, Engine, shape_of
from llm2slm_export.inference.runtime.tensorrt.library import EngineLibrary, FoundLibrary, find_library
from llm2slm_export.inference.runtime.tensorrt.memory import DeviceTensor, MemoryPool

_FEWER = "run fewer prompts at a time (--batch-size), or shorter ones"


def find_libraries() -> dict[TensorRtVariant, FoundLibrary]:
    """The installed library of each variant."""
    return {variant: find_library(variant) for variant in TENSORRT_VARIANTS}


def require_library(device: str, libraries: Mapping[TensorRtVariant, FoundLibrary]) -> None:
    """Check that a variant of TensorRT is installed.

    Raises:
        MissingExtraError: none is usable, with the reason for each.
    """
    if all(library.version is None for library in libraries.values()):
        raise MissingExtraError(
            f"The device {device!r} needs TensorRT or TensorRT-RTX.",
            *(f"{library.variant}: {library.problem}" for library in libraries.values()),
            remedy=" or ".join(library.pip for library in libraries.values()),
        )


def open_tensorrt(
    bundle: Bundle,
    *,
    index: int,
    graphs: Sequence[GraphName] = GRAPHS,
    device: GpuDevice | None = None,
    libraries: Mapping[TensorRtVariant, FoundLibrary] | None = None,
) -> "TensorRtBackend":
    """Open the engines of a bundle's head that fit a GPU.

    Args:
        index: the GPU's CUDA index.
        graphs: the graphs to open. Calls that need another one are refused.
        device, libraries: None: those of this machine.

    Raises:
        MissingExtraError: a library is not installed.
        DeviceError: there is no GPU, the driver is too old, no engines fit, or there is too little memory.
        EngineError: TensorRT cannot load an engine.
        BundleError: an engine does not match the manifest.
    """
    libraries = find_libraries() if libraries is None else libraries
    require_library(f"tensorrt:{index}", libraries)
    if device is None:
        try:
            device = CudaDevice(index, cuda=cuda_runtime())
        except DeviceError as error:
            # The list of the bundle's engines shows which devices it supports.
            checked = check_engines(bundle, libraries=libraries, device=None, graphs=graphs)
            engines = [f"the bundle has {entry}" for entry in checked] or ["the bundle has no engines"]
            raise DeviceError(error.fact, *error.evidence, *engines, remedy=error.remedy) from error
    chosen = choose_engines(bundle, libraries=libraries, device=device.facts, graphs=graphs)
    library = EngineLibrary(chosen.engines.variant, libraries[chosen.engines.variant].module)
    device.make_current()
    host = EngineHost(library, MemoryPool(device), libraries)
    return TensorRtBackend(bundle, chosen, host=host, graphs=graphs)


@dataclass
class EngineHost:
    """The library, memory pool and encoder that the backends of a bundle's heads share. The last one releases them."""

    library: EngineLibrary
    memory: MemoryPool
    libraries: Mapping[TensorRtVariant, FoundLibrary]
    encoder: Engine | None = None
    users: int = 0
    lock: RLock = field(default_factory=RLock)

    def release(self) -> None:
        """Release one backend's use."""
        self.users -= 1
        if self.users:
            return
        if self.encoder is not None:
            self.encoder.close()
            self.encoder = None
        self.memory.close()


class TensorRtBackend:
    """The `Backend` on a set of TensorRT engines. Tensors are `DeviceTensor`s.

    Args:
        bundle: an opened bundle with the engines' head selected.
        chosen: the set of engines, which fits the device.
        host: the shared library and memory of the device.
        graphs: the graphs to open.

    Raises:
        DeviceError: there is too little memory for an engine.
        EngineError: an engine does not load.
        BundleError: an engine does not match the manifest.
    """

    def __init__(
        self, bundle: Bundle, chosen: EngineCandidate, *, host: EngineHost, graphs: Sequence[GraphName] = GRAPHS
    ) -> None:
        self.chosen, self._host, self._graphs = chosen, host, tuple(graphs)
        self._bundle, self._manifest, self._limits = bundle, bundle.manifest, chosen.engines.limits
        self._engines: dict[GraphName, Engine] = {}
        self._decoder: EngineDecoder | None = None
        # Inputs override outputs of the same name: the decoder's type may differ from the projector's.
        entries = chosen.engines.graphs.values()
        self._types = {tensor.name: tensor.dtype for entry in entries for tensor in (*entry.outputs, *entry.inputs)}
        self._closed = False
        self._home = HomeProcess(self)
        host.users += 1
        try:
            with host.lock:
                self._open()
        except BaseException:
            self.close()
            raise

    @property
    def device(self) -> str:
        """The device in use."""
        return f"tensorrt:{self._host.memory.device.facts.index}"

    @property
    def limits(self) -> EngineLimits:
        """The largest request that the engines accept."""
        return self._limits

    @property
    def runtimes(self) -> dict[GraphName, Runtime]:
        """The engines' variant, for each open graph."""
        return dict.fromkeys(self._engines, self.chosen.engines.variant)

    @property
    def precisions(self) -> dict[GraphName, Precision | EnginePrecision]:
        """The precision of each open engine."""
        return {name: self.chosen.engines.graphs[name].precision for name in self._engines}

    @property
    def threads(self) -> int | None:
        """None: no graph runs on the CPU."""
        return None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Requested settings that are not in effect, with the reason."""
        if self._decoder is None or not self._decoder.uncaptured:
            return ()
        return (f"CUDA graphs: {self.chosen.engines.variant} cannot capture some steps.",)

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size] on the device, for ids and mask [batch, prompt]."""
        self._check_prompts(*input_ids.shape)
        with self._locked():
            return self._run("encoder", {INPUT_IDS: input_ids, ATTENTION_MASK: attention_mask}, {})[HIDDEN_STATES]

    def project(self, hidden: Hidden, input_ids: Ids, attention_mask: Ids) -> Conditioning:
        """The projector's outputs on the device.

        Args:
            hidden: hidden states [batch, prompt, encoder_hidden_size].
            input_ids, attention_mask: [batch, prompt].
        """
        self._check_prompts(*input_ids.shape)
        with self._locked():
            arrays = {INPUT_IDS: input_ids, ATTENTION_MASK: attention_mask}
            tensors = self._run("projector", arrays, {HIDDEN_STATES: hidden})
        return Conditioning(tensors, context_mask(self._manifest.shape, attention_mask))

    def arrays(self, conditioning: Conditioning) -> dict[str, Array]:
        """The conditioning's tensors in host memory. Floats are float32."""
        with self._locked():
            return {name: tensor.read() for name, tensor in conditioning.tensors.items()}

    def conditioning(self, arrays: Mapping[str, Array], attention_mask: Ids) -> Conditioning:
        """The conditioning of tensors in host memory, in the engines' types, and their mask [batch, context].

        Raises:
            EncodingError: values overflow the engines' type.
        """
        with self._locked():
            return Conditioning({name: self._tensor(name, array) for name, array in arrays.items()}, attention_mask)

    def prefill(self, conditioning: Conditioning) -> tuple[EngineState, Logits]:
        """The first decoder call."""
        with self._locked():
            return self._decoding().prefill(conditioning.tensors, conditioning.attention_mask)

    def step(self, state: EngineState, input_ids: Ids) -> Logits:
        """One decoder call on ids [rows, sequence_length].

        Returns:
            Logits [rows, sequence_length, vocab_size], valid until the state's next call.
        """
        with self._locked():
            return self._decoding().step(state, input_ids)

    def rewind(self, state: EngineState, lengths: Ids) -> None:
        """Set every row's number of cache positions back to `lengths` [rows].

        Raises:
            ValueError: a row is shorter than its length in `lengths`.
        """
        with self._locked():
            self._decoding().rewind(state, lengths)

    def lengths(self, state: EngineState) -> Ids:
        """Every row's number of occupied cache positions, [rows]."""
        return state.lengths.copy()

    def step_argmax(self, state: EngineState, input_ids: Ids) -> tuple[Ids, Logits]:
        """One decoder call on ids [batch, 1]: the ids [batch] with the highest logit, and these logits [batch]."""
        with self._locked():
            return self._decoding().step_argmax(state, input_ids)

    def select(self, state: EngineState, rows: Ids) -> None:
        """Select rows of the state."""
        with self._locked():
            self._decoding().select(state, rows)

    def join(self, state: EngineState, other: EngineState) -> None:
        """Append the rows of `other` behind those of `state`. `other` cannot be used afterwards.

        Raises:
            UsageError: the rows are more than the engines accept. Both states are as before.
        """
        with self._locked():
            self._decoding().join(state, other)

    def head(self, bundle: Bundle) -> "TensorRtBackend":
        """A backend for another head of the bundle, sharing the device and the encoder.

        Raises:
            DeviceError: the head has no engines for this encoder, or none that fit.
        """
        self._home.require()
        facts, encoder = self._host.memory.device.facts, self.chosen.engines.graphs["encoder"]
        checked = check_engines(bundle, libraries=self._host.libraries, device=facts, graphs=self._graphs)
        together = [
            entry
            for entry in checked
            if entry.engines.variant == self.chosen.engines.variant and entry.engines.graphs["encoder"] == encoder
        ]
        chosen = preferred(together, bundle.manifest)
        if chosen is None:
            raise DeviceError(
                f"The head {bundle.manifest.head!r} of {bundle.directory} has no engines for the encoder in use, that of "
                f"{self.chosen.key}.",
                *(str(line) for entry in checked for line in (entry, *entry.mismatches)),
                remedy=rebuild(bundle, self.chosen.engines.variant),
            )
        return TensorRtBackend(bundle, chosen, host=self._host, graphs=self._graphs)

    def close(self) -> None:
        """Release the engines, except a shared encoder; the last backend also releases the device.

        In a forked child they are kept, but cannot be used.
        """
        if self._home.inherited:
            return
        with self._host.lock:
            if self._closed:
                return
            self._host.memory.device.make_current()
            self._host.memory.device.synchronize(self._host.memory.stream)
            if self._decoder is not None:
                self._decoder.close()
            for name, engine in self._engines.items():
                if name != "encoder":
                    engine.close()
            self._engines.clear()
            self._decoder, self._closed = None, True
            self._host.release()

    def _open(self) -> None:
        host, entries = self._host, self.chosen.engines.graphs
        for name in self._graphs:
            if name == "encoder" and host.encoder is not None:
                self._engines[name] = host.encoder
                continue
            engine = Engine(self._bundle, name, entries[name], library=host.library, memory=host.memory)
            self._engines[name] = engine
            if name == "encoder":
                host.encoder = engine
        if "decoder" in self._engines:
            self._decoder = EngineDecoder(self._engines["decoder"], host.memory, self._bundle, self._limits)

    def _locked(self) -> "_DeviceLock":
        """A context with the device locked for this thread."""
        self._home.require()
        if self._closed:
            raise self._not_open("engines are")
        return _DeviceLock(self._host)

    def _decoding(self) -> EngineDecoder:
        if self._decoder is None:
            raise self._not_open("decoder engine is")
        return self._decoder

    def _not_open(self, what: str) -> UsageError:
        return UsageError(
            f"The {what} not open.",
            f"open: {', '.join(self._engines) or 'none'}",
            remedy="load the bundle again",
        )

    def _run(
        self, name: GraphName, arrays: Mapping[str, Array], tensors: Mapping[str, DeviceTensor]
    ) -> dict[str, DeviceTensor]:
        """Run the encoder or the projector. Returns its outputs. Arrays that are no inputs of the engine are ignored."""
        engine = self._engines.get(name)
        if engine is None:
            raise self._not_open(f"{name} engine is")
        entry, memory = engine.entry, self._host.memory
        batch, prompt = arrays[INPUT_IDS].shape
        sizes = {"batch": batch, "prompt": prompt, "context": prompt * self._manifest.shape.context_per_token}
        inputs = {
            spec.name: tensors[spec.name] if spec.name in tensors else self._tensor(spec.name, arrays[spec.name])
            for spec in entry.inputs
        }
        outputs = {
            spec.name: DeviceTensor(
                memory, shape_of(spec, sizes), spec.dtype, purpose=f"{spec.name} of the {name}", remedy=_FEWER
            )
            for spec in entry.outputs
        }
        profile = engine.profile({spec.name: inputs[spec.name].shape for spec in entry.inputs})
        if profile is None:
            raise self._uncovered(name, batch, prompt)
        context = engine.context(profile)
        context.bind({key: Bound(tensor.address, tensor.shape) for key, tensor in {**inputs, **outputs}.items()})
        context.enqueue()
        # The inputs may be released now: their memory is reused later on the same stream.
        memory.device.synchronize(memory.stream)
        return outputs

    def _tensor(self, name: str, array: Array) -> DeviceTensor:
        dtype = self._types.get(name, str(array.dtype))
        tensor = DeviceTensor(self._host.memory, array.shape, dtype, purpose=name, remedy=_FEWER)
        tensor.write(array)
        if dtype == "float16" and bool((np.abs(array) > np.finfo(np.float16).max).any()):
            raise EncodingError(
                f"{name} holds values that overflow float16, its type in these engines.",
                f"largest: {np.abs(array).max():.4g}; at most {np.finfo(np.float16).max:.0f}",
                remedy="use engines built with --engine-precision bf16 or fp32",
            )
        return tensor

    def _check_prompts(self, batch: int, prompt: int) -> None:
        if batch > self._limits.batch or prompt > self._limits.prompt:
            raise self._uncovered("encoder", batch, prompt)

    def _uncovered(self, name: GraphName, batch: int, prompt: int) -> UsageError | PromptError:
        """The error for a request beyond the engines' optimization profiles."""
        limits = self._limits
        line = f"engines {self.chosen.key}: up to {limits.batch} prompts of {limits.prompt} tokens"
        if prompt > limits.prompt:
            return PromptError(
                f"A prompt of {prompt} tokens is longer than the engines accept: {limits.prompt}.", line,
                remedy="shorten it, or " + self._rebuilt(f" --max-prompt {prompt}"),
            )  # fmt: skip
        return UsageError(
            f"A batch of {batch} prompts is larger than the engines accept: {limits.batch}."
            if batch > limits.batch else f"No profile of the {name} engine covers {batch} prompts of {prompt} tokens.", line,
            remedy=f"run with --batch-size {limits.batch} or less, or " + self._rebuilt(f" --max-batch {batch}"),
        )  # fmt: skip

    def _rebuilt(self, options: str) -> str:
        return rebuild(self._bundle, self.chosen.engines.variant, options=options)


class _DeviceLock:
    """Locks a device and makes it the thread's current device."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host

    def __enter__(self) -> None:
        self._host.lock.acquire()
        self._host.memory.device.make_current()

    def __exit__(self, *_: object) -> None:
        self._host.lock.release()
