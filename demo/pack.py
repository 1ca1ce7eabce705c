"""Make a composition self-contained: put its LLM's encoder inside, in float16, beside the SLM.

A composition names its LLM by hub id or path. The demo's was trained here, so it travels with the pair; the LLM's
decoder, which the pair never uses, stays behind. The tokenizer is the SLM's, which is the same.

Usage: python demo/pack.py COMPOSITION
"""

import json
import pathlib
import sys

import torch
from transformers import T5EncoderModel

from llm2slm_export.composition import COMPOSITION_FILE


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python demo/pack.py COMPOSITION")
    directory = pathlib.Path(sys.argv[1])
    path = directory / COMPOSITION_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    encoder = T5EncoderModel.from_pretrained(directory / fields["llm"]["model"], dtype=torch.float32)
    encoder.half().save_pretrained(directory / "llm")
    fields["llm"] |= {"model": "llm", "tokenizer": fields["slm"]["model"]}
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    total = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
    print(f"{directory}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
