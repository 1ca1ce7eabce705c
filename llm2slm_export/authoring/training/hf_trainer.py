"""transformers' trainer with its own loss and row order, and checkpoints of the trainable weights only."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.optimization import Adafactor
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2slm_export.authoring.recipe import TrainingSettings
from llm2slm_export.authoring.training.checkpoints import (
    UNREADABLE,
    WEIGHTS_FILE,
    complete,
    last_checkpoint,
    prune,
    remove,
)
from llm2slm_export.errors import TrainingError

_LAYER_DROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
_CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # keys of torch.cpu.get_capabilities, on x86-64 and ARM


class ByLength(Sampler[int]):
    """Samples rows of similar length together, in an order that depends on seed and epoch only.

    All processes, and a run resumed from a checkpoint, therefore have the same order, independent of dropout.

    Args:
        lengths: of the rows.
        batch_size: rows per batch, over all processes.
        seed: of the order.
        epoch: returns the number of the starting epoch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        yield from get_length_grouped_indices(self._lengths, self._batch_size, generator=generator)


class PartTrainer(Trainer):
    """transformers' trainer for a model that returns logits [batch, response, vocab_size].

    Raises:
        TrainingError: the loss or a weight is not finite, or a checkpoint belongs to a run with other settings.
    """

    def __init__(self, *, label_smoothing: float, **options: Any) -> None:
        super().__init__(**options)
        self.remove_callback(PrinterCallback)  # `StepLog` prints
        self._label_smoothing = label_smoothing
        # `compute_loss` receives the token count of the whole step, over all batches and processes, and divides by it.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This process's share of the mean loss per token, times the number of processes: gradients are averaged."""
        logits: Tensor = model(**inputs)
        smoothing = self._label_smoothing if model.training else 0.0
        total = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), inputs["labels"].flatten(), reduction="sum", label_smoothing=smoothing
        )
        loss = total / num_items_in_batch * self.accelerator.num_processes
        if not torch.isfinite(loss):
            step = self.state.global_step
            when = f"in step {step + 1}" if model.training else f"in the evaluation after step {step}"
            raise self._non_finite_error(f"The loss is {loss.item()} {when}.")
        return (loss, {"logits": logits}) if return_outputs else loss

    def _non_finite_error(self, fact: str, *evidence: str) -> TrainingError:
        found = last_checkpoint(Path(str(self.args.output_dir)))
        rates = [entry["learning_rate"] for entry in self.state.log_history if "learning_rate" in entry]
        return TrainingError(
            fact,
            *evidence,
            f"learning rate {rates[-1]:.3g}" if rates else f"learning rate up to {self.args.learning_rate:.3g}",
            f"the last complete checkpoint is {found}" if found else "there is no checkpoint yet",
            remedy="lower training.learning_rate or set training.bf16=false, and train again"
            + (", with another --work" if found else ""),
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> ByLength:
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return self._sampler(train_dataset or self.train_dataset, rows, lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Any) -> ByLength:
        return self._sampler(eval_dataset, self.args.eval_batch_size, lambda: 0)

    def _sampler(self, dataset: Any, rows: int, epoch: Callable[[], int]) -> ByLength:
        return ByLength(list(dataset["length"]), rows * self.args.world_size, self.args.seed, epoch)

    def _learning(self) -> dict[str, Tensor]:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        weights = self._learning()
        bad = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
        if bad:
            # The validation loss can be finite: it does not use every row of an embedding table.
            raise self._non_finite_error(
                f"{len(bad)} weights are not finite after step {self.state.global_step}.", *bad[:5]
            )
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            save_file({name: weight.contiguous() for name, weight in weights.items()}, directory / WEIGHTS_FILE)
            torch.save(self.args, directory / "training_args.bin")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, mark it as complete, and then remove older ones."""
        directory = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            remove(directory)  # an incomplete one of a killed run
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes its RNG state
        if self.args.should_save:
            complete(directory, torch_threads=torch.get_num_threads())
            prune(directory.parent)

    def _best_checkpoint(self) -> Path | None:
        """The best checkpoint so far, in the current directory: checkpoints may have been moved."""
        best = self.state.best_model_checkpoint
        return None if best is None else Path(str(self.args.output_dir)) / Path(best).name

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _fitting(checkpoint, "the optimizer's state"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _fitting(checkpoint, "the random state"):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = self._best_checkpoint()
        if best is not None:
            self._load_weights(best)

    def _load_weights(self, checkpoint: Path) -> None:
        with _fitting(str(checkpoint), WEIGHTS_FILE):
            found = load_file(checkpoint / WEIGHTS_FILE)
        weights = self._learning()
        mismatches = [
            f"{name}: {_shape(found, name)} in the checkpoint, {_shape(weights, name)} in the model"
            for name in sorted(found.keys() | weights.keys())
            if _shape(found, name) != _shape(weights, name)
        ]
        if mismatches:
            more = [f"and {len(mismatches) - 5} more"] if len(mismatches) > 5 else []
            raise TrainingError(
                f"{checkpoint} belongs to a run with other settings.",
                *mismatches[:5],
                *more,
                remedy="resume with the recipe that wrote it, or start over with another --work",
            )
        for name, weight in weights.items():
            weight.copy_(found[name])


def _shape(weights: Mapping[str, Tensor], name: str) -> str:
    return "×".join(map(str, weights[name].shape)) if name in weights else "nothing"


@contextmanager
def _fitting(checkpoint: str | None, what: str) -> Iterator[None]:
    """Convert errors while loading a part of a checkpoint to an error that names the checkpoint.

    Raises:
        TrainingError: the part is unreadable, or does not match the run.
    """
    try:
        yield
    except UNREADABLE as error:
        raise TrainingError(
            f"Training cannot resume from {checkpoint}: {what} is unreadable, or does not match this run.",
            f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            remedy="resume with the recipe that wrote it, or start over with another --work",
        ) from error


def has_bf16(device: torch.device) -> bool:
    """Whether a device has bfloat16 matrix instructions; emulated products take many times as long."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in _CPU_BF16)


def freeze_unreached(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Freeze the weights that receive no gradient, such as an SLM's encoder with `cross_attention`.

    They would be counted as trained, and every process would wait for their gradients.

    Args:
        model: in evaluation mode; it returns logits.
        batch: any batch.

    Returns:
        the number of frozen weights.
    """
    device = next(model.parameters()).device
    logits: Tensor = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    if logits.requires_grad:
        logits.float().sum().backward()  # type: ignore[no-untyped-call]
    unreached = [weight for weight in model.parameters() if weight.requires_grad and weight.grad is None]
    for weight in unreached:
        weight.requires_grad = False
    model.zero_grad(set_to_none=True)
    return sum(weight.numel() for weight in unreached)


def arguments(settings: TrainingSettings, work: Path, rows: int, model: nn.Module, processes: int) -> TrainingArguments:
    """transformers' training arguments.

    Args:
        settings: the recipe's.
        work: directory of the checkpoints.
        rows: number of training rows.
        model: the model to train.
        processes: number of processes.
    """
    rows_per_step = settings.batch_size * settings.gradient_accumulation_steps * processes
    every = max(1, math.ceil(rows / rows_per_step) // settings.evaluations_per_epoch)
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
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=None,  # `_save_checkpoint` removes older ones once the new one is complete
        logging_steps=min(50, every),
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        average_tokens_across_devices=True,
        # `freeze_unreached` leaves no weight without a gradient, except in models that drop layers at random.
        ddp_find_unused_parameters=_drops_layers(model),
    )


def _drops_layers(model: nn.Module) -> bool:
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return any(getattr(config, name, 0) for config in configs for name in _LAYER_DROP)


def optimizer(settings: TrainingSettings) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer's class and options."""
    if settings.optimizer == "adafactor":
        # Updates relative to each parameter's scale, as in T5's training (arXiv 1804.04235). T5's initialization, with
        # embeddings of unit variance, requires them.
        return Adafactor, {
            "lr": settings.learning_rate, "scale_parameter": True, "relative_step": False, "warmup_init": False,
            "weight_decay": settings.weight_decay,
        }  # fmt: skip
    return torch.optim.AdamW, {
        "lr": settings.learning_rate, "betas": (0.9, 0.98), "weight_decay": settings.weight_decay, "fused": True,
    }  # fmt: skip
