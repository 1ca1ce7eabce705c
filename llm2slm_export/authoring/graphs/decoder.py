"""The decoder graph: one call of the SLM's decoder with past KV, in transformers' own modelling code and caches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from llm2slm_export.authoring.graphs.attention import FusedAttention
from llm2slm_export.authoring.graphs.encoder import example_mask
from llm2slm_export.authoring.graphs.graph import EXAMPLE_PAST_LENGTH, EXAMPLE_SIZES, Graph, positions, zeros
from llm2slm_export.authoring.graphs.kv_cache import filled_cache, flat_cache, scattered_cache
from llm2slm_export.authoring.models.reference import Reference, context_width
from llm2slm_export.contract import (
    ENCODER_ATTENTION_MASK,
    INPUT_IDS,
    PAST_LENGTH,
    decoder_spec,
)


class EncoderDecoderDecoderGraph(Graph):
    """One call of an encoder-decoder SLM's decoder.

    Inputs: `input_ids` [batch, sequence_length], `encoder_attention_mask` [batch, context], `past_length` [batch], past and
    cross-attention keys and values.
    Outputs: `logits` [batch, sequence_length, vocab_size], present keys and values.
    """

    name = "decoder"

    def __init__(self, reference: Reference) -> None:
        super().__init__(decoder_spec(reference.shape))
        self.slm = reference.slm
        self.d_states = context_width(self.slm, "cross_attention")
        self.groups = (2 * reference.shape.num_hidden_layers, 2 * reference.shape.num_hidden_layers)
        self.attention = FusedAttention(self.slm)

    def forward(
        self,
        input_ids: Tensor,
        encoder_attention_mask: Tensor,
        past_length: Tensor,
        past: list[Tensor],
        cross: list[Tensor],
    ) -> list[Tensor]:
        model: Any = self.slm
        cache = EncoderDecoderCache(scattered_cache(past, past_length), filled_cache(cross))
        # Without it, every step would project the encoder's states again.
        cache.is_updated = dict.fromkeys(range(len(cross) // 2), True)
        # BART would create a mask whose size depends on tensor values, which the meta tensors of `plan` do not have.
        # During export it creates none.
        seen = None if torch.onnx.is_in_onnx_export() else input_ids.new_ones(input_ids.shape[0], past[0].shape[2])
        # The decoder uses the shape of the states only: keys and values come from the cache.
        states = encoder_attention_mask[:, :, None].to(cross[0].dtype).expand(-1, -1, self.d_states)
        with self.attention.call(cache.cross_attention_cache), positions_by_row(model.get_decoder()):
            outputs = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=encoder_attention_mask,
                decoder_input_ids=input_ids,
                decoder_attention_mask=seen,
                **positions(model, input_ids, past_length, name="decoder_position_ids"),
                cache=cache,
                use_cache=True,
            )
        return [outputs.logits, *flat_cache(cache.self_attention_cache)]

    def example_tensors(self) -> dict[str, Tensor]:
        """See `Graph`."""
        tensors = {t.name: zeros(t, EXAMPLE_SIZES) for t in self.spec.inputs}
        tensors[ENCODER_ATTENTION_MASK] = example_mask(EXAMPLE_SIZES["batch"], EXAMPLE_SIZES["context"])
        tensors[PAST_LENGTH] = torch.full((EXAMPLE_SIZES["batch"],), EXAMPLE_PAST_LENGTH)
        return tensors


class DecoderOnlyDecoderGraph(Graph):
    """One call of a decoder-only SLM: prompt embeddings, followed by embedded ids, with past KV.

    Inputs: `prompt_embeds` [batch, embeds_length, hidden_size], `input_ids` [batch, sequence_length], `past_length`
    [batch], `logits_to_keep` [batch, num_logits], past keys and values.
    Outputs: `logits` [batch, num_logits, vocab_size], present keys and values.
    Embeddings and ids may be empty: one graph serves the prompt pass and the step, and no weight is stored twice.
    """

    name = "decoder"

    def __init__(self, reference: Reference) -> None:
        super().__init__(decoder_spec(reference.shape))
        self.slm = reference.slm
        self.groups = (2 * reference.shape.num_hidden_layers,)
        self.attention = FusedAttention(self.slm)

    def forward(
        self,
        input_ids: Tensor,
        prompt_embeds: Tensor,
        past_length: Tensor,
        logits_to_keep: Tensor,
        past: list[Tensor],
    ) -> list[Tensor]:
        model: Any = self.slm
        embeds = torch.cat([prompt_embeds, model.get_input_embeddings()(input_ids)], dim=1)
        cache = scattered_cache(past, past_length)
        with self.attention.call(), selected_states(model.get_output_embeddings(), logits_to_keep):
            outputs = model(
                inputs_embeds=embeds,
                # OPT asks for one of its own where there is none. The exported graph does not read it.
                attention_mask=input_ids.new_ones(input_ids.shape[0], past[0].shape[2]),
                position_ids=past_length[:, None] + torch.arange(embeds.shape[1], device=embeds.device),
                cache=cache,
                use_cache=True,
            )
        return [outputs.logits, *flat_cache(cache)]

    def example_tensors(self) -> dict[str, Tensor]:
        """See `Graph`."""
        sizes = EXAMPLE_SIZES
        tensors = {t.name: zeros(t, sizes) for t in self.spec.inputs}
        tensors[PAST_LENGTH] = torch.full((sizes["batch"],), EXAMPLE_PAST_LENGTH)
        tensors[INPUT_IDS] = torch.ones_like(tensors[INPUT_IDS])
        return tensors


@contextmanager
def selected_states(head: nn.Module, indices: Tensor) -> Iterator[None]:
    """Give a language-model head only the states at `indices` [batch, num_logits] within the block.

    transformers' `logits_to_keep` has the same indices for every row.
    """

    def select(_: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
        (states,) = given  # [batch, length, hidden_size]
        # GatherElements. ONNX Runtime's GatherND reads host memory that a replayed CUDA graph no longer has.
        return torch.gather(states, 1, indices[:, :, None].expand(-1, -1, states.shape[2]))

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def positions_by_row(decoder: nn.Module) -> Iterator[None]:
    """Let BART's learned positions be of each row within the block: it adds an axis to position ids [batch, length]."""
    table = getattr(decoder, "embed_positions", None)
    if table is None:
        yield
        return
    hook = table.register_forward_hook(
        lambda _module, _given, positions: positions[0] if positions.ndim == 4 else positions
    )
    try:
        yield
    finally:
        hook.remove()
