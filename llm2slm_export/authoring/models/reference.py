"""The reference: a composition as a torch module, computed with unmodified transformers models.

    prompt ids ─▶ LLM ─H─▶ projector ─Z─▶ fusion with the prompt's embeddings ─▶ inputs_embeds of the SLM
                                     └──▶ cross_attention: encoder_outputs of the SLM

The exported bundle must match it token for token at fp32.
"""

import hashlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from llm2slm_export.authoring.models.generation_config import own_options
from llm2slm_export.authoring.models.projector import Projector
from llm2slm_export.authoring.models.special_tokens import slm_special_ids
from llm2slm_export.contract import Fusion, PairShape
from llm2slm_export.errors import CompositionError

Layer = int | tuple[int, ...]


def is_encoder_decoder(slm: nn.Module) -> bool:
    """Whether a model is an encoder-decoder."""
    config: Any = slm.config
    return bool(config.is_encoder_decoder)


def pack_sequences(parts: list[Tensor], attention_mask: Tensor, *, left: bool) -> tuple[Tensor, Tensor]:
    """Concatenate one or two sequences of a prompt without padding between them.

    Args:
        parts: each [batch, prompt, hidden_size], padded on the right.
        attention_mask: [batch, prompt], the mask of each part.
        left: put the padding on the left (decoder-only SLMs) instead of on the right.

    Returns:
        [batch, context, hidden_size] and its mask [batch, context], context = parts · prompt. Padding positions hold
        copies of other positions; the mask hides them.
    """
    prompt, count = attention_mask.shape[1], len(parts)
    if count == 1 and not left:
        return parts[0], attention_mask
    lengths = attention_mask.sum(dim=1, keepdim=True)  # [batch, 1]
    offset = torch.arange(count * prompt, device=attention_mask.device)[None, :]
    offset = offset - count * (prompt - lengths) if left else offset + torch.zeros_like(lengths)
    real = (offset >= 0) & (offset < count * lengths)
    # The second sequence starts at `prompt` in the concatenated parts, and at the row's own length in the result.
    source = torch.where(offset < lengths, offset, offset - lengths + prompt) if count > 1 else offset
    source = source.clamp(min=0, max=count * prompt - 1)
    joined = torch.cat(parts, dim=1) if count > 1 else parts[0]
    moved = torch.gather(joined, 1, source[:, :, None].expand(-1, -1, joined.shape[2]))
    return moved, real.to(attention_mask.dtype)


def response_logits(
    slm: nn.Module, context: Tensor, context_mask: Tensor, labels: Tensor, fusion: Fusion = "add"
) -> Tensor:
    """Teacher-forced logits of the response.

    Args:
        slm: the SLM.
        context: [batch, context, hidden_size], the SLM's conditioning: its encoder's output with `cross_attention`, its
            inputs_embeds with any other fusion.
        context_mask: [batch, context], padded on the right; for decoder-only SLMs on the left.
        labels: [batch, response] token ids, -100 for padding.
        fusion: the pair's fusion.

    Returns:
        [batch, response, vocab_size]; position t predicts labels[:, t].
    """
    model: Any = slm
    if is_encoder_decoder(slm):
        # Not `labels=`: some families shift labels with another start token than `generate` uses (mBART).
        ids = slm_special_ids(slm)
        start = torch.full_like(labels[:, :1], ids.decoder_start or 0)
        written = torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, ids.pad or 0)], dim=1)
        outputs = model(
            **conditioned_on(context, fusion), attention_mask=context_mask, decoder_input_ids=written, use_cache=False
        )
        logits: Tensor = outputs.logits
        return logits
    written = labels[:, :-1]
    response_mask = (written != -100).to(context_mask.dtype)
    response_embeds = model.get_input_embeddings()(written.clamp(min=0))
    mask = torch.cat([context_mask, response_mask], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    outputs = model(
        inputs_embeds=torch.cat([context, response_embeds], dim=1),
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=labels.shape[1],
        use_cache=False,
    )
    response: Tensor = outputs.logits
    return response


def conditioned_on(context: Tensor, fusion: Fusion) -> dict[str, Any]:
    """The arguments of an unmodified SLM for its conditioning [batch, context, hidden_size]."""
    if fusion == "cross_attention":
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=context)}
    return {"inputs_embeds": context}


