"""The model that a run trains (the pair, or its LLM or SLM alone), and its trainable weights."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from llm2slm_export.authoring.composition import CompositionFile, LlmEntry
from llm2slm_export.authoring.models.architectures import LLM_ARCHITECTURES, check_types
from llm2slm_export.authoring.models.loading import load_config, load_full, load_llm, model_from_config
from llm2slm_export.authoring.models.pairing import (
    PairConfig,
    compose,
    composition_file,
    projector_entry,
    source_tokenizer,
)
from llm2slm_export.authoring.models.projector import Projector
from llm2slm_export.authoring.models.reference import (
    Layer,
    Reference,
    is_encoder_decoder,
    pack_sequences,
    read,
    response_logits,
)
from llm2slm_export.authoring.recipe import LoraSettings, ModelSource, Recipe, TrainingSettings
from llm2slm_export.authoring.training.inputs import TrainingPart, from_scratch, training_settings
from llm2slm_export.authoring.training.lora import Adapters
from llm2slm_export.errors import CompositionError, RecipeError


class StandaloneModel(nn.Module):
    """One model of the pair alone, with the same loss and data, conditioned on its own prompt embeddings.

    Args:
        model: a model with its language-model head.
        freeze_encoder: freeze the encoder, without dropout, and the input embeddings: the LLM alone then encodes like
            the pair's LLM.
    """

    def __init__(self, model: nn.Module, *, freeze_encoder: bool = False) -> None:
        super().__init__()
        self.slm = model
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            self.encoder.requires_grad_(requires_grad=False)  # includes the input embeddings

    @property
    def encoder(self) -> nn.Module:
        """The encoder of an encoder-decoder."""
        model: Any = self.slm
        encoder: nn.Module = model.get_encoder()
        return encoder

    def train(self, mode: bool = True) -> "StandaloneModel":
        """Set the mode of all parts but a frozen encoder, which stays in evaluation mode."""
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, hidden_states: Tensor | None = None
    ) -> Tensor:
        """Teacher-forced logits [batch, response, vocab_size].

        Args:
            input_ids, attention_mask: [batch, prompt], padded on the right
            labels: [batch, response], -100 for padding
            hidden_states: [batch, prompt, d_model] of a frozen encoder, if precomputed
        """
        if self.freeze_encoder:
            if hidden_states is None:
                with torch.no_grad():
                    hidden_states = read(self.encoder, input_ids, attention_mask, -1)
            return response_logits(self.slm, hidden_states, attention_mask, labels, "cross_attention")
        model: Any = self.slm
        embeds = [model.get_input_embeddings()(input_ids)]
        return response_logits(
            model, *pack_sequences(embeds, attention_mask, left=not is_encoder_decoder(model)), labels
        )


@dataclass(frozen=True)
class TrainingTarget:
    """The model to train, its prompt and response tokenizers, and the SLM's low-rank adapters."""

    model: Reference | StandaloneModel
    prompt_tokenizer: PreTrainedTokenizerFast
    response_tokenizer: PreTrainedTokenizerFast
    adapters: Adapters | None = None

    @property
    def llm_and_layer(self) -> tuple[nn.Module, Layer] | None:
        """The frozen model that encodes prompts, and its layers; None if there is none."""
        if isinstance(self.model, Reference):
            return self.model.llm, self.model.layer
        return (self.model.encoder, -1) if self.model.freeze_encoder else None


def load_part(recipe: Recipe, part: TrainingPart) -> TrainingTarget:
    """Load the model to train, and freeze the weights that are not trained.

    Raises:
        RecipeError: the settings leave nothing to train, or do not apply to the part.
        CompositionError: a model cannot be loaded, or the two are not compatible.
    """
    settings = training_settings(recipe)
    if part == "pair":
        return _pair(recipe, settings)
    source = recipe.llm if part == "llm" else recipe.slm
    if part != "llm" and settings.slm == "frozen":
        raise RecipeError(
            f"training.slm is frozen, but `--only {part}` trains the SLM alone.",
            remedy="set training.slm=full or training.slm=lora",
        )
    model: Any = _with_head(source, part)
    if settings.freeze_encoder and not is_encoder_decoder(model):
        raise RecipeError(
            "training.freeze_encoder is set, but the model has no encoder.",
            f"`--only {part}` trains a {model.config.model_type}, which is decoder-only",
            remedy="set training.freeze_encoder=false",
        )
    tokenizer = source_tokenizer(source)
    if from_scratch(source, part):
        _check_ids("llm" if part == "llm" else "slm", source.config or {}, model, tokenizer)
    adapters = None
    if part != "llm" and settings.slm == "lora":
        frozen = model.get_encoder() if settings.freeze_encoder else None
        adapters = Adapters(model, settings.lora or LoraSettings(), without=frozen)
    return TrainingTarget(
        StandaloneModel(model, freeze_encoder=settings.freeze_encoder), tokenizer, tokenizer, adapters
    )


