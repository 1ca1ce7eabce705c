"""The models that every peer is given: sizes of known ones, weights drawn once, in a form that all of them convert.

Usage: python models.py NAME DIRECTORY PROMPT_TOKENS (the driver runs it, so as not to hold torch while it times)
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llm2slm_export.authoring.models.aliases import architecture
from llm2slm_export.authoring.models.byte_tokenizer import byte_tokenizer
from llm2slm_export.authoring.models.loading import config_from, model_from_config
from llm2slm_export.files.atomic import replaced_directory
from llm2slm_export.files.output_target import Kind

PROMPT = "The quick brown fox jumps over the lazy dog near the old river bank. "
SEED = 0
_TASK = "task.json"
_MADE = Kind(
    "a model that the benchmark made", lambda path: () if (path / _TASK).is_file() else (f"no {_TASK} is in it",)
)


def make(name: str, target: Path, prompt_tokens: int) -> None:
    """Draw a model's weights; save it with a tokenizer, a tiny T5 that reads for our bundle, and the prompt.

    Args:
        name: in llm2slm_export's table of known models.
        prompt_tokens: length of the prompt, with what the tokenizer adds.
    """
    known = architecture(name)
    if known is None:
        raise SystemExit(f"{name} is not in llm2slm_export's table of known models")
    config: Any = config_from(known)
    tokenizer = _whole_vocabulary(byte_tokenizer(config), config.vocab_size)
    reader = {
        "model_type": "t5", "vocab_size": config.vocab_size, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_heads": 2,
        "num_layers": 1, "eos_token_id": config.eos_token_id, "decoder_start_token_id": 0,
    }  # fmt: skip
    with replaced_directory(target, _MADE, force=True) as directory:
        for place, fields in ((directory, known), (directory / "reader", reader)):
            torch.manual_seed(SEED)
            model: Any = model_from_config(fields)
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
            _for_transformers_4(place, fields)
        added = len(tokenizer("").input_ids)
        text = (PROMPT * prompt_tokens)[: prompt_tokens - added]
        task = {"text": text, "ids": tokenizer(text).input_ids, "eos": config.eos_token_id}
        (directory / _TASK).write_text(json.dumps(task) + "\n", encoding="utf-8")


def _whole_vocabulary(tokenizer: PreTrainedTokenizerFast, size: int) -> PreTrainedTokenizerFast:
    """The tokenizer with a token for every id: all of the model's outputs can be written, as with a real one."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = fields["model"]["vocab"]
    used = set(vocab.values())
    vocab |= {f"<{id}>": id for id in range(size) if id not in used}
    names = {name: str(getattr(tokenizer, name)) for name in ("eos_token", "pad_token")}
    whole = Tokenizer.from_str(json.dumps(fields))
    return PreTrainedTokenizerFast(tokenizer_object=whole, clean_up_tokenization_spaces=False, **names)


def _for_transformers_4(directory: Path, fields: dict[str, Any]) -> None:
    """What transformers 5 writes under names that its predecessor, which some peers need, does not know."""
    for name, wanted in (
        ("config.json", {key: fields[key] for key in ("rope_theta",) if key in fields}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        path = directory / name
        saved = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(saved | wanted, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
