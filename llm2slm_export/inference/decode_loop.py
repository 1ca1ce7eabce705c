"""The decoder's half of a pair: from an encoding to responses, one decoder call after another.

It knows no prompt's text, no batch border and no file. The LLM is not touched.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
from tokenizers import Tokenizer

from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.contract import GRAPHS
from llm2slm_export.errors import BundleError, Llm2SlmError
from llm2slm_export.inference.encodings.encoding import Encoding
from llm2slm_export.inference.generation.beam_search import BeamSearch, Hypothesis
from llm2slm_export.inference.generation.detokenizer import Detokenizer
from llm2slm_export.inference.generation.options import FinishReason, GenerationOptions
from llm2slm_export.inference.generation.sampler import Sampler
from llm2slm_export.inference.outputs import Generation, Step
from llm2slm_export.inference.runtime.backend import Backend, DecoderState, Ids, Logits


@dataclass(frozen=True)
class _Call:
    """One decoder call: a step for every row that was not finished before it, and how long the call took."""

    steps: Mapping[int, Step]
    ms: float


class DecodeLoop:
    """Writes the responses to encodings.

    Args:
        backend: runs the decoder graph.
        manifest: of the head that writes.
        tokenizer: the SLM's.
        num_tokens: ids from here on are never written: the tokenizer cannot produce them.
    """

    def __init__(self, backend: Backend, manifest: Manifest, tokenizer: Tokenizer, *, num_tokens: int) -> None:
        self._backend, self._manifest, self._tokenizer, self._num_tokens = backend, manifest, tokenizer, num_tokens

    def write(
        self, encoding: Encoding, options: GenerationOptions, *, prompts: Sequence[int], batch: int = 0
    ) -> list[list[Generation]]:
        """The responses to each prompt of an encoding.

        Args:
            prompts: index of each row's prompt among all prompts: what is drawn depends on it, and not on the batch.
            batch: the encoding's number, for `Generation.batch`.

        Raises:
            BundleError: the decoder's logits are not finite.
            Llm2SlmError: there is too little memory for so many rows.
        """
        respond = self._search if options.num_beams > 1 else self._choose
        try:
            responses = respond(encoding, options, prompts)
        except MemoryError as error:
            raise Llm2SlmError(
                "There is too little memory for the responses.",
                f"prompts: {len(prompts)}, num_beams: {options.num_beams}, "
                f"num_return_sequences: {options.num_return_sequences}, vocabulary: {self._manifest.shape.vocab_size}",
                remedy="use a smaller batch_size (--batch-size), num_beams or num_return_sequences",
            ) from error
        return [[replace(g, batch=batch, sequence=i) for i, g in enumerate(row)] for row in responses]

    def stream(self, encoding: Encoding, options: GenerationOptions) -> Iterator[Step]:
        """The one response to an encoding of one prompt, token by token; the last step carries it whole.

        Raises:
            BundleError: as `write`.
        """
        calls = []
        for call in self._calls(encoding, options, [0]):
            calls.append(call)
            (step,) = call.steps.values()
            if step.finish_reason is not None:
                blank = self._blank(encoding, 0, _timings(encoding, [call.ms for call in calls]))
                step = replace(step, generation=_fold(blank, calls, 0))
            yield step

    def _choose(self, encoding: Encoding, options: GenerationOptions, prompts: Sequence[int]) -> list[list[Generation]]:
        """Greedy choice or sampling."""
        calls, count = list(self._calls(encoding, options, prompts)), options.num_return_sequences
        timings = _timings(encoding, [call.ms for call in calls])
        return [
            [_fold(self._blank(encoding, row, timings), calls, row * count + sequence) for sequence in range(count)]
            for row in range(len(encoding))
        ]

    def _calls(self, encoding: Encoding, options: GenerationOptions, prompts: Sequence[int]) -> Iterator[_Call]:
        """One decoder call after another until every row is finished; a row that is leaves, and costs nothing more.

        The rows are each prompt's `num_return_sequences`, prompt after prompt.
        """
        count = options.num_return_sequences
        rows = [(prompt, sequence) for prompt in prompts for sequence in range(count)]
        sampler = Sampler(options, special_ids=self._manifest.special_ids, num_tokens=self._num_tokens, rows=rows)
        texts = [Detokenizer(self._decode, options.stop) for _ in rows]
        started = perf_counter()
        state, logits = self._prefill(encoding, count)
        running, best = np.arange(len(rows)), None
        for new_tokens in range(1, options.max_new_tokens + 1):
            if not _all_finite(logits):
                raise self._non_finite_error(logits, encoding, running // count, prompts=prompts, new_token=new_tokens)
            ids = sampler.choose(logits) if best is None else sampler.accept(best[0])
            logprobs = sampler.logprobs().tolist() if options.output_scores else [None] * len(ids)
            last = new_tokens == options.max_new_tokens
            steps = {
                row: self._step(texts[row], token_id, logprob, last=last)
                for row, token_id, logprob in zip(running.tolist(), ids.tolist(), logprobs, strict=True)
            }
            yield _Call(steps, _ms_since(started))
            # After the yield: what the consumer does with a step is not the decoder's time.
            started = perf_counter()
            going = np.flatnonzero([step.finish_reason is None for step in steps.values()])
            if not len(going):
                return
            if len(going) < len(running):
                sampler.keep(going)
                self._backend.select(state, going)
                running, ids = running[going], ids[going]
            best = self._backend.step_argmax(state, ids[:, None]) if sampler.is_plain_greedy else None
            logits = self._backend.step(state, ids[:, None]) if best is None else best[1][:, None]

    def _prefill(self, encoding: Encoding, count: int) -> tuple[DecoderState, Logits]:
        """The prompt pass, once for each prompt, and then `count` rows of each: state and logits [batch · count, vocab]."""
        state, logits = self._backend.prefill(encoding.conditioning)
        copies = np.repeat(np.arange(len(encoding)), count)
        self._backend.select(state, copies)
        return state, logits[copies]

    def _step(self, text: Detokenizer, token_id: int, logprob: float | None, *, last: bool) -> Step:
        piece = text.push(token_id)
        reason: FinishReason | None = "length" if last else None
        if token_id in self._manifest.special_ids.eos:
            reason = "stop"
        if reason and not text.stopped:
            piece += text.finish()
        return Step(token_id, piece, "stop" if text.stopped else reason, logprob)

    def _search(self, encoding: Encoding, options: GenerationOptions, prompts: Sequence[int]) -> list[list[Generation]]:
        """Beam search: rows are moved, copied and dropped between calls as the search says."""
        search = BeamSearch(
            options, special_ids=self._manifest.special_ids, num_tokens=self._num_tokens, prompts=prompts,
            stops=self._stops(options.stop),
        )  # fmt: skip
        started = perf_counter()
        state, logits = self._backend.prefill(encoding.conditioning)
        prefill_ms = _ms_since(started)
        started = perf_counter()
        rows = np.arange(len(encoding))
        for new_tokens in range(1, options.max_new_tokens + 1):
            if not _all_finite(logits):
                raise self._non_finite_error(logits, encoding, rows, prompts=prompts, new_token=new_tokens)
            advance = search.advance(logits)
            if advance is None:
                break
            self._backend.select(state, advance.rows)
            logits, rows = self._backend.step(state, advance.ids[:, None]), rows[advance.rows]
        timings = _timings(encoding, [prefill_ms, _ms_since(started)])
        return [
            [self._told(self._blank(encoding, row, timings), found, options) for found in hypotheses]
            for row, hypotheses in enumerate(search.results())
        ]

    def _non_finite_error(
        self, logits: Logits, encoding: Encoding, rows: Ids, *, prompts: Sequence[int], new_token: int
    ) -> BundleError:
        """The error of logits [rows, vocab] that nothing can be chosen by.

        Args:
            rows: of each row of the logits, the row of the encoding that it goes on from.
            prompts: of each row of the encoding, the index of its prompt among all prompts.
            new_token: how many tokens there would be with the one that the logits are for.
        """
        arrays = self._backend.arrays(encoding.conditioning).values()
        # By prompt: what spoils one of its beams or sequences seldom leaves the others.
        highest = zip(rows.tolist(), logits.max(axis=1).tolist(), strict=True)
        found = {row: most for row, most in highest if not math.isfinite(most)}
        built = self._backend.precisions
        precision = ", ".join(f"{name} {built[name]}" for name in GRAPHS if name in built)
        return BundleError(
            f"The decoder of {self._manifest.name!r} gives logits that are not finite, for new token {new_token}.",
            *(
                f"prompt {prompts[row]}: the highest is {'NaN' if math.isnan(most) else most}; what encoder and projector "
                f"made of it is {'finite' if all(np.isfinite(array[row]).all() for array in arrays) else 'not finite'}"
                for row, most in sorted(found.items())
            ),
            f"precision: {precision}; device: {self._backend.device}",
            remedy="fp16 overflows above 65504: where there is any, build the bundle again with --precision bf16 or fp32 "
            "(engines: --engine-precision); where there is none, look for weights that are not finite in what it was "
            "built from",
        )

    def _told(self, blank: Generation, found: Hypothesis, options: GenerationOptions) -> Generation:
        """A hypothesis as a response."""
        text = self._decode(found.token_ids)
        ends = [at for at in map(text.find, options.stop) if at >= 0]
        return replace(
            blank,
            text=text[: min(ends, default=len(text))],
            token_ids=tuple(found.token_ids),
            finish_reason=found.finish_reason,
            new_tokens=len(found.token_ids),
            score=found.score,
            token_logprobs=tuple(found.logprobs) if options.output_scores else None,
        )

    def _stops(self, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
        """Whether ids hold a stop string; None where there is none to look for."""
        return (lambda ids: any(string in self._decode(ids) for string in stop)) if stop else None

    def _decode(self, ids: Sequence[int]) -> str:
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            # What Rust panics with is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise BundleError(
                f"The tokenizer of {self._manifest.name!r} fails on a response.",
                " ".join(str(error).split())[:500],
                remedy="build the bundle with the tokenizer that its model was published with",
            ) from error

    def _blank(self, encoding: Encoding, row: int, timings: dict[str, float]) -> Generation:
        """A response of no tokens to an encoding's row."""
        return Generation(
            text="", token_ids=(), finish_reason="length", prompt_tokens=encoding.prompt_tokens[row], new_tokens=0,
            dropped_tokens=encoding.dropped_tokens[row], device=self._backend.device,
            timings_ms=dict(timings), cached=encoding.cached[row] if encoding.cached else None,
            warnings=self._backend.warnings,
        )  # fmt: skip


