"""Training on transformers' trainer: a pair, or one of its models by itself (the baselines, and a reader from scratch)."""

import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.optimization import Adafactor
from transformers.trainer_utils import get_last_checkpoint

from llm2slm_export.atomic import replaced_directory
from llm2slm_export.composition import COMPOSITION_FILE, SLM_DIRECTORY, TRAINING_FILE, CompositionFile, LlmEntry
from llm2slm_export.errors import RecipeError, TrainingError, UsageError
from llm2slm_export.models.families import check_types
from llm2slm_export.models.loading import load_config, load_full, load_reader, load_tokenizer, model_from_config
from llm2slm_export.models.pairing import Joint, compose, composition_file, projector_entry
from llm2slm_export.models.projector import Projector, save_projector
from llm2slm_export.models.reference import Reference, arranged, digest, is_encoder_decoder, response_logits
from llm2slm_export.models.template import written_out
from llm2slm_export.recipe import ModelSource, Recipe, TrainingSettings
from llm2slm_export.training.data import HiddenStates, collator, read_pairs, tokenize

Part = Literal["pair", "llm", "slm"]
WEIGHTS_FILE = "trainable.safetensors"
GATE_PROMPTS = 32


class Alone(nn.Module):
    """One model of the pair without the other: the same loss on the same data, conditioned on its own embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.slm = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits [batch, response, vocab]."""
        model: Any = self.slm
        embeds = [model.get_input_embeddings()(input_ids)]
        return response_logits(model, *arranged(embeds, attention_mask, left=not is_encoder_decoder(model)), labels)


