"""The learned constant: the best one vector in place of the LLM's hidden states, the pair as it is."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from llm2slm_export.authoring.models.pairing import LoadedPair
from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.authoring.training.collate import padded, tokenize
from llm2slm_export.authoring.training.pairs import Row
from llm2slm_export.inference.runtime.backend import Array

STEPS, BATCH, LEARNING_RATE = 300, 32, 0.02
_STARTS = 32  # hidden states it may start from
_CHECKS = 8  # batches that decide between what was learned and the best start


def learn_constant(
    pair: LoadedPair, rows: Sequence[Row], *, seed: int, advance: Callable[[int], None] = lambda _: None
) -> Array:
    """A vector [encoder_hidden_size] that, at every position of every prompt, makes the responses as likely as it can.

    Nothing else learns; the pair's weights stay as they are. It starts from the best of some hidden states that has a
    gradient (where every unit of the projector is silent there is none), and where learning leads nowhere better the
    best of them is what is returned.

    Args:
        rows: prompts and responses of the training data.
        advance: called with 1 after each of the STEPS.
    """
    reference, generator = pair.reference, torch.Generator().manual_seed(seed)
    # A training step each: more rows than that are never seen.
    chosen = torch.randperm(len(rows), generator=generator)[: STEPS * BATCH].tolist()
    data, _ = tokenize(
        [rows[index] for index in chosen], pair.file.template, pair.llm_tokenizer, pair.slm_tokenizer,
        pair.file.max_prompt_tokens, pair.file.max_new_tokens,
    )  # fmt: skip
    reference.requires_grad_(requires_grad=False)
    pad = pair.llm_tokenizer.pad_token_id or 0

    def batch(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        part = [data[i % len(data)] for i in range(number * BATCH, (number + 1) * BATCH)]
        prompts = [row["input_ids"] for row in part]
        mask = padded([[1] * len(p) for p in prompts], 0)
        return padded(prompts, pad), mask, padded([row["labels"] for row in part], -100)

    def loss_of(vector: torch.Tensor, number: int) -> torch.Tensor:
        input_ids, mask, labels = batch(number)
        logits = reference(input_ids, mask, labels, hidden_states=vector.expand(*input_ids.shape, -1))
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    states = _states(reference, *batch(0)[:2])
    with torch.no_grad():
        states.sort(key=lambda state: loss_of(state, 0).item())
    vector = torch.nn.Parameter(next((s for s in states if _has_gradient(s, loss_of)), states[0]).clone())
    scale = vector.detach().square().mean().sqrt().clamp(min=1e-3).item()
    optimizer = torch.optim.Adam([vector], lr=LEARNING_RATE * scale)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss_of(vector, number).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        advance(1)
    with torch.no_grad():
        best = min(
            (vector.detach(), states[0]), key=lambda state: sum(loss_of(state, n).item() for n in range(_CHECKS))
        )
    return best.numpy().astype(np.float32)


def _states(reference: Reference, input_ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Vectors [encoder_hidden_size] to start from: the mean hidden state of some prompts, and some of theirs."""
    states = reference.hidden_states(input_ids, mask)[mask.bool()]
    return [states.mean(dim=0), *states[:: max(1, len(states) // _STARTS)][:_STARTS]]


def _has_gradient(state: torch.Tensor, loss_of: Callable[[torch.Tensor, int], torch.Tensor]) -> bool:
    start = state.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(start, 0), start)
    return bool(gradient.abs().max() > 0)
