"""An encoding: what encoder and projector made of prompts, which pair it belongs to, and its form on disk.

    a safetensors file   the conditioning's tensors by their contract names, `input_ids` [batch, prompt], and as metadata
                         format, version, bundle, head, encoder, projector, tokenizer (sha256), prompt_tokens, dropped_tokens

It knows no text, and runs no graph.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath

import numpy as np

from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.contract import INPUT_IDS, GraphName, PairShape, TensorSpec, projector_spec
from llm2slm_export.errors import EncodingError
from llm2slm_export.files.bounded_json import JsonError, parse_json
from llm2slm_export.inference.encodings.safetensors_file import read_tensors, write_tensors
from llm2slm_export.inference.runtime.backend import Array, Backend, Conditioning, Ids, context_mask

FORMAT = "llm2slm-encoding"
VERSION = 2
MOST_ID = 2**31  # ids, and counts of them, are below


@dataclass(frozen=True)
class EncodingIdentity:
    """Everything an encoding depends on besides its prompts, as sha256: two pairs that agree make the same encodings.

    Args:
        encoder: the encoder graph's files.
        projector: the files of the head's projector graph.
        tokenizer: the LLM's tokenizer and the prompt template.
    """

    encoder: str
    projector: str
    tokenizer: str

    @classmethod
    def of(cls, manifest: Manifest) -> "EncodingIdentity":
        """The identity of a bundle's encodings, or of one of its heads'."""
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
        """The name, a sha256, of what is made of one prompt's ids."""
        return _digest([self.encoder, self.projector, self.tokenizer, *map(str, ids)])

    def check(self, other: "EncodingIdentity", what: str) -> None:
        """Refuse what was made with another identity.

        Args:
            what: the thing that has the identity `other`, to begin a sentence with.

        Raises:
            EncodingError: naming everything that differs.
        """
        differing = [
            f"{field.name}: this pair has {getattr(self, field.name)[:12]}…, it was made by {getattr(other, field.name)[:12]}…"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if differing:
            raise EncodingError(
                f"{what} was not made by this pair.",
                *differing,
                remedy="encode with the bundle and head that write the responses, or write them with those that encoded",
            )


@dataclass(frozen=True, eq=False)
class Encoding:
    """Encoder and projector results for a batch of prompts. Reusable: decoding from it leaves it as it was.

    Args:
        conditioning: what the decoder reads.
        input_ids: [batch, prompt] prompt ids, padded on the right.
        prompt_tokens: tokens the LLM read, per row.
        dropped_tokens: tokens cut from over-long prompts, per row.
        timings_ms: what the batch took here: `tokenize`, `encode`, `project`, and `cache` where there is one.
        identity: of the pair that made it.
        cached: per row, whether it came from the cache; empty without a cache.
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
        """[batch, prompt], 1 on tokens and 0 on the padding to their right."""
        return prompt_mask(self.prompt_tokens)

    def __len__(self) -> int:
        return len(self.prompt_tokens)


def prompt_mask(prompt_tokens: Sequence[int]) -> Ids:
    """The mask [batch, prompt] of prompts of so many tokens, padded on the right to the longest."""
    real = np.array(prompt_tokens)[:, None]
    return (np.arange(max(prompt_tokens)) < real).astype(np.int64)


def save_encoding(encoding: Encoding, path: Path, *, backend: Backend, manifest: Manifest) -> None:
    """Write an encoding, so that a pair with the same identity can use it anywhere.

    Raises:
        EncodingError: another pair made it.
    """
    EncodingIdentity.of(manifest).check(encoding.identity, "The encoding")
    about = {
        "format": FORMAT,
        "version": str(VERSION),
        "bundle": manifest.name,
        "head": manifest.head,
        **asdict(encoding.identity),
        "prompt_tokens": json.dumps(encoding.prompt_tokens),
        "dropped_tokens": json.dumps(encoding.dropped_tokens),
    }
    tensors = {**backend.arrays(encoding.conditioning), INPUT_IDS: encoding.input_ids}
    write_tensors(path, tensors, about)


def load_encoding(path: Path, *, backend: Backend, manifest: Manifest) -> Encoding:
    """Read an encoding that `save_encoding` wrote; its times are zero, for it took none here.

    Raises:
        EncodingError: no such file, a damaged one, something else, or what another pair made.
    """
    tensors, about = read_tensors(path)
    _check_format(path, about)
    identity = EncodingIdentity(**{field.name: _said(path, about, field.name) for field in fields(EncodingIdentity)})
    EncodingIdentity.of(manifest).check(
        identity, f"The encoding {path} (bundle {_said(path, about, 'bundle')!r}, head {_said(path, about, 'head')!r})"
    )
    prompt_tokens = _counts(path, about, "prompt_tokens")
    dropped_tokens = _counts(path, about, "dropped_tokens")
    if len(dropped_tokens) != len(prompt_tokens) or not all(prompt_tokens):
        raise malformed(path, "prompt_tokens and dropped_tokens are not of the same prompts")
    if (longest := max(prompt_tokens)) > manifest.max_prompt_tokens:
        raise malformed(path, f"a prompt of {longest} tokens, and the pair reads {manifest.max_prompt_tokens}")
    input_ids = tensors.pop(INPUT_IDS, None)
    if input_ids is None or input_ids.shape != (len(prompt_tokens), longest) or input_ids.dtype != np.int64:
        raise malformed(path, f"{INPUT_IDS} must be int64 [{len(prompt_tokens)}, {longest}]")
    if input_ids.size and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < MOST_ID:
        raise malformed(path, f"{INPUT_IDS} holds numbers that are no ids")
    if (problem := conditioning_problem(tensors, manifest, len(prompt_tokens), longest)) is not None:
        raise malformed(path, problem)
    mask = prompt_mask(prompt_tokens)
    return Encoding(
        conditioning=backend.conditioning(tensors, context_mask(manifest.shape, mask)),
        input_ids=input_ids,
        prompt_tokens=prompt_tokens,
        dropped_tokens=dropped_tokens,
        timings_ms=dict.fromkeys(("tokenize", "encode", "project"), 0.0),
        identity=identity,
    )


def conditioning_problem(tensors: Mapping[str, Array], manifest: Manifest, batch: int, prompt: int) -> str | None:
    """Why tensors are not what a pair's encoder and projector make of so many prompts of so many tokens; None: they are."""
    specs = {spec.name: spec for spec in projector_spec(manifest.shape).outputs}
    if tensors.keys() != specs.keys():
        missing, more = sorted(specs.keys() - tensors.keys()), sorted(tensors.keys() - specs.keys())
        return f"it has no tensor {missing[0]}" if missing else f"it has a tensor {more[0]!r}, which is no projector's"
    sizes = {"batch": batch, "context": prompt * manifest.shape.context_per_token}
    for name, spec in specs.items():
        shape = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in spec.axes)
        tensor = tensors[name]
        if tensor.shape != shape:
            return f"the tensor {name} has the shape {list(tensor.shape)}, its prompts' is {list(shape)}"
        # Graphs give the manifest's type, engines float32 whatever theirs is.
        if tensor.dtype.name not in ("float32", *_float_types(manifest, name)):
            return f"the tensor {name} is of type {tensor.dtype}"
        if not np.isfinite(tensor).all():
            return f"the tensor {name} holds numbers that are not finite"
    return None


