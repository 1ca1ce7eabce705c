"""The output of a job: a directory with its file, job.json, and a file of each part that is complete."""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llm2slm_export.batch_jobs.input_file import Part
from llm2slm_export.batch_jobs.job_file import JOB_FILE, JobFile, is_job, read_job
from llm2slm_export.batch_jobs.part_result import PartResult, Tally
from llm2slm_export.errors import DataError, Llm2SlmError, UsageError
from llm2slm_export.files.atomic import cached_file, clear_abandoned
from llm2slm_export.files.output_target import Kind, reasons_against, resolved
from llm2slm_export.files.workplace import occupied

_DIGITS = 5  # at least, of a part's number


def _foreign(directory: Path) -> list[str]:
    return [] if is_job(directory) else [f"it is not an output of `batch`: it holds no {JOB_FILE} of one"]


BATCH_JOB = Kind("an output of `batch`", _foreign)


def started_job(path: Path, inputs: Iterable[Path]) -> JobFile | None:
    """The job that was started in a directory; None: it does not exist, or is empty.

    Args:
        inputs: paths that the job reads.

    Raises:
        UsageError: the directory holds something else, or cannot be written.
        DataError: the job file is damaged.
    """
    target = resolved(path, follow=False)
    if reasons := reasons_against(target, BATCH_JOB, inputs):
        raise UsageError(
            f"{path} cannot be written.", *reasons,
            remedy="choose another output directory: an empty or a new one, or that of the same job",
        )  # fmt: skip
    return read_job(target)


class OutputDirectory:
    """The directory of a job that this process has locked.

    Args:
        path: its path.
        parts: the parts of the input.
    """

    def __init__(self, path: Path, parts: Iterable[Part]) -> None:
        self.path, self._parts = path, tuple(parts)
        self._digits = max(_DIGITS, len(str(len(self._parts) - 1)))
        self.done: dict[int, Tally] = {
            part.number: self._read(part) for part in self._parts if self.file(part.number).exists()
        }

    @property
    def missing(self) -> tuple[Part, ...]:
        """The parts without a file."""
        return tuple(part for part in self._parts if part.number not in self.done)

    @property
    def tally(self) -> Tally:
        """The counts of all complete parts."""
        whole = Tally()
        for _, tally in sorted(self.done.items()):
            whole.add(tally)
        return whole

    @property
    def answered(self) -> int:
        """The number of rows of the parts that have a file now: more than `tally` has if `write` was interrupted."""
        return sum(part.rows for part in self._parts if self.file(part.number).exists())

    def file(self, number: int) -> Path:
        """The file of a part."""
        return self.path / f"part-{number:0{self._digits}}.jsonl"

    def write(self, result: PartResult) -> None:
        """Write a part's file. It appears whole, or not at all.

        Raises:
            Llm2SlmError: it cannot be written.
        """
        path = self.file(result.number)
        try:
            with cached_file(path, durable=True, clear=False) as new:
                new.write_bytes(result.content)
        except OSError as error:
            raise _unwritable(path, error, len(self.done), len(self._parts)) from error
        self.done[result.number] = result.tally

    def _read(self, part: Part) -> Tally:
        """The counts of a part's file.

        Raises:
            DataError: it does not hold the part's rows.
        """
        path, tally = self.file(part.number), Tally()
        try:
            with path.open("rb") as file:
                for index, line in enumerate(file, start=part.first):
                    row = json.loads(line)
                    if row["index"] != index or not line.endswith(b"\n"):
                        raise ValueError
                    tally.add_row(row)
            if tally.rows != part.rows:
                raise ValueError
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged.",
                f"rows {part.first} to {part.first + part.rows - 1} are expected; {tally.rows} could be read",
                remedy="remove this file and run again: its rows are answered again",
            ) from error
        return tally


@contextmanager
def opened(path: Path, job: JobFile, parts: Iterable[Part]) -> Iterator[OutputDirectory]:
    """Lock the directory of a job, create it if it does not exist, and remove the leftovers of killed runs.

    Raises:
        UsageError: it is the directory of another job, with every difference.
        DataError: the job file or a part is damaged.
        Llm2SlmError: another run is writing to it, or it cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(occupied(path))
        except BlockingIOError as error:
            raise Llm2SlmError(
                f"Another run is writing to {path}.", remedy="wait for its end, or choose another output directory"
            ) from error
        clear_abandoned(path, lambda _: True)
        started = read_job(path)
        differing = [] if started is None else started.differences(job)
        if started is None or (differing and not any(path.glob("part-*.jsonl"))):
            # Nothing was answered: there is nothing to resume.
            _begin(path, job)
        elif differing:
            raise UsageError(
                f"{path} is the output of another job.", *differing,
                remedy="run it with the same bundle, input and options, or choose another output directory",
            )  # fmt: skip
        yield OutputDirectory(path, parts)


def _begin(path: Path, job: JobFile) -> None:
    file = path / JOB_FILE
    try:
        with cached_file(file, durable=True, clear=False) as new:
            new.write_text(job.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(file, error, 0, None) from error


def _unwritable(path: Path, error: OSError, done: int, parts: int | None) -> Llm2SlmError:
    return Llm2SlmError(
        f"{path} cannot be written: {error.strerror or error}.",
        *([] if parts is None else [f"{done} of {parts} parts are complete"]),
        remedy="free some space or make the directory writable, and run again: complete parts are kept",
    )
