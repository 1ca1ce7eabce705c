"""The decoder graph: one call of the SLM's decoder with past KV, in transformers' own modelling code and caches."""

from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from llm2slm_export.authoring.graphs.attention import FusedAttention
from llm2slm_export.authoring.graphs.encoder import example_mask
from llm2slm_export.authoring.graphs.graph import EXAMPLE_PAST_LENGTH, EXAMPLE_SIZES, Graph, positions, zeros
from llm2slm_export.authoring.graphs.kv_cache import filled_cache, flat_cache, scattered_cache
from llm2slm_export.authoring.models.reference import Reference, context_width
from llm2slm_export.contract import (
    ATTENTION_MASK,
    ENCODER_ATTENTION_MASK,
    INPUT_IDS,
    PAST_LENGTH,
    decoder_spec,
)


class EncoderDecoderDecoderGraph(Graph):
    """One call of an encoder-decoder SLM's decoder.

    Inputs: `input_ids` [batch, sequence_length], `encoder_attention_mask` [batch, context], `past_length` [1], past and
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
        with self.attention.call(cache.cross_attention_cache):
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
        tensors[PAST_LENGTH] = torch.tensor([EXAMPLE_PAST_LENGTH])
        return tensors


class DecoderOnlyDecoderGraph(Graph):
    """One call of a decoder-only SLM: prompt embeddings, followed by embedded ids, with past KV.

    Inputs: `prompt_embeds` [batch, embeds_length, hidden_size], `input_ids` [batch, sequence_length], `attention_mask`
    [batch, capacity], `past_length` [1], `logits_to_keep` [num_logits], past keys and values.
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
        attention_mask: Tensor,
        past_length: Tensor,
        logits_to_keep: Tensor,
        past: list[Tensor],
    ) -> list[Tensor]:
        model: Any = self.slm
        embeds = torch.cat([prompt_embeds, model.get_input_embeddings()(input_ids)], dim=1)
        # As in `generate`: padding has no position.
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        called = past_length + torch.arange(embeds.shape[1], device=embeds.device)
        cache = scattered_cache(past, past_length)
        with self.attention.call():
            outputs = model(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=positions.index_select(1, called),
                cache=cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
        return [outputs.logits, *flat_cache(cache)]

    def example_tensors(self) -> dict[str, Tensor]:
        """See `Graph`."""
        sizes = EXAMPLE_SIZES
        tensors = {t.name: zeros(t, sizes) for t in self.spec.inputs}
        tensors[ATTENTION_MASK] = example_mask(sizes["batch"], sizes["capacity"]).flip(1)
        tensors[PAST_LENGTH] = torch.tensor([EXAMPLE_PAST_LENGTH])
        tensors[INPUT_IDS] = torch.ones_like(tensors[INPUT_IDS])
        return tensors