class Reference(nn.Module):
    """A frozen LLM, a projector, a fusion and an SLM.

    Args:
        llm: a model whose output has `last_hidden_state` and `hidden_states`: an encoder, or a decoder without head.
        projector: maps the hidden states into the SLM's embedding space.
        slm: a model with a language-model head.
        fusion: combines projected states and prompt embeddings.
        layer: index into the LLM's hidden states, -1 for its output (after the final norm); or several for layer
            fusion.
    """

    def __init__(self, llm: nn.Module, projector: Projector, slm: nn.Module, fusion: Fusion, layer: Layer = -1) -> None:
        super().__init__()
        self.llm = llm.requires_grad_(requires_grad=False)
        self.projector = projector
        self.slm = slm
        self.fusion = fusion
        self.layer = layer
        model: Any = llm if projector.adapter is not None else slm
        # A separate attribute, because a build releases the LLM before the last use of its embedding table.
        self.prompt_table: nn.Module = model.get_input_embeddings()

    def train(self, mode: bool = True) -> "Reference":
        """Set the mode of all parts but the LLM, which is frozen and stays without dropout."""
        super().train(mode)
        self.llm.eval()
        return self

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """H [batch, prompt, encoder_hidden_size] of ids and mask [batch, prompt]; several layers are concatenated."""
        return read(self.llm, input_ids, attention_mask, self.layer)

    def fuse(self, hidden_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The SLM's conditioning.

        Args:
            hidden_states: [batch, prompt, encoder_hidden_size]
            input_ids, attention_mask: [batch, prompt], padded on the right

        Returns:
            [batch, context, hidden_size] and its mask [batch, context], padded on the right; for decoder-only SLMs on
            the left.
        """
        projected: Tensor = self.projector(hidden_states)
        if self.fusion == "add":
            parts = [self._prompt_embeds(input_ids) + projected]
        elif self.fusion == "prefix":
            parts = [projected, self._prompt_embeds(input_ids)]
        else:
            parts = [projected]
        return pack_sequences(parts, attention_mask, left=not is_encoder_decoder(self.slm))

    def _prompt_embeds(self, input_ids: Tensor) -> Tensor:
        """E: the prompt embeddings [batch, prompt, hidden_size], the SLM's own or the LLM's through the adapter."""
        embeds: Tensor = self.prompt_table(input_ids)
        return embeds if self.projector.adapter is None else self.projector.adapter(embeds)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, hidden_states: Tensor | None = None
    ) -> Tensor:
        """Teacher-forced logits [batch, response, vocab_size]; precomputed `hidden_states` skip the LLM."""
        if hidden_states is None:
            hidden_states = self.hidden_states(input_ids, attention_mask)
        context, mask = self.fuse(hidden_states, input_ids, attention_mask)
        return response_logits(self.slm, context, mask, labels, self.fusion)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, hidden_states: Tensor | None = None, **options: Any
    ) -> Tensor:
        """The unmodified SLM's own `generate`, given its conditioning.

        The model's generation_config is emptied during the call, because transformers completes a given one from it.
        The default is the configuration that a bundle exports (`own_options`).

        Returns:
            [batch, response] ids as transformers returns them for `inputs_embeds`. An encoder-decoder SLM's begin with
            the decoder start token.
        """
        if hidden_states is None:
            hidden_states = self.hidden_states(input_ids, attention_mask)
        options.setdefault("generation_config", own_options(self.slm))
        context, mask = self.fuse(hidden_states, input_ids, attention_mask)
        if is_encoder_decoder(self.slm):
            # Dynamic caches: transformers allocates a T5's cache by the number of *encoder* layers.
            options["cache"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        model: Any = self.slm
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            ids: Tensor = model.generate(**conditioned_on(context, self.fusion), attention_mask=mask, **options)
        finally:
            model.generation_config = own
        return ids

    @cached_property
    def shape(self) -> PairShape:
        """The sizes that the tensor contract depends on."""
        return pair_shape(self.projector, self.slm, self.fusion)


def read(llm: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: Layer, **options: Any) -> Tensor:
    """The LLM's hidden states of one layer, or of several concatenated: [batch, prompt, layers · width]."""
    model: Any = llm
    if layer == -1:
        states: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        return states
    outputs = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **options)
    indices = (layer,) if isinstance(layer, int) else layer
    return torch.cat([outputs.hidden_states[i] for i in indices], dim=2)


