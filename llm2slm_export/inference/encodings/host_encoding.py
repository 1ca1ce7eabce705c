"""An encoding in host memory, and its file format.

The file is a safetensors file with the conditioning's tensors by their contract names, `input_ids` [batch, prompt], and the
metadata format, version, bundle, head, encoder, projector, tokenizer (SHA-256), prompt_tokens and dropped_tokens.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Self

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.contract import INPUT_IDS, PairShape, projector_spec
from llm2slm_export.errors import EncodingError
from llm2slm_export.files.bounded_json import JsonError, parse_json
from llm2slm_export.inference.encodings.encoding import (
    Encoding,
    EncodingIdentity,
    conditioning_problem,
    prompt_mask,
    split_rows,
)
from llm2slm_export.inference.encodings.safetensors_file import dump_tensors, parse_tensors, read_tensors, write_tensors
from llm2slm_export.inference.runtime.backend import Backend, Ids, context_mask

FORMAT = "llm2slm-encoding"
VERSION = 2
MOST_ID = 2**31  # exclusive bound of ids and of their counts
_STAGES = ("tokenize", "encode", "project")


@dataclass(frozen=True, eq=False)
class HostEncoding:
    """An `Encoding` whose tensors are in host memory, as in files and on a wire. It needs no backend, and no open pair.

    Args:
        tensors: the projector's outputs by their contract names.
        input_ids: [batch, prompt] prompt ids, padded on the right.
        prompt_tokens: number of prompt tokens of each row.
        dropped_tokens: number of tokens truncated from the prompt of each row.
        timings_ms: as `Encoding.timings_ms`; zero if it was read from a file.
        identity: identity of the pair that made it.
        bundle, head: names of that pair, for messages.
        cached: as `Encoding.cached`.
    """

    tensors: Mapping[str, Array]
    input_ids: Ids
    prompt_tokens: tuple[int, ...]
    dropped_tokens: tuple[int, ...]
    timings_ms: Mapping[str, float]
    identity: EncodingIdentity
    bundle: str
    head: str
    cached: tuple[bool, ...] = ()

    @classmethod
    def of(cls, encoding: Encoding, *, backend: Backend, manifest: Manifest) -> Self:
        """A copy of an encoding in host memory.

        Raises:
            EncodingError: it is an encoding of another pair.
        """
        EncodingIdentity.of(manifest).check(encoding.identity, "The encoding")
        return cls(
            tensors=backend.arrays(encoding.conditioning), input_ids=encoding.input_ids,
            prompt_tokens=encoding.prompt_tokens, dropped_tokens=encoding.dropped_tokens, timings_ms=encoding.timings_ms,
            identity=encoding.identity, bundle=manifest.name, head=manifest.head, cached=encoding.cached,
        )  # fmt: skip

    @classmethod
    def from_bytes(cls, data: bytes, *, manifest: Manifest) -> Self:
        """Read what `to_bytes` returned.

        Raises:
            EncodingError: it is damaged, not an encoding, or an encoding of another pair.
        """
        return cls._checked("The encoding", *parse_tensors(data, "The encoding"), manifest)

    @classmethod
    def read(cls, path: Path, *, manifest: Manifest) -> Self:
        """Read a file written by `write`.

        Raises:
            EncodingError: the file is missing, damaged, not an encoding, or an encoding of another pair.
        """
        return cls._checked(str(path), *read_tensors(path), manifest)

    def to_bytes(self) -> bytes:
        """The encoding as the content of a file. Every pair with the same identity can read it."""
        return dump_tensors(self._stored, self._about)

    def write(self, path: Path) -> None:
        """Write the encoding to a file. Every pair with the same identity can read it.

        Raises:
            EncodingError: the file cannot be written.
        """
        write_tensors(path, self._stored, self._about)

    def on(self, backend: Backend, shape: PairShape) -> Encoding:
        """The encoding on a backend, which generates from it."""
        return Encoding(
            conditioning=backend.conditioning(self.tensors, context_mask(shape, prompt_mask(self.prompt_tokens))),
            input_ids=self.input_ids, prompt_tokens=self.prompt_tokens, dropped_tokens=self.dropped_tokens,
            timings_ms=self.timings_ms, identity=self.identity, cached=self.cached,
        )  # fmt: skip

    def rows(self, shape: PairShape) -> list[Self]:
        """The encoding of each prompt, without padding."""
        split = split_rows(self.tensors, shape, self.prompt_tokens)
        return [
            replace(
                self, tensors=tensors, input_ids=self.input_ids[row : row + 1, :tokens], prompt_tokens=(tokens,),
                dropped_tokens=(self.dropped_tokens[row],), cached=self.cached[row : row + 1],
            )
            for row, (tensors, tokens) in enumerate(zip(split, self.prompt_tokens, strict=True))
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def _stored(self) -> dict[str, Array]:
        return {**self.tensors, INPUT_IDS: self.input_ids}

    @property
    def _about(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "version": str(VERSION),
            "bundle": self.bundle,
            "head": self.head,
            **asdict(self.identity),
            "prompt_tokens": json.dumps(self.prompt_tokens),
            "dropped_tokens": json.dumps(self.dropped_tokens),
        }

    @classmethod
    def _checked(cls, source: str, tensors: dict[str, Array], about: Mapping[str, str], manifest: Manifest) -> Self:
        """An encoding from the content of a file.

        Args:
            source: what it was read from, as the subject of an error's sentence.
        """
        _check_format(source, about)
        identity = EncodingIdentity(
            **{field.name: _metadata(source, about, field.name) for field in fields(EncodingIdentity)}
        )
        bundle, head = _metadata(source, about, "bundle"), _metadata(source, about, "head")
        subject = source if source == "The encoding" else f"The encoding {source}"
        EncodingIdentity.of(manifest).check(identity, f"{subject} (bundle {bundle!r}, head {head!r})")
        prompt_tokens = _counts(source, about, "prompt_tokens")
        dropped_tokens = _counts(source, about, "dropped_tokens")
        if len(dropped_tokens) != len(prompt_tokens) or not all(prompt_tokens):
            raise malformed(source, "prompt_tokens and dropped_tokens do not match")
        if (longest := max(prompt_tokens)) > manifest.max_prompt_tokens:
            raise malformed(
                source, f"a prompt has {longest} tokens; the pair accepts at most {manifest.max_prompt_tokens}"
            )
        input_ids = tensors.pop(INPUT_IDS, None)
        if input_ids is None or input_ids.shape != (len(prompt_tokens), longest) or input_ids.dtype != np.int64:
            raise malformed(source, f"{INPUT_IDS} must be int64 [{len(prompt_tokens)}, {longest}]")
        if input_ids.size and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < MOST_ID:
            raise malformed(source, f"the tensor {INPUT_IDS} holds a value that is not a token id")
        if (problem := conditioning_problem(tensors, manifest, len(prompt_tokens), longest)) is not None:
            raise malformed(source, problem)
        return cls(
            tensors=tensors, input_ids=input_ids, prompt_tokens=prompt_tokens, dropped_tokens=dropped_tokens,
            timings_ms=dict.fromkeys(_STAGES, 0.0), identity=identity, bundle=bundle, head=head,
        )  # fmt: skip


def max_encoding_bytes(manifest: Manifest) -> int:
    """Maximum bytes of the file of one prompt's encoding."""
    sizes = {"batch": 1, "context": manifest.max_prompt_tokens * manifest.shape.context_per_token}
    tensors = [
        prod(axis if isinstance(axis, int) else sizes[axis] for axis in spec.axes)
        for spec in projector_spec(manifest.shape).outputs
    ]
    # The header has about 100 bytes for each tensor.
    return 4 * sum(tensors) + 8 * manifest.max_prompt_tokens + 1000 * (len(tensors) + 10)


