"""The composition on disk: what a trained (or freshly initialised) pair is, before export.

    <dir>/composition.json         CompositionFile
          projector.safetensors    fc_in.weight [d_hidden, d_in], fc_in.bias, fc_out.weight [d_out, d_hidden], fc_out.bias
          slm/                     save_pretrained of the SLM and its tokenizer
          training.json            what it was trained on, with which settings, its metrics (absent when untrained)

Only the formats live here: no torch. `models.reference` computes with them.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llm2slm_export.contract import Fusion
from llm2slm_export.errors import CompositionError

COMPOSITION_FILE = "composition.json"
PROJECTOR_FILE = "projector.safetensors"
TRAINING_FILE = "training.json"
SLM_DIRECTORY = "slm"
VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LlmEntry(_Part):
    """The frozen LLM: a hub id, or a path relative to composition.json."""

    model: str
    revision: str | None = None
    layer: int = -1
    tokenizer: str | None = None


class SlmEntry(_Part):
    model: str = SLM_DIRECTORY


class ProjectorEntry(_Part):
    """Z = fc_out(relu(fc_in(H))): widths of H, of the hidden layer and of Z."""

    kind: Literal["mlp"] = "mlp"
    d_in: int
    d_hidden: int
    d_out: int
    activation: Literal["relu"] = "relu"


class CompositionFile(_Part):
    format: Literal["llm2slm-composition"] = "llm2slm-composition"
    version: Literal[1] = 1
    name: str
    llm: LlmEntry
    slm: SlmEntry = SlmEntry()
    projector: ProjectorEntry
    fusion: Fusion = "add"
    tokenizer: Literal["shared"] = "shared"
    prompt_template: str = "{prompt}"
    max_prompt_tokens: int = 512
    max_new_tokens: int = 128


def read_composition(directory: Path) -> CompositionFile:
    """Read and validate `composition.json`.

    Raises:
        CompositionError: no such file, not a composition, a newer version, or fields that do not validate.
    """
    path = directory / COMPOSITION_FILE
    if not path.is_file():
        raise CompositionError(
            f"{directory} is not a composition: it has no {COMPOSITION_FILE}.",
            remedy="give the directory that `llm2slm-export train` wrote",
        )
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = raw.get("version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise CompositionError(
                f"{path} has version {version}; this release reads up to version {VERSION}.",
                remedy="pip install --upgrade llm2slm-export",
            )
        return CompositionFile.model_validate(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CompositionError(f"{path} is not JSON.", str(error), remedy="train the composition again") from error
    except ValidationError as error:
        raise CompositionError(
            f"{path} does not describe a composition.",
            *(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()),
            remedy="mend the fields named, or train the composition again",
        ) from error
