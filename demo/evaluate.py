"""BLEU and chrF of the demo's systems on held-out sentences, greedy, every French reference of a sentence counted.

A system is a directory: a transformers model (the LLM or the SLM by itself) or a bundle (the pair).

Usage: python demo/evaluate.py TEST.tsv [--rows N] [--json FILE] NAME=DIRECTORY [NAME=DIRECTORY …]
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable

import sacrebleu

import llm2slm_export

BATCH = 64
MAX_NEW_TOKENS = 96


def read(path: pathlib.Path, rows: int | None) -> tuple[list[str], list[list[str]]]:
    """Distinct English sentences and, for each, all its French references."""
    references: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        english, french, _ = line.split("\t")
        references.setdefault(english, []).append(french)
    # Spread over the file, which is sorted: the first N sentences would all begin alike.
    sentences = sorted(references, key=lambda s: hash_of(s))[:rows]
    return sentences, [references[s] for s in sentences]


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def bundle(directory: pathlib.Path) -> Callable[[list[str]], list[str]]:
    pair = llm2slm_export.load(directory)
    return lambda batch: [g.text for g in pair.generate(batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)]


def transformers_model(directory: pathlib.Path) -> Callable[[list[str]], list[str]]:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def translate(batch: list[str]) -> list[str]:
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        ids = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )  # fmt: skip
        texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    return translate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", type=pathlib.Path)
    parser.add_argument("systems", nargs="+", metavar="NAME=DIRECTORY")
    parser.add_argument("--rows", type=int, help="sentences to score; all where it is not given")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    sentences, references = read(arguments.test, arguments.rows)
    # sacrebleu wants one list per reference number, None where a sentence has fewer.
    columns = [[r[i] if i < len(r) else None for r in references] for i in range(max(map(len, references)))]
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    results = {}
    print(f"{len(sentences)} sentences, {sum(map(len, references))} references, greedy, batch {BATCH}")
    for system in arguments.systems:
        name, _, directory = system.partition("=")
        path = pathlib.Path(directory)
        translate = bundle(path) if (path / "manifest.json").is_file() else transformers_model(path)
        started = time.monotonic()
        output = [""] * len(sentences)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            for row, text in zip(rows, translate([sentences[i] for i in rows]), strict=True):
                output[row] = text
        bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
        score = {
            "bleu": round(bleu.corpus_score(output, columns).score, 2),
            "chrf": round(chrf.corpus_score(output, columns).score, 2),
            "seconds": round(time.monotonic() - started, 1),
            "signatures": [str(bleu.get_signature()), str(chrf.get_signature())],
        }
        results[name] = score
        print(f"{name:24} BLEU {score['bleu']:6.2f}  chrF {score['chrf']:6.2f}  {score['seconds']:.0f} s", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"sentences": len(sentences), "systems": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
