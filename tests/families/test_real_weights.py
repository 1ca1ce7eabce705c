"""Published weights against transformers alone: `LLM2SLM_REAL_MODELS` names a directory with `flan-t5-small`,
`stories15m` and `all-minilm-l6`, each as `save_pretrained` leaves it. They are not in this repository; without them these are skipped."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import llm2slm_export
from llm2slm_export.authoring.build import build
from llm2slm_export.authoring.models.loading import load_full, load_llm
from llm2slm_export.authoring.models.pairing import PairConfig, load_composition, projector_entry
from llm2slm_export.authoring.models.projector import Projector
from tests.families.models import CONFIGS
from tests.support.held_out import prompts
from tests.support.oracle import Oracle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LLM2SLM_REAL_MODELS" not in os.environ, reason="LLM2SLM_REAL_MODELS is not set"),
]
COUNT = 40


def model(name: str) -> Path:
    return Path(os.environ.get("LLM2SLM_REAL_MODELS", "")) / name


def write(directory: Path, llm: Path, slm: Path, pair_config: PairConfig) -> Path:
    """A composition of two models where they lie, with a projector whose output is about as large as embeddings are."""
    torch.manual_seed(0)
    entry = projector_entry(load_llm(str(llm)), load_full(str(slm)), pair_config)
    projector = Projector(entry)
    for parameter in projector.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)
    save_file(projector.state_dict(), directory / "projector.safetensors")
    fields = {
        "format": "llm2slm-composition", "version": 1, "name": "real", "llm": {"model": str(llm), "layer": pair_config.layer},
        "slm": {"model": str(slm)}, "projector": entry.model_dump(), "fusion": pair_config.fusion, "tokenizer": pair_config.tokenizer,
        "prompt_template": "{prompt}", "max_prompt_tokens": 128, "max_new_tokens": 32,
    }  # fmt: skip
    (directory / "composition.json").write_text(json.dumps(fields))
    return directory


def tiny_slm(directory: Path, tokenizer: Path) -> Path:
    """A random two-layer T5 that writes in another model's tokens."""
    from transformers import AutoTokenizer

    torch.manual_seed(1)
    known = AutoTokenizer.from_pretrained(tokenizer)
    fields: dict[str, Any] = CONFIGS["t5"] | {"vocab_size": len(known), "eos_token_id": known.eos_token_id}
    config = AutoConfig.for_model(**fields)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(directory)
    known.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("llm", "slm", "pair_config"),
    [
        ("flan-t5-small", "flan-t5-small", PairConfig()),
        ("flan-t5-small", "flan-t5-small", PairConfig(fusion="cross_attention")),
        ("flan-t5-small", "tiny", PairConfig(fusion="prefix")),
        ("flan-t5-small", "stories15m", PairConfig(tokenizer="llm")),
        ("flan-t5-small", "stories15m", PairConfig(fusion="prefix", tokenizer="llm", layer=(2, 5, -1))),
        ("all-minilm-l6", "stories15m", PairConfig(fusion="replace", tokenizer="llm")),
        ("stories15m", "tiny", PairConfig(layer=3)),
        ("stories15m", "tiny", PairConfig(fusion="replace", layer=(1, 3, 5))),
    ],
    ids=str,
)
def test_real_weights_are_transformers(llm: str, slm: str, pair_config: PairConfig, tmp_path: Path) -> None:
    slm_model = tiny_slm(tmp_path / "tiny", model(llm)) if slm == "tiny" else model(slm)
    composition = write(tmp_path, model(llm), slm_model, pair_config)
    build(load_composition(composition), tmp_path / "bundle")
    oracle, texts = Oracle(composition), prompts()[:COUNT]
    beams = {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False}
    with llm2slm_export.load(tmp_path / "bundle") as pair:
        greedy = [g.token_ids for g in pair.generate(texts, max_new_tokens=24, do_sample=False)]
        searched = [g.token_ids for g in pair.generate(texts, max_new_tokens=24, do_sample=False, **beams)]
    assert greedy == oracle.generate(texts, 24)
    assert searched == oracle.generate(texts, 24, **beams)


def test_an_untied_head_survives_saving_and_loading(tmp_path: Path) -> None:
    """transformers 5.23 ties T5's head when it builds from a configuration; a checkpoint with both keeps both."""
    slm: Any = load_full(str(model("flan-t5-small")))
    assert not torch.equal(slm.lm_head.weight, slm.get_input_embeddings().weight)
    slm.save_pretrained(tmp_path)
    again: Any = load_full(str(tmp_path))
    assert torch.equal(again.lm_head.weight, slm.lm_head.weight)
    assert torch.equal(again.get_input_embeddings().weight, slm.get_input_embeddings().weight)
