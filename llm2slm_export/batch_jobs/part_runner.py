"""A loaded pair that answers the parts of a job. The bytes of a part depend on the job alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llm2slm_export.batch_jobs.input_file import InputFile, InputRow, Part
from llm2slm_export.batch_jobs.job_file import JobFile
from llm2slm_export.batch_jobs.part_result import PartResult, part_result
from llm2slm_export.bundle.manifest_file import read_manifest
from llm2slm_export.errors import BundleError, Llm2SlmError, PromptError, UsageError
from llm2slm_export.inference.batching import batches
from llm2slm_export.inference.orchestrator import load
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.tokenization import PromptIds


@dataclass(frozen=True)
class BatchRequest:
    """A job and where it runs. It can be pickled.

    Args:
        bundle: absolute path of the bundle.
        input: the scanned input.
        job: the job.
        options: the generation options that were given; the bundle's defaults otherwise.
        threads: CPU threads per operator; None: the runtime's choice.
    """

    bundle: Path
    input: InputFile
    job: JobFile
    options: Mapping[str, Any]
    threads: int | None = None


class PartRunner:
    """Answers parts. A context manager; `close` releases the pair.

    Raises:
        BundleError: the bundle is not the job's, or is damaged.
        DeviceError, MissingExtraError: as `load`.
    """

    def __init__(self, request: BatchRequest) -> None:
        self._input, self._job = request.input, request.job
        job = request.job
        digest = read_manifest(request.bundle).digest
        if digest != job.bundle.digest:
            raise BundleError(
                f"{request.bundle} is not the bundle of this job.",
                f"the job's manifest has the digest {job.bundle.digest[:16]}…, this one {digest[:16]}…",
                remedy="use the bundle that the job began with",
            )
        self._pair = load(
            request.bundle, head=job.bundle.head, device=job.device, threads=request.threads, runtime=job.runtime
        )
        self._given = dict(request.options)
        if job.bad_words:
            self._given["bad_words_ids"] = self._pair.bad_words_ids(job.bad_words)
        self._reading = {"truncate": job.truncate, "split_special_tokens": job.split_special_tokens}
        self._key = job.key()
        self._options = self._pair.options(**self._given)
        self._batch_size = self._pair.at_a_time(job.batch_size, **self._given)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Requested settings that are not in effect, with the reason."""
        return self._pair.warnings

    def run(self, part: Part, on_rows: Callable[[int], None] | None = None) -> PartResult:
        """Answer a part.

        Args:
            on_rows: called with the number of further rows that have been answered or refused.

        Raises:
            DataError: the input has changed.
            Llm2SlmError: the job cannot go on: too little memory, or a device that fails.
        """
        rows = self._input.read(part)
        ready, found = self._read(rows)
        if on_rows is not None and found:
            on_rows(len(found))
        order = list(ready)
        sizes = [len(ready[at].ids) for at in order]
        # All rows of the part are sorted together: the batches depend on the part alone.
        for batch in batches(sizes, size=self._batch_size, window=max(1, len(order))):
            answered = [order[index] for index in batch]
            found |= self._answered({at: ready[at] for at in answered}, rows)
            if on_rows is not None:
                on_rows(len(batch))
        return part_result(part.number, (self._row(row, found[at]) for at, row in enumerate(rows)))

    def close(self) -> None:
        """Release the pair."""
        self._pair.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, rows: Sequence[InputRow]) -> tuple[dict[int, PromptIds], dict[int, dict[str, Any]]]:
        """The ids of each prompt that can be run, by its index in the part, and the errors of the others."""
        ready, refused = {}, {}
        for at, row in enumerate(rows):
            if row.prompt is None:
                refused[at] = {"error": row.problem}
                continue
            try:
                ready[at], _ = self._pair.prepare(row.prompt, **self._reading, **self._given)
            except (PromptError, BundleError) as error:
                refused[at] = {"error": _reason(error)}
        return ready, refused

    def _answered(self, prompts: Mapping[int, PromptIds], rows: Sequence[InputRow]) -> dict[int, dict[str, Any]]:
        """The responses to a batch. If it fails because of one prompt, each is run by itself."""
        try:
            return dict(zip(prompts, map(_response, self._generated(prompts, rows)), strict=True))
        except (BundleError, UsageError) as error:
            if len(prompts) == 1:
                return {at: {"error": _reason(error)} for at in prompts}
        found: dict[int, dict[str, Any]] = {}
        for at, ids in prompts.items():
            found |= self._answered({at: ids}, rows)
        return found

    def _generated(self, prompts: Mapping[int, PromptIds], rows: Sequence[InputRow]) -> Iterator[Sequence[Generation]]:
        encoding = self._pair.prompt_encoder().read(list(prompts.values()))
        # A row's index in the input is the key of its random draws.
        indices = [rows[at].index for at in prompts]
        yield from self._pair.decode_loop().write(encoding, self._options, prompts=indices)

    def _row(self, row: InputRow, found: Mapping[str, Any]) -> dict[str, Any]:
        keyed = {} if row.prompt is None else {"key": self._key.of(row.prompt)}
        placed = {"line": row.line} if "error" in found else {}
        return {"index": row.index, **row.identifier, **keyed, **placed, **found}


def _response(generations: Sequence[Generation]) -> dict[str, Any]:
    """The fields of a prompt's responses."""
    first = generations[0]
    if len(generations) == 1:
        return {**_fields(first), "prompt_tokens": first.prompt_tokens, **_dropped(first)}
    return {
        "responses": [_fields(generation) for generation in generations],
        "prompt_tokens": first.prompt_tokens, **_dropped(first),
    }  # fmt: skip


def _fields(generation: Generation) -> dict[str, Any]:
    optional = {"score": generation.score, "token_logprobs": generation.token_logprobs}
    return {
        "text": generation.text, "finish_reason": generation.finish_reason, "new_tokens": generation.new_tokens,
        **{name: value for name, value in optional.items() if value is not None},
    }  # fmt: skip


def _dropped(generation: Generation) -> dict[str, int]:
    return {"dropped_tokens": generation.dropped_tokens} if generation.dropped_tokens else {}


def _reason(error: Llm2SlmError) -> str:
    """Why a prompt has no response, in one line."""
    if isinstance(error, PromptError) and error.prompts:
        return next(iter(error.prompts.values()))
    return " ".join([error.fact, *error.evidence])
