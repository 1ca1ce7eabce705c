"""Prompts that are decoded with the same options, and what their responses are made with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.contract import GRAPHS
from llm2slm_export.errors import BundleError
from llm2slm_export.inference.encodings.encoding import Encoding
from llm2slm_export.inference.generation.options import GenerationOptions
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.runtime.backend import Backend, Ids, Logits


@dataclass(frozen=True, eq=False)
class Request:
    """Prompts that are decoded with the same options.

    Args:
        encoding: the encoding of the prompts.
        options: the generation options.
        prompts: each prompt's index in the call. Samples depend on it, and not on the batch.
        backend, manifest, tokenizer: of the head that writes the responses.
        num_tokens: number of ids of the SLM's tokenizer. Ids from here on are never generated.
        first_row: the encoding's row of the first prompt; those of the others follow.
    """

    encoding: Encoding
    options: GenerationOptions
    prompts: Sequence[int]
    backend: Backend
    manifest: Manifest
    tokenizer: Tokenizer
    num_tokens: int
    first_row: int = 0

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens.

        Raises:
            BundleError: the tokenizer fails.
        """
        try:
            text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            # A panic in Rust is not an Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise BundleError(
                f"The tokenizer of {self.manifest.name!r} fails on a response.",
                " ".join(str(error).split())[:500],
                remedy="build the bundle with the tokenizer that its model was published with",
            ) from error
        return text

    def check_finite(self, logits: Logits, rows: Ids, *, new_token: int) -> None:
        """Refuse logits [rows, vocab_size] of which a row has no finite maximum: NaN, +inf, or all -inf.

        Args:
            rows: [rows] the request's prompt of each row of the logits, counted from 0.
            new_token: the number, from 1, of the token that the logits are for.

        Raises:
            BundleError: with the prompts and what is known of the cause.
        """
        # max propagates NaN, so one pass is enough. It adds 1 % to the demo's steps of 0.2 ms, and less to longer ones.
        highest = logits.max(axis=1).tolist()
        if not all(map(math.isfinite, highest)):
            raise self._non_finite_error(highest, rows, new_token=new_token)

    def _non_finite_error(self, highest: Sequence[float], rows: Ids, *, new_token: int) -> BundleError:
        arrays = self.backend.arrays(self.encoding.conditioning).values()
        # Reported per prompt: its beams or sequences are usually all affected.
        found = {row: most for row, most in zip(rows.tolist(), highest, strict=True) if not math.isfinite(most)}
        built = self.backend.precisions
        precision = ", ".join(f"{name} {built[name]}" for name in GRAPHS if name in built)
        return BundleError(
            f"The decoder of {self.manifest.name!r} returns non-finite logits for new token {new_token}.",
            *(
                f"prompt {self.prompts[row]}: the highest is {'NaN' if math.isnan(most) else most}; the projector's "
                f"output is {'finite' if all(np.isfinite(array[self.first_row + row]).all() for array in arrays) else 'not finite'}"
                for row, most in sorted(found.items())
            ),
            f"precision: {precision}; device: {self.backend.device}",
            remedy="fp16 overflows above 65504: if a graph is fp16, build the bundle again with --precision bf16 or fp32 "
            "(engines: --engine-precision); otherwise look for non-finite weights in its models",
        )

    def blank(self, row: int, timings_ms: Mapping[str, float]) -> Generation:
        """An empty response to the prompt of this number, from 0."""
        encoding, row = self.encoding, self.first_row + row
        return Generation(
            text="", token_ids=(), finish_reason="length", prompt_tokens=encoding.prompt_tokens[row], new_tokens=0,
            dropped_tokens=encoding.dropped_tokens[row], device=self.backend.device,
            timings_ms=dict(timings_ms), cached=encoding.cached[row] if encoding.cached else None,
            warnings=self.backend.warnings,
        )  # fmt: skip
