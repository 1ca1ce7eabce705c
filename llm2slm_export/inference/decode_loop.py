"""The decoder half of a pair: an encoding to responses, one decoder call after another. The LLM does not run."""

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
    """One decoder call: a step for every unfinished row, by its index, and the call's milliseconds."""

    steps: Mapping[int, Step]
    ms: float


class DecodeLoop:
    """Generates the responses to encodings.

    Args:
        backend: runs the decoder graph.
        manifest: the manifest of the head.
        tokenizer: the SLM's tokenizer.
        num_tokens: number of ids of the SLM's tokenizer. Ids from here on are never generated.
    """

    def __init__(self, backend: Backend, manifest: Manifest, tokenizer: Tokenizer, *, num_tokens: int) -> None:
        self._backend, self._manifest, self._tokenizer, self._num_tokens = backend, manifest, tokenizer, num_tokens

    def write(
        self, encoding: Encoding, options: GenerationOptions, *, prompts: Sequence[int], batch: int = 0
    ) -> list[list[Generation]]:
        """Generate the responses to an encoding, a list per prompt.

        Args:
            prompts: the index of each row's prompt in the call. Samples depend on it, and not on the batch.
            batch: the value of `Generation.batch`.

        Raises:
            BundleError: the decoder's logits are not finite.
            Llm2SlmError: there is too little memory for the rows.
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
        """Yield the response to an encoding of one prompt, token by token. The last step has the complete response.

        Raises:
            BundleError: as `write`.
        """
        calls = []
        for call in self._calls(encoding, options, [0]):
            calls.append(call)
            (step,) = call.steps.values()
            if step.finish_reason is not None:
                blank = self._empty(encoding, 0, _timings(encoding, [call.ms for call in calls]))
                step = replace(step, generation=_fold(blank, calls, 0))
            yield step

    def _choose(self, encoding: Encoding, options: GenerationOptions, prompts: Sequence[int]) -> list[list[Generation]]:
        """Greedy search or sampling."""
        calls, count = list(self._calls(encoding, options, prompts)), options.num_return_sequences
        timings = _timings(encoding, [call.ms for call in calls])
        return [
            [_fold(self._empty(encoding, row, timings), calls, row * count + sequence) for sequence in range(count)]
            for row in range(len(encoding))
        ]

    def _calls(self, encoding: Encoding, options: GenerationOptions, prompts: Sequence[int]) -> Iterator[_Call]:
        """Yield decoder calls until every row is finished. Finished rows are dropped from the decoder's state.

        Each prompt has `num_return_sequences` consecutive rows.
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
            # After the yield, so that the consumer's time is not counted.
            started = perf_counter()
            going = np.flatnonzero([step.finish_reason is None for step in steps.values()])
            if not len(going):
                return
            if len(going) < len(running):
                sampler.keep(going)
                self._backend.select(state, going)
                running, ids = running[going], ids[going]
            best = self._backend.step_argmax(state, ids[:, None]) if sampler.is_plain_greedy else None
            logits = self._backend.step(state, ids[:, None])[:, -1] if best is None else best[1][:, None]

    def _prefill(self, encoding: Encoding, count: int) -> tuple[DecoderState, Logits]:
        """Run the prompt pass once per prompt, then repeat each row `count` times.

        Returns:
            The decoder's state, and logits [batch · count, vocab_size].
        """
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
        """Beam search. It selects the decoder's rows before each call."""
        search = BeamSearch(
            options, special_ids=self._manifest.special_ids, num_tokens=self._num_tokens, prompts=prompts,
            stops=self._stop_check(options.stop),
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
            logits, rows = self._backend.step(state, advance.ids[:, None])[:, -1], rows[advance.rows]
        timings = _timings(encoding, [prefill_ms, _ms_since(started)])
        return [
            [self._generation(self._empty(encoding, row, timings), found, options) for found in hypotheses]
            for row, hypotheses in enumerate(search.results())
        ]

    def _non_finite_error(
        self, logits: Logits, encoding: Encoding, rows: Ids, *, prompts: Sequence[int], new_token: int
    ) -> BundleError:
        """The error for logits [rows, vocab_size] without a finite maximum.

        Args:
            rows: the encoding's row of each row of the logits.
            prompts: the prompt's index in the call, for each row of the encoding.
            new_token: the number, from 1, of the token that the logits are for.
        """
        arrays = self._backend.arrays(encoding.conditioning).values()
        # Reported per prompt: its beams or sequences are usually all affected.
        highest = zip(rows.tolist(), logits.max(axis=1).tolist(), strict=True)
        found = {row: most for row, most in highest if not math.isfinite(most)}
        built = self._backend.precisions
        precision = ", ".join(f"{name} {built[name]}" for name in GRAPHS if name in built)
        return BundleError(
            f"The decoder of {self._manifest.name!r} returns non-finite logits for new token {new_token}.",
            *(
                f"prompt {prompts[row]}: the highest is {'NaN' if math.isnan(most) else most}; the projector's "
                f"output is {'finite' if all(np.isfinite(array[row]).all() for array in arrays) else 'not finite'}"
                for row, most in sorted(found.items())
            ),
            f"precision: {precision}; device: {self._backend.device}",
            remedy="fp16 overflows above 65504: if a graph is fp16, build the bundle again with --precision bf16 or fp32 "
            "(engines: --engine-precision); otherwise look for non-finite weights in its models",
        )

    def _generation(self, blank: Generation, found: Hypothesis, options: GenerationOptions) -> Generation:
        """The response of a hypothesis."""
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

    def _stop_check(self, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
        """A check whether the text of ids contains a stop string; None without stop strings."""
        return (lambda ids: any(string in self._decode(ids) for string in stop)) if stop else None

    def _decode(self, ids: Sequence[int]) -> str:
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            # A panic in Rust is not an Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise BundleError(
                f"The tokenizer of {self._manifest.name!r} fails on a response.",
                " ".join(str(error).split())[:500],
                remedy="build the bundle with the tokenizer that its model was published with",
            ) from error

    def _empty(self, encoding: Encoding, row: int, timings: dict[str, float]) -> Generation:
        """An empty response to a row of an encoding."""
        return Generation(
            text="", token_ids=(), finish_reason="length", prompt_tokens=encoding.prompt_tokens[row], new_tokens=0,
            dropped_tokens=encoding.dropped_tokens[row], device=self._backend.device,
            timings_ms=dict(timings), cached=encoding.cached[row] if encoding.cached else None,
            warnings=self._backend.warnings,
        )  # fmt: skip


def _all_finite(logits: Logits) -> bool:
    """Whether every row of logits [rows, vocab_size] has a finite maximum: no NaN, no +inf, not all -inf."""
    # max propagates NaN, so one pass is enough. It adds 1 % to the demo's steps of 0.2 ms, and less to longer ones.
    return all(map(math.isfinite, logits.max(axis=1).tolist()))


def _fold(blank: Generation, calls: Sequence[_Call], row: int) -> Generation:
    """The response made of one row's steps."""
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
    """The milliseconds of an encoding and of the decoder calls, and their total."""
    timings = {**encoding.timings_ms, "prefill": calls_ms[0], "decode": sum(calls_ms[1:])}
    return {**timings, "total": sum(timings.values())}


def _ms_since(started: float) -> float:
    return (perf_counter() - started) * 1e3
