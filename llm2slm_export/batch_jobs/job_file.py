"""The file of a job, job.json: what its responses depend on. A run that resumes it must be the same job."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from llm2slm_export.errors import DataError
from llm2slm_export.files.json_format import JsonFormat
from llm2slm_export.files.strict_model import WHOLE_NUMBER, StrictModel

JOB_FILE = "job.json"
FORMAT: Literal["llm2slm-batch-job"] = "llm2slm-batch-job"
VERSION: Literal[1] = 1
Count = Annotated[int, Field(ge=1, lt=2**31)]


class JobBundle(StrictModel):
    """The bundle and its head. `digest` is that of the manifest, which has the hash of every file."""

    name: str
    head: str
    digest: str


class JobInput(StrictModel):
    """The input. Its name is not compared: the hash tells whether it is the same file."""

    name: str
    prompt_field: str | int
    id_field: str | int | None
    bytes: Annotated[int, Field(ge=1)]
    sha256: str
    rows: Annotated[int, Field(ge=1)]


class JobFile(StrictModel):
    """A job.

    Args:
        options: the generation options, with the bundle's defaults.
        bad_words: words that are never generated.
        truncate, split_special_tokens: as `Orchestrator.generate`.
        device, runtime: what runs the graphs.
        batch_size: maximum prompts per batch.
        part_rows: rows per part.
        tool_versions: the releases that began the job. They are not compared.
    """

    format: Literal["llm2slm-batch-job"] = FORMAT
    version: Annotated[Literal[1], WHOLE_NUMBER] = VERSION
    bundle: JobBundle
    input: JobInput
    options: dict[str, Any]
    bad_words: tuple[str, ...] = ()
    truncate: bool = False
    split_special_tokens: bool = False
    device: str
    runtime: str
    batch_size: Count
    part_rows: Count
    tool_versions: dict[str, str] = Field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        """The random seed of sampling."""
        found = self.options.get("seed")
        return found if isinstance(found, int) else None

    def differences(self, other: "JobFile") -> list[str]:
        """Each value of this job that another one has otherwise, one line each."""
        mine, theirs = dict(_values(self._compared())), dict(_values(other._compared()))
        return [
            f"{name}: the job has {_shown(mine.get(name))}, this run {_shown(theirs.get(name))}"
            for name in dict.fromkeys((*mine, *theirs))
            if mine.get(name) != theirs.get(name)
        ]

    def key(self) -> "RowKey":
        """The keys of this job's rows."""
        return RowKey(self)

    def _compared(self) -> dict[str, Any]:
        # Through JSON, where a tuple is a list.
        raw: dict[str, Any] = json.loads(self.model_dump_json(exclude={"tool_versions": True, "input": {"name"}}))
        return raw


class RowKey:
    """A SHA-256 of a prompt, the options and the bundle. Greedy responses of rows with equal keys are the same."""

    def __init__(self, job: JobFile) -> None:
        compared = job._compared()
        given = {name: compared[name] for name in ("options", "bad_words", "truncate", "split_special_tokens")}
        given["bundle"] = {name: compared["bundle"][name] for name in ("head", "digest")}
        self._hash = hashlib.sha256(json.dumps(given, sort_keys=True).encode() + b"\n")

    def of(self, prompt: str) -> str:
        """The key of a prompt, in hexadecimal digits."""
        found = self._hash.copy()
        found.update(prompt.encode("utf-8", "surrogatepass"))
        return found.hexdigest()


_FORMAT = JsonFormat(
    "a batch job", JobFile, DataError,
    if_damaged="choose another output directory", if_invalid="choose another output directory",
    version_field="version", newest=VERSION,
)  # fmt: skip


def read_job(directory: Path) -> JobFile | None:
    """Read the job file of a directory; None if it has none.

    Raises:
        DataError: it is damaged, or a newer release wrote it.
    """
    path = directory / JOB_FILE
    return _FORMAT.read(path) if path.is_file() else None


def is_job(directory: Path) -> bool:
    """Whether a directory has a job file, damaged or of any release."""
    path = directory / JOB_FILE
    try:
        raw = json.loads(path.read_bytes()) if path.is_file() and not path.is_symlink() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def _values(raw: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in raw.items():
        if isinstance(value, dict):
            yield from _values(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _shown(value: Any) -> str:
    shown = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"
