"""training.json: the record that `train` writes beside the composition. It is validated on reading."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llm2slm_export.authoring.composition import COMPOSITION_FILE, TRAINING_FILE
from llm2slm_export.authoring.recipe import DataSettings
from llm2slm_export.errors import CompositionError
from llm2slm_export.files.data_files import Field, default_fields, kind_of, spelled_field
from llm2slm_export.files.json_format import JsonFormat


class _RecordModel(BaseModel):
    # Later releases may write more fields.
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Teacher(_RecordModel):
    further_prompts: str | None = None


class _Training(_RecordModel):
    data: DataSettings | None = None
    teacher: _Teacher | None = None


class _Recipe(_RecordModel):
    training: _Training | None = None


class _File(_RecordModel):
    recipe: _Recipe | None = None
    prompts: tuple[str, ...] = ()


_AGAIN = "train the composition again, or remove the file"
_FORMAT = JsonFormat("a training record", _File, CompositionError, if_damaged=_AGAIN, if_invalid=_AGAIN)


@dataclass(frozen=True)
class TrainingRecord:
    """The fields of training.json that later commands use.

    Args:
        path: the training.json.
        data: files and fields of the training data.
        further_prompts: the teacher's additional prompts.
        prompts: the first validation prompts.
    """

    path: Path
    data: DataSettings | None
    further_prompts: str | None
    prompts: tuple[str, ...]


def read_record(directory: Path) -> TrainingRecord | None:
    """Read the training.json of a directory; None if the directory has none.

    Raises:
        CompositionError: the file is not a valid record.
    """
    path = directory / TRAINING_FILE
    if not path.is_file():
        return None
    found = _FORMAT.read(path)
    training = (found.recipe or _Recipe()).training or _Training()
    return TrainingRecord(path, training.data, (training.teacher or _Teacher()).further_prompts, found.prompts)


def usual_places(name: str) -> list[Path]:
    """Candidate directories of a bundle's composition, by the bundle's name."""
    return [Path("runs") / name / "pair", Path("compositions") / name]


def record_of(name: str, composition: Path | None = None) -> TrainingRecord | None:
    """The training record of a bundle's composition.

    Args:
        name: the bundle's name.
        composition: the composition's directory; None: the first of `usual_places` that exists.

    Raises:
        CompositionError: as `read_record`.
    """
    places = [composition] if composition is not None else usual_places(name)
    there = next((place for place in places if (place / COMPOSITION_FILE).is_file()), None)
    return read_record(there) if there is not None else None


def fields_of(
    path: Path, given: Mapping[str, str | None], record: "TrainingRecord | DataSettings | None"
) -> tuple[dict[str, Field], str]:
    """The fields of a data file, and the origin of the fields that were not given.

    Args:
        given: field by role (`prompt`, `response`), as typed. None: the training data's field if that data has the same
            file type or named fields, else `data_files.default_fields`.
    """
    settings = record.data if isinstance(record, TrainingRecord) else record
    names = list(given)
    fields, origin = default_fields(path, names), ""
    if settings is not None:
        recorded: dict[str, Any] = {name: getattr(settings, f"{name}_field") for name in names}
        same = kind_of(Path(settings.train)) == kind_of(path)
        if same or (all(isinstance(field, str) for field in recorded.values()) and recorded != {n: n for n in names}):
            fields = recorded
            origin = str(record.path) if isinstance(record, TrainingRecord) else "the recipe"
    typed = {name: spelled_field(field, path) for name, field in given.items() if field is not None}
    return fields | typed, "" if len(typed) == len(given) else origin
