"""Compositions of random models on disk, as training would leave them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llm2slm_export.authoring.models.byte_tokenizer import byte_tokenizer
from llm2slm_export.files.names import safe_name
from tests.families.combinations import Combination
from tests.families.models import CONFIGS

# Many, so that rows and beams end at different lengths.
EOS = [1, *range(7, 300, 13)]
TEMPLATE = "x {prompt}"


def write_composition(directory: Path, combination: Combination, seed: int = 0) -> Path:
    """A composition whose every weight matters: no zero projector, no layer that only passes on."""
    torch.manual_seed(seed)
    llm, slm = _model(combination.llm, head=False), _model(combination.slm, head=True)
    slm.generation_config.eos_token_id = EOS
    llm.save_pretrained(directory / "llm")
    slm.save_pretrained(directory / "slm")
    writes = _tokenizer(pad=0, eos=1)
    reads = _tokenizer(pad=3, eos=4) if combination.tokenizer == "llm" else writes
    reads.save_pretrained(directory / "llm")
    writes.save_pretrained(directory / "slm")
    encoder = llm.get_encoder() if llm.config.is_encoder_decoder else llm
    adapter = combination.tokenizer == "llm" and combination.fusion in ("add", "prefix")
    d_out = slm.get_input_embeddings().embedding_dim
    if combination.fusion == "cross_attention":
        d_out = slm.get_encoder().config.hidden_size
    layers = (combination.layer,) if isinstance(combination.layer, int) else combination.layer
    states = encoder(input_ids=torch.ones(1, 1, dtype=torch.int64), output_hidden_states=True).hidden_states
    entry = {
        "kind": combination.projector, "d_in": states[layers[0]].shape[-1], "d_out": d_out, "layers": len(layers),
        "d_hidden": 26 if combination.projector == "mlp" else None,
        "d_embedding": llm.get_input_embeddings().embedding_dim if adapter else None,
    }  # fmt: skip
    save_file(_projector(entry), directory / "projector.safetensors")
    fields = {
        "format": "llm2slm-composition", "version": 1, "name": safe_name(str(combination)),
        "llm": {"model": "llm", "layer": combination.layer}, "slm": {"model": "slm"}, "projector": entry,
        "fusion": combination.fusion, "tokenizer": combination.tokenizer, "prompt_template": TEMPLATE,
        "max_prompt_tokens": 100, "max_new_tokens": 20,
    }  # fmt: skip
    (directory / "composition.json").write_text(json.dumps(fields))
    (directory / "training.json").write_text(json.dumps({"prompts": ["ab", "a longer one, with words", "q"]}))
    return directory


def _model(name: str, *, head: bool) -> Any:
    fields = dict(CONFIGS[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    auto: Any = AutoModel
    if head:
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    if config.model_type not in {"t5", "mt5", "umt5", "longt5"}:
        # transformers' own draw is so narrow that attention hardly matters.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.15)
    return model


def _tokenizer(*, pad: int, eos: int) -> Any:
    fields: Any = SimpleNamespace(pad_token_id=pad, eos_token_id=eos, vocab_size=290, is_encoder_decoder=True)
    return byte_tokenizer(fields)


def _projector(entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    if entry["layers"] > 1:
        shapes |= {"layer_fusion.weight": (entry["layers"],), "layer_fusion.norm.weight": (entry["d_in"],)}
    if entry["kind"] == "mlp":
        hidden = entry["d_hidden"]
        shapes |= {"fc_in.weight": (hidden, entry["d_in"]), "fc_in.bias": (hidden,)}
        shapes |= {"fc_out.weight": (entry["d_out"], hidden), "fc_out.bias": (entry["d_out"],)}
    if entry["d_embedding"] is not None:
        shapes |= {"adapter.weight": (entry["d_out"], entry["d_embedding"]), "adapter.bias": (entry["d_out"],)}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
