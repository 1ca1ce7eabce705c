"""A job's parts in this process, one after the other."""

from collections.abc import Callable, Iterator, Sequence

from llm2slm_export.batch_jobs.input_file import Part
from llm2slm_export.batch_jobs.part_result import PartResult
from llm2slm_export.batch_jobs.part_runner import BatchRequest, PartRunner


def run_locally(
    request: BatchRequest,
    parts: Sequence[Part],
    *,
    on_rows: Callable[[int], None],
    on_warning: Callable[[str], None],
) -> Iterator[PartResult]:
    """Yield the parts, each as soon as it is answered.

    Args:
        on_rows: called with the number of further answered rows.
        on_warning: called with each requested setting that is not in effect.

    Raises:
        Llm2SlmError: as `PartRunner`.
    """
    with PartRunner(request) as runner:
        for warning in runner.warnings:
            on_warning(warning)
        for part in parts:
            yield runner.run(part, on_rows)
