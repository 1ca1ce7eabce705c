"""One training run: a pair, or one of its models alone (the baselines, and an LLM from scratch)."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2slm_export.authoring.artifacts import TRAINED
from llm2slm_export.authoring.composition import COMPOSITION_FILE, SLM_DIRECTORY, TRAINING_FILE
from llm2slm_export.authoring.models.chat_template import prompt_template
from llm2slm_export.authoring.models.pairing import source_tokenizer
from llm2slm_export.authoring.models.projector import save_projector
from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.authoring.models.special_tokens import prompt_pad
from llm2slm_export.authoring.progress import SILENT, Progress
from llm2slm_export.authoring.recipe import Recipe, TeacherSettings, TrainingSettings, without_absolute_paths
from llm2slm_export.authoring.torch_threads import choose_threads, torch_threads
from llm2slm_export.authoring.training.checkpoints import (
    Resumption,
    foreign_to_checkpoint,
    last_checkpoint,
    resumption,
    set_aside,
)
from llm2slm_export.authoring.training.collate import collator, require_rows, tokenize
from llm2slm_export.authoring.training.distillation import Teacher
from llm2slm_export.authoring.training.hf_trainer import (
    PartTrainer,
    arguments,
    freeze_unreached,
    has_bf16,
    optimizer,
)
from llm2slm_export.authoring.training.hidden_state_cache import HiddenStates
from llm2slm_export.authoring.training.inputs import TrainingPart, sources_read, training_settings
from llm2slm_export.authoring.training.pairs import Row, read_further_prompts, read_pairs, refuse_overlap
from llm2slm_export.authoring.training.step_log import StepLog
from llm2slm_export.authoring.training.trainable import TrainingTarget, load_part, pair_file, table_rows
from llm2slm_export.errors import Llm2SlmError, RecipeError, TrainingError, UsageError
from llm2slm_export.files.atomic import Replacement
from llm2slm_export.files.workplace import occupied

GATE_PROMPTS = 32
# Timeout of the other processes while the main one encodes prompts or runs the teacher.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a run. `is_main_process`: whether this process wrote the directory."""

    directory: Path
    metrics: dict[str, float]
    seconds: float
    is_main_process: bool = True


