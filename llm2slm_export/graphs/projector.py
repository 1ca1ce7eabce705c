"""The projector graph: hidden states → what conditions the decoder, once per prompt.

Besides projector and fusion it holds the encoder-decoder SLM's own encoder (DESIGN: the SLM prompt pass), down to the
cross-attention keys and values, so that the decoder never computes them.
"""

from typing import Any

import torch
from torch import Tensor

from llm2slm_export.contract import ATTENTION_MASK, HIDDEN_STATES, INPUT_IDS, projector_spec
from llm2slm_export.graphs.encoder import example_mask
from llm2slm_export.graphs.graph import EXAMPLE_SIZES, Graph
from llm2slm_export.models.reference import Reference, left_padded


class ProjectorGraph(Graph):
    """hidden_states [batch, prompt, d_llm], attention_mask [batch, prompt], input_ids with `add` → conditioning."""

    name = "projector"

    def __init__(self, reference: Reference) -> None:
        super().__init__(projector_spec(reference.shape))
        self.projector = reference.projector
        self.slm = reference.slm
        self.reads_ids = reference.shape.projector_reads_ids

    def _fused(self, hidden_states: Tensor, input_ids: Tensor | None) -> Tensor:
        projected: Tensor = self.projector(hidden_states)
        if input_ids is None:
            return projected
        model: Any = self.slm
        embeds: Tensor = model.get_input_embeddings()(input_ids)
        return embeds + projected

    def example_tensors(self) -> dict[str, Tensor]:
        batch, prompt = EXAMPLE_SIZES["batch"], EXAMPLE_SIZES["prompt"]
        return {
            HIDDEN_STATES: torch.zeros(batch, prompt, self.projector.fc_in.in_features),
            ATTENTION_MASK: example_mask(batch, prompt),
            INPUT_IDS: torch.ones(batch, prompt, dtype=torch.int64),
        }


class EncoderDecoderProjectorGraph(ProjectorGraph):
    """→ past_key_values.{i}.encoder.{key,value} [batch, heads, prompt, d_head], i over the SLM decoder's layers."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, input_ids: Tensor | None = None) -> list[Tensor]:
        model: Any = self.slm
        fused = self._fused(hidden_states, input_ids)
        read = model.encoder(inputs_embeds=fused, attention_mask=attention_mask).last_hidden_state
        outputs = []
        for block in model.decoder.block:
            attention = block.layer[1].EncDecAttention
            for projection in (attention.k, attention.v):
                split = projection(read).view(*read.shape[:2], attention.n_heads, attention.key_value_proj_dim)
                outputs.append(split.transpose(1, 2))  # [batch, heads, prompt, d_head]
        return outputs


class DecoderOnlyProjectorGraph(ProjectorGraph):
    """→ prompt_embeds [batch, prompt, d_slm], padding moved to the left, as the decoder's prompt pass wants it."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, input_ids: Tensor | None = None) -> list[Tensor]:
        return [left_padded(self._fused(hidden_states, input_ids), attention_mask)[0]]
