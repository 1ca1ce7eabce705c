"""The arguments of the Ray Serve application."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from llm2slm_export.errors import UsageError
from llm2slm_export.files.validation_problems import validation_problems
from llm2slm_export.serving.served_models import named_bundle

_Count = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(gt=0)]
# A number in YAML, a text on the command line.
_Replicas = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    StringConstraints(pattern=r"^\d{1,4}(-\d{1,4})?$"),
]


class RayOptions(BaseModel):
    """Arguments of the application. Texts are converted, so that a command line can give them.

    Args:
        bundle: bundles as [NAME=]BUNDLE, with absolute paths that every node has.
        api_key_file: file with one API key per line; None: none is needed.
        reader_replicas, writer_replicas, front_replicas: number of replicas, or MIN-MAX to scale with the load.
        reader_threads, writer_threads: cores that a replica uses, and has reserved.
        reader_device, writer_device: as `load` takes them; a replica whose device is not cpu has one GPU reserved.
        reader_gpus, writer_gpus: GPUs that are reserved instead, or parts of one.
        runtime: runtime of the encoder and projector on the CPU.
        cache_mb: maximum size of a reader's cached encodings in MB; None: no encoding is cached.
        max_rows, max_waiting, max_prefill_tokens: limits of a replica's scheduler.
        max_body_bytes: maximum size of a request's body.
        timeout: seconds until a request ends with status 504, if it gives no timeout; None: never.
        drain: seconds that running requests have when a replica is stopped.
        autoscaling: further fields of Serve's autoscaling_config, of both parts.
        log_prompts: whether prompts and responses are written to the log.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str | list[str]
    api_key_file: Path | None = None
    reader_replicas: _Replicas = "1"
    writer_replicas: _Replicas = "1"
    front_replicas: _Count = 1
    reader_threads: _Count = 1
    writer_threads: _Count = 1
    reader_device: str = "cpu"
    writer_device: str = "cpu"
    reader_gpus: Annotated[float, Field(ge=0)] | None = None
    writer_gpus: Annotated[float, Field(ge=0)] | None = None
    runtime: str = "onnxruntime"
    cache_mb: _Count | None = None
    max_rows: _Count = 16
    max_waiting: _Count = 64
    max_prefill_tokens: _Count = 2048
    max_body_bytes: _Count = 1_000_000
    timeout: _Seconds | None = None
    drain: Annotated[float, Field(ge=0)] = 30.0
    autoscaling: dict[str, Any] = {}
    log_prompts: bool = False

    @property
    def bundles(self) -> list[tuple[str, Path]]:
        """The models' names and their bundles."""
        return [named_bundle(item) for item in ([self.bundle] if isinstance(self.bundle, str) else self.bundle)]


def ray_options(arguments: Mapping[str, Any]) -> RayOptions:
    """The options in arguments.

    Raises:
        UsageError: some are wrong; all of them are named.
    """
    try:
        options = RayOptions.model_validate(dict(arguments))
    except ValidationError as error:
        raise _refused(validation_problems(error, RayOptions, whole="the arguments")) from None
    problems = []
    for name in ("reader_replicas", "writer_replicas"):
        least, _, most = getattr(options, name).partition("-")
        if int(most or least) < max(int(least), 1):
            problems.append(f"{name}: give a number above 0, or MIN-MAX (got {getattr(options, name)!r})")
    if not options.bundle:
        problems.append("bundle: give at least one")
    else:
        problems += [
            f"bundle: {path} is a relative path; replicas run in other directories"
            for _, path in options.bundles
            if not path.is_absolute()
        ]
    if options.api_key_file is not None and not options.api_key_file.is_absolute():
        problems.append(f"api_key_file: {options.api_key_file} is a relative path; replicas run in other directories")
    if problems:
        raise _refused(problems)
    return options


def _refused(problems: list[str]) -> UsageError:
    return UsageError(
        "The arguments of the application are wrong.", *problems, remedy="fix these; docs/serving.md has all of them"
    )
