"""The decoder half of a pair: an encoding to responses, one decoder call after another. The LLM does not run."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter

from tokenizers import Tokenizer

from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.errors import Llm2SlmError
from llm2slm_export.inference.decode_core import DecodeCore
from llm2slm_export.inference.drafting import Drafting
from llm2slm_export.inference.encodings.encoding import Encoding
from llm2slm_export.inference.generation.options import GenerationOptions
from llm2slm_export.inference.outputs import Generation, Step
from llm2slm_export.inference.request import Request
from llm2slm_export.inference.rows.beam_rows import BeamRows
from llm2slm_export.inference.rows.drafted_row import DraftedRow
from llm2slm_export.inference.rows.request_rows import RequestRows
from llm2slm_export.inference.rows.sampled_rows import SampledRows
from llm2slm_export.inference.runtime.backend import Backend


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

    def request(self, encoding: Encoding, options: GenerationOptions, prompts: Sequence[int]) -> Request:
        """The request of an encoding's prompts, whose indices in the call are `prompts`."""
        return Request(
            encoding, options, prompts, self._backend, self._manifest, self._tokenizer, num_tokens=self._num_tokens
        )

    def write(
        self,
        encoding: Encoding,
        options: GenerationOptions,
        *,
        prompts: Sequence[int],
        batch: int = 0,
        drafting: Drafting | None = None,
    ) -> list[list[Generation]]:
        """Generate the responses to an encoding, a list per prompt.

        Args:
            prompts: the index of each row's prompt in the call. Samples depend on it, and not on the batch.
            batch: the value of `Generation.batch`.
            drafting: how tokens are drafted; None: they are not.

        Raises:
            BundleError: the decoder's logits are not finite.
            Llm2SlmError: there is too little memory for the rows.
        """
        request = self.request(encoding, options, prompts)
        off = drafting.off(request) if drafting is not None else None
        try:
            if drafting is not None and off is None:
                groups: Sequence[RequestRows] = drafting.rows(request)
            else:
                groups = [BeamRows(request) if options.num_beams > 1 else SampledRows(request)]
            calls_ms = list(self._calls(encoding, groups, drafting))
        except MemoryError as error:
            raise Llm2SlmError(
                "There is too little memory for the responses.",
                f"prompts: {len(prompts)}, num_beams: {options.num_beams}, "
                f"num_return_sequences: {options.num_return_sequences}, vocabulary: {self._manifest.shape.vocab_size}",
                remedy="use a smaller batch_size (--batch-size), num_beams or num_return_sequences",
            ) from error
        timings, warnings = _timings(encoding, calls_ms), () if off is None else (off,)
        return [
            [replace(g, batch=batch, sequence=i, warnings=(*g.warnings, *warnings)) for i, g in enumerate(row)]
            for group in groups
            for row in group.responses(timings)
        ]

    def stream(
        self, encoding: Encoding, options: GenerationOptions, *, drafting: Drafting | None = None
    ) -> Iterator[Step]:
        """Yield the response to an encoding of one prompt, token by token. The last step has the complete response.

        Args:
            drafting: how tokens are drafted; None: they are not.

        Raises:
            BundleError: as `write`.
        """
        request, calls_ms = self.request(encoding, options, [0]), list[float]()
        group: SampledRows | DraftedRow = SampledRows(request)
        if drafting is not None:
            (group,) = drafting.rows(request)
        for call_ms in self._calls(encoding, [group], drafting):
            calls_ms.append(call_ms)
            for step in list(group.last):
                if step.finish_reason is not None:
                    ((generation,),) = group.responses(_timings(encoding, calls_ms))
                    step = replace(step, generation=generation)
                yield step

    def _calls(
        self,
        encoding: Encoding,
        groups: Sequence[RequestRows],
        drafting: Drafting | None,
    ) -> Iterator[float]:
        """Run decoder calls until all groups are finished, and yield each call's milliseconds."""
        core = DecodeCore(self._backend, drafting.costs if drafting is not None else None)
        started = perf_counter()
        core.admit(encoding.conditioning, groups)
        while True:
            for group in groups:
                if group.error is not None:
                    raise group.error
            yield (perf_counter() - started) * 1e3
            if not core.groups:
                return
            # After the yield, so that the consumer's time is not counted.
            started = perf_counter()
            core.step()


def _timings(encoding: Encoding, calls_ms: Sequence[float]) -> dict[str, float]:
    """The milliseconds of an encoding and of the decoder calls, and their total."""
    timings = {**encoding.timings_ms, "prefill": calls_ms[0], "decode": sum(calls_ms[1:], 0.0)}
    return {**timings, "total": sum(timings.values())}
