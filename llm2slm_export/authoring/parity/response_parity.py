"""Parity of the responses of `run` with those of transformers' `generate`."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.models.generation_config import own_options
from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.authoring.parity.bundle_graphs import BundleGraphs
from llm2slm_export.authoring.parity.gate import Gate
from llm2slm_export.authoring.parity.reference_outputs import GATE_TOKENS, ReferenceBatch
from llm2slm_export.authoring.parity.ties import Ties
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import GenerationDefaults
from llm2slm_export.bundle.parity_report import ParityRow
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.runtime.selection import open_backend

_NOISY_SEARCHES = 8  # reference searches with noise, which show whether rounding decides the result


class ResponseParity:
    """The comparison of a bundle's responses with the reference's.

    Args:
        graphs: the bundle's.
        reference: the unmodified models; its LLM is not used.
        ties: of the chained graphs (`TokenParity`).
    """

    def __init__(self, graphs: BundleGraphs, reference: Reference, ties: Ties) -> None:
        self.graphs, self.reference, self.ties = graphs, reference, ties

    def compare(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare responses at fp32: greedy, and with the SLM's own generation_config if it sets other options."""
        own, plain = self.graphs.manifest.generation, GenerationDefaults(max_new_tokens=GATE_TOKENS)
        backend = open_backend(self.graphs.bundle, runtime=self.graphs.runtime)
        with Orchestrator(self._generating(plain), backend) as pair:
            for case in cases:
                if case.prompts:
                    yield self._greedy_row(case, pair.generate(case.prompts))
            limits = {"max_new_tokens": max(GATE_TOKENS, own.min_new_tokens), "num_return_sequences": 1}
            defaults = own.model_copy(update=limits)
            if own.do_sample or defaults == plain:
                return
            searching = Orchestrator(self._generating(defaults), backend)
            for case in cases:
                # One prompt at a time: in padded batches of decoder-only SLMs, transformers exempts as many tokens of a
                # row from the repetition penalty as the row has padding positions.
                if len(case.prompts) == 1:
                    yield self._default_row(case, defaults, searching.generate(case.prompts))

    def gate(self, gate: Gate, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare greedy responses to the gate's prompts. The row is reported but not gated. It shows how often responses
        differ."""
        prompts = sum(len(case.prompts) for case in cases)
        plain, differing = GenerationDefaults(max_new_tokens=GATE_TOKENS), 0
        with Orchestrator(
            self._generating(plain), open_backend(self.graphs.bundle, runtime=self.graphs.runtime)
        ) as pair:
            for case in cases:
                differing += _differing(pair.generate(case.prompts), case.responses)
        yield ParityRow.judged("pair", gate.label(prompts), "responses", "share that differs", differing / prompts, 1.0)

    def _greedy_row(self, case: ReferenceBatch, got: Sequence[Generation]) -> ParityRow:
        """Compare responses up to the first tie: the tokens after it depend on rounding."""
        differing = tied = 0
        for row, (response, ids) in enumerate(zip(got, case.responses, strict=True)):
            ours, theirs = response.token_ids, tuple(ids.tolist())
            if ours == theirs:
                continue
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            if place is not None and self.ties.tokens[case.name][row, place, ours[place]]:
                tied += 1
            else:
                differing += 1
        return _ids_row(case.name, "greedy token ids", differing, tied)

    def _default_row(self, case: ReferenceBatch, defaults: GenerationDefaults, got: Sequence[Generation]) -> ParityRow:
        """Compare a response with the SLM's own generation_config, unless rounding can change the search."""
        if not _differing(got, [self._reference_ids(case, defaults)]):
            return _ids_row(case.name, "default token ids", 0, 0)
        likely = [self._reference_ids(case, defaults, noise_seed=seed) for seed in range(_NOISY_SEARCHES)]
        unstable = len({tuple(ids.tolist()) for ids in likely}) > 1
        return _ids_row(case.name, "default token ids", int(not unstable), int(unstable))

    def _generating(self, defaults: GenerationDefaults) -> Bundle:
        """The bundle with other generation defaults."""
        return Bundle(self.graphs.bundle.directory, self.graphs.manifest.model_copy(update={"generation": defaults}))

    def _reference_ids(
        self, case: ReferenceBatch, defaults: GenerationDefaults, noise_seed: int | None = None
    ) -> Array:
        """The unmodified SLM's ids for a case of one prompt, with its own generation_config.

        Args:
            noise_seed: seed of logit noise as large as the logits' tolerance; None: no noise.
        """
        options = own_options(self.reference.slm)
        beyond = range(self.graphs.slm_size, self.graphs.shape.vocab_size)
        options.update(
            max_new_tokens=defaults.max_new_tokens, max_length=None, min_new_tokens=defaults.min_new_tokens, min_length=0,
            num_return_sequences=1,
            suppress_tokens=list(beyond) or None, pad_token_id=self.graphs.manifest.special_ids.pad,
        )  # fmt: skip
        ids = self.reference.generate(
            case.input_ids, case.attention_mask, case.hidden_states, generation_config=options,
            logits_processor=LogitsProcessorList(
                [] if noise_seed is None else [_Noise(self.ties.tolerance, noise_seed)]
            ),
        )  # fmt: skip
        written = ids[0, 1:] if self.graphs.shape.slm_kind == "encoder-decoder" else ids[0]
        is_eos = np.isin(written.numpy(), self.graphs.manifest.special_ids.eos)
        return written.numpy()[is_eos.cumsum() - is_eos == 0]  # type: ignore[no-any-return]


class _Noise(LogitsProcessor):
    """Uniform noise on logits, up to `share` of the largest logit."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.generator = share, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        largest = scores[scores.isfinite()].abs().max()
        return scores + (2 * torch.rand(scores.shape, generator=self.generator) - 1) * self.share * largest


def _ids_row(case: str, what: str, differing: int, tied: int) -> ParityRow:
    """A row of differing responses. `tied` responses differ first where rounding decides; they are only reported."""
    which = case + (f", {tied} decided by float32's rounding" if tied else "")
    return ParityRow.judged("pair", which, what, "prompts that differ", float(differing), 0.0)


def _differing(got: Sequence[Generation], expected: Sequence[Array]) -> int:
    """The number of responses whose ids differ from the reference's."""
    return sum(row.token_ids != tuple(ids.tolist()) for row, ids in zip(got, expected, strict=True))
