"""Checkpoints on disk: which are complete and undamaged, and from which one a run resumes.

A marker file is written last and holds the hashes of the other files. A checkpoint without it is incomplete; one whose
files differ from their hashes is damaged.
"""

import json
import math
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

from llm2slm_export.errors import TrainingError, printable
from llm2slm_export.files.atomic import cached_file, clear_abandoned, rename_free
from llm2slm_export.files.output_target import foreign_entries

COMPLETE_FILE = "complete.json"
WEIGHTS_FILE = "trainable.safetensors"
# The first alternative is safetensors' temporary file.
_OF_A_CHECKPOINT = re.compile(
    rf"\.tmp\w+|{re.escape(WEIGHTS_FILE)}|training_args\.bin|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|"
    rf"rng_state(_\d+)?\.pth|{re.escape(TRAINER_STATE_NAME)}|{re.escape(COMPLETE_FILE)}|\.{re.escape(COMPLETE_FILE)}\..*"
)
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_KEPT = 2  # if the newest one is damaged, a run resumes from the one before
_DAMAGED = "damaged-"  # prefix of the name of a damaged checkpoint
_FOREIGN = "kept-"  # prefix of the name of a directory that had a checkpoint's name but is none
# Pickled files that torch reads with `weights_only`; the trainer's own arguments are not read.
_PICKLED = re.compile(r"optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth")
# Fields of the trainer's state that a run reads.
_STATE: dict[str, type | UnionType] = {
    "global_step": int, "max_steps": int, "num_train_epochs": int | float, "epoch": int | float | None,
    "train_batch_size": int | None, "best_model_checkpoint": str | None, "best_metric": int | float | None,
    "best_global_step": int | None, "log_history": list, "stateful_callbacks": dict,
    "total_flos": int | float, "num_input_tokens_seen": int,
    "logging_steps": int | float, "eval_steps": int | float, "save_steps": int | float,
}  # fmt: skip
_COUNTS = ("global_step", "epoch")  # never negative
# Exceptions of the libraries that read the files, for any content.
UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, EOFError, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True)
class Resumption:
    """The checkpoint that a run resumes from.

    Args:
        checkpoint: the newest undamaged one.
        torch_threads: the run's number of threads until then; results depend on it.
        damaged: newer checkpoints, with their damage.
    """

    checkpoint: Path
    torch_threads: int
    damaged: dict[Path, str]


def complete(checkpoint: Path, *, torch_threads: int) -> None:
    """Mark a checkpoint as complete."""
    files = {path.name: _sha256(path) for path in sorted(checkpoint.iterdir()) if path.is_file()}
    text = json.dumps({"torch_threads": torch_threads, "files": files}, indent=1) + "\n"
    with cached_file(checkpoint / COMPLETE_FILE, durable=True) as partial:
        partial.write_text(text, encoding="utf-8")


def last_checkpoint(work: Path) -> Path | None:
    """The last complete checkpoint, without checking its files."""
    return next(_finished(work), None)


