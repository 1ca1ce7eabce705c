"""Drafting: several tokens are proposed at once, and the decoder accepts or corrects them in one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np

from llm2slm_export.errors import UsageError
from llm2slm_export.inference.generation.options import GenerationOptions, is_number, is_whole
from llm2slm_export.inference.generation.sampler import draw
from llm2slm_export.inference.runtime.backend import Ids, Logits

DrafterName = Literal["ngram"]
MOST_DRAFT_TOKENS = 64
LONGEST_NGRAM = 3


@dataclass(frozen=True)
class DraftToken:
    """One proposed token.

    Args:
        token_id: the token.
        distribution: [num_tokens] the probabilities that the drafter drew it from; None if it did not draw.
        confidence: the probability that the drafter's model gives the token, without processors; 0 if it has none.
    """

    token_id: int
    distribution: Logits | None = None
    confidence: float = 0.0


class Drafter(Protocol):
    """Proposes the tokens after those of one response."""

    def draft(self, ids: Sequence[int], most: int) -> list[DraftToken]:
        """At most `most` tokens that may follow `ids`, the response so far; fewer, or none, if it does not know them."""
        ...


class NgramDrafter:
    """Prompt lookup: proposes what followed the same last tokens earlier, in the prompt or in the response.

    Args:
        prompt: the prompt's ids in the SLM's tokenizer; empty if they are not known.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._prompt = list(prompt)

    def draft(self, ids: Sequence[int], most: int) -> list[DraftToken]:
        """The tokens after the latest earlier occurrence of the longest n-gram that ends the response, n ≤ 3."""
        known = [*self._prompt, *ids]
        longest = min(LONGEST_NGRAM, len(ids), len(known) - 1)
        found = start = 0
        # The end of an earlier occurrence. Lists, because NumPy's windows take longer than most decoder calls of small SLMs.
        for end in range(len(known) - 2, -1, -1) if longest else ():
            if known[end] != known[-1]:
                continue
            size = 1
            while size < longest and size <= end and known[end - size] == known[-1 - size]:
                size += 1
            if size > found:
                found, start = size, end + 1
                if found == longest:
                    break
        return [DraftToken(token_id) for token_id in known[start : start + most]] if found else []


def verified(scores: Logits, token: DraftToken, *, accept: float, redraw: float) -> int:
    """Speculative sampling: the token after a drawn draft token, distributed as softmax(`scores`).

    The draft is accepted with probability min(1, p/q); else the token is drawn from the residual max(0, p - q). Leviathan et
    al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192.

    Args:
        scores: [num_tokens] the verifier's processed scores.
        token: the draft, with its distribution q.
        accept, redraw: uniform numbers in [0, 1) for the two choices.
    """
    assert token.distribution is not None, "the draft was not drawn"
    shifted = np.exp(scores.astype(np.float64) - scores.max())
    wanted, drafted = shifted / shifted.sum(), token.distribution.astype(np.float64)
    if accept * drafted[token.token_id] < wanted[token.token_id]:
        return token.token_id
    residual = np.maximum(wanted - drafted, 0)
    # Rounding can leave nothing where both distributions are equal.
    return draw(residual if residual.any() else wanted, redraw)


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """Options of drafting.

    Args:
        drafter: `ngram` for prompt lookup, and with a verifier the pair drafts where that finds nothing; None: the pair drafts if
            there is a verifier.
        verifier: the head that accepts or corrects the drafts; None: the pair itself.
        defer: the verifier decides only tokens to which the drafting pair's model, before temperature, top-k and the like,
            gives a lower probability. 1: all tokens. 0: none.
        num_draft_tokens: number of tokens per draft; None: adapted to the acceptance and to the time of a call.

    Raises:
        UsageError: options are invalid or contradict each other, all of them named.
    """

    drafter: DrafterName | None = None
    verifier: str | None = None
    defer: float | None = None
    num_draft_tokens: int | None = None

    def __post_init__(self) -> None:
        problems: list[str] = []
        verifier: object = self.verifier
        if self.drafter is not None and self.drafter not in get_args(DrafterName):
            problems.append(f"drafter: must be one of {', '.join(get_args(DrafterName))}, got {self.drafter!r}")
        if self.drafter is not None and self.defer is not None:
            problems.append("drafter and defer: prompt lookup has no probability to defer by")
        if verifier is not None and not isinstance(verifier, str):
            problems.append(f"verifier: must be the name of a head, got {verifier!r}")
        if self.defer is not None and not is_number(self.defer, 0, 1):
            problems.append(f"defer: must be a number from 0 to 1, got {self.defer!r}")
        if self.num_draft_tokens is not None and not is_whole(self.num_draft_tokens, 1, MOST_DRAFT_TOKENS):
            problems.append(
                f"num_draft_tokens: must be a whole number from 1 to {MOST_DRAFT_TOKENS}, got {self.num_draft_tokens!r}"
            )
        without = [name for name in ("defer",) if getattr(self, name) is not None and self.verifier is None]
        problems += [f"{name}: has no effect without verifier" for name in without]
        if self.num_draft_tokens is not None and not self.is_given:
            problems.append("num_draft_tokens: has no effect without drafter or verifier")
        _refuse(problems, "fix or remove these options")

    @property
    def is_given(self) -> bool:
        """Whether tokens are drafted."""
        return self.drafter is not None or self.verifier is not None

    def check(self, options: GenerationOptions) -> None:
        """Refuse generation options with which tokens cannot be drafted.

        Raises:
            UsageError: all of them named.
        """
        if not self.is_given:
            return
        problems = []
        if options.num_beams > 1:
            problems.append(f"num_beams: {options.num_beams}; a beam is known only at its end")
        if options.num_return_sequences > 1:
            problems.append(f"num_return_sequences: {options.num_return_sequences}; a draft is for one response")
        if options.do_sample and self.drafter is not None and self.verifier is not None:
            problems.append(
                "do_sample: with drafter and verifier, a seed's tokens would depend on the length of the drafts"
            )
        if options.output_scores and self.defer is not None:
            problems.append("output_scores: with defer the verifier does not score every token")
        _refuse(problems, "remove these options, or those of drafting (--drafter, --verifier, --defer)")


def _refuse(problems: Sequence[str], remedy: str) -> None:
    if problems:
        raise UsageError("These drafting options cannot be used.", *problems, remedy=remedy)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of equal items at the start of two sequences."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def as_row(ids: Sequence[int]) -> Ids:
    """Ids as one row, [1, tokens]."""
    return np.array(ids, np.int64).reshape(1, -1)
