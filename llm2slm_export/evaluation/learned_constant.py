"""The learned constant control: one trained vector in place of the LLM's hidden states; the pair is unchanged."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.models.pairing import LoadedPair
from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.authoring.training.collate import padded, tokenize
from llm2slm_export.authoring.training.pairs import Row

STEPS, BATCH, LEARNING_RATE = 300, 32, 0.02
_STARTS = 32  # candidate hidden states for initialization
_CHECKS = 8  # batches that decide between the trained vector and the best candidate


def learn_constant(
    pair: LoadedPair, rows: Sequence[Row], *, seed: int, advance: Callable[[int], None] = lambda _: None
) -> Array:
    """Train a vector [encoder_hidden_size] that replaces every hidden state, to maximize the responses' likelihood.

    The pair's weights are frozen. Training starts from the best candidate hidden state with a gradient (there is none
    if all units of the projector's ReLU are inactive). The best candidate is returned if training does not improve on
    it.

    Args:
        pair: the pair.
        rows: prompts and responses of the training data.
        seed: of the selection of rows.
        advance: called with 1 after each of the STEPS.
    """
    reference, generator = pair.reference, torch.Generator().manual_seed(seed)
    # More rows than STEPS batches are not used.
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
    """Candidate vectors [encoder_hidden_size]: the mean and a selection of some prompts' hidden states."""
    states = reference.hidden_states(input_ids, mask)[mask.bool()]
    return [states.mean(dim=0), *states[:: max(1, len(states) // _STARTS)][:_STARTS]]


def _has_gradient(state: torch.Tensor, loss_of: Callable[[torch.Tensor, int], torch.Tensor]) -> bool:
    start = state.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(start, 0), start)
    return bool(gradient.abs().max() > 0)
