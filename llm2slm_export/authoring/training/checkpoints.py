"""Checkpoints on disk: which are whole, and which one a run goes on from.

A checkpoint has a file of its own that is written last and holds the others' hashes. Without it a checkpoint was never
finished; where it does not agree with the others, the checkpoint is damaged.
"""

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2slm_export.errors import TrainingError
from llm2slm_export.files.atomic import cached_file, clear_abandoned, rename_free
from llm2slm_export.files.target import foreign_entries

COMPLETE_FILE = "complete.json"
WEIGHTS_FILE = "trainable.safetensors"
# The first is what safetensors gives its name when it is whole.
_OF_A_CHECKPOINT = re.compile(
    rf"\.tmp\w+|{re.escape(WEIGHTS_FILE)}|training_args\.bin|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|"
    rf"rng_state(_\d+)?\.pth|{re.escape(TRAINER_STATE_NAME)}|{re.escape(COMPLETE_FILE)}|\.{re.escape(COMPLETE_FILE)}\..*"
)
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_KEPT = 2  # a run that finds the newest one damaged goes on from the one before
_DAMAGED = "damaged-"  # before the name of a checkpoint that a run did not go on from
_FOREIGN = "kept-"  # before the name of a directory that was in a checkpoint's place and is not one
# Pickled, and read with torch's `weights_only`; the trainer's own arguments are not read.
_PICKLED = re.compile(r"optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth")
# What a run reads of the trainer's state.
_STATE: dict[str, type | UnionType] = {
    "global_step": int, "max_steps": int, "num_train_epochs": int | float, "epoch": int | float | None,
    "train_batch_size": int | None, "best_model_checkpoint": str | None, "best_metric": int | float | None,
    "best_global_step": int | None, "log_history": list, "stateful_callbacks": dict,
    "total_flos": int | float, "num_input_tokens_seen": int,
}  # fmt: skip
# What the libraries raise that read one of the files, whatever is in it.
UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, EOFError, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on.

    Args:
        checkpoint: the newest one that is whole.
        torch_threads: that the run computed with until then; the same number again gives the same result.
        damaged: newer ones that are not whole, each with what is wrong with it.
    """

    checkpoint: Path
    torch_threads: int
    damaged: dict[Path, str]


def complete(checkpoint: Path, *, torch_threads: int) -> None:
    """Mark a checkpoint as written to its end."""
    files = {path.name: _sha256(path) for path in sorted(checkpoint.iterdir()) if path.is_file()}
    text = json.dumps({"torch_threads": torch_threads, "files": files}, indent=1) + "\n"
    with cached_file(checkpoint / COMPLETE_FILE, durable=True) as partial:
        partial.write_text(text, encoding="utf-8")


def last_checkpoint(work: Path) -> Path | None:
    """The last checkpoint that was written to its end. Whether it is as it was written is not looked at."""
    return next(_finished(work), None)


def resumption(work: Path) -> Resumption | None:
    """The newest checkpoint that is whole; None where none was written to its end.

    Raises:
        TrainingError: all of them are damaged.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in _finished(work):
        problem = _problem(checkpoint)
        if problem is None:
            return Resumption(checkpoint, int(_marker(checkpoint)["torch_threads"]), damaged)
        damaged[checkpoint] = problem
    if not damaged:
        return None
    raise TrainingError(
        f"No checkpoint in {work} is whole.",
        *(f"{path.name}: {problem}" for path, problem in damaged.items()),
        remedy="run without --resume and with another --work: training starts over",
    )


def foreign_to_checkpoint(path: Path) -> list[str]:
    """Why what has a checkpoint's name is not one that this trainer wrote, maybe half; nothing where it is."""
    if path.is_symlink() or not path.is_dir():
        return ["it is not a directory"]
    clear_abandoned(path, lambda name: name == COMPLETE_FILE)  # of a run that was killed while it marked the checkpoint
    return foreign_entries(path, lambda name, is_directory: not is_directory and bool(_OF_A_CHECKPOINT.fullmatch(name)))


