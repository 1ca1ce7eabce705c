"""The outputs of generation and of scoring: a complete response, one step of a stream, and a response's log-probability."""

from dataclasses import dataclass

from llm2slm_export.inference.generation.options import FinishReason


@dataclass(frozen=True)
class Generation:
    """A response.

    Args:
        text: the response, cut before a stop string.
        token_ids: the new tokens, without the decoder start token and padding, with the end-of-sequence token if there is
            one.
        finish_reason: `stop` (end-of-sequence token or stop string) or `length` (`max_new_tokens`).
        prompt_tokens: number of prompt tokens encoded by the LLM.
        new_tokens: number of `token_ids`.
        dropped_tokens: number of tokens truncated from the prompt.
        device: the device in use.
        timings_ms: milliseconds of the prompt's batch: `tokenize`, `encode`, `project`, `prefill` (first decoder call),
            `decode` (all later ones), `cache` (lookup and storage, with a cache), and `total`, their sum. A reused
            encoding's times are counted at every use.
        batch: index of the prompt's batch in the call. Responses of the same batch share `timings_ms`.
        sequence: index among the responses to the same prompt (`num_return_sequences`).
        score: the beam's score, transformers' `sequences_scores`; None without beam search.
        token_logprobs: log-probability of each token; None without `output_scores`.
        cached: whether the prompt's encoding came from the cache; None without a cache.
        warnings: requested settings that are not in effect, with the reason.
        drafted_tokens, accepted_tokens: number of draft tokens that the decoder verified, and of those that it accepted;
            None without drafting.
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
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None


@dataclass(frozen=True)
class Step:
    """One token of a response.

    Args:
        text: the text released with this token. It is empty while text is held back, and then longer than the token's own.
        finish_reason: set on the last step only.
        logprob: the token's log-probability; None without `output_scores`.
        generation: the complete response, on the last step of a stream.
    """

    token_id: int
    text: str
    finish_reason: FinishReason | None
    logprob: float | None = None
    generation: Generation | None = None


@dataclass(frozen=True)
class Score:
    """The log-probability of a given response.

    Args:
        text: the response.
        token_ids: its ids in the SLM's tokenizer, then the end-of-sequence token if that is scored too.
        token_logprobs: the log-probability of each token, in nats: log-softmax of the logits of the whole vocabulary.
        logprob: their sum.
        is_greedy: whether greedy search without logits processors chooses every one of these tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class PromptScores:
    """The scores of the responses to one prompt.

    Args:
        prompt_tokens: number of prompt tokens encoded by the LLM.
        dropped_tokens: number of tokens truncated from the prompt.
        scores: one for each response, in order.
    """

    prompt_tokens: int
    dropped_tokens: int
    scores: tuple[Score, ...]