def resumption(work: Path) -> Resumption | None:
    """The newest undamaged checkpoint; None if no checkpoint is complete.

    Raises:
        TrainingError: all complete checkpoints are damaged.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in _finished(work):
        problem = _problem(checkpoint)
        if problem is None:
            return Resumption(checkpoint, _marker(checkpoint)[0], damaged)
        damaged[checkpoint] = problem
    if not damaged:
        return None
    raise TrainingError(
        f"All checkpoints in {work} are damaged.",
        *(f"{path.name}: {problem}" for path, problem in damaged.items()),
        remedy="run without --resume and with another --work: training starts over",
    )


def foreign_to_checkpoint(path: Path) -> list[str]:
    """Reasons why a path is not a checkpoint of this trainer, complete or not; empty if it is one."""
    if path.is_symlink() or not path.is_dir():
        return ["it is not a directory"]
    clear_abandoned(path, lambda name: name == COMPLETE_FILE)  # a marker's temporary file of a killed run
    return foreign_entries(path, lambda name, is_directory: not is_directory and bool(_OF_A_CHECKPOINT.fullmatch(name)))


def prune(work: Path) -> None:
    """Remove all checkpoints except the newest two complete ones and the best ones that these refer to."""
    newest = list(_finished(work))[:_KEPT]
    kept = {checkpoint.name for checkpoint in newest} | {_best(checkpoint) for checkpoint in newest}
    for path in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if _NAME.fullmatch(path.name) and path.name not in kept:
            remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, complete or not. With foreign entries it is renamed instead, with a warning."""
    if not os.path.lexists(checkpoint):
        return
    reasons = foreign_to_checkpoint(checkpoint)
    if not reasons:
        shutil.rmtree(checkpoint, ignore_errors=True)
        return
    kept = rename_free(checkpoint, checkpoint.with_name(_FOREIGN + checkpoint.name))
    warnings.warn(f"{checkpoint} is kept as {kept.name}: {'; '.join(reasons)}", RuntimeWarning, stacklevel=2)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that runs ignore it.

    Returns:
        its new path.
    """
    return rename_free(checkpoint, checkpoint.with_name(_DAMAGED + checkpoint.name))


def _finished(work: Path) -> Iterator[Path]:
    """Complete checkpoints, newest first."""
    steps = {
        int(match[1]): marker.parent
        for marker in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE_FILE}")
        if (match := _NAME.fullmatch(marker.parent.name))
    }
    return (steps[step] for step in sorted(steps, reverse=True))


def _problem(checkpoint: Path) -> str | None:
    """Why a run cannot resume from a checkpoint; None if it can."""
    problem = _damage(checkpoint)
    if problem is not None:
        return printable(problem)
    # The run's final weights may be those of an earlier checkpoint.
    best = _best(checkpoint)
    if best is not None and best != checkpoint.name:
        damage = _damage(checkpoint.with_name(best))
        if damage is not None:
            return printable(f"the best checkpoint so far, {best}, is damaged: {damage}")
    return None


def _best(checkpoint: Path) -> str | None:
    """The name of the best checkpoint so far; None if there is none, or the state is unreadable."""
    try:
        best = _state(checkpoint / TRAINER_STATE_NAME).best_model_checkpoint
    except UNREADABLE:
        return None
    return None if best is None else Path(best).name


def _damage(checkpoint: Path) -> str | None:
    """The damage of a checkpoint's files; None if there is none."""
    try:
        _, expected = _marker(checkpoint)
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
            return f"{name} has changed since it was written ({path.stat().st_size} bytes)"
        try:
            _read(path)
        except UNREADABLE as error:
            return f"{name} cannot be read ({_short(error)})"
    return None


def _read(path: Path) -> None:
    """Read a file as the trainer does."""
    if path.name == TRAINER_STATE_NAME:
        _state(path)
    elif path.name == WEIGHTS_FILE:
        load_file(path)
    elif _PICKLED.fullmatch(path.name):
        with safe_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch did not write; unreadable ones raise
            torch.load(path, map_location="cpu", weights_only=True)


def _state(path: Path) -> TrainerState:
    """The trainer's state in a file.

    Raises:
        UNREADABLE: the file is missing, or not a valid state.
    """
    state = TrainerState.load_from_json(str(path))
    fields = {name: getattr(state, name) for name in _STATE}
    wrong = [name for name, value in fields.items() if not isinstance(value, _STATE[name]) or not _is_finite(value)]
    wrong += [name for name in _COUNTS if name not in wrong and (fields[name] or 0) < 0]
    best = state.best_model_checkpoint
    if isinstance(best, str) and not _NAME.fullmatch(Path(best).name):
        wrong.append("best_model_checkpoint")
    if "log_history" not in wrong and not all(map(_is_logged, state.log_history)):
        wrong.append("log_history")
    if wrong:
        raise ValueError(f"{', '.join(dict.fromkeys(wrong))}: invalid value")
    return state


def _is_logged(entry: Any) -> bool:
    """Whether an entry of the history maps names to numbers; a loss may be infinite or NaN."""
    return isinstance(entry, dict) and all(isinstance(value, int | float) for value in entry.values())


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _marker(checkpoint: Path) -> tuple[int, dict[str, str]]:
    """The number of threads and the SHA-256 by file name that a checkpoint's marker records.

    Raises:
        UNREADABLE: the marker is missing or invalid.
    """
    read: dict[str, Any] = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
    threads = read["torch_threads"]
    if type(threads) is not int or threads < 1:
        raise ValueError(f"torch_threads: invalid value {threads!r}")
    return threads, {str(name): str(digest) for name, digest in read["files"].items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _short(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it holds other objects than tensors, numbers and text"  # torch's own message suggests loading them
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
