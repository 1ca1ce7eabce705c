"""The encoder's half of a pair: from prompts' ids to an encoding, through the cache where there is one.

It knows no text and writes no token.
"""

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
class _Made:
    """What the two graphs made of a batch, and how long each took."""

    conditioning: Conditioning
    encode_ms: float
    project_ms: float


class PromptEncoder:
    """Encodes batches of prompts.

    Args:
        backend: runs the encoder and projector graphs.
        manifest: of the head that the encodings are for.
        cache: asked before the graphs are run; None: they always are.
    """

    def __init__(self, backend: Backend, manifest: Manifest, cache: EncodingCache | None) -> None:
        self._backend, self._manifest, self._cache = backend, manifest, cache
        self._identity = EncodingIdentity.of(manifest)

    def read(self, prompts: Sequence[PromptIds]) -> Encoding:
        """The encoding of a batch of prompts, in their order."""
        started = perf_counter()
        ids = [prompt.ids for prompt in prompts]
        cached: tuple[bool, ...] = ()
        cache_ms = {}
        if self._cache is None:
            made = self._make(ids)
        else:
            made, cached = self._through(self._cache, ids)
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

    def _make(self, ids: Sequence[Sequence[int]]) -> _Made:
        """Run the graphs."""
        input_ids, mask = self._padded(ids), prompt_mask([len(row) for row in ids])
        started = perf_counter()
        hidden = self._backend.encode(input_ids, mask)
        encode_ms = _ms_since(started)
        started = perf_counter()
        conditioning = self._backend.project(hidden, input_ids, mask)
        return _Made(conditioning, encode_ms, _ms_since(started))

    def _through(self, cache: EncodingCache, ids: Sequence[Sequence[int]]) -> tuple[_Made, tuple[bool, ...]]:
        """Run the graphs on the prompts that the cache does not hold, each once, and store what they make."""
        keys = [self._identity.key(row) for row in ids]
        found = {}
        for key, row in dict(zip(keys, ids, strict=True)).items():
            if (stored := cache.find(key, partial(self._problem, len(row)))) is not None:
                found[key] = stored
        cached = tuple(key in found for key in keys)
        missing = {key: row for key, row in zip(keys, ids, strict=True) if key not in found}
        if not missing:
            return _Made(self._assembled(keys, found, ids), 0.0, 0.0), cached
        made = self._make(list(missing.values()))
        arrays = self._backend.arrays(made.conditioning)
        new = split_rows(arrays, self._manifest.shape, [len(row) for row in missing.values()])
        rows = dict(zip(missing, new, strict=True))
        cache.store(rows)
        if list(missing) == keys:
            return made, cached
        conditioning = self._assembled(keys, found | rows, ids)
        return _Made(conditioning, made.encode_ms, made.project_ms), cached

    def _problem(self, tokens: int, row: Row) -> str | None:
        """Why stored arrays are not those of a prompt of so many tokens; None: they are."""
        return conditioning_problem(row, self._manifest, 1, tokens)

    def _assembled(self, keys: Sequence[str], rows: dict[str, Row], ids: Sequence[Sequence[int]]) -> Conditioning:
        """A batch's conditioning from its prompts' rows."""
        tokens, shape = [len(row) for row in ids], self._manifest.shape
        arrays = join_rows([rows[key] for key in keys], shape, tokens)
        return self._backend.conditioning(arrays, context_mask(shape, prompt_mask(tokens)))

    def _padded(self, ids: Sequence[Sequence[int]]) -> Ids:
        """Ids [batch, prompt], padded on the right to the longest."""
        padded = np.full((len(ids), max(map(len, ids))), self._manifest.special_ids.prompt_pad, np.int64)
        for index, row in enumerate(ids):
            padded[index, : len(row)] = row
        return padded


def _ms_since(started: float) -> float:
    return (perf_counter() - started) * 1e3
