"""What a caller gets: a whole response, and one token of one. Data, no behaviour."""

from dataclasses import dataclass

from llm2slm_export.inference.generation.options import FinishReason


@dataclass(frozen=True)
class Generation:
    """A response.

    Args:
        token_ids: the tokens written, without the decoder start token and with the end-of-sequence token where there
            is one: transformers' `generate` without its padding.
        finish_reason: `stop` (end-of-sequence token or stop string) or `length` (`max_new_tokens`).
        prompt_tokens: tokens the LLM read.
        dropped_tokens: tokens cut from an over-long prompt.
        device: the device really used.
        timings_ms: `tokenize`, `encode`, `project`, `prefill` (first decoder call), `decode` (all later ones) and
            `total`, their sum, for the batch that the prompt was in; `cache`, looking up and storing, where there is a
            cache. An encoding's share is counted at every use.
        batch: number of that batch among those of the call: responses with the same number share their times.
        sequence: index among the responses to the same prompt (`num_return_sequences`).
        score: of a beam, transformers' `sequences_scores`; None without beams.
        token_logprobs: log-probability of every token; None unless asked for with `output_scores`.
        cached: whether the prompt's encoding came from the cache; None without one.
        warnings: what was asked for and is not in use, and why.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    dropped_tokens: int
    device: str
    timings_ms: dict[str, float]
    batch: int = 0
    sequence: int = 0
    score: float | None = None
    token_logprobs: tuple[float, ...] | None = None
    cached: bool | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One token of a response.

    Args:
        text: what became certain with this token: none, or more than its own text where some was held back.
        finish_reason: None on every step but the last.
        logprob: the token's log-probability; None unless asked for with `output_scores`.
        generation: the whole response, on the last step of a stream.
    """

    token_id: int
    text: str
    finish_reason: FinishReason | None
    logprob: float | None = None
    generation: Generation | None = None
