"""An encoding: the conditioning of a batch of prompts, and the identity of its pair."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.contract import GraphName, PairShape, TensorSpec, projector_spec
from llm2slm_export.errors import EncodingError
from llm2slm_export.inference.runtime.backend import Conditioning, Ids


@dataclass(frozen=True)
class EncodingIdentity:
    """SHA-256 hashes of everything an encoding depends on besides its prompts.

    Pairs with equal identities make the same encodings.

    Args:
        encoder: hash of the encoder graph's files.
        projector: hash of the head's projector graph's files.
        tokenizer: hash of the LLM's tokenizer and the prompt template.
    """

    encoder: str
    projector: str
    tokenizer: str

    @classmethod
    def of(cls, manifest: Manifest) -> "EncodingIdentity":
        """The identity of the encodings of a manifest's head."""
        template = manifest.template
        settings = {"without special tokens": not template.special_tokens, "stripped": template.strip}
        settings_set = [name for name, is_set in settings.items() if is_set]
        tokenizer = [template.text, *settings_set, *_hashes(manifest, manifest.tokenizer.llm)]
        return cls(
            encoder=_digest(_graph_hashes(manifest, "encoder")),
            projector=_digest(_graph_hashes(manifest, "projector")),
            tokenizer=_digest(tokenizer),
        )

    def key(self, ids: Sequence[int]) -> str:
        """The cache key, a SHA-256, of the encoding of one prompt's ids."""
        return _digest([self.encoder, self.projector, self.tokenizer, *map(str, ids)])

    def check(self, other: "EncodingIdentity", what: str) -> None:
        """Refuse another identity.

        Args:
            what: the encoding with the identity `other`, as the subject of the error's sentence.

        Raises:
            EncodingError: the identities differ, with every difference.
        """
        differing = [
            f"{field.name}: this pair has {getattr(self, field.name)[:12]}…, the encoding has {getattr(other, field.name)[:12]}…"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if differing:
            raise EncodingError(
                f"{what} belongs to another pair.",
                *differing,
                remedy="encode and generate with the same bundle and head",
            )


@dataclass(frozen=True, eq=False)
class Encoding:
    """The outputs of encoder and projector for a batch of prompts. Generation does not change it, so it can be reused.

    Args:
        conditioning: the projector's outputs, which condition the decoder.
        input_ids: [batch, prompt] prompt ids, padded on the right.
        prompt_tokens: number of prompt tokens of each row.
        dropped_tokens: number of tokens truncated from the prompt of each row.
        timings_ms: milliseconds of the batch: `tokenize`, `encode`, `project`, and with a cache `cache`.
        identity: identity of the pair that made it.
        cached: whether each row came from the cache; empty without a cache.
    """

    conditioning: Conditioning
    input_ids: Ids
    prompt_tokens: tuple[int, ...]
    dropped_tokens: tuple[int, ...]
    timings_ms: Mapping[str, float]
    identity: EncodingIdentity
    cached: tuple[bool, ...] = ()

    @property
    def attention_mask(self) -> Ids:
        """[batch, prompt], 1 for tokens and 0 for padding on the right."""
        return prompt_mask(self.prompt_tokens)

    def __len__(self) -> int:
        return len(self.prompt_tokens)


def prompt_mask(prompt_tokens: Sequence[int]) -> Ids:
    """The attention mask [batch, prompt] of prompts with these lengths, padded on the right to the longest."""
    real = np.array(prompt_tokens)[:, None]
    return (np.arange(max(prompt_tokens)) < real).astype(np.int64)


def conditioning_problem(tensors: Mapping[str, Array], manifest: Manifest, batch: int, prompt: int) -> str | None:
    """The reason why tensors are not a conditioning of this pair.

    Args:
        batch: number of prompts.
        prompt: tokens of the longest one.

    Returns:
        The reason; None if names, shapes and types fit and all values are finite.
    """
    specs = {spec.name: spec for spec in projector_spec(manifest.shape).outputs}
    if tensors.keys() != specs.keys():
        missing, more = sorted(specs.keys() - tensors.keys()), sorted(tensors.keys() - specs.keys())
        if missing:
            return f"it has no tensor {missing[0]}"
        return f"it has a tensor {more[0]!r}, which is not an output of the projector"
    sizes = {"batch": batch, "context": prompt * manifest.shape.context_per_token}
    for name, spec in specs.items():
        shape = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in spec.axes)
        tensor = tensors[name]
        if tensor.shape != shape:
            return f"the tensor {name} has the shape {list(tensor.shape)}, its prompts' is {list(shape)}"
        # ONNX graphs return the manifest's type, TensorRT backends always float32.
        if tensor.dtype.name not in ("float32", *_float_types(manifest, name)):
            return f"the tensor {name} is of type {tensor.dtype}"
        if not np.isfinite(tensor).all():
            return f"the tensor {name} holds a value that is not a finite number"
    return None


def split_rows(arrays: Mapping[str, Array], shape: PairShape, prompt_tokens: Sequence[int]) -> list[dict[str, Array]]:
    """Split conditioning tensors [batch, …, context, …] into one set per prompt, [1, …, context, …], without padding.

    The sets are copies, so they do not keep the batch in memory.
    """
    return [
        {
            spec.name: arrays[spec.name][_slices(spec, shape, row, tokens)].copy()
            for spec in projector_spec(shape).outputs
        }
        for row, tokens in enumerate(prompt_tokens)
    ]


def join_rows(rows: Sequence[Mapping[str, Array]], shape: PairShape, prompt_tokens: Sequence[int]) -> dict[str, Array]:
    """Join the sets of `split_rows` to conditioning tensors [batch, …, context, …], padded on the right."""
    sizes = {"batch": len(rows), "context": max(prompt_tokens) * shape.context_per_token}
    joined = {}
    for spec in projector_spec(shape).outputs:
        shape_of = [axis if isinstance(axis, int) else sizes[axis] for axis in spec.axes]
        whole = np.zeros(shape_of, np.result_type(*(row[spec.name].dtype for row in rows)))
        for row, tokens in enumerate(prompt_tokens):
            whole[_slices(spec, shape, row, tokens)] = rows[row][spec.name]
        joined[spec.name] = whole
    return joined


def _slices(spec: TensorSpec, shape: PairShape, row: int, tokens: int) -> tuple[slice, ...]:
    """The slices of a prompt's row and unpadded positions in a conditioning tensor."""
    places: dict[str | int, slice] = {
        "batch": slice(row, row + 1),
        "context": slice(0, tokens * shape.context_per_token),
    }
    return tuple(places.get(axis, slice(None)) for axis in spec.axes)


def _float_types(manifest: Manifest, name: str) -> tuple[str, ...]:
    graph = manifest.graphs.get("projector")
    return tuple(tensor.dtype for tensor in getattr(graph, "outputs", ()) if tensor.name == name)


def _graph_hashes(manifest: Manifest, name: GraphName) -> list[str]:
    """The SHA-256 of a graph's file and of its external data files. `bundle.open_bundle` has checked the latter."""
    entry = manifest.graphs[name]
    return _hashes(manifest, entry.file, *entry.data)


def _hashes(manifest: Manifest, *files: str) -> list[str]:
    """The SHA-256 of files, sorted by path: the order does not depend on the manifest, and exchanged files differ."""
    found = (entry for entry in manifest.files if entry.path in files)
    return [entry.sha256 for entry in sorted(found, key=lambda entry: PurePosixPath(entry.path))]


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
