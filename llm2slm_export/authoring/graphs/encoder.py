"""The encoder graph: prompt ids → hidden states, once per prompt."""

import torch
from torch import Tensor

from llm2slm_export.authoring.graphs.graph import EXAMPLE_SIZES, Graph, positions
from llm2slm_export.authoring.models.reference import Reference, read
from llm2slm_export.contract import ATTENTION_MASK, INPUT_IDS, encoder_spec


class EncoderGraph(Graph):
    """input_ids, attention_mask [batch, prompt] → hidden_states [batch, prompt, encoder_hidden_size]."""

    name = "encoder"

    def __init__(self, reference: Reference) -> None:
        super().__init__(encoder_spec(reference.shape))
        self.llm = reference.llm
        self.layer = reference.layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        explicit = positions(self.llm, attention_mask)
        return (read(self.llm, input_ids, attention_mask, self.layer, **explicit),)

    def example_tensors(self) -> dict[str, Tensor]:
        """See `Graph`."""
        batch, prompt = EXAMPLE_SIZES["batch"], EXAMPLE_SIZES["prompt"]
        return {INPUT_IDS: torch.ones(batch, prompt, dtype=torch.int64), ATTENTION_MASK: example_mask(batch, prompt)}


def example_mask(batch: int, length: int) -> Tensor:
    """A mask [batch, length] with two padding positions on the right of the last row."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - 2 :] = 0
    return mask
