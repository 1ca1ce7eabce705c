"""A bundle's graphs on ONNX Runtime's CUDA provider. Only ids and logits cross between host and device."""

from collections.abc import Sequence
from typing import Any

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.contract import GRAPHS, GraphName
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.runtime.backend import Conditioning, Hidden, Ids
from llm2slm_export.inference.runtime.onnxruntime.backend import OrtBackend, SessionBackend
from llm2slm_export.inference.runtime.onnxruntime.cuda_decoder import CudaDecoder
from llm2slm_export.inference.runtime.onnxruntime.cuda_sessions import CudaOptions, CudaSessions
from llm2slm_export.inference.runtime.onnxruntime.device_tensors import DeviceTensors
from llm2slm_export.inference.runtime.onnxruntime.devices import find_device


class CudaBackend(SessionBackend):
    """The `Backend` on ONNX Runtime's CUDA provider.

    Args:
        bundle, threads, graphs, encoder: as `OrtBackend`. The threads compute shapes on the CPU; the default is 1.
        device: `cuda` or `cuda:n`. `cpu` runs the same code without a GPU and without CUDA graphs.
        options: options of the device; None: the defaults.

    Raises:
        DeviceError: the device is not available, lacks a kernel for a node, or has too little memory.
        UsageError, BundleError, MissingExtraError: as `OrtBackend`.
    """

    sessions: CudaSessions
    decoder: CudaDecoder

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str,
        threads: int | None,
        graphs: Sequence[GraphName] = GRAPHS,
        encoder: Any = None,
        options: CudaOptions | None = None,
    ) -> None:
        options = options or CudaOptions()
        if options.memory_bytes is not None and options.memory_bytes < 1:
            raise UsageError(
                f"memory_bytes is {options.memory_bytes}.", remedy="give at least 1, or leave it out for no limit"
            )
        sessions = CudaSessions(
            bundle, find_device(device), threads=threads, graphs=graphs, encoder=encoder, options=options
        )
        memory = DeviceTensors(sessions.device.kind, sessions.device.index, [sessions.provider()])
        super().__init__(sessions, memory, CudaDecoder(sessions, memory))

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size], an OrtValue on the device."""
        with self.sessions.described_out_of_memory("encoder", input_ids.shape):
            return super().encode(input_ids, attention_mask)

    def project(self, hidden: Hidden, input_ids: Ids, attention_mask: Ids) -> Conditioning:
        """The projector's outputs on the device."""
        with self.sessions.described_out_of_memory("projector", input_ids.shape):
            return super().project(hidden, input_ids, attention_mask)

    def head(self, bundle: Bundle) -> "CudaBackend":
        """A backend for another head of the bundle, sharing the encoder. Its session lives until the last backend is closed."""
        return CudaBackend(
            bundle,
            device=self.device,
            threads=self.sessions.requested_threads,
            graphs=self.sessions.graphs,
            encoder=self.sessions.encoder_to_share(),
            options=self.sessions.options,
        )

    def close(self) -> None:
        """Release the sessions and the memory of unused steps."""
        if not self.sessions.inherited:
            self.decoder.pool.clear()
        super().close()


def open_ort(
    bundle: Bundle,
    *,
    device: str,
    threads: int | None,
    graphs: Sequence[GraphName] = GRAPHS,
    cuda: CudaOptions | None = None,
) -> OrtBackend | CudaBackend:
    """Open a bundle's graphs on ONNX Runtime.

    Args:
        cuda: options of a CUDA device; None: the defaults.

    Raises:
        UsageError: `cuda` is given for another device.
        DeviceError, BundleError, MissingExtraError: as the backends.
    """
    if find_device(device).kind == "cuda":
        return CudaBackend(bundle, device=device, threads=threads, graphs=graphs, options=cuda)
    if cuda is not None:
        raise UsageError(
            f"The options of a CUDA device do not apply to the device {device!r}.",
            str(cuda),
            remedy="leave out --gpu-memory-mb and --no-cuda-graph, or use device 'cuda'",
        )
    return OrtBackend(bundle, device=device, threads=threads, graphs=graphs)
