"""Make a self-contained copy of a composition: its LLM's encoder inside, in float16, beside the SLM.

A composition names its LLM by hub id or path. The demo's was trained here, so it travels with the pair; the LLM's
decoder, which the pair never uses, stays behind. The tokenizer is the SLM's, which is the same.

Usage: python demo/pack.py COMPOSITION DESTINATION
"""

import json
import pathlib
import shutil
import sys

import torch
from transformers import T5EncoderModel

from llm2slm_export.composition import COMPOSITION_FILE, PROJECTOR_FILE, SLM_DIRECTORY, TRAINING_FILE


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python demo/pack.py COMPOSITION DESTINATION")
    source, destination = map(pathlib.Path, sys.argv[1:])
    destination.mkdir(parents=True, exist_ok=True)
    fields = json.loads((source / COMPOSITION_FILE).read_text(encoding="utf-8"))
    encoder = T5EncoderModel.from_pretrained(source / fields["llm"]["model"], dtype=torch.float32)
    encoder.half().save_pretrained(destination / "llm")
    shutil.copytree(source / SLM_DIRECTORY, destination / SLM_DIRECTORY, dirs_exist_ok=True)
    for name in (PROJECTOR_FILE, TRAINING_FILE):
        shutil.copyfile(source / name, destination / name)
    fields["llm"] |= {"model": "llm", "tokenizer": SLM_DIRECTORY}
    (destination / COMPOSITION_FILE).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    total = sum(p.stat().st_size for p in destination.rglob("*") if p.is_file())
    print(f"{destination}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
