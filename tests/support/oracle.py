"""The definition of correct, with transformers and safetensors alone: no code of this package.

Every prompt is computed by itself, without padding: Z of its hidden states, fused with the prompt's embeddings, given
as `inputs_embeds` (or, cross_attention, as `encoder_outputs`) to the unmodified SLM's own `generate`.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
)
from transformers.modeling_outputs import BaseModelOutput


class Oracle:
    """A composition on disk, computed with Hugging Face alone."""

    def __init__(self, directory: Path) -> None:
        self.fields = json.loads((directory / "composition.json").read_text())
        llm, slm = directory / self.fields["llm"]["model"], directory / self.fields["slm"]["model"]
        (architecture,) = AutoConfig.from_pretrained(llm).architectures
        reads_only = architecture.endswith("EncoderModel")  # saved without a decoder
        model = getattr(transformers, architecture) if reads_only else AutoModel
        whole: Any = model.from_pretrained(llm, dtype=torch.float32).eval()
        self.llm: Any = whole.get_encoder() if reads_only or whole.config.is_encoder_decoder else whole
        self.encoder_decoder = AutoConfig.from_pretrained(slm).is_encoder_decoder
        auto = AutoModelForSeq2SeqLM if self.encoder_decoder else AutoModelForCausalLM
        self.slm: Any = auto.from_pretrained(slm, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(slm)
        self.llm_tokenizer = AutoTokenizer.from_pretrained(llm) if self.fields["tokenizer"] == "llm" else self.tokenizer
        self.weights = {name: t.float() for name, t in load_file(directory / "projector.safetensors").items()}

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    @torch.no_grad()
    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """[1, prompt, d] of one prompt's ids [1, prompt]: one layer's, or several side by side."""
        states = self.llm(input_ids=ids, output_hidden_states=True).hidden_states
        chosen = self.fields["llm"].get("layer", -1)
        return torch.cat([states[i] for i in ([chosen] if isinstance(chosen, int) else chosen)], dim=-1)

    @torch.no_grad()
    def memory(self, prompt: str) -> torch.Tensor:
        """[1, context, hidden_size] that the SLM is conditioned on."""
        ids = self.llm_tokenizer(prompt, return_tensors="pt").input_ids
        hidden = self.hidden_states(ids)
        if "layer_fusion.weight" in self.weights:
            gates = torch.sigmoid(self.weights["layer_fusion.weight"])
            total = sum(g * h for g, h in zip(gates, hidden.chunk(len(gates), dim=-1), strict=True))
            scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)
            hidden = total * scale * self.weights["layer_fusion.norm.weight"]
        if self.fields["projector"].get("kind", "mlp") == "mlp":
            hidden = self.linear("fc_out", torch.relu(self.linear("fc_in", hidden)))
        if self.fields["fusion"] in ("replace", "cross_attention"):
            return hidden
        if self.fields["tokenizer"] == "llm":
            embeds = self.linear("adapter", self.llm.get_input_embeddings()(ids))
        else:
            embeds = self.slm.get_input_embeddings()(ids)
        return embeds + hidden if self.fields["fusion"] == "add" else torch.cat([hidden, embeds], dim=1)

    @torch.no_grad()
    def run(self, prompt: str, **options: Any) -> Any:
        """What `generate` returns for one prompt."""
        memory = self.memory(prompt)
        beyond = list(range(len(self.tokenizer), self.slm.config.get_text_config(decoder=True).vocab_size)) or None
        given: dict[str, Any] = {"inputs_embeds": memory}
        if self.fields["fusion"] == "cross_attention":
            given = {"encoder_outputs": BaseModelOutput(last_hidden_state=memory)}
        if self.encoder_decoder:
            # transformers sizes its own caches by the T5 encoder's layers, and breaks on a deeper decoder.
            given["cache"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        mask = torch.ones(memory.shape[:2], dtype=torch.int64)
        return self.slm.generate(
            **given, attention_mask=mask, suppress_tokens=beyond, return_dict_in_generate=True, **options
        )

    def generate(self, prompts: list[str], max_new_tokens: int, **options: Any) -> list[tuple[int, ...]]:
        """Ids of every prompt, without the start token and without padding, up to and including EOS; greedy by default."""
        rows = []
        for prompt in prompts:
            options = {"max_new_tokens": max_new_tokens, "do_sample": False, **options}
            ids = self.run(prompt, **options).sequences[0].tolist()
            written = ids[1:] if self.encoder_decoder else ids
            eos = self.slm.generation_config.eos_token_id
            ends = [i for i, id in enumerate(written) if id in (eos if isinstance(eos, list) else [eos])]
            rows.append(tuple(written[: ends[0] + 1 if ends else len(written)]))
        return rows
