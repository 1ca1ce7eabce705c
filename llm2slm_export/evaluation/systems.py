"""Systems under evaluation: the pair, a model alone, or the pair with perturbed hidden states."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.errors import DataError, PromptError
from llm2slm_export.evaluation.report import Kind
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.runtime.backend import Backend
from llm2slm_export.inference.tokenization import PromptTokenizer, open_tokenizer


@dataclass(frozen=True)
class System:
    """A bundle, and the backend that runs its graphs.

    Args:
        name: in the report.
        kind: pair, baseline or control.
        description: for the report.
        bundle: the graphs and tokenizers.
        backend: runs the graphs.
        parameters: number of the models' parameters.
        key: identifies what responses depend on besides the bundle.
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
        """The SHA-256 of the responses' tokenizer."""
        manifest = self.bundle.manifest
        return next(entry.sha256 for entry in manifest.files if entry.path == manifest.tokenizer.slm)

    def refuse_long_prompts(self, prompts: Sequence[str], *, truncate: bool) -> None:
        """Refuse prompts over the limit, unless they are to be truncated.

        Raises:
            PromptError: the message counts them and shows the first.
        """
        if truncate:
            return
        rows = PromptTokenizer(self.bundle).read(list(prompts), truncate=True)
        long = [prompt for prompt, row in zip(prompts, rows, strict=True) if row.dropped]
        if long:
            limit = self.bundle.manifest.max_prompt_tokens
            raise PromptError(
                f"{len(long)} of {len(prompts)} prompts exceed the {limit} prompt tokens of {self.name}.",
                *_first(long),
                remedy="remove them from --data, or truncate them with --truncate",
            )

    def refuse_long_responses(self, prompts: Sequence[str], responses: Sequence[str]) -> None:
        """Refuse references beyond the decoder's last position, which have no loss.

        Raises:
            DataError: the message counts them and shows the first.
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
                f"{len(long)} of {len(responses)} references exceed the {known} positions of {self.name}.",
                *_first(long),
                remedy="remove them from --data, or remove loss from --metrics",
            )

    def _targets(self, responses: Sequence[str]) -> list[list[int]]:
        """The ids of responses, each with EOS."""
        tokenizer = open_tokenizer(self.bundle.path(self.bundle.manifest.tokenizer.slm))
        end = self.bundle.manifest.special_ids.eos[0]
        return [[*tokenizer.encode(text, add_special_tokens=False).ids, end] for text in responses]

    def orchestrator(self) -> Orchestrator:
        """The system as a loaded pair; closing it closes the backend."""
        return Orchestrator(self.bundle, self.backend)

    def respond(
        self, prompts: Sequence[str], *, batch_size: int, truncate: bool, num_beams: int, max_new_tokens: int
    ) -> Iterator[list[Generation]]:
        """Generate responses, in batches, in the prompts' order."""
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
        """Losses [prompts, 2]: the sum of the negative log-likelihoods (nats) of a response's tokens and EOS, and their
        number.

        All tokens of a response are computed in one decoder call, or in few. At int8 and int4 ONNX Runtime's CPU kernels for
        several positions and for one, as in generation, round differently.

        Args:
            prompts: the prompts.
            responses: one reference response per prompt.
            batch_size: prompts per batch.
            truncate: truncate prompts that are too long instead of refusing them.
            advance: called with the number of prompts finished since the last call.
        """
        found = np.zeros((len(prompts), 2))
        scored = self.orchestrator().score_batches(
            prompts, [[response] for response in responses], batch_size=batch_size, truncate=truncate
        )
        for row, entry in enumerate(scored):
            (score,) = entry.scores
            found[row] = -score.logprob, len(score.token_ids)
            advance(1)
        return found


def _first(texts: Sequence[str]) -> list[str]:
    """The first five texts, shortened, and the number of further ones."""
    shown = [repr(text if len(text) <= 80 else f"{text[:79]}…") for text in texts[:5]]
    return [*shown, f"and {len(texts) - 5} more"] if len(texts) > 5 else shown
