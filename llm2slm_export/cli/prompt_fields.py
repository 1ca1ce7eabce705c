"""The prompts of a file that an option names, and the field that holds them."""

from pathlib import Path
from typing import TYPE_CHECKING

from llm2slm_export.errors import BundleError, UsageError

if TYPE_CHECKING:
    from llm2slm_export.authoring.training_record import TrainingRecord
    from llm2slm_export.files.data_files import Field


def prompts_of(option: str, file: Path | None, given: str | None, record: "TrainingRecord | None") -> tuple[str, ...]:
    """The prompts of the file that an option names; empty if it names none."""
    from llm2slm_export.cli.prompt_files import read_file

    if file is None:
        return ()
    field, origin = prompt_field_of(file, option, given, record)
    return tuple(prompt.text for prompt in read_file(file, option, field, origin))


def prompt_field_of(
    file: Path, option: str, given: str | None, record: "TrainingRecord | None"
) -> "tuple[Field | None, str]":
    """The field of a file's prompts, and where it comes from; None: each line is a prompt."""
    from llm2slm_export.authoring.training_record import fields_of
    from llm2slm_export.files.data_files import kind_of

    if kind_of(file) == "text":
        if given is not None:
            raise UsageError(
                f"{option} {file} has one prompt per line, and no fields.",
                f"--prompt-field {given}",
                remedy="leave out --prompt-field, or name the file .jsonl, .tsv or .csv",
            )
        return None, ""
    fields, origin = fields_of(file, {"prompt": given}, record)
    return fields["prompt"], origin


def record_of_bundle(bundle: Path, given: str | None) -> "TrainingRecord | None":
    """The training record of a bundle's pair; None if a field is given, or no record is found."""
    from llm2slm_export.authoring.training_record import record_of
    from llm2slm_export.bundle.manifest_file import read_manifest

    if given is not None:
        return None
    try:
        name = read_manifest(bundle).name
    except BundleError:  # reported when the bundle is loaded
        return None
    return record_of(name)


def refuse_unused_field(given: str | None, options: str, *files: Path | None) -> None:
    """Raise `UsageError` if a prompt field is given, and none of the files that it would apply to."""
    if given is not None and not any(files):
        raise UsageError(
            f"--prompt-field {given} goes with {options}.", remedy=f"add {options} with a file, or leave it out"
        )
