"""Checks of a request against the limits of TensorRT engines, before any graph runs."""

from collections.abc import Sequence

from llm2slm_export.bundle.manifest import EngineLimits
from llm2slm_export.errors import PromptError, UsageError
from llm2slm_export.inference.generation.options import GenerationOptions


def check_prompts(limits: EngineLimits | None, prompt_tokens: Sequence[int]) -> None:
    """Refuse prompts with more tokens than the engines accept.

    Raises:
        PromptError: prompts are too long, with the first of them.
    """
    if limits is None:
        return
    problems = {i: f"{tokens} tokens" for i, tokens in enumerate(prompt_tokens) if tokens > limits.prompt}
    if problems:
        raise PromptError(
            f"{len(problems)} of {len(prompt_tokens)} prompts are longer than the engines accept: {limits.prompt} tokens.",
            remedy="shorten these prompts, set truncate=True (--truncate), or build the engines again "
            f"with --max-prompt {max(prompt_tokens)}",
            prompts=problems,
        )


def check_new_tokens(limits: EngineLimits | None, options: GenerationOptions) -> None:
    """Refuse `max_new_tokens` above the room in the engines' KV cache.

    Raises:
        UsageError: with the limit.
    """
    if limits is not None and options.max_new_tokens > limits.new:
        raise UsageError(
            f"max_new_tokens is {options.max_new_tokens}; the engines have room for {limits.new}.",
            remedy=f"lower max_new_tokens (--max-new-tokens) to {limits.new} or less, or build the engines again with "
            f"--max-new {options.max_new_tokens}",
        )


def prompts_at_a_time(limits: EngineLimits | None, options: GenerationOptions, asked: int | None) -> int | None:
    """The maximum number of prompts per batch; None: unlimited.

    Args:
        asked: the requested batch size; None: the engines' maximum.

    Raises:
        UsageError: the request exceeds the engines' batch size.
    """
    if limits is None:
        return asked
    rows = rows_per_prompt(options)
    most = limits.batch // rows
    if most == 0 or (asked is not None and asked > most):
        check_rows(limits, options, prompts=max(1, asked or 1))
    return most if asked is None else asked


def check_rows(limits: EngineLimits | None, options: GenerationOptions, *, prompts: int) -> None:
    """Refuse a batch with more rows than the engines accept.

    Raises:
        UsageError: with the limit.
    """
    rows = rows_per_prompt(options)
    if limits is None or prompts * rows <= limits.batch:
        return
    most = limits.batch // rows
    raise UsageError(
        f"A batch of {prompts * rows} rows is larger than the engines accept: {limits.batch}.",
        f"prompts: {prompts}; rows per prompt: {rows} (num_beams {options.num_beams}, num_return_sequences {options.num_return_sequences})",
        remedy=(
            f"lower batch_size (--batch-size) to {most} or less" if most else "lower num_beams or num_return_sequences"
        )
        + f", or build the engines again with --max-batch {prompts * rows}",
    )


def rows_per_prompt(options: GenerationOptions) -> int:
    """Decoder rows per prompt."""
    return max(options.num_beams, options.num_return_sequences)