def prune(work: Path) -> None:
    """Remove all checkpoints but the newest two that were written to their end, and the best ones that these would end with."""
    newest = list(_finished(work))[:_KEPT]
    kept = {checkpoint.name for checkpoint in newest} | {_best(checkpoint) for checkpoint in newest}
    for path in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if _NAME.fullmatch(path.name) and path.name not in kept:
            remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, whole or half; what came into it and is no part of it is kept, all of it, and said."""
    if not os.path.lexists(checkpoint):
        return
    reasons = foreign_to_checkpoint(checkpoint)
    if not reasons:
        shutil.rmtree(checkpoint, ignore_errors=True)
        return
    kept = rename_free(checkpoint, checkpoint.with_name(_FOREIGN + checkpoint.name))
    warnings.warn(f"{checkpoint} is kept as {kept.name}: {'; '.join(reasons)}", RuntimeWarning, stacklevel=2)


def set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name under which no run looks for one.

    Returns:
        where it is.
    """
    return rename_free(checkpoint, checkpoint.with_name(_DAMAGED + checkpoint.name))


def _finished(work: Path) -> Iterator[Path]:
    """Checkpoints that were written to their end, the newest first."""
    steps = {
        int(match[1]): marker.parent
        for marker in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE_FILE}")
        if (match := _NAME.fullmatch(marker.parent.name))
    }
    return (steps[step] for step in sorted(steps, reverse=True))


def _problem(checkpoint: Path) -> str | None:
    """Why a run cannot go on from a checkpoint; None: it can."""
    problem = _damage(checkpoint)
    if problem is not None:
        return problem
    # The weights that the run ends with may be those of an earlier one.
    best = _best(checkpoint)
    if best is not None and best != checkpoint.name:
        damage = _damage(checkpoint.with_name(best))
        if damage is not None:
            return f"the best checkpoint until then, {best}, is damaged: {damage}"
    return None


def _best(checkpoint: Path) -> str | None:
    """The name of the best checkpoint until then; None where there is none, or where nobody can tell."""
    try:
        best = _state(checkpoint / TRAINER_STATE_NAME).best_model_checkpoint
    except UNREADABLE:
        return None
    return None if best is None else Path(best).name


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint."""
    try:
        expected = {str(name): str(digest) for name, digest in _marker(checkpoint)["files"].items()}
        int(_marker(checkpoint)["torch_threads"])
    except UNREADABLE as error:
        return f"{COMPLETE_FILE} cannot be read ({_short(error)})"
    wrong = [name for name in (TRAINER_STATE_NAME, WEIGHTS_FILE) if name not in expected]
    if wrong:
        return f"{COMPLETE_FILE} does not name {' and '.join(wrong)}"
    for name, digest in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} is not as it was written ({path.stat().st_size} bytes)"
        try:
            _read(path)
        except UNREADABLE as error:
            return f"{name} cannot be read ({_short(error)})"
    return None


def _read(path: Path) -> None:
    """Read a file as the trainer will."""
    if path.name == TRAINER_STATE_NAME:
        _state(path)
    elif path.name == WEIGHTS_FILE:
        load_file(path)
    elif _PICKLED.fullmatch(path.name):
        with safe_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that torch has not written; what cannot be read is an error
            torch.load(path, map_location="cpu", weights_only=True)


def _state(path: Path) -> TrainerState:
    """The trainer's state in a file.

    Raises:
        UNREADABLE: there is none, or none that a run can go on from.
    """
    state = TrainerState.load_from_json(str(path))
    wrong = [name for name, kind in _STATE.items() if not isinstance(getattr(state, name), kind)]
    if not wrong and not all(isinstance(entry, dict) for entry in state.log_history):
        wrong = ["log_history"]
    if wrong or state.global_step < 0:
        raise ValueError(f"{', '.join(wrong) or 'global_step'}: no value that a run has")
    return state


def _marker(checkpoint: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
    return read


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _short(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it holds other objects than tensors, numbers and text"  # torch's own text proposes to load them
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
