"""Train a tokenizer: unigram pieces over both sides of the rows, with T5's special ids and layout.

Writes into OUT what transformers' AutoTokenizer loads. FILE is TSV (its first two columns) or JSONL (the keys `prompt`
and `response`), by its name. Two runs learn the same pieces, but the trainer's sums differ in their last digits, so a
few pieces of near-equal score change ids: keep the tokenizer that a model was trained with.

Usage: python demo/train_tokenizer.py FILE [FILE …] OUT [--response-only] [--vocab 8000]
"""

import argparse
import json
import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "</s>", "<unk>"]  # T5's ids 0, 1, 2


def read(path: pathlib.Path) -> list[tuple[str, str]]:
    """The prompt and the response of each row."""
    if path.suffix not in {".tsv", ".jsonl"}:
        sys.exit(f"{path} is neither .tsv nor .jsonl")
    if not path.is_file():
        sys.exit(f"there is no {path}")
    if path.suffix == ".tsv":
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        return [(row[0], row[1]) for row in rows]
    with path.open(encoding="utf-8") as lines:
        return [(row["prompt"], row["response"]) for row in map(json.loads, lines)]


def train(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=vocab, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--response-only", action="store_true", help="leave the prompts (the first columns) out")
    parser.add_argument("--vocab", type=int, default=8_000, help="pieces, special ones included")
    arguments = parser.parse_args()
    rows = [row for path in arguments.files for row in read(path)]
    texts = sorted({side for row in rows for side in row[arguments.response_only :]})
    fast = PreTrainedTokenizerFast(
        tokenizer_object=train(texts, arguments.vocab),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(arguments.out)
    print(f"{arguments.out}: {len(fast)} pieces; 'How are you?' = {fast('How are you?').input_ids}")


if __name__ == "__main__":
    main()
