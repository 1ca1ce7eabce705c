"""The definition of correct, with transformers and safetensors alone: no code of this package.

Z = fc_out(relu(fc_in(H))), fused with the SLM's prompt embeddings, given as `inputs_embeds` to the SLM's own `generate`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, T5EncoderModel


class Oracle:
    """A composition on disk, computed with Hugging Face alone."""

    def __init__(self, directory: Path) -> None:
        self.fields = json.loads((directory / "composition.json").read_text())
        self.llm = T5EncoderModel.from_pretrained(directory / self.fields["llm"]["model"], dtype=torch.float32).eval()
        slm = directory / self.fields["slm"]["model"]
        self.encoder_decoder = AutoConfig.from_pretrained(slm).is_encoder_decoder
        auto = AutoModelForSeq2SeqLM if self.encoder_decoder else AutoModelForCausalLM
        self.slm: Any = auto.from_pretrained(slm, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(slm)
        self.weights = {name: t.float() for name, t in load_file(directory / "projector.safetensors").items()}

    @torch.no_grad()
    def fused(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """inputs_embeds [batch, prompt, d_slm] and their mask, padded on the side the SLM's `generate` wants."""
        side = "right" if self.encoder_decoder else "left"
        # T5's relative positions make its hidden states independent of the padding side.
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side)
        hidden = self.llm(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        w = self.weights
        inner = torch.relu(hidden @ w["fc_in.weight"].T + w["fc_in.bias"])
        projected = inner @ w["fc_out.weight"].T + w["fc_out.bias"]
        if self.fields["fusion"] == "add":
            projected = projected + self.slm.get_input_embeddings()(batch.input_ids)
        return projected, batch.attention_mask

    @torch.no_grad()
    def generate(self, prompts: list[str], max_new_tokens: int) -> list[tuple[int, ...]]:
        """Greedy ids of every prompt, without the start token and without padding, up to and including EOS."""
        embeds, mask = self.fused(prompts)
        beyond = list(range(len(self.tokenizer), self.slm.config.vocab_size)) or None
        ids = self.slm.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
            suppress_tokens=beyond,
        )  # fmt: skip
        eos = self.slm.generation_config.eos_token_id
        rows = []
        for row in ids.tolist():
            written = row[1:] if self.encoder_decoder else row
            end = written.index(eos) + 1 if eos in written else len(written)
            rows.append(tuple(written[:end]))
        return rows
