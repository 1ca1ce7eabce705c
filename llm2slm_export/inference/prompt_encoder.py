"""The encoder half of a pair: prompt ids to an encoding, through the cache if there is one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np

from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.inference.encodings.cache import EncodingCache, Row
from llm2slm_export.inference.encodings.encoding import (
    Encoding,
    EncodingIdentity,
    conditioning_problem,
    join_rows,
    prompt_mask,
    split_rows,
)
from llm2slm_export.inference.runtime.backend import Backend, Conditioning, Ids, context_mask
from llm2slm_export.inference.tokenization import PromptIds


@dataclass(frozen=True)
class _Encoded:
    """The graphs' output for a batch, and the milliseconds of each graph."""

    conditioning: Conditioning
    encode_ms: float
    project_ms: float


class PromptEncoder:
    """Encodes batches of prompts.

    Args:
        backend: runs the encoder and projector graphs.
        manifest: the manifest of the encodings' head.
        cache: the cache of encodings; None: every prompt is encoded.
    """

    def __init__(self, backend: Backend, manifest: Manifest, cache: EncodingCache | None) -> None:
        self._backend, self._manifest, self._cache = backend, manifest, cache
        self._identity = EncodingIdentity.of(manifest)

    def read(self, prompts: Sequence[PromptIds]) -> Encoding:
        """The encoding of a batch of prompts, in order."""
        started = perf_counter()
        ids = [prompt.ids for prompt in prompts]
        cached: tuple[bool, ...] = ()
        cache_ms = {}
        if self._cache is None:
            made = self._encode(ids)
        else:
            made, cached = self._encode_missing(self._cache, ids)
            cache_ms = {"cache": _ms_since(started) - made.encode_ms - made.project_ms}
        return Encoding(
            conditioning=made.conditioning,
            input_ids=self._padded(ids),
            prompt_tokens=tuple(len(prompt.ids) for prompt in prompts),
            dropped_tokens=tuple(prompt.dropped for prompt in prompts),
            timings_ms={
                "tokenize": sum(prompt.ms for prompt in prompts), **cache_ms, "encode": made.encode_ms, "project": made.project_ms,
            },
            identity=self._identity,
            cached=cached,
        )  # fmt: skip

    def _encode(self, ids: Sequence[Sequence[int]]) -> _Encoded:
        """Run the encoder and projector graphs."""
        input_ids, mask = self._padded(ids), prompt_mask([len(row) for row in ids])
        started = perf_counter()
        hidden = self._backend.encode(input_ids, mask)
        encode_ms = _ms_since(started)
        started = perf_counter()
        conditioning = self._backend.project(hidden, input_ids, mask)
        return _Encoded(conditioning, encode_ms, _ms_since(started))

    def _encode_missing(self, cache: EncodingCache, ids: Sequence[Sequence[int]]) -> tuple[_Encoded, tuple[bool, ...]]:
        """Encode the prompts that are not cached, each once, and store them.

        Returns:
            The batch's encoding, and whether each prompt was cached.
        """
        keys = [self._identity.key(row) for row in ids]
        found = {}
        for key, row in dict(zip(keys, ids, strict=True)).items():
            if (stored := cache.find(key, partial(self._problem, len(row)))) is not None:
                found[key] = stored
        cached = tuple(key in found for key in keys)
        missing = {key: row for key, row in zip(keys, ids, strict=True) if key not in found}
        if not missing:
            return _Encoded(self._joined(keys, found, ids), 0.0, 0.0), cached
        made = self._encode(list(missing.values()))
        arrays = self._backend.arrays(made.conditioning)
        new = split_rows(arrays, self._manifest.shape, [len(row) for row in missing.values()])
        rows = dict(zip(missing, new, strict=True))
        cache.store(rows)
        if list(missing) == keys:
            return made, cached
        conditioning = self._joined(keys, found | rows, ids)
        return _Encoded(conditioning, made.encode_ms, made.project_ms), cached

    def _problem(self, tokens: int, row: Row) -> str | None:
        """The reason why cached arrays do not fit a prompt of this many tokens; None: they fit."""
        return conditioning_problem(row, self._manifest, 1, tokens)

    def _joined(self, keys: Sequence[str], rows: dict[str, Row], ids: Sequence[Sequence[int]]) -> Conditioning:
        """The conditioning of a batch, joined from its prompts' cached arrays."""
        tokens, shape = [len(row) for row in ids], self._manifest.shape
        arrays = join_rows([rows[key] for key in keys], shape, tokens)
        return self._backend.conditioning(arrays, context_mask(shape, prompt_mask(tokens)))

    def _padded(self, ids: Sequence[Sequence[int]]) -> Ids:
        """Ids [batch, prompt], padded on the right to the longest prompt."""
        padded = np.full((len(ids), max(map(len, ids))), self._manifest.special_ids.prompt_pad, np.int64)
        for index, row in enumerate(ids):
            padded[index, : len(row)] = row
        return padded


def _ms_since(started: float) -> float:
    return (perf_counter() - started) * 1e3