def _all_finite(logits: Logits) -> bool:
    """Whether no row [vocab] has a NaN or plus infinity in it, and none is nothing but minus infinity."""
    # One pass: a NaN is the maximum of its row. The demo's steps, 0.2 ms, take a hundredth longer; others less.
    return all(map(math.isfinite, logits.max(axis=1).tolist()))


def _fold(blank: Generation, calls: Sequence[_Call], row: int) -> Generation:
    """The response whose steps are a row of some calls."""
    steps = [call.steps[row] for call in calls if row in call.steps]
    logprobs = tuple(step.logprob for step in steps if step.logprob is not None)
    return replace(
        blank,
        text="".join(step.text for step in steps),
        token_ids=tuple(step.token_id for step in steps),
        finish_reason=steps[-1].finish_reason or "length",
        new_tokens=len(steps),
        token_logprobs=logprobs or None,
    )


def _timings(encoding: Encoding, calls_ms: Sequence[float]) -> dict[str, float]:
    """An encoding's times, and those of the decoder calls."""
    timings = {**encoding.timings_ms, "prefill": calls_ms[0], "decode": sum(calls_ms[1:])}
    return {**timings, "total": sum(timings.values())}


def _ms_since(started: float) -> float:
    return (perf_counter() - started) * 1e3
