"""Make a self-contained copy of a composition: its LLM's encoder inside, beside the SLM, all weights in float16.

A composition names its LLM by hub id or path. The demo's was trained here, so it travels with the pair; the LLM's
decoder, which the pair never uses, stays behind. The tokenizer is the SLM's, which is the same.

Usage: python demo/pack.py COMPOSITION DESTINATION
"""

import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import T5EncoderModel

from llm2slm_export.authoring.composition import COMPOSITION_FILE, PROJECTOR_FILE, SLM_DIRECTORY, TRAINING_FILE


def write_tokenizer(path: pathlib.Path) -> None:
    """A third of the size: no indentation, and the pieces' scores with three decimals of fourteen.

    Of 473,688 sentences of Tatoeba 13 are split another way, between pieces that were level to five digits.
    """
    fields = json.loads(Tokenizer.from_file(str(path)).to_str())
    fields["model"]["vocab"] = [[piece, round(score, 3)] for piece, score in fields["model"]["vocab"]]
    path.write_text(json.dumps(fields, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python demo/pack.py COMPOSITION DESTINATION")
    source, destination = map(pathlib.Path, sys.argv[1:])
    destination.mkdir(parents=True, exist_ok=True)
    fields = json.loads((source / COMPOSITION_FILE).read_text(encoding="utf-8"))
    encoder = T5EncoderModel.from_pretrained(source / fields["llm"]["model"], dtype=torch.float32)
    encoder.half().save_pretrained(destination / "llm")
    shutil.copytree(source / SLM_DIRECTORY, destination / SLM_DIRECTORY, dirs_exist_ok=True)
    for name in (f"{SLM_DIRECTORY}/model.safetensors", PROJECTOR_FILE):
        halved = {key: value.half() for key, value in load_file(source / name).items()}
        save_file(halved, destination / name, metadata={"format": "pt"})
    write_tokenizer(destination / SLM_DIRECTORY / "tokenizer.json")
    config = destination / SLM_DIRECTORY / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"dtype": "float32"', '"dtype": "float16"'))
    shutil.copyfile(source / TRAINING_FILE, destination / TRAINING_FILE)
    fields["llm"] |= {"model": "llm", "tokenizer": SLM_DIRECTORY}
    (destination / COMPOSITION_FILE).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    total = sum(p.stat().st_size for p in destination.rglob("*") if p.is_file())
    print(f"{destination}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
