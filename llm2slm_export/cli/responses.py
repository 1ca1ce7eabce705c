"""What `run` prints: responses in order, as they come, for people or as JSON; and where the time went."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llm2slm_export.cli import console
from llm2slm_export.cli.prompt_files import Prompt
from llm2slm_export.inference.outputs import Generation, Step

# Printed only where they say something.
_OPTIONAL = ("score", "token_logprobs", "cached", "warnings")


def print_stream(steps: Iterable[Step], prompt: Prompt) -> list[Generation]:
    """A response as it arrives."""
    generation = None
    for step in steps:
        print(step.text, end="", flush=True)
        generation = step.generation
    print()
    assert generation is not None  # the last step carries it
    _tell_dropped(generation, prompt)
    return [generation]


def print_answers(
    parts: Iterable[Sequence[Generation]],
    prompts: Sequence[Prompt],
    *,
    json: bool,
    refused: Mapping[int, str] | None = None,
) -> list[Generation]:
    """Responses in the prompts' order, each on a line of its own, with line ends in it as \\n.

    Args:
        parts: each with all responses of its prompts.
        prompts: empty where they are not known (an encoding's).
        json: an object for each response instead of its text.
        refused: why, by the index of each prompt that has no response: an empty line, or an object with `error`, keeps
            its place.
    """
    refused = refused or {}
    waiting, printed, prompt = iter(enumerate(prompts)), [], None
    for part in parts:
        several = any(generation.sequence for generation in part)
        for generation in part:
            if generation.sequence == 0:
                prompt = _next_answered(waiting, refused, json=json)
                _tell_dropped(generation, prompt)
            if json:
                console.print_json(_fields(generation, prompt, several=several))
            else:
                print(generation.text.replace("\n", "\\n"), flush=True)
            printed.append(generation)
    _next_answered(waiting, refused, json=json)
    return printed


def _next_answered(waiting: Iterator[tuple[int, Prompt]], refused: Mapping[int, str], *, json: bool) -> Prompt | None:
    """The next prompt that has a response; a line is printed for each refused one before it."""
    for index, prompt in waiting:
        if index not in refused:
            return prompt
        if json:
            console.print_json({"prompt": prompt.text, "error": refused[index]})
        else:
            print(flush=True)
    return None


def print_profile(generations: Sequence[Generation]) -> None:
    """Times by stage, on stderr. What ran together shares its times, so each batch counts once."""
    prompts = [generation for generation in generations if generation.sequence == 0]
    read = sum(generation.prompt_tokens for generation in prompts)
    written = sum(generation.new_tokens for generation in generations)
    # The prefill call already yields each response's first token.
    tokens = {"decode": written - len(generations), "total": written}
    timings = {generation.batch: generation.timings_ms for generation in generations}.values()
    rows = [
        (stage, sum(batch[stage] for batch in timings), tokens.get(stage, read)) for stage in generations[0].timings_ms
    ]
    console.console(stderr=True).print(_profile_table(rows))


def _profile_table(rows: Sequence[tuple[str, float, int]]) -> console.Table:
    """Stages with their time in ms and the tokens they went over."""

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


def _tell_dropped(generation: Generation, prompt: Prompt | None) -> None:
    if generation.dropped_tokens:
        place = prompt.place if prompt else "a prompt of the encoding"
        print(f"{place}: {generation.dropped_tokens} tokens of the prompt were dropped", file=sys.stderr)
