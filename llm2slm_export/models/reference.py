"""The reference: a composition as a torch module, computed with unmodified transformers models.

    prompt ids ─▶ LLM encoder ─H─▶ projector ─Z─▶ fusion with the SLM's prompt embeddings ─▶ inputs_embeds of the SLM

The exported bundle must match it token for token at fp32.
"""

from typing import Any

import torch
from torch import Tensor, nn

from llm2slm_export.contract import Fusion, PairShape
from llm2slm_export.models.projector import Projector


def is_encoder_decoder(slm: nn.Module) -> bool:
    config: Any = slm.config
    return bool(config.is_encoder_decoder)


def left_padded(embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move right padding to the left, so that every row's last position is its last prompt token.

    Args:
        embeds: [batch, prompt, d]
        attention_mask: [batch, prompt], padding on the right

    Returns:
        the moved embeddings and mask, same shapes. Padding positions hold a copy of the first token, and are masked.
    """
    prompt = attention_mask.shape[1]
    lengths = attention_mask.sum(dim=1, keepdim=True)
    source = torch.arange(prompt, device=embeds.device)[None, :] - (prompt - lengths)  # [batch, prompt]
    moved = torch.gather(embeds, 1, source.clamp(min=0)[:, :, None].expand(-1, -1, embeds.shape[2]))
    return moved, (source >= 0).to(attention_mask.dtype)


def response_logits(slm: nn.Module, inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Teacher-forced logits of the response.

    Args:
        slm: the writer.
        inputs_embeds: [batch, prompt, d_slm]
        attention_mask: [batch, prompt], padding on the right
        labels: [batch, response] token ids, -100 where there is none

    Returns:
        [batch, response, vocab]: row t predicts labels[:, t]
    """
    model: Any = slm
    if is_encoder_decoder(slm):
        outputs = model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels)
        logits: Tensor = outputs.logits
        return logits
    prompt_embeds, prompt_mask = left_padded(inputs_embeds, attention_mask)
    written = labels[:, :-1]
    response_mask = (written != -100).to(attention_mask.dtype)
    response_embeds = model.get_input_embeddings()(written.clamp(min=0))
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    outputs = model(
        inputs_embeds=torch.cat([prompt_embeds, response_embeds], dim=1),
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=labels.shape[1],
        use_cache=False,
    )
    response: Tensor = outputs.logits
    return response


class Reference(nn.Module):
    """A frozen LLM encoder, a projector, a fusion and an SLM.

    Args:
        llm: an encoder whose output has `last_hidden_state` and `hidden_states`.
        layer: index into the encoder's hidden states; -1 is its output (after its final norm).
    """

    def __init__(self, llm: nn.Module, projector: Projector, slm: nn.Module, fusion: Fusion, layer: int = -1) -> None:
        super().__init__()
        self.llm = llm.requires_grad_(requires_grad=False)
        self.projector = projector
        self.slm = slm
        self.fusion = fusion
        self.layer = layer

    def train(self, mode: bool = True) -> "Reference":
        """The LLM stays in evaluation mode: frozen means no dropout either."""
        super().train(mode)
        self.llm.eval()
        return self

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """H: [batch, prompt] ids and mask → [batch, prompt, d_llm]."""
        if self.layer == -1:
            outputs = self.llm(input_ids=input_ids, attention_mask=attention_mask)
            states: Tensor = outputs.last_hidden_state
            return states
        outputs = self.llm(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        layer: Tensor = outputs.hidden_states[self.layer]
        return layer

    def fuse(self, hidden_states: Tensor, input_ids: Tensor) -> Tensor:
        """[batch, prompt, d_llm] and the prompt's ids [batch, prompt] → the SLM's inputs_embeds [batch, prompt, d_slm]."""
        projected: Tensor = self.projector(hidden_states)
        if self.fusion == "replace":
            return projected
        model: Any = self.slm
        embeds: Tensor = model.get_input_embeddings()(input_ids)
        return embeds + projected

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, hidden_states: Tensor | None = None
    ) -> Tensor:
        """Teacher-forced logits [batch, response, vocab]; `hidden_states` skips the LLM where they are known."""
        if hidden_states is None:
            hidden_states = self.hidden_states(input_ids, attention_mask)
        return response_logits(self.slm, self.fuse(hidden_states, input_ids), attention_mask, labels)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, hidden_states: Tensor | None = None, **options: Any
    ) -> Tensor:
        """The unmodified SLM's own `generate` on the fused embeddings.

        Returns:
            [batch, response] ids as transformers returns them for `inputs_embeds`: an encoder-decoder SLM's begin with
            the decoder start token.
        """
        if hidden_states is None:
            hidden_states = self.hidden_states(input_ids, attention_mask)
        embeds = self.fuse(hidden_states, input_ids)
        if not is_encoder_decoder(self.slm):
            embeds, attention_mask = left_padded(embeds, attention_mask)
        model: Any = self.slm
        ids: Tensor = model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)
        return ids

    @property
    def shape(self) -> PairShape:
        """The sizes that the tensor contract depends on."""
        return pair_shape(self.projector, self.slm, self.fusion)


def pair_shape(projector: Projector, slm: nn.Module, fusion: Fusion) -> PairShape:
    config: Any = slm.config
    if config.is_encoder_decoder:
        layers, heads, d_head = config.num_decoder_layers, config.num_heads, config.d_kv
    else:
        layers, heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", config.num_attention_heads)
        d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return PairShape(
        slm_kind="encoder-decoder" if config.is_encoder_decoder else "decoder-only",
        fusion=fusion,
        d_llm=projector.fc_in.in_features,
        d_slm=projector.fc_out.out_features,
        layers=layers,
        heads=heads,
        d_head=d_head,
        vocab=config.vocab_size,
    )