def malformed(source: str, reason: str) -> EncodingError:
    """The error for a safetensors file that is not a valid encoding."""
    return EncodingError(f"{source} cannot be read as an encoding.", reason, remedy="copy it again, or encode again")


def _check_format(source: str, about: Mapping[str, str]) -> None:
    if about.get("format") != FORMAT:
        raise EncodingError(
            f"{source} is not an encoding.",
            f"expected format {FORMAT!r}, got {about.get('format')!r}",
            remedy="give what `llm2slm-export run --save-encoding` or a server's /v1/encodings wrote",
        )
    version = _metadata(source, about, "version")
    if not re.fullmatch("[0-9]{1,8}", version, re.ASCII) or int(version) < 1:
        raise malformed(source, f"its version is {version[:20]!r}, which is not a positive integer")
    if int(version) > VERSION:
        raise EncodingError(
            f"{source} has version {version} of the format; this release reads up to {VERSION}.",
            remedy="pip install --upgrade llm2slm-export",
        )


def _metadata(source: str, about: Mapping[str, str], key: str) -> str:
    if key not in about:
        raise malformed(source, f"its metadata has no {key}")
    return about[key]


def _counts(source: str, about: Mapping[str, str], key: str) -> tuple[int, ...]:
    try:
        counts = parse_json(_metadata(source, about, key).encode())
    except JsonError as error:
        raise malformed(source, f"{key} is not JSON: {error}") from error
    whole = isinstance(counts, list) and all(type(count) is int and 0 <= count < MOST_ID for count in counts)
    if not whole or not counts:
        raise malformed(source, f"{key} is not a list of numbers")
    return tuple(counts)
