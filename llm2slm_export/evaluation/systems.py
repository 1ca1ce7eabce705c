"""A system: whatever answers prompts through a bundle's graphs. The pair, a model by itself, or the pair misled."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.errors import DataError, PromptError
from llm2slm_export.evaluation.report import Kind
from llm2slm_export.inference.batching import batches
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.prompt_encoder import PromptEncoder
from llm2slm_export.inference.runtime.backend import Array, Backend
from llm2slm_export.inference.tokenization import PromptTokenizer, open_tokenizer


@dataclass(frozen=True)
class System:
    """A bundle, and the backend that runs its graphs.

    Args:
        description: what it is, for people.
        parameters: of the models that it runs.
        key: what its responses depend on beside the bundle.
    """

    name: str
    kind: Kind
    description: str
    bundle: Bundle
    backend: Backend
    parameters: int
    key: str = ""

    @property
    def responses_tokenizer(self) -> str:
        """The sha256 of the tokenizer that responses are in."""
        manifest = self.bundle.manifest
        return next(entry.sha256 for entry in manifest.files if entry.path == manifest.tokenizer.slm)

    def refuse_long_prompts(self, prompts: Sequence[str], *, truncate: bool) -> None:
        """Refuse prompts over the limit, unless they are to be cut.

        Raises:
            PromptError: with how many there are, and the first ones.
        """
        if truncate:
            return
        rows = PromptTokenizer(self.bundle).read(list(prompts), truncate=True)
        long = [prompt for prompt, row in zip(prompts, rows, strict=True) if row.dropped]
        if long:
            limit = self.bundle.manifest.max_prompt_tokens
            raise PromptError(
                f"{len(long)} of {len(prompts)} prompts are longer than the {limit} tokens that {self.name} reads.",
                *_first(long),
                remedy="take them out of --data, or have them cut with --truncate",
            )

    def refuse_long_responses(self, prompts: Sequence[str], responses: Sequence[str]) -> None:
        """Refuse references that would run past the last position that the decoder knows: they have no loss.

        Raises:
            DataError: with how many there are, and the first ones.
        """
        known, shape = self.bundle.manifest.max_total_tokens, self.bundle.manifest.shape
        if known is None:
            return
        rows = PromptTokenizer(self.bundle).read(list(prompts), truncate=True)
        pair_config = shape.slm_kind == "decoder-only"
        long = [
            response
            for row, target, response in zip(rows, self._targets(responses), responses, strict=True)
            if len(target) + (len(row.ids) * shape.context_per_token - 1 if pair_config else 0) > known
        ]
        if long:
            raise DataError(
                f"{len(long)} of {len(responses)} references run past the {known} positions that {self.name} knows.",
                *_first(long),
                remedy="take them out of --data, or leave loss out of --metrics",
            )

    def _targets(self, responses: Sequence[str]) -> list[list[int]]:
        """The ids of responses, each with its end."""
        tokenizer = open_tokenizer(self.bundle.path(self.bundle.manifest.tokenizer.slm))
        end = self.bundle.manifest.special_ids.eos[0]
        return [[*tokenizer.encode(text, add_special_tokens=False).ids, end] for text in responses]

    def orchestrator(self) -> Orchestrator:
        """The system behind the interface of a loaded pair; closing it closes the backend."""
        return Orchestrator(self.bundle, self.backend)

    def respond(
        self, prompts: Sequence[str], *, batch_size: int, truncate: bool, num_beams: int, max_new_tokens: int
    ) -> Iterator[list[Generation]]:
        """The responses, some at a time, in the prompts' order."""
        return self.orchestrator().generate_batches(
            prompts, batch_size=batch_size, truncate=truncate, do_sample=False, num_beams=num_beams,
            num_return_sequences=1, max_new_tokens=max_new_tokens,
        )  # fmt: skip

    def loss(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        *,
        batch_size: int,
        truncate: bool,
        advance: Callable[[int], None],
    ) -> Array:
        """[prompts, 2]: the sum of the negative log-likelihoods (nats) of a given response's tokens and its end, and
        their number.

        Args:
            advance: called with how many prompts have been done since the last call.
        """
        targets, end = self._targets(responses), self.bundle.manifest.special_ids.eos[0]
        rows = PromptTokenizer(self.bundle).read(list(prompts), truncate=truncate)
        encoder = PromptEncoder(self.backend, self.bundle.manifest, None)
        found = np.zeros((len(rows), 2))
        for batch in batches([len(row.ids) for row in rows], size=batch_size):
            encoding = encoder.read([rows[index] for index in batch])
            state, logits = self.backend.prefill(encoding.conditioning)
            longest = max(len(targets[index]) for index in batch)
            ids = np.full((len(batch), longest), end)
            for row, index in enumerate(batch):
                ids[row, : len(targets[index])] = targets[index]
            real = np.arange(longest) < np.array([[len(targets[index])] for index in batch])
            for position in range(longest):
                chosen = _log_softmax(logits)[np.arange(len(batch)), ids[:, position]]
                found[batch, 0] -= np.where(real[:, position], chosen, 0.0)
                if position + 1 < longest:
                    logits = self.backend.step(state, ids[:, position : position + 1])
            found[batch, 1] = real.sum(axis=1)
            advance(len(batch))
        return found


def _first(texts: Sequence[str]) -> list[str]:
    """A few of them, shortened, and how many more there are."""
    shown = [repr(text if len(text) <= 80 else f"{text[:79]}…") for text in texts[:5]]
    return [*shown, f"and {len(texts) - 5} more"] if len(texts) > 5 else shown


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    normalised: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalised
