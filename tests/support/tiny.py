"""Tiny random SLMs: their logits, transformers' `generate` on them, and this package's generation fed by them."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from llm2slm_export.bundle.manifest import GenerationDefaults, SpecialIds
from llm2slm_export.inference.generation.beam_search import BeamSearch, Hypothesis
from llm2slm_export.inference.generation.options import GenerationOptions
from llm2slm_export.inference.generation.sampler import Sampler
from tests.support.tiny_models import SLM_CONFIGS

VOCAB = 307
NUM_TOKENS = 290  # the ids behind these belong to no token
MEMORY = 5  # tokens of the prompt
EOS = (1, 7, 40, 91, 118, 202, 210, 263)  # many, so that sequences end early and at different times
DEFAULTS = GenerationDefaults(max_new_tokens=9)

Stops = Callable[[Sequence[int]], bool]


def options(**overrides: Any) -> GenerationOptions:
    return GenerationOptions.resolve(DEFAULTS, **overrides)


@dataclass
class Theirs:
    """What `generate` returned, per returned sequence: ids without start token, `sequences_scores`, per-token scores."""

    ids: list[list[int]]
    scores: list[float] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)


class Tiny:
    """A random model of the `SLM_CONFIGS` and a batch of prompts, [prompts, MEMORY, width]."""

    def __init__(self, slm: str, prompts: int) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        fields = {**SLM_CONFIGS[slm], "tie_word_embeddings": False}
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        torch.manual_seed(1)
        make = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        self.model = make.from_config(config).eval().requires_grad_(False)
        for name, weight in self.model.named_parameters():
            if weight.ndim == 2 and (slm == "llama" or "shared" not in name):
                # Sharper than at initialisation, so that what is said depends on what was said.
                weight.mul_(8 if slm == "llama" else 1.6)
        head = self.model.get_output_embeddings().weight
        head *= 0.3 if slm == "t5" else 1
        head[list(EOS)] *= 1.7
        self.model.generation_config.eos_token_id = None  # what is not given comes from here
        self.start = 0 if config.is_encoder_decoder else None
        self.memory = torch.randn(prompts, MEMORY, getattr(config, "d_model", None) or config.hidden_size)

    def special_ids(self, eos: Sequence[int] = EOS) -> SpecialIds:
        return SpecialIds(prompt_pad=0, pad=0, eos=tuple(eos), decoder_start=self.start)

    def logits(self, prompts: Sequence[int], ids: np.ndarray) -> np.ndarray:
        """[rows, vocab] after ids [rows, so far] without start token, one prompt per row."""
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        memory, ids = self.memory[list(prompts)], torch.from_numpy(ids)
        if self.start is None:
            embeddings = torch.cat([memory, self.model.get_input_embeddings()(ids)], dim=1)
            logits = self.model(inputs_embeds=embeddings).logits
        else:
            start = torch.full((len(ids), 1), self.start)
            logits = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=memory),
                decoder_input_ids=torch.cat([start, ids], dim=1),
            ).logits
        return logits[:, -1].numpy()

    def generate(
        self, prompts: Sequence[int], *, eos: Sequence[int] = EOS, stops: Stops | None = None, **asked: Any
    ) -> Theirs:
        """transformers' `generate` under the options `asked`, with ids of no token suppressed."""
        import torch
        from transformers import LogitsProcessorList
        from transformers.modeling_outputs import BaseModelOutput

        memory = self.memory[list(prompts)]
        mask = torch.ones(memory.shape[:2], dtype=torch.long)
        given: dict[str, Any] = (
            {"inputs_embeds": memory}
            if self.start is None
            else {"encoder_outputs": BaseModelOutput(last_hidden_state=memory)}
        )
        skip = 0 if self.start is None else 1
        if stops is not None:
            given["stopping_criteria"] = [
                lambda ids, _: torch.tensor([stops(row) for row in ids[:, skip:].tolist()], dtype=torch.bool)
            ]
        if "bad_words_ids" in asked:
            asked["bad_words_ids"] = [list(word) for word in asked["bad_words_ids"]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on penalties that do not see the prompt
            out = self.model.generate(
                **given,
                **{"max_new_tokens": DEFAULTS.max_new_tokens, **asked},
                pad_token_id=0,
                eos_token_id=list(eos) or None,
                logits_processor=LogitsProcessorList(),
                attention_mask=mask,
                suppress_tokens=list(range(NUM_TOKENS, VOCAB)),
                return_dict_in_generate=True,
                output_scores=True,
            )
        beams = out.get("beam_indices")
        scores = self.model.compute_transition_scores(out.sequences, out.scores, beams, normalize_logits=beams is None)
        ids = out.sequences[:, skip:].tolist()
        if beams is None:
            lengths = [next((at + 1 for at, token_id in enumerate(row) if token_id in eos), len(row)) for row in ids]
            totals: list[float] = []
        else:
            lengths = (beams >= 0).sum(dim=1).tolist()
            totals = out.sequences_scores.tolist()
        return Theirs(
            [row[:length] for row, length in zip(ids, lengths, strict=True)],
            totals,
            [row[:length] for row, length in zip(scores.tolist(), lengths, strict=True)],
        )

    def search(
        self,
        prompts: Sequence[int],
        *,
        eos: Sequence[int] = EOS,
        stops: Stops | None = None,
        streams: Sequence[int] | None = None,
        **asked: Any,
    ) -> list[list[Hypothesis]]:
        """This package's beam search on the same; `streams` where prompts that are equal are to draw apart."""
        search = BeamSearch(
            options(**asked),
            special_ids=self.special_ids(eos),
            num_tokens=NUM_TOKENS,
            prompts=prompts if streams is None else streams,
            stops=stops,
        )
        of, ids = np.array(prompts), np.zeros((len(prompts), 0), np.int64)
        while (advance := search.advance(self.logits(of, ids))) is not None:
            of = of[advance.rows]
            ids = np.concatenate([ids[advance.rows], advance.ids[:, None]], axis=1)
        return search.results()

    def choose(
        self, prompts: Sequence[int], *, eos: Sequence[int] = EOS, **asked: Any
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and log-probabilities by this package's sampler; rows leave when they are finished."""
        resolved = options(**asked, output_scores=True)
        sampler = Sampler(
            resolved, special_ids=self.special_ids(eos), num_tokens=NUM_TOKENS, rows=[(prompt, 0) for prompt in prompts]
        )
        chosen: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        active = np.arange(len(prompts))
        for _ in range(resolved.max_new_tokens):
            written = np.array([chosen[row] for row in active], np.int64).reshape(len(active), -1)
            new = sampler.choose(self.logits([prompts[row] for row in active], written))
            for row, token_id, logprob in zip(active, new.tolist(), sampler.logprobs().tolist(), strict=True):
                chosen[row].append(token_id)
                logprobs[row].append(logprob)
            going = np.flatnonzero(~np.isin(new, eos))
            sampler.keep(going)
            active = active[going]
            if not active.size:
                break
        return chosen, logprobs


@cache
def tiny(slm: str) -> Tiny:
    return Tiny(slm, prompts=5)
