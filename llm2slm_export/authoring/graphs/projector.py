"""The projector graph: hidden states → the decoder's conditioning, once per prompt.

It contains the projector and the fusion. For an encoder-decoder SLM it also contains the SLM's encoder and the
projection to cross-attention keys and values, so that the decoder never computes them.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from llm2slm_export.authoring.graphs.encoder import example_mask
from llm2slm_export.authoring.graphs.graph import EXAMPLE_SIZES, Graph, positions
from llm2slm_export.authoring.graphs.kv_cache import empty_cache, flat_cache
from llm2slm_export.authoring.models.reference import Reference, pack_sequences
from llm2slm_export.contract import ATTENTION_MASK, HIDDEN_STATES, INPUT_IDS, projector_spec


class ProjectorGraph(Graph):
    """Base of both projector graphs.

    Inputs: `hidden_states` [batch, prompt, encoder_hidden_size], `attention_mask` [batch, prompt] and, if the fusion
    uses prompt embeddings, `input_ids` [batch, prompt].
    """

    name = "projector"

    def __init__(self, reference: Reference) -> None:
        super().__init__(projector_spec(reference.shape))
        self.projector = reference.projector
        self.slm = reference.slm
        self.table = reference.prompt_table
        self.fusion = reference.fusion
        self.shape = reference.shape

    def _fused(self, hidden_states: Tensor, attention_mask: Tensor, input_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """[batch, context, hidden_size] and its mask."""
        parts: list[Tensor] = [self.projector(hidden_states)]
        if input_ids is not None:
            embeds: Tensor = self.table(input_ids)
            if self.projector.adapter is not None:
                embeds = self.projector.adapter(embeds)
            parts = [embeds + parts[0]] if self.fusion == "add" else [*parts, embeds]
        return pack_sequences(parts, attention_mask, left=False)

    def example_tensors(self) -> dict[str, Tensor]:
        """See `Graph`; `input_ids` is included for every fusion."""
        batch, prompt = EXAMPLE_SIZES["batch"], EXAMPLE_SIZES["prompt"]
        return {
            HIDDEN_STATES: torch.zeros(batch, prompt, self.shape.encoder_hidden_size),
            ATTENTION_MASK: example_mask(batch, prompt),
            INPUT_IDS: torch.ones(batch, prompt, dtype=torch.int64),
        }


class EncoderDecoderProjectorGraph(ProjectorGraph):
    """Outputs past_key_values.{i}.encoder.{key,value} of decoder layer i.

    Each is [batch, num_key_value_heads, context, head_dim].

    The unmodified decoder caches them in a call of one token. The exporter drops the rest of that call, because no
    output depends on it. No family's attribute names are needed.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, input_ids: Tensor | None = None) -> list[Tensor]:
        model: Any = self.slm
        states, mask = self._fused(hidden_states, attention_mask, input_ids)
        if self.fusion != "cross_attention":
            encoder = model.get_encoder()
            states = encoder(inputs_embeds=states, attention_mask=mask, **positions(encoder, mask)).last_hidden_state
        start, layers = torch.zeros_like(mask[:, :1]), self.shape.num_hidden_layers
        cache = EncoderDecoderCache(empty_cache(layers), empty_cache(layers))
        model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=start,
            **positions(model, start, name="decoder_position_ids"),
            cache=cache,
            use_cache=True,
        )
        return flat_cache(cache.cross_attention_cache)


class DecoderOnlyProjectorGraph(ProjectorGraph):
    """Outputs prompt_embeds [batch, context, hidden_size], padded on the right."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, input_ids: Tensor | None = None) -> list[Tensor]:
        return [self._fused(hidden_states, attention_mask, input_ids)[0]]
