"""The reference: an untrained pair is the SLM alone, padding changes nothing, the LLM stays frozen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2slm_export.authoring.composition import ProjectorEntry
from llm2slm_export.authoring.models.loading import load_full
from llm2slm_export.authoring.models.pairing import compose_untrained
from llm2slm_export.authoring.models.projector import Projector
from llm2slm_export.authoring.models.reference import Reference, pack_sequences, response_logits
from llm2slm_export.authoring.recipe import ModelSource
from tests.support.tiny_models import LLM_CONFIG, SLM_CONFIGS

PROMPTS = torch.tensor([[5, 9, 11, 1, 0, 0], [7, 1, 0, 0, 0, 0], [5, 6, 7, 8, 9, 1]])
MASK = (PROMPTS != 0).long()


def pair(save_model: Callable[..., Path], slm_type: str) -> Reference:
    return compose_untrained(
        ModelSource(model=str(save_model(LLM_CONFIG))), ModelSource(model=str(save_model(SLM_CONFIGS[slm_type], 1)))
    ).reference


@pytest.mark.parametrize("slm_type", list(SLM_CONFIGS))
def test_an_untrained_add_composition_is_the_slm_alone_exactly(save_model: Callable[..., Path], slm_type: str) -> None:
    reference = pair(save_model, slm_type)
    slm: Any = reference.slm
    embeds = slm.get_input_embeddings()(PROMPTS)
    moved, mask = pack_sequences([embeds], MASK, left=slm_type != "t5")
    fused, fused_mask = reference.fuse(reference.hidden_states(PROMPTS, MASK), PROMPTS, MASK)
    assert torch.equal(fused, moved)
    assert torch.equal(fused_mask, mask)

    ours = reference.generate(PROMPTS, MASK, max_new_tokens=10, do_sample=False)
    if slm_type == "t5":
        alone = slm.generate(input_ids=PROMPTS, attention_mask=MASK, max_new_tokens=10, do_sample=False)
    else:
        alone = slm.generate(inputs_embeds=moved, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(ours, alone)


@pytest.mark.parametrize("slm_type", list(SLM_CONFIGS))
def test_a_padded_batch_gives_what_its_rows_give_alone(save_model: Callable[..., Path], slm_type: str) -> None:
    reference = pair(save_model, slm_type)
    torch.nn.init.normal_(reference.projector.fc_out.weight)
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100], [9, 9, 1, -100]])
    with torch.no_grad():
        together = reference(PROMPTS, MASK, labels)
        for row in range(3):
            prompt, written = int(MASK[row].sum()), int((labels[row] != -100).sum())
            alone = reference(
                PROMPTS[row : row + 1, :prompt], MASK[row : row + 1, :prompt], labels[row : row + 1, :written]
            )
            torch.testing.assert_close(together[row : row + 1, :written], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slm_type", ["llama", "gpt2"])
def test_response_logits_are_those_of_the_unpadded_model(save_model: Callable[..., Path], slm_type: str) -> None:
    slm: Any = load_full(str(save_model(SLM_CONFIGS[slm_type])))
    labels = torch.tensor([[5, 6, 7, 1]])
    prompt = PROMPTS[:1, :4]
    with torch.no_grad():
        embeds = slm.get_input_embeddings()(PROMPTS[:1])
        got = response_logits(slm, *pack_sequences([embeds], MASK[:1], left=True), labels)
        whole = slm(input_ids=torch.cat([prompt, labels[:, :-1]], dim=1)).logits[:, 3:]
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_arranged_rows_are_their_parts_one_after_the_other(count: int, left: bool) -> None:
    parts = [torch.randn(3, 6, 4) for _ in range(count)]
    moved, mask = pack_sequences(parts, MASK, left=left)
    assert moved.shape == (3, 6 * count, 4)
    for row in range(3):
        prompt = int(MASK[row].sum())
        expected = torch.cat([part[row, :prompt] for part in parts])
        assert torch.equal(moved[row][mask[row].bool()], expected)
        real = mask[row].tolist()
        assert real == sorted(real, reverse=not left)


def test_several_layers_are_fused_by_sigmoid_weights_and_a_norm() -> None:
    projector = Projector(ProjectorEntry(kind="identity", d_in=4, d_out=4, layers=3))
    fusion = projector.layer_fusion
    assert fusion is not None
    torch.nn.init.normal_(fusion.weight)
    torch.nn.init.normal_(fusion.norm.weight)
    layers = [torch.randn(2, 5, 4) for _ in range(3)]
    total = sum(torch.sigmoid(w) * layer for w, layer in zip(fusion.weight, layers, strict=True))
    expected = total * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + 1e-6) * fusion.norm.weight
    torch.testing.assert_close(projector(torch.cat(layers, dim=2)), expected)


def test_the_projector_starts_at_zero_and_is_relu_between_two_linear_layers() -> None:
    projector = Projector(ProjectorEntry(d_in=4, d_hidden=6, d_out=3))
    hidden = torch.randn(2, 5, 4)
    assert torch.equal(projector(hidden), torch.zeros(2, 5, 3))
    torch.nn.init.normal_(projector.fc_out.weight)
    expected = torch.relu(hidden @ projector.fc_in.weight.T + projector.fc_in.bias) @ projector.fc_out.weight.T
    torch.testing.assert_close(projector(hidden), expected)


def test_the_llm_stays_in_evaluation_mode_and_gets_no_gradient(save_model: Callable[..., Path]) -> None:
    reference = pair(save_model, "t5").train()
    assert not reference.llm.training
    assert reference.slm.training
    reference(PROMPTS, MASK, torch.tensor([[5, 1], [6, 1], [7, 1]])).sum().backward()
    assert all(p.grad is None for p in reference.llm.parameters())
    assert reference.projector.fc_out.weight.grad is not None
