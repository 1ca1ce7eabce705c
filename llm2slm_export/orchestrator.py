"""Encode once, then loop: a pair that turns prompts into responses, whatever runs its graphs."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from llm2slm_export.bundle import Bundle, Manifest, open_bundle
from llm2slm_export.errors import PromptError, UsageError
from llm2slm_export.generation import FinishReason, GenerationOptions, TextStream, TokenChooser
from llm2slm_export.runtime.backend import Backend, Encoding


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
            `total`, their sum, for the batch that the prompt was in. An encoding's share is counted at every use.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    dropped_tokens: int
    device: str
    timings_ms: dict[str, float]


@dataclass(frozen=True)
class Step:
    """One token of a response.

    Args:
        text: what became certain with this token: none, or more than its own text where some was held back.
        finish_reason: None on every step but the last.
        generation: the whole response, on the last step of a stream.
    """

    token_id: int
    text: str
    finish_reason: FinishReason | None
    generation: Generation | None = None


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    dropped: int
    ms: float


@dataclass(frozen=True)
class _Call:
    """One decoder call: a step for every row that was not finished before it, and how long the call took."""

    steps: tuple[Step | None, ...]
    ms: float


def load(path: str | os.PathLike[str], *, device: str = "cpu", threads: int | None = None) -> "Orchestrator":
    """Open a bundle, check its files, and load its graphs.

    Args:
        path: a directory that `llm2slm-export build` wrote.
        device: `cpu`, `cuda` or `cuda:n`.
        threads: threads inside one operator; None leaves the choice to the runtime.

    Raises:
        BundleError: not a bundle, or not what was built.
        DeviceError: a device that cannot be had.
        UsageError: a device name or number of threads that means nothing.
        MissingExtraError: no runtime is installed.
    """
    from llm2slm_export.runtime.ort import OrtBackend, find_device

    # Before hashing gigabytes.
    find_device(device)
    bundle = open_bundle(Path(path))
    return Orchestrator(bundle, OrtBackend(bundle, device=device, threads=threads))


class Orchestrator:
    """A loaded pair. A context manager; `close` releases the graphs.

    Args:
        bundle: an opened bundle: its manifest and tokenizers are read.
        backend: runs its graphs.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self._manifest = bundle.manifest
        self._backend: Backend | None = backend
        self._llm_tokenizer = _tokenizer(bundle.path(bundle.manifest.tokenizer.llm))
        self._slm_tokenizer = _tokenizer(bundle.path(bundle.manifest.tokenizer.slm))
        self._device = backend.device

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._manifest

    @property
    def device(self) -> str:
        """The device really in use."""
        return self._device

    def encode(self, prompts: Sequence[str], *, truncate: bool = False) -> Encoding:
        """Run the encoder and the projector once on a batch of prompts.

        Args:
            truncate: cut prompts that are too long instead of refusing them.

        Raises:
            UsageError: no prompts, or something else than a sequence of strings.
            PromptError: prompts that are empty or too long, all of them named.
        """
        return self._encode(self._tokenize(prompts, truncate=truncate))

    def generate(
        self, prompts: Sequence[str], *, batch_size: int | None = None, truncate: bool = False, **options: Any
    ) -> list[Generation]:
        """The responses to prompts, in their order.

        Args:
            batch_size: prompts per batch; None puts all in one.
            truncate: cut prompts that are too long instead of refusing them.
            options: `GenerationOptions` by name; the bundle's defaults where nothing is said.

        Raises:
            UsageError: options or prompts that mean nothing.
            PromptError: prompts that are empty or too long, all of them named; nothing is generated then.
        """
        size = batch_size if batch_size is not None else max(1, len(prompts))
        batches = self.generate_batches(prompts, batch_size=size, truncate=truncate, **options)
        return [generation for batch in batches for generation in batch]

    def generate_batches(
        self, prompts: Sequence[str], *, batch_size: int, truncate: bool = False, **options: Any
    ) -> Iterator[list[Generation]]:
        """The same, a batch at a time as each is done. Every prompt is checked before this returns.

        Raises:
            UsageError, PromptError: as `generate`.
        """
        resolved = self._options(options)
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}.", remedy="give at least 1")
        rows = self._tokenize(prompts, truncate=truncate)
        self._check_total(rows, resolved)
        return (
            self._generate(self._encode(rows[first : first + batch_size]), resolved, first_row=first)
            for first in range(0, len(rows), batch_size)
        )

    def generate_from(self, encoding: Encoding, **options: Any) -> list[Generation]:
        """The responses to prompts already encoded by this pair. The encoding can be used again.

        Raises:
            UsageError: options that mean nothing.
        """
        return self._generate(encoding, self._options(options), first_row=0)

    def stream(self, prompt: str, *, truncate: bool = False, **options: Any) -> Iterator[Step]:
        """The response to one prompt, token by token; the texts of its steps join to `Generation.text`.

        The prompt is encoded before this returns. `truncate`, `options` and errors as for `generate`.
        """
        resolved = self._options(options)
        rows = self._tokenize([prompt], truncate=truncate)
        self._check_total(rows, resolved)
        return self._stream(self._encode(rows), resolved)

    def close(self) -> None:
        """Release the graphs. The pair cannot be used afterwards; closing twice is harmless."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _options(self, options: dict[str, Any]) -> GenerationOptions:
        return GenerationOptions.resolve(self._manifest.generation, **options)

    def _running(self) -> Backend:
        if self._backend is None:
            raise UsageError("This pair has been closed.", remedy="load the bundle again")
        return self._backend

    def _tokenize(self, prompts: Sequence[str], *, truncate: bool) -> list[_Prompt]:
        _check_prompts(prompts)
        rows = [self._tokenize_one(prompt, truncate=truncate) for prompt in prompts]
        most = self._manifest.max_prompt_tokens
        problems = [
            f"prompt {index}: no tokens" if not row.ids else f"prompt {index}: {len(row.ids)} tokens, at most {most}"
            for index, row in enumerate(rows)
            if not 0 < len(row.ids) <= most
        ]
        if problems:
            raise PromptError(
                f"{len(problems)} of {len(rows)} prompts cannot be run by {self._manifest.name!r}.",
                *problems,
                remedy="shorten the prompts named, or have them cut with truncate=True (--truncate)",
            )
        return rows

    def _check_total(self, rows: Sequence[_Prompt], options: GenerationOptions) -> None:
        """Refuse what would run past the last position that the SLM's decoder knows."""
        most = self._manifest.max_total_tokens
        if most is None:
            return
        problems = [
            f"prompt {index}: {len(row.ids)} tokens and {options.max_new_tokens} new ones"
            for index, row in enumerate(rows)
            if len(row.ids) + options.max_new_tokens > most
        ]
        if problems:
            raise PromptError(
                f"{len(problems)} of {len(rows)} prompts leave too little room: {self._manifest.name!r} knows {most} positions.",
                *problems,
                remedy="shorten the prompts named, or lower max_new_tokens (--max-new-tokens)",
            )

    def _tokenize_one(self, prompt: str, *, truncate: bool) -> _Prompt:
        started = perf_counter()
        # Not str.format: a template may hold other braces.
        encoded = self._llm_tokenizer.encode(self._manifest.prompt_template.replace("{prompt}", prompt))
        ids: list[int] = encoded.ids
        dropped = max(0, len(ids) - self._manifest.max_prompt_tokens) if truncate else 0
        if dropped:
            # The model expects the end-of-sequence token that its tokenizer appends.
            tail = 1 if encoded.special_tokens_mask[-1] else 0
            ids = ids[: len(ids) - tail - dropped] + ids[len(ids) - tail :]
        return _Prompt(ids, dropped, _ms_since(started))

    def _encode(self, rows: Sequence[_Prompt]) -> Encoding:
        backend = self._running()
        longest = max(len(row.ids) for row in rows)
        input_ids = np.full((len(rows), longest), self._manifest.special_ids.prompt_pad, np.int64)
        attention_mask = np.zeros((len(rows), longest), np.int64)
        for index, row in enumerate(rows):
            input_ids[index, : len(row.ids)] = row.ids
            attention_mask[index, : len(row.ids)] = 1
        started = perf_counter()
        hidden = backend.encode(input_ids, attention_mask)
        encode_ms = _ms_since(started)
        started = perf_counter()
        conditioning = backend.project(hidden, input_ids, attention_mask)
        return Encoding(
            conditioning=conditioning,
            input_ids=input_ids,
            prompt_tokens=tuple(len(row.ids) for row in rows),
            dropped_tokens=tuple(row.dropped for row in rows),
            timings_ms={
                "tokenize": sum(row.ms for row in rows),
                "encode": encode_ms,
                "project": _ms_since(started),
            },
        )

    def _calls(self, encoding: Encoding, options: GenerationOptions, *, first_row: int) -> Iterator[_Call]:
        """The loop: one decoder call after another until every row is finished."""
        backend, special_ids, batch = self._running(), self._manifest.special_ids, len(encoding)
        chooser = TokenChooser(
            options,
            special_ids=special_ids,
            choices=min(self._manifest.tokenizer.slm_size, self._manifest.shape.vocab),
            batch=batch,
            first_row=first_row,
        )
        texts = [TextStream(self._decode, options.stop) for _ in range(batch)]
        active = np.ones(batch, bool)
        started = perf_counter()
        state, logits = backend.prefill(encoding.conditioning)
        for new_tokens in range(1, options.max_new_tokens + 1):
            ids = np.where(active, chooser.choose(logits, active), special_ids.pad)
            last = new_tokens == options.max_new_tokens
            steps = tuple(
                self._step(texts[row], int(ids[row]), last=last) if active[row] else None for row in range(batch)
            )
            active = np.array([step is not None and step.finish_reason is None for step in steps])
            yield _Call(steps, _ms_since(started))
            if not active.any():
                return
            # After the yield: what the consumer does with a step is not the decoder's time.
            started = perf_counter()
            logits = backend.step(state, ids[:, None])

    def _step(self, text: TextStream, token_id: int, *, last: bool) -> Step:
        piece = text.push(token_id)
        reason: FinishReason | None = "length" if last else None
        if token_id in self._manifest.special_ids.eos:
            reason = "stop"
        if reason and not text.stopped:
            piece += text.finish()
        return Step(token_id, piece, "stop" if text.stopped else reason)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._slm_tokenizer.decode(ids, skip_special_tokens=True)

    def _stream(self, encoding: Encoding, options: GenerationOptions) -> Iterator[Step]:
        calls = []
        for call in self._calls(encoding, options, first_row=0):
            calls.append(call)
            for step in call.steps:
                if step is not None and step.finish_reason is not None:
                    yield replace(step, generation=self._fold(encoding, calls)[0])
                elif step is not None:
                    yield step

    def _generate(self, encoding: Encoding, options: GenerationOptions, *, first_row: int) -> list[Generation]:
        return self._fold(encoding, list(self._calls(encoding, options, first_row=first_row)))

    def _fold(self, encoding: Encoding, calls: Sequence[_Call]) -> list[Generation]:
        timings = {
            **encoding.timings_ms,
            "prefill": calls[0].ms,
            "decode": sum(call.ms for call in calls[1:]),
        }
        timings["total"] = sum(timings.values())
        return [self._fold_row(encoding, calls, row, timings) for row in range(len(encoding))]

    def _fold_row(self, encoding: Encoding, calls: Sequence[_Call], row: int, timings: dict[str, float]) -> Generation:
        steps = [step for call in calls if (step := call.steps[row]) is not None]
        return Generation(
            text="".join(step.text for step in steps),
            token_ids=tuple(step.token_id for step in steps),
            finish_reason=steps[-1].finish_reason or "length",
            prompt_tokens=encoding.prompt_tokens[row],
            new_tokens=len(steps),
            dropped_tokens=encoding.dropped_tokens[row],
            device=self._device,
            timings_ms=dict(timings),
        )


def _tokenizer(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    # A tokenizer.json may carry its training run's padding and truncation.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise UsageError(
            "The prompts are one string, not a sequence of strings.", f"got: {prompts!r}", remedy=f"give [{prompts!r}]"
        )
    if not prompts:
        raise UsageError("There are no prompts.", f"got: {prompts!r}", remedy="give at least one prompt")
    wrong = [f"prompt {i}: {type(prompt).__name__}" for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    if wrong:
        raise UsageError("Some prompts are not strings.", *wrong, remedy="give strings")
    empty = [f"prompt {i}: {prompt!r}" for i, prompt in enumerate(prompts) if not prompt.strip()]
    if empty:
        raise PromptError("Some prompts are empty.", *empty, remedy="leave them out, or give them text")
    broken = [f"prompt {i}: {prompt!a}" for i, prompt in enumerate(prompts) if _has_surrogate(prompt)]
    if broken:
        raise PromptError(
            "Some prompts are not Unicode text: they hold lone surrogates.",
            *broken,
            remedy="read them as UTF-8, or drop the characters shown as \\ud8xx … \\udfxx",
        )


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _ms_since(started: float) -> float:
    return (perf_counter() - started) * 1e3