def _pair(recipe: Recipe, settings: TrainingSettings) -> TrainingTarget:
    if recipe.llm.model is None:
        raise RecipeError(
            "The recipe names an LLM architecture but no LLM.",
            remedy="set llm.model to a trained model; `train --only llm` trains one from llm.config",
        )
    if settings.freeze_encoder:
        raise RecipeError(
            "training.freeze_encoder is set, but does not apply to a pair.",
            "a pair's LLM is always frozen; training.slm selects the SLM's trained weights",
            remedy="set training.freeze_encoder=false; it applies to --only",
        )
    slm = _with_head(recipe.slm, "pair")
    slm_model: Any = slm
    check_types(load_config(recipe.llm.model, recipe.llm.revision), slm_model.config)
    llm = load_llm(recipe.llm.model, recipe.llm.revision)
    llm_tokenizer, slm_tokenizer = source_tokenizer(recipe.llm), source_tokenizer(recipe.slm)
    if from_scratch(recipe.slm, "pair"):
        _check_ids("slm", recipe.slm.config or {}, slm, slm_tokenizer)
    projector = Projector(projector_entry(llm, slm, PairConfig.of(recipe)), start=recipe.projector.start)
    file = pair_file(recipe, projector, llm_tokenizer, Path())
    reference = compose(llm, projector, slm, file, llm_tokenizer, slm_tokenizer)
    adapters = None
    if settings.slm == "frozen":
        slm.requires_grad_(requires_grad=False)
    elif settings.slm == "lora":
        adapters = Adapters(slm, settings.lora or LoraSettings())
    return TrainingTarget(reference, llm_tokenizer, slm_tokenizer, adapters)


def pair_file(
    recipe: Recipe, projector: Projector, llm_tokenizer: PreTrainedTokenizerFast, out: Path
) -> CompositionFile:
    """The composition.json of a recipe's pair in `out`."""
    source = recipe.llm

    def seen_from_out(name: str | None) -> str | None:
        """A directory relative to `out`, so that both can be moved together; a hub id unchanged."""
        return os.path.relpath(name, out) if name is not None and Path(name).is_dir() else name

    entry = LlmEntry(
        model=str(seen_from_out(source.model)), revision=source.revision, layer=source.layer,
        tokenizer=seen_from_out(source.tokenizer),
    )  # fmt: skip
    return composition_file(recipe.name, entry, projector.entry, PairConfig.of(recipe), llm_tokenizer)


def _with_head(source: ModelSource, part: TrainingPart) -> nn.Module:
    if from_scratch(source, part):
        return model_from_config(source.config or {})
    return load_writing(str(source.model), source.revision)  # validated: a source has a model or a configuration


def _check_ids(name: str, config: dict[str, Any], model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that a model created from a configuration has an embedding for every id of its tokenizer.

    Raises:
        RecipeError: an id is out of range.
    """
    made: Any = model
    rows, needed = made.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=-1) + 1
    problems = [f"the tokenizer's largest id is {needed - 1}"] if needed > rows else []
    for key, value in config.items():
        ids = (value if isinstance(value, list) else [value]) if key.endswith("_token_id") else []
        if outside := [i for i in ids if i is not None and not (isinstance(i, int) and 0 <= i < rows)]:
            problems.append(f"{name}.config.{key} is {outside[0]}")
    if problems:
        raise RecipeError(
            f"{name}.config.vocab_size is {rows}: the embedding table has no row for some ids.",
            *problems,
            remedy=f"set {name}.config.vocab_size to {max(needed, 1)} or more, and special ids below it",
        )


def table_rows(trainee: TrainingTarget) -> tuple[int, int]:
    """The rows of the embedding tables for prompts and responses."""
    model: Any = trainee.model
    models = (model.llm if hasattr(model, "llm") else model.slm, model.slm)
    read, written = (part.get_input_embeddings().weight.shape[0] for part in models)
    return read, written


def load_writing(name: str, revision: str | None) -> nn.Module:
    """Load a model with its language-model head, to train it alone or as a teacher.

    Raises:
        CompositionError: the model cannot be loaded, lacks weights (a head that was not saved), or has no decoder.
    """
    refuse_encoder_only(name, revision)
    return load_full(name, revision)


def refuse_encoder_only(name: str, revision: str | None, option: str | None = None) -> None:
    """Refuse a model without a decoder, which cannot generate text.

    Args:
        name, revision: the model.
        option: the command-line option that names the model, for the remedy.

    Raises:
        CompositionError: the model is an encoder.
    """
    config: Any = load_config(name, revision)
    kind, reason = LLM_ARCHITECTURES.get(config.model_type), None
    if kind == "encoder-only":
        reason = f"a {config.model_type} is an encoder without a decoder"
    elif kind == "encoder-decoder" and not config.is_encoder_decoder:
        reason = f"it has only an encoder: config.json names {', '.join(config.architectures or ['no decoder'])}"
    if reason is not None:
        raise CompositionError(
            f"{name} has no decoder and cannot generate text.",
            reason,
            remedy=("give" if option is None else f"leave {option} out, or give with {option}=DIR")
            + " a complete model: an encoder-decoder, or a decoder with its language-model head",
        )