class _Trainer(Trainer):
    """transformers' trainer, with our loss, and checkpoints that hold what is trained and not the frozen LLM."""

    def __init__(self, *, label_smoothing: float, **options: Any) -> None:
        super().__init__(**options)
        self._label_smoothing = label_smoothing

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits: Tensor = model(**inputs)
        smoothing = self._label_smoothing if model.training else 0.0
        labels = inputs["labels"].flatten()
        total = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels, reduction="sum", label_smoothing=smoothing
        )
        count = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
        loss = total / count
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The loss is {loss.item()} at step {self.state.global_step}.",
                f"learning rate {self.state.log_history[-1].get('learning_rate', 'n/a') if self.state.log_history else 'n/a'}",
                remedy=f"lower training.learning_rate; the last good checkpoint is in {self.args.output_dir}",
            )
        return (loss, {"logits": logits}) if return_outputs else loss

    def _trainable(self) -> nn.Module:
        model: Any = self.accelerator.unwrap_model(self.model)
        parts = {"slm": model.slm}
        if isinstance(model, Reference):
            parts["projector"] = model.projector
        return nn.ModuleDict(parts)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        save_model(self._trainable(), str(directory / WEIGHTS_FILE))
        torch.save(self.args, directory / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        load_model(self._trainable(), Path(resume_from_checkpoint) / WEIGHTS_FILE)

    def _load_best_model(self) -> None:
        load_model(self._trainable(), Path(str(self.state.best_model_checkpoint)) / WEIGHTS_FILE)


@dataclass(frozen=True)
class TrainingResult:
    directory: Path
    metrics: dict[str, float]
    seconds: float


def train(
    recipe: Recipe,
    out: Path,
    *,
    part: Part = "pair",
    work: Path | None = None,
    resume: bool = False,
    force: bool = False,
    weights_dtype: torch.dtype = torch.float32,
) -> TrainingResult:
    """Train what `part` names and write it to `out`.

    Args:
        part: `pair` writes a composition; `llm` and `slm` train that model by itself on the recipe's data and write a
            transformers directory: the baselines, and a reader made from scratch.
        work: where checkpoints and cached hidden states are kept; `<out>.work` where it is not given.
        resume: go on from the last checkpoint in `work`.
        weights_dtype: the type weights are written in.

    Raises:
        RecipeError, DataError, CompositionError: before training starts.
        TrainingError: the loss stopped being a number, or the frozen LLM changed.
        UsageError: `out` exists and `force` is not set, or `work` holds another run and `resume` is not set.
    """
    if recipe.training is None:
        raise RecipeError(
            f"The recipe {recipe.name!r} has no `training` section.", remedy="add one, or use `build` on it as it is"
        )
    settings = recipe.training
    if out.exists() and not force:
        raise UsageError(f"{out} exists already.", remedy="choose another --out, or add --force to replace it")
    work = work or out.with_name(out.name + ".work")
    checkpoint = _checkpoint(work, resume=resume)
    torch.manual_seed(settings.seed)
    model, llm_tokenizer, slm_tokenizer = _model(recipe, part)
    rows = {
        name: read_pairs(source, settings.data)
        for name, source in (("train", settings.data.train), ("validation", settings.data.validation))
    }
    limits = settings.max_prompt_tokens, settings.max_response_tokens
    template = written_out(recipe.prompt_template, llm_tokenizer)
    data, dropped = {}, {}
    for name, pairs in rows.items():
        data[name], dropped[name] = tokenize(pairs, template, llm_tokenizer, slm_tokenizer, *limits)
    pad_id = _pad_id(llm_tokenizer)
    hidden = None
    if isinstance(model, Reference) and settings.cache_hidden_states:
        prompts = [ids for part_data in data.values() for ids in part_data["input_ids"]]
        hidden = HiddenStates.build(model, prompts, work / "hidden_states", pad_id)
    before = digest(model.llm) if isinstance(model, Reference) else ""
    trainer = _Trainer(
        model=model,
        args=_arguments(settings, work, len(data["train"])),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collator(pad_id, hidden),
        optimizer_cls_and_kwargs=_optimizer(settings),
        label_smoothing=settings.label_smoothing,
    )
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    if isinstance(model, Reference):
        _assert_frozen(model, before)
    metrics = {k: v for k, v in trainer.evaluate().items() if k == "eval_loss"}
    record = {
        "recipe": recipe.model_dump(mode="json"),
        "part": part,
        "rows": {name: len(data[name]) for name in data},
        "rows_left_out": dropped,
        # What `build` runs its parity gate on: real prompts of the task.
        "prompts": list(dict.fromkeys(prompt for prompt, _ in rows["validation"]))[:GATE_PROMPTS],
        "metrics": metrics
        | {"best_step": _step(trainer.state.best_model_checkpoint), "steps": trainer.state.global_step},
        "history": [entry for entry in trainer.state.log_history if "eval_loss" in entry],
        "parameters": {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "frozen": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        },
        "seconds": round(seconds, 1),
        "resumed": checkpoint is not None,
        "hardware": {
            "machine": platform.machine(),
            "torch_threads": torch.get_num_threads(),
            "cuda": torch.cuda.is_available(),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "tokenizers")},
    }
    with replaced_directory(out, force=force) as directory:
        if isinstance(model, Reference):
            _write_composition(recipe, model, llm_tokenizer, slm_tokenizer, directory, out, weights_dtype)
        else:
            _save_pretrained(model.slm, llm_tokenizer, directory, weights_dtype)
        (directory / TRAINING_FILE).write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return TrainingResult(out, metrics, seconds)


def _checkpoint(work: Path, *, resume: bool) -> str | None:
    found = get_last_checkpoint(str(work)) if work.is_dir() else None
    if found and not resume:
        raise UsageError(
            f"{work} holds checkpoints of an earlier run (the last: {Path(found).name}).",
            remedy="add --resume to go on from there, or remove the directory to start over",
        )
    if resume and not found:
        raise UsageError(f"{work} holds no checkpoint to resume from.", remedy="run without --resume")
    return found


