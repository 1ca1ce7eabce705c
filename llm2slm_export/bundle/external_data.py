"""The external data files of an ONNX graph, read without the `onnx` package.

Only the protobuf fields on the way to a tensor are decoded. Everything else is skipped and never copied.
"""

import mmap
from pathlib import Path

from llm2slm_export.files.regular_file import open_regular

MOST_FIELDS = 20_000_000
MOST_DEPTH = 64

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_LOCATION = b"location"

# Of each message, the fields whose messages can contain tensors: field number → message (onnx.proto).
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
_KEY, _VALUE = 1, 2


class OnnxError(ValueError):
    """The file is not an ONNX model, or exceeds the bounds. The message is one line without a full stop."""


def external_data(path: Path) -> frozenset[str]:
    """The external data files of a graph, as written in it: relative to the graph's directory.

    Raises:
        OnnxError: the file is not an ONNX model.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        if not file.seek(0, 2):
            raise OnnxError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Walk(content).locations()


class _Walk:
    """One pass over a model's bytes."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._fields = content, 0
        self._found: set[str] = set()

    def locations(self) -> frozenset[str]:
        # No recursion: an untrusted file decides how deep its messages nest.
        waiting = [("model", 0, len(self._content), 0)]
        while waiting:
            message, at, end, depth = waiting.pop()
            if depth > MOST_DEPTH:
                raise OnnxError(f"it nests deeper than {MOST_DEPTH} levels")
            key, value = b"", None
            while at < end:
                number, kind, at, after = self._field(at, end)
                if kind != _LENGTH:
                    at = after
                    continue
                inner = _FIELDS[message].get(number)
                if inner is not None:
                    waiting.append((inner, at, after, depth + 1))
                elif message == "entry" and number == _KEY:
                    # A longer key cannot equal `location`, so only its beginning is copied.
                    key = bytes(self._content[at : min(after, at + len(_LOCATION) + 1)])
                elif message == "entry" and number == _VALUE:
                    value = self._text(at, after)
                at = after
            if message == "entry" and key == _LOCATION:
                self._found.add(value or "")
        return frozenset(self._found)

    def _field(self, at: int, end: int) -> tuple[int, int, int, int]:
        """A field's number and wire type, and the start and end of its content."""
        self._fields += 1
        if self._fields > MOST_FIELDS:
            raise OnnxError(f"it has more than {MOST_FIELDS} fields")
        tag, at = self._varint(at, end)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise OnnxError(f"it is not protobuf: byte {at} has field number {number}")
        if kind == _VARINT:
            return number, kind, at, self._varint(at, end)[1]
        if kind == _LENGTH:
            length, at = self._varint(at, end)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise OnnxError(f"it is not protobuf: byte {at} has wire type {kind}")
        if length > end - at:
            raise OnnxError(f"it is not protobuf: a field at byte {at} is longer than what holds it")
        return number, kind, at, at + length

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if at >= end or shift > 63:
                raise OnnxError(f"it is not protobuf: no number ends at byte {at}")
            byte = self._content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7

    def _text(self, start: int, end: int) -> str:
        # PATH_MAX on Linux.
        if end - start > 4096:
            raise OnnxError("it names a file by more than 4096 bytes")
        try:
            return bytes(self._content[start:end]).decode()
        except UnicodeDecodeError as error:
            raise OnnxError("it names a file by bytes that are not UTF-8") from error
