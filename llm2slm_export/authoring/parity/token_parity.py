"""Parity of the chained graphs' next tokens, with the reference's tokens as history."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from llm2slm_export import contract
from llm2slm_export.arrays import Array
from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.authoring.parity.bundle_graphs import BundleGraphs
from llm2slm_export.authoring.parity.float64 import Double
from llm2slm_export.authoring.parity.gate import Gate
from llm2slm_export.authoring.parity.measurements import Measurements
from llm2slm_export.authoring.parity.reference_outputs import ReferenceBatch
from llm2slm_export.authoring.parity.teacher_forcing import (
    CONTEXT_MASK,
    conditioning,
    context_mask,
    forced_logits,
    in_turn,
    prompt_feed,
    reference_logits,
)
from llm2slm_export.authoring.parity.ties import Ties, find_ties
from llm2slm_export.authoring.parity.tolerances import DIVERGENCE, MARGIN, TOLERANCES
from llm2slm_export.bundle.parity_report import ParityRow


class TokenParity:
    """The comparison of the chained graphs' next tokens with the reference's.

    Args:
        graphs: the bundle's.
        reference: the unmodified models; its LLM is not used.
    """

    def __init__(self, graphs: BundleGraphs, reference: Reference) -> None:
        self.graphs, self.reference, self.ids = graphs, reference, graphs.manifest.special_ids
        self.ties = Ties()  # `compare` finds them at fp32

    def compare(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare teacher-forced next tokens of the chained graphs and, at fp32, their logits."""
        limit = max(TOLERANCES[p].tokens for p in self.graphs.precision.values())
        differing = compared = 0
        tokens: set[int] = set()
        choices: list[tuple[ReferenceBatch, Array]] = []
        measured, exact = Measurements(), dict[str, Array]()
        for case, logits in self._chained(cases, lambda length: (1,) * length):
            written = case.written.numpy()
            choices.append((case, logits.argmax(axis=2)))
            compared += int(written.sum())
            tokens.update(case.generated.numpy()[written].tolist())
            if self.graphs.float32:
                float32, exact[case.name] = self._whole_logits(case)
                measured.add(
                    "pair", case.name, contract.LOGITS, logits[written], float32[written], exact[case.name][written]
                )
        if self.graphs.float32:
            yield from measured.rows()
            ((tolerance, _),) = measured.tolerances().values()
            self.ties = find_ties(cases, exact, tolerance)
        tied = 0
        for case, chosen in choices:
            written, generated = case.written.numpy(), case.generated.numpy()
            unlike = (chosen != generated) & written
            differing += int(unlike.sum())
            if self.graphs.float32:
                allowed = np.take_along_axis(self.ties.tokens[case.name], chosen[:, :, None], axis=2)[:, :, 0]
                tied += int((unlike & allowed).sum())
        differing -= tied
        if limit > 0.0:
            # An untrained SLM repeats a few tokens: one near-tie then decides all occurrences of a token.
            limit = max(limit, 1 / len(tokens))
        # Over all prompts: one batch has too few tokens for a fraction.
        share = differing / compared
        which = f"{compared} tokens" + (f", {tied} tied within float32's rounding" if tied else "")
        yield ParityRow.judged("pair", which, "next tokens", "share that differs", share, limit)

    def gate(self, gate: Gate, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare teacher-forced next tokens and their distribution on the gate's prompts."""
        allowed = gate.differing
        if allowed is None:
            allowed = sum(TOLERANCES[p].gate for p in self.graphs.precision.values())
        differing = compared = 0
        divergence = 0.0
        for case, logits in self._chained(cases, lambda length: (length,)):
            got = torch.from_numpy(logits[case.written.numpy()])
            _, context = conditioning(self.reference, self.ids, case)
            expected = reference_logits(self.reference, case, context)[case.written][:, : self.graphs.slm_size]
            differing += self._misses(got.argmax(dim=1), case.generated[case.written], expected)
            compared += len(got)
            theirs, ours = (torch.log_softmax(scores.double(), dim=1) for scores in (expected, got))
            divergence += float((theirs.exp() * (theirs - ours)).sum())
        which = f"{gate.label(sum(len(case.prompts) for case in cases))}, {compared} tokens"
        yield ParityRow.judged("pair", which, "next tokens", "share that differs", differing / compared, allowed)
        yield ParityRow.judged("pair", which, "next tokens", "KL divergence, nats", divergence / compared, DIVERGENCE)

    def _whole_logits(self, case: ReferenceBatch) -> tuple[Array, Array]:
        """Logits [batch, response, vocabulary] of the whole unmodified composition, in float32 and in float64."""
        assert case.exact is not None  # the encoder is at fp32
        both = []
        for states, mode in ((case.hidden_states, nullcontext()), (case.exact, Double())):
            with torch.no_grad(), mode:
                context, _ = self.reference.fuse(states, case.input_ids, case.attention_mask)
                logits = reference_logits(self.reference, case, context)
            both.append(logits[:, :, : self.graphs.slm_size].numpy())
        return both[0], both[1]

    def _misses(self, chosen: Tensor, written: Tensor, expected: Tensor) -> int:
        """Count predicted tokens that differ from the reference's and, at fp32, are not tied with them.

        Args:
            chosen: the bundle's next tokens, [tokens].
            written: the reference's, [tokens].
            expected: the reference's logits [tokens, vocabulary], in float32.
        """
        unlike = chosen != written
        if self.graphs.float32:
            # The reference's float32 logits have an error too.
            within = 2 * (1 + 1 / MARGIN) * self.ties.tolerance * float(expected.abs().max())
            theirs, ours = (expected.gather(1, ids[:, None])[:, 0] for ids in (written, chosen))
            unlike &= (theirs - ours).abs() > within
        return int(unlike.sum())

    def _chained(
        self, cases: Sequence[ReferenceBatch], calls: Callable[[int], tuple[int, ...]]
    ) -> Iterator[tuple[ReferenceBatch, Array]]:
        """Each case with the teacher-forced logits [batch, response, vocabulary] of the three chained graphs.

        Args:
            calls: splits a response length into the lengths of decoder calls.
        """
        encoder, projector, decoder = (self.graphs.open(name) for name in contract.GRAPHS)
        for case in cases:
            hidden = encoder(prompt_feed(case))
            given = projector(prompt_feed(case) | hidden) | {CONTEXT_MASK: context_mask(self.graphs.shape, case)}
            batch, length = case.generated.shape
            each = in_turn(batch, calls(length))
            logits = forced_logits(decoder, self.graphs.shape, self.ids, case, given, each)
            yield case, logits[:, :, : self.graphs.slm_size]