def _model(recipe: Recipe, part: Part) -> tuple[Any, PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """What is trained, and the tokenizers of its prompts and its responses."""
    if part != "pair":
        source = recipe.llm if part == "llm" else recipe.slm
        tokenizer = load_tokenizer(_tokenizer_name(source))
        return Alone(_trainable_model(source, alone=True)), tokenizer, tokenizer
    if recipe.llm.model is None:
        raise RecipeError(
            "The recipe names an LLM architecture but no LLM.",
            remedy="set llm.model to a trained model; `train --only llm` makes one from llm.config",
        )
    slm = _trainable_model(recipe.slm, alone=False)
    slm_model: Any = slm
    check_types(load_config(recipe.llm.model, recipe.llm.revision), slm_model.config)
    llm = load_reader(recipe.llm.model, recipe.llm.revision)
    llm_tokenizer = load_tokenizer(_tokenizer_name(recipe.llm), recipe.llm.revision)
    slm_tokenizer = load_tokenizer(_tokenizer_name(recipe.slm), recipe.slm.revision)
    projector = Projector(projector_entry(llm, slm, Joint.of(recipe)))
    file = _composition_file(recipe, projector, recipe.llm.model, llm_tokenizer)
    return compose(llm, projector, slm, file, llm_tokenizer, slm_tokenizer), llm_tokenizer, slm_tokenizer


def _tokenizer_name(source: ModelSource) -> str:
    return source.tokenizer or str(source.model)


def _trainable_model(source: ModelSource, *, alone: bool) -> nn.Module:
    """`alone`: from its configuration where there is one, from scratch. In a pair: the model where there is one."""
    if source.config is not None and (alone or source.model is None):
        return model_from_config(source.config)
    assert source.model is not None  # the recipe has been validated: one of the two is given
    return load_full(source.model, source.revision)


def _composition_file(
    recipe: Recipe, projector: Projector, llm_model: str, llm_tokenizer: PreTrainedTokenizerFast
) -> CompositionFile:
    entry = LlmEntry(model=llm_model, revision=recipe.llm.revision, layer=recipe.llm.layer)
    return composition_file(recipe.name, entry, projector.entry, Joint.of(recipe), llm_tokenizer)


def _arguments(settings: TrainingSettings, work: Path, rows: int) -> TrainingArguments:
    steps_per_epoch = math.ceil(rows / (settings.batch_size * settings.gradient_accumulation_steps))
    every = max(1, steps_per_epoch // settings.evaluations_per_epoch)
    return TrainingArguments(
        output_dir=str(work),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=min(50, every),
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to="none",
    )


def _optimizer(settings: TrainingSettings) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if settings.optimizer == "adafactor":
        # Updates relative to each parameter's scale: what T5 was trained with (arXiv 1804.04235), and what its
        # initialisation, embeddings of unit variance, asks for.
        return Adafactor, {
            "lr": settings.learning_rate, "scale_parameter": True, "relative_step": False, "warmup_init": False,
            "weight_decay": settings.weight_decay,
        }  # fmt: skip
    return torch.optim.AdamW, {
        "lr": settings.learning_rate, "betas": (0.9, 0.98), "weight_decay": settings.weight_decay, "fused": True,
    }  # fmt: skip


def _pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    return int(pad if pad is not None else eos)


def _assert_frozen(model: Reference, before: str) -> None:
    """The LLM has no gradient and its weights are bit for bit those it came with."""
    with_gradient: Sequence[str] = [name for name, p in model.llm.named_parameters() if p.grad is not None]
    if with_gradient or digest(model.llm) != before:
        raise TrainingError(
            "The frozen LLM was touched by training.",
            f"parameters with a gradient: {', '.join(with_gradient) or 'none'}",
            "weights changed" if digest(model.llm) != before else "weights unchanged",
            remedy="this is a bug in llm2slm-export; nothing was written",
        )


def _step(checkpoint: str | None) -> int:
    return int(str(checkpoint).rsplit("-", 1)[1]) if checkpoint else 0


def _save_pretrained(model: nn.Module, tokenizer: PreTrainedTokenizerFast, directory: Path, dtype: torch.dtype) -> None:
    saved: Any = model
    saved.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _write_composition(
    recipe: Recipe,
    model: Reference,
    llm_tokenizer: PreTrainedTokenizerFast,
    slm_tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    out: Path,
    dtype: torch.dtype,
) -> None:
    llm = str(recipe.llm.model)
    if Path(llm).is_dir():
        # Relative to where composition.json will be, so that the two directories can move together.
        llm = os.path.relpath(llm, out)
    file = _composition_file(recipe, model.projector, llm, llm_tokenizer)
    (directory / COMPOSITION_FILE).write_text(file.model_dump_json(indent=1) + "\n", encoding="utf-8")
    save_projector(model.projector, directory, dtype)
    _save_pretrained(model.slm, slm_tokenizer, directory / SLM_DIRECTORY, dtype)