def train(
    recipe: Recipe,
    out: Path,
    *,
    part: TrainingPart = "pair",
    work: Path | None = None,
    cache: Path | None = None,
    resume: bool = False,
    force: bool = False,
    weights_dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> TrainingResult:
    """Train a part of a recipe, and write it to `out`.

    Under `torchrun` or `accelerate launch` every process calls this; the main one writes.

    Args:
        recipe: models, data and settings.
        out: output directory.
        part: `pair` writes a composition. The others train one model alone on the recipe's data, and write a
            transformers directory. `llm`, `slm`: created from the recipe's configuration, if it has one. `slm-alone`:
            the pair's initial SLM, a baseline with the pair's training budget.
        work: directory of the checkpoints; None: `<out>.work`.
        cache: directory of hidden states and teacher responses, which runs may share; None: `cache` beside `out`.
        resume: resume from the newest undamaged checkpoint in `work`.
        force: replace an existing `out`.
        weights_dtype: type of the saved weights.
        threads: number of torch threads; None: the checkpoint's, or the number of idle cores.
        progress: receives the main process's tasks and steps.

    Raises:
        RecipeError, DataError, CompositionError: before training starts.
        TrainingError: the loss or a weight is not finite, frozen weights changed, or all checkpoints are damaged.
        UsageError: `out` exists without `force`, must not be replaced (`atomic.Replacement`), or contains `work` or
            `cache`; or `work` holds another run and `resume` is not set; or `work` holds directories with a
            checkpoint's name that are none; or another process trains in `work`; or `threads` is less than one.
        Llm2SlmError: `out` appeared or changed during training. It is kept, and the result is beside it.
    """
    settings = training_settings(recipe)
    replacement = Replacement(out, TRAINED, force=force, inputs=map(Path, sources_read(recipe, part).values()))
    work, cache = work or out.with_name(out.name + ".work"), cache or out.parent / "cache"
    _refuse_inside(out, {"work": work, "cache": cache})
    with _alone_in(work):
        resumed = _resumption(work, resume=resume)
        chosen = choose_threads(threads, before=resumed.torch_threads if resumed else None)
        torch.manual_seed(settings.seed)
        with torch_threads(chosen.count):
            trainee = load_part(recipe, part)
            rows = {
                name: read_pairs(source, settings.data)
                for name, source in (("train", settings.data.train), ("validation", settings.data.validation))
            }
            teacher = settings.teacher if part != "llm" else None  # the LLM cannot be its own teacher
            further = (
                read_further_prompts(teacher.further_prompts, settings.data)
                if teacher and teacher.further_prompts
                else []
            )
            prompts = {name: [prompt for prompt, _ in pairs] for name, pairs in rows.items()}
            refuse_overlap(prompts["train"] + further, prompts["validation"], what="validation")
            with _processes() as processes:
                _say(processes, chosen.reason)
                _tell_resumption(processes, resumed)
                run = _Run(recipe, part, settings, trainee, rows, further, cache, processes, progress)
                trainer = run.trainer(work)
                started = time.monotonic()
                trainer.train(resume_from_checkpoint=str(resumed.checkpoint) if resumed else None)
                seconds = time.monotonic() - started
                run.assert_frozen()
                metrics = {k: v for k, v in trainer.evaluate().items() if k == "eval_loss"}
                if processes.is_main_process:
                    record = run.record(trainer, metrics, seconds, resumed=resumed is not None)
                    with replacement.written() as directory:
                        _write(run, directory, out, weights_dtype)
                        # A later run compares the directory with this list before it replaces it.
                        record["files"] = sorted(
                            path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
                        )
                        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
                        (directory / TRAINING_FILE).write_text(text, encoding="utf-8")
                processes.wait_for_everyone()
                return TrainingResult(out, metrics, seconds, bool(processes.is_main_process))


@contextmanager
def _alone_in(work: Path) -> Iterator[None]:
    """Lock a checkpoint directory: two runs would overwrite each other's checkpoints."""
    if os.environ.get("RANK", "0") != "0":  # in a distributed run, the first process holds the lock
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(occupied(work))
        except BlockingIOError:
            raise UsageError(
                f"Another process trains in {work}.",
                remedy="wait until it ends, or give another --work",
            ) from None
        yield


@contextmanager
def _processes() -> Iterator[Any]:
    """accelerate's state of the run's processes (one, unless a launcher started several)."""
    distributed = torch.distributed.is_available()
    joined = distributed and torch.distributed.is_initialized()
    yield PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    if distributed and torch.distributed.is_initialized() and not joined:
        torch.distributed.destroy_process_group()


@contextmanager
def _first_batch() -> Iterator[None]:
    """Convert errors of the first batch to an error that points to the models' sizes.

    Raises:
        TrainingError: the block raised an exception.
    """
    try:
        yield
    except (Llm2SlmError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise TrainingError(
            "The models cannot compute the first batch.",
            f"{type(error).__name__}: {reason[:300]}",
            remedy="check the sizes in the models' configurations (llm.config, slm.config in a recipe): they must be compatible",
        ) from error


class _Run:
    """A prepared run: model, data and caches."""

    def __init__(
        self,
        recipe: Recipe,
        part: TrainingPart,
        settings: TrainingSettings,
        trainee: TrainingTarget,
        rows: dict[str, list[Row]],
        further: list[str],
        cache: Path,
        processes: Any,
        progress: Progress,
    ) -> None:
        self.recipe, self.part, self.trainee, self.processes = recipe, part, trainee, processes
        self.progress = progress if processes.is_main_process else SILENT
        if settings.bf16 and not has_bf16(processes.device):
            self._say(
                f"training.bf16 is ignored: this {processes.device.type} has no bfloat16 instructions, and emulation "
                "takes many times as long; matrix products are in float32"
            )
            settings = settings.model_copy(update={"bf16": False})
        self.settings = settings
        self.gate_prompts = list(dict.fromkeys(prompt for prompt, _ in rows["validation"]))[:GATE_PROMPTS]
        self.model = trainee.model.to(processes.device).eval()
        self.teacher: dict[str, Any] | None = None
        if settings.teacher is not None and part == "llm":
            self._say("training.teacher is ignored: the LLM cannot be its own teacher")
        elif settings.teacher is not None:
            rows = rows | {"train": self._distilled(rows["train"], further, settings.teacher, cache)}
        template = prompt_template(recipe.prompt_template, trainee.prompt_tokenizer)
        limits = settings.max_prompt_tokens, settings.max_response_tokens
        self.data: dict[str, Dataset] = {}
        self.left_out: dict[str, int] = {}
        for name, pairs in rows.items():
            self.data[name], self.left_out[name] = tokenize(
                pairs, template, trainee.prompt_tokenizer, trainee.response_tokenizer, *limits
            )
            require_rows(self.data[name], *table_rows(trainee))
            if self.left_out[name]:
                self._say(f"{name}: {self.left_out[name]} of {len(pairs)} rows exceed the limits and were dropped")
        pad_id = prompt_pad(trainee.prompt_tokenizer) or 0
        hidden = self._hidden_states(cache, pad_id)
        self.collate = collator(pad_id, hidden.__getitem__ if hidden is not None else None)
        with _first_batch():
            self.unreached = freeze_unreached(self.model, self.collate([self.data["train"][0]]))
        if self.unreached:
            self._say(f"{self.unreached:,} weights receive no gradient and stay unchanged")
        if not any(weight.requires_grad for weight in self.model.parameters()):
            raise RecipeError(
                "The recipe leaves nothing to train.",
                f"training.slm {settings.slm}, projector {recipe.projector.kind}, fusion {recipe.fusion}",
                remedy="set training.slm=full or training.slm=lora, or projector.kind=mlp",
            )
        self._frozen = _digest(self._weights(learning=False))

    def _say(self, text: str) -> None:
        _say(self.processes, text)

    def _weights(self, *, learning: bool) -> dict[str, Tensor]:
        return {n: weight for n, weight in self.model.named_parameters() if weight.requires_grad == learning}

    def _distilled(self, rows: list[Row], further: list[str], wanted: TeacherSettings, cache: Path) -> list[Row]:
        llm, settings = self.recipe.llm, self.settings
        if llm.model is None:
            raise RecipeError(
                "The recipe has a teacher but no trained LLM.",
                remedy="set llm.model to a trained model; `train --only llm` trains one from llm.config",
            )
        tokenizer = source_tokenizer(llm)
        teacher = Teacher(
            llm.model, llm.revision, tokenizer, prompt_template(self.recipe.prompt_template, tokenizer), wanted,
            max_prompt_tokens=settings.max_prompt_tokens, max_new_tokens=max(1, settings.max_response_tokens - 1),
            device=self.processes.device, bf16=settings.bf16,
        )  # fmt: skip
        own = dict.fromkeys(prompt for prompt, _ in rows)
        asked = [*own, *further]
        if wanted.rows == "kept":
            asked = further = [prompt for prompt in further if prompt not in own]
        with self.processes.main_process_first():
            answers = teacher.answer(asked, cache / "teacher", self.progress)
        distilled = answers.distilled(rows, further, how=wanted.rows)
        self.teacher = wanted.model_dump() | {
            "model": llm.model, "prompts": answers.prompts, "unfinished": answers.unfinished, "empty": answers.empty,
            "too_long": answers.too_long, "rows_before": len(rows), "rows_after": len(distilled),
        }  # fmt: skip
        before = f"{len(rows)} rows" + (f" and {len(further)} further prompts" if further else "")
        self._say(
            f"teacher: {answers.prompts} prompts; dropped: {answers.unfinished} unfinished responses, "
            f"{answers.empty} empty responses, {answers.too_long} prompts over the limit; {before} became {len(distilled)} rows"
        )
        return distilled

    def _hidden_states(self, cache: Path, pad_id: int) -> HiddenStates | None:
        if self.trainee.llm_and_layer is None or not self.settings.cache_hidden_states:
            return None
        llm, layer = self.trainee.llm_and_layer
        prompts = [ids for data in self.data.values() for ids in data["input_ids"]]
        with self.processes.main_process_first():
            return HiddenStates.build(
                llm, layer, prompts, cache / "hidden_states", pad_id, bf16=self.settings.bf16, progress=self.progress
            )

    def trainer(self, work: Path) -> PartTrainer:
        """The run's trainer, with checkpoints in `work`."""
        settings = self.settings
        chosen = arguments(settings, work, len(self.data["train"]), self.model, self.processes.num_processes)
        if chosen.n_gpu > 1:
            self._say(f"one of {chosen.n_gpu} GPUs is used; `accelerate launch -m llm2slm_export` uses all")
            chosen._n_gpu = 1
        return PartTrainer(
            model=self.model, args=chosen, train_dataset=self.data["train"], eval_dataset=self.data["validation"],
            data_collator=self.collate, optimizer_cls_and_kwargs=optimizer(settings),
            label_smoothing=settings.label_smoothing, callbacks=[StepLog(self.progress, self._say)],
        )  # fmt: skip

    def assert_frozen(self) -> None:
        """Check that frozen weights have no gradient and are unchanged, bit for bit.

        Raises:
            TrainingError: a frozen weight has a gradient or changed.
        """
        frozen = self._weights(learning=False)
        with_gradient = [name for name, weight in frozen.items() if weight.grad is not None]
        changed = _digest(frozen) != self._frozen
        if with_gradient or changed:
            raise TrainingError(
                "Frozen weights were touched by training.",
                f"with a gradient: {', '.join(with_gradient) or 'none'}",
                "weights changed" if changed else "weights unchanged",
                remedy="this is a bug in llm2slm-export; nothing was written",
            )

    def record(
        self, trainer: PartTrainer, metrics: dict[str, float], seconds: float, *, resumed: bool
    ) -> dict[str, Any]:
        """The content of training.json."""
        state = trainer.state
        return {
            "recipe": without_absolute_paths(self.recipe.model_dump(mode="json")),
            "part": self.part,
            "rows": {name: len(data) for name, data in self.data.items()},
            "rows_left_out": self.left_out,
            "teacher": without_absolute_paths(self.teacher),
            # Real prompts of the task for `build`'s parity check.
            "prompts": self.gate_prompts,
            "metrics": metrics | {"best_step": _step(state.best_model_checkpoint), "steps": state.global_step},
            "history": [entry for entry in state.log_history if "eval_loss" in entry],
            "parameters": {
                "trained": sum(weight.numel() for weight in self._weights(learning=True).values()),
                "frozen": sum(weight.numel() for weight in self._weights(learning=False).values()),
                "unreached": self.unreached,
            },
            "seconds": round(seconds, 1),
            "resumed": resumed,
            "hardware": {
                "machine": platform.machine(),
                "torch_threads": torch.get_num_threads(),
                "cuda": torch.cuda.is_available(),
                "bf16": self.settings.bf16,
                "processes": self.processes.num_processes,
            },
            "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "tokenizers")},
        }


def _refuse_inside(out: Path, places: dict[str, Path]) -> None:
    """Refuse `work` or `cache` inside `out`, which the result replaces."""
    target = Path(os.path.realpath(out))
    inside = [
        f"--{option} {place}" for option, place in places.items()
        if target in (path := Path(os.path.realpath(place)), *path.parents)
    ]  # fmt: skip
    if inside:
        raise UsageError(
            f"The result replaces {out}, which contains directories that the run writes to.",
            *inside,
            remedy="choose directories outside --out",
        )


def _resumption(work: Path, *, resume: bool) -> Resumption | None:
    # The trainer removes old checkpoints by name only.
    foreign = [
        f"{path}: {reason}" for path in sorted(work.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) for reason in foreign_to_checkpoint(path)
    ]  # fmt: skip
    if foreign:
        raise UsageError(
            f"{work} holds entries with a checkpoint's name that are no checkpoints.",
            *foreign,
            remedy="give another --work",
        )
    if not resume:
        if last := last_checkpoint(work):
            raise UsageError(
                f"{work} holds checkpoints of an earlier run (the last: {last.name}).",
                remedy="add --resume to continue from there, or remove the directory to start over",
            )
        return None
    found = resumption(work)
    if found is None:
        raise UsageError(
            f"{work} holds no complete checkpoint.",
            remedy="run without --resume: training starts over",
        )
    return found


def _tell_resumption(processes: Any, resumed: Resumption | None) -> None:
    """Report the checkpoint that the run resumes from, and rename damaged newer ones."""
    if resumed is None:
        return
    processes.wait_for_everyone()  # until all processes have read the checkpoints
    for damaged, problem in resumed.damaged.items():
        if processes.is_main_process:
            place = set_aside(damaged)
            _say(processes, f"{damaged.name} is damaged: {problem}. It was renamed to {place.name}.")
    _say(processes, f"Training resumes from {resumed.checkpoint.name}.")


def _say(processes: Any, text: str) -> None:
    if processes.is_main_process:
        # Not through a console of its own: a progress bar on a terminal replaces sys.stdout, and keeps these lines above it.
        print(text, flush=True)


def _digest(weights: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, weight in weights.items():
        total.update(name.encode())
        total.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _step(checkpoint: str | None) -> int:
    return int(str(checkpoint).rsplit("-", 1)[1]) if checkpoint else 0


def _write(run: _Run, directory: Path, out: Path, dtype: torch.dtype) -> None:
    trainee = run.trainee
    if trainee.adapters is not None:
        trainee.adapters.merge()
    if not isinstance(trainee.model, Reference):
        _save_pretrained(trainee.model.slm, trainee.response_tokenizer, directory, dtype)
        return
    file = pair_file(run.recipe, trainee.model.projector, trainee.prompt_tokenizer, out)
    (directory / COMPOSITION_FILE).write_text(file.model_dump_json(indent=1) + "\n", encoding="utf-8")
    save_projector(trainee.model.projector, directory, dtype)
    _save_pretrained(trainee.model.slm, trainee.response_tokenizer, directory / SLM_DIRECTORY, dtype)


def _save_pretrained(model: nn.Module, tokenizer: PreTrainedTokenizerFast, directory: Path, dtype: torch.dtype) -> None:
    saved: Any = model
    saved.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