def malformed(path: Path, reason: str) -> EncodingError:
    """The error of a file that holds tensors, and not an encoding's."""
    return EncodingError(f"{path} cannot be read as an encoding.", reason, remedy="copy it again, or encode again")


def split_rows(arrays: Mapping[str, Array], shape: PairShape, prompt_tokens: Sequence[int]) -> list[dict[str, Array]]:
    """Conditioning tensors [batch, …, context, …] as one set for each prompt, [1, …, its context, …], without padding.

    The sets are copies: they keep nothing of the batch in memory.
    """
    return [
        {
            spec.name: arrays[spec.name][_place(spec, shape, row, tokens, arrays[spec.name].shape)].copy()
            for spec in projector_spec(shape).outputs
        }
        for row, tokens in enumerate(prompt_tokens)
    ]


def join_rows(rows: Sequence[Mapping[str, Array]], shape: PairShape, prompt_tokens: Sequence[int]) -> dict[str, Array]:
    """The other way round: conditioning tensors [batch, …, context, …], padded where the decoder wants it."""
    sizes = {"batch": len(rows), "context": max(prompt_tokens) * shape.context_per_token}
    joined = {}
    for spec in projector_spec(shape).outputs:
        shape_of = [axis if isinstance(axis, int) else sizes[axis] for axis in spec.axes]
        whole = np.zeros(shape_of, rows[0][spec.name].dtype)
        for row, tokens in enumerate(prompt_tokens):
            whole[_place(spec, shape, row, tokens, whole.shape)] = rows[row][spec.name]
        joined[spec.name] = whole
    return joined