def llm_layers(llm: nn.Module) -> int:
    """The number of the LLM's layers."""
    config: Any = llm.config
    return int(config.get_text_config().num_hidden_layers)


@torch.no_grad()
def llm_width(llm: nn.Module, layer: Layer) -> int:
    """The width of the LLM's hidden states, measured on one token.

    The configuration is not sufficient: OPT may project its output to another width than that of its layers.

    Raises:
        CompositionError: the layers have different widths.
    """
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(llm.parameters()).device)
    several = (layer,) if isinstance(layer, int) else layer
    widths = {i: read(llm, ids, torch.ones_like(ids), i).shape[2] for i in several}
    if len(set(widths.values())) > 1:
        raise CompositionError(
            "The LLM's layers have different widths and cannot be fused.",
            *(f"layer {i}: {width}" for i, width in widths.items()),
            remedy="choose layers of the same width, or one layer",
        )
    return next(iter(widths.values()))


def context_width(slm: nn.Module, fusion: Fusion) -> int:
    """The SLM's hidden_size: of its input embeddings or, with `cross_attention`, of its encoder's output."""
    model: Any = slm
    if fusion == "cross_attention":
        return int(model.get_encoder().config.hidden_size)
    return int(model.get_input_embeddings().embedding_dim)


@torch.no_grad()
def pair_shape(projector: Projector, slm: nn.Module, fusion: Fusion) -> PairShape:
    """The sizes of a pair; those of the cache are measured on one token.

    Raises:
        CompositionError: the decoder's layers cache tensors of different sizes.
    """
    model: Any = slm
    device = next(slm.parameters()).device
    kind = is_encoder_decoder(slm)
    hidden_size = context_width(slm, fusion)
    if kind:
        context = torch.zeros(1, 1, context_width(slm, "cross_attention"), device=device)
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        model(
            **conditioned_on(context, "cross_attention"),
            decoder_input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device),
            cache=cache,
            use_cache=True,
        )
        layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
        count = len(layers) // 2
    else:
        cache = DynamicCache()
        model(inputs_embeds=torch.zeros(1, 1, hidden_size, device=device), cache=cache, use_cache=True)
        layers, count = cache.layers, len(cache.layers)
    sizes = {(t.shape[1], t.shape[3]) for layer in layers for t in (layer.keys, layer.values)}
    if len(sizes) > 1:
        raise CompositionError(
            f"The SLM's layers cache keys and values of {len(sizes)} different sizes.",
            f"heads and widths: {', '.join(f'{h}×{d}' for h, d in sorted(sizes))}",
            remedy="choose an SLM whose decoder layers have equal sizes",
        )
    heads, head_dim = sizes.pop()
    config: Any = model.config.get_text_config(decoder=True)
    return PairShape(
        slm_kind="encoder-decoder" if kind else "decoder-only",
        fusion=fusion,
        encoder_hidden_size=projector.entry.layers * projector.entry.d_in,
        hidden_size=hidden_size,
        num_hidden_layers=count,
        num_key_value_heads=heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
    )


def digest(module: nn.Module) -> str:
    """The SHA-256 of a module's weights, in the order of its state dict."""

    total = hashlib.sha256()
    for tensor in module.state_dict().values():
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
