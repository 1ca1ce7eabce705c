"""The output of `run`: responses in order, as text or JSON, scores of given responses, and the profile."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llm2slm_export.cli import console
from llm2slm_export.cli.prompt_files import Prompt
from llm2slm_export.inference.outputs import Generation, PromptScores, Step

# These fields are printed only if they have a value.
_OPTIONAL = ("score", "token_logprobs", "cached", "warnings", "drafted_tokens", "accepted_tokens")


def print_stream(steps: Iterable[Step], prompt: Prompt) -> list[Generation]:
    """Print a response as it is generated."""
    generation = None
    for step in steps:
        print(step.text, end="", flush=True)
        generation = step.generation
    print()
    assert generation is not None  # the last step carries it
    _tell_dropped(generation.dropped_tokens, prompt)
    return [generation]


def print_answers(
    parts: Iterable[Sequence[Generation]],
    prompts: Sequence[Prompt],
    *,
    json: bool,
    refused: Mapping[int, str] | None = None,
) -> list[Generation]:
    """Print responses in the prompts' order, one per line, with their line ends as \\n.

    Args:
        parts: lists of responses, each with all responses of its prompts.
        prompts: empty if they are not known (an encoding's).
        json: print an object for each response instead of its text.
        refused: the reason for each prompt without a response, by index. An empty line, or an object with `error`, takes
            the place of its response.
    """
    refused = refused or {}
    waiting, printed, prompt = iter(enumerate(prompts)), [], None
    for part in parts:
        several = any(generation.sequence for generation in part)
        for generation in part:
            if generation.sequence == 0:
                prompt = _next_answered(waiting, refused, json=json)
                _tell_dropped(generation.dropped_tokens, prompt)
            if json:
                console.print_json(_fields(generation, prompt, several=several))
            else:
                print(generation.text.replace("\n", "\\n"), flush=True)
            printed.append(generation)
    _next_answered(waiting, refused, json=json)
    return printed


def print_scores(
    parts: Iterable[PromptScores],
    prompts: Sequence[Prompt],
    *,
    json: bool,
    refused: Mapping[int, str] | None = None,
) -> None:
    """Print the scores of given responses: a table for each prompt, the best first.

    Args:
        parts: the scores of each prompt that is not refused.
        prompts: empty if they are not known (an encoding's).
        json: print an object for each prompt, with the responses in the given order, instead of tables.
        refused: the reason for each prompt without scores, by index. With `json` an object with `error` takes its place.
    """
    refused = refused or {}
    waiting = iter(enumerate(prompts))
    for number, entry in enumerate(parts, start=1):
        prompt = _next_answered(waiting, refused, json=json)
        _tell_dropped(entry.dropped_tokens, prompt)
        if json:
            fields = asdict(entry)
            if not entry.dropped_tokens:
                del fields["dropped_tokens"]
            console.print_json(({"prompt": prompt.text} if prompt else {}) | fields)
            continue
        best = sorted(entry.scores, key=lambda score: -score.logprob)
        title = prompt.text.replace("\n", "\\n") if prompt else f"prompt {number} of the encoding"
        rows = ((f"{score.logprob:.4f}", len(score.token_ids), score.text) for score in best)
        console.console().print(console.Table(title, ("log-probability", "tokens", "response"), rows, right=(0, 1)))
    _next_answered(waiting, refused, json=json)


def _next_answered(waiting: Iterator[tuple[int, Prompt]], refused: Mapping[int, str], *, json: bool) -> Prompt | None:
    """The next prompt with a response. A line is printed for each refused prompt before it."""
    for index, prompt in waiting:
        if index not in refused:
            return prompt
        if json:
            console.print_json({"prompt": prompt.text, "error": refused[index]})
        else:
            print(flush=True)
    return None


def print_profile(generations: Sequence[Generation]) -> None:
    """Print times by stage, and the number of accepted draft tokens, on stderr.

    The responses of a batch share its times, so each batch counts once.
    """
    prompts = [generation for generation in generations if generation.sequence == 0]
    read = sum(generation.prompt_tokens for generation in prompts)
    written = sum(generation.new_tokens for generation in generations)
    # The prefill call already yields each response's first token.
    tokens = {"decode": written - len(generations), "total": written}
    timings = {generation.batch: generation.timings_ms for generation in generations}.values()
    rows = [
        (stage, sum(batch[stage] for batch in timings), tokens.get(stage, read)) for stage in generations[0].timings_ms
    ]
    human = console.console(stderr=True)
    human.print(_profile_table(rows))
    drafted = [generation for generation in generations if generation.drafted_tokens is not None]
    if drafted:
        accepted = sum(generation.accepted_tokens or 0 for generation in drafted)
        human.print(
            f"accepted {accepted} of {sum(generation.drafted_tokens or 0 for generation in drafted)} draft tokens"
        )


def _profile_table(rows: Sequence[tuple[str, float, int]]) -> console.Table:
    """A table of stages with their times in ms and their numbers of tokens."""

    def cells(stage: str, ms: float, tokens: int) -> tuple[object, ...]:
        per_token = f"{ms / tokens:.3f}" if tokens else "-"
        return stage, f"{ms:.2f}", tokens, per_token, f"{1000 * tokens / ms:.0f}" if ms else "-"

    return console.Table(
        "Profile", ("stage", "ms", "tokens", "ms/token", "tokens/s"), (cells(*row) for row in rows), right=(1, 2, 3, 4)
    )


def _fields(generation: Generation, prompt: Prompt | None, *, several: bool) -> dict[str, Any]:
    fields = asdict(generation)
    omitted = {name for name in _OPTIONAL if fields[name] in (None, ())}
    if not generation.dropped_tokens:
        omitted.add("dropped_tokens")
    if not several:
        omitted.add("sequence")
    kept = {name: value for name, value in fields.items() if name not in omitted}
    return ({"prompt": prompt.text} if prompt else {}) | kept


def _tell_dropped(dropped_tokens: int, prompt: Prompt | None) -> None:
    if dropped_tokens:
        place = prompt.place if prompt else "a prompt of the encoding"
        print(f"{place}: {dropped_tokens} tokens of the prompt were dropped", file=sys.stderr)