def _place(spec: TensorSpec, shape: PairShape, row: int, tokens: int, sizes: Sequence[int]) -> tuple[slice, ...]:
    """Where a prompt of so many tokens lies in a conditioning tensor of these sizes."""
    real = tokens * shape.context_per_token
    context = sizes[spec.axes.index("context")]
    positions = slice(0, real) if shape.slm_kind == "encoder-decoder" else slice(context - real, context)
    places: dict[str | int, slice] = {"batch": slice(row, row + 1), "context": positions}
    return tuple(places.get(axis, slice(None)) for axis in spec.axes)


def _check_format(path: Path, about: Mapping[str, str]) -> None:
    if about.get("format") != FORMAT:
        raise EncodingError(
            f"{path} is not an encoding.",
            f"expected format {FORMAT!r}, got {about.get('format')!r}",
            remedy="give a file that `llm2slm-export run --save-encoding` wrote",
        )
    version = _said(path, about, "version")
    if not re.fullmatch("[0-9]{1,8}", version, re.ASCII) or int(version) < 1:
        raise malformed(path, f"its version is {version[:20]!r}, which is no number from 1 on")
    if int(version) > VERSION:
        raise EncodingError(
            f"{path} has version {version} of the format; this release reads up to {VERSION}.",
            remedy="pip install --upgrade llm2slm-export",
        )


def _said(path: Path, about: Mapping[str, str], key: str) -> str:
    if key not in about:
        raise malformed(path, f"it does not say its {key}")
    return about[key]


def _counts(path: Path, about: Mapping[str, str], key: str) -> tuple[int, ...]:
    try:
        counts = parse_json(_said(path, about, key).encode())
    except JsonError as error:
        raise malformed(path, f"{key} is not JSON: {error}") from error
    whole = isinstance(counts, list) and all(type(count) is int and 0 <= count < MOST_ID for count in counts)
    if not whole or not counts:
        raise malformed(path, f"{key} is no list of numbers")
    return tuple(counts)


def _float_types(manifest: Manifest, name: str) -> tuple[str, ...]:
    graph = manifest.graphs.get("projector")
    return tuple(tensor.dtype for tensor in getattr(graph, "outputs", ()) if tensor.name == name)


def _graph_hashes(manifest: Manifest, name: GraphName) -> list[str]:
    """The sha256 of a graph's file and of every file that holds weights of its, which are those that the graph itself names
    (`bundle.open_bundle`)."""
    entry = manifest.graphs[name]
    return _hashes(manifest, entry.file, *entry.data)


def _hashes(manifest: Manifest, *files: str) -> list[str]:
    """In an order that no manifest chooses: two files that have each other's content are another graph."""
    found = (entry for entry in manifest.files if entry.path in files)
    return [entry.sha256 for entry in sorted(found, key=lambda entry: PurePosixPath(entry.path))]


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
