"""External data: every weight is stored once, within a graph and across the graphs of a bundle."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

# Smaller weights stay inside the .onnx file, so that ONNX tools can read them without the data file.
EXTERNAL_BYTES = 1024
# Alignment of offsets, for memory mapping and vector loads.
ALIGNMENT = 64


# Operators that read a few rows of a table or of its scales.
_LOOKUPS = ("Gather", "GatherBlockQuantized")


def bytes_read(model: ir.Model) -> int:
    """Bytes of weights that one call reads: all weights except lookup-only tables."""
    return sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None and any(node.op_type not in _LOOKUPS for node, _ in value.uses())
    )


@dataclass
class WeightStore:
    """The weights of a bundle under construction, by content hash.

    The first graph that uses a tensor writes it; others refer to that file, because ONNX external data may be in any
    file beside the model. The SLM's embedding table, for example, is used by projector and decoder.
    """

    directory: Path
    unique_bytes: int = 0
    _written: dict[str, ir.ExternalTensor] = field(default_factory=dict)

    def save(self, model: ir.Model, file: str) -> tuple[str, ...]:
        """Write `file` and, for weights that no earlier graph has, `file`.data. Tensors are evaluated one at a time.

        Returns:
            the names of all data files that the model refers to.
        """
        data = self.directory / f"{file}.data"
        locations: set[str] = set()
        with data.open("wb") as stream:
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                if tensor is None:
                    raise ValueError(f"initializer {name} has no value")
                content = tensor.tobytes()
                key = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + content).hexdigest()
                if key in self._written:
                    value.const_value = self._reference(self._written[key], name)
                    locations.add(str(self._written[key].location))
                    continue
                self.unique_bytes += len(content)
                if len(content) < EXTERNAL_BYTES:
                    continue
                stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
                self._written[key] = ir.ExternalTensor(
                    data.name, stream.tell(), len(content), tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name,
                    base_dir=str(self.directory),
                )  # fmt: skip
                stream.write(content)
                value.const_value = self._written[key]
                locations.add(data.name)
        if not data.stat().st_size:
            data.unlink()
        ir.save(model, self.directory / file)
        return tuple(sorted(locations))

    @staticmethod
    def _reference(tensor: ir.ExternalTensor, name: str) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name,
            base_dir=str(tensor.base_dir),
        )  # fmt: skip
