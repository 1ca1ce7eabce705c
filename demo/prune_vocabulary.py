"""Cut a T5's vocabulary to the pieces that some rows need: its tokenizer, its embedding and its output layer.

Writes into OUT a model directory with the tokenizer. A piece that goes is spelled with those that stay: every single
character of the vocabulary does, so nothing becomes unknown that was not. The extra ids of T5's pre-training go. No
weight that stays is changed.

With --add N, a character that the tokenizer does not know and that N texts hold becomes a piece, so that the small model
can write it (T5's knows no ñ, í or ¿). Its rows are the mean of the others: the model has never seen it.

A small model that shares a pretrained LLM's tokenizer would spend most of its weights, and of each step, on pieces that
its task never uses.

Usage: python demo/prune_vocabulary.py MODEL FILE [FILE …] OUT [--pieces 8000] [--keep TEXT] [--add N]
"""

import argparse
import json
import pathlib
import shutil
from collections import Counter

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from train_tokenizer import SPECIAL, read
from transformers import PreTrainedTokenizerFast

TABLES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


def kept(tokenizer: Tokenizer, texts: list[str], pieces: int, always: str) -> list[int]:
    """The ids that stay, in order: special ones, single characters, `always`, and the most frequent of the rest."""
    counts = Counter(token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids)
    stay = {*range(len(SPECIAL)), *tokenizer.encode(always).ids}
    vocabulary = [piece for piece, _ in json.loads(tokenizer.to_str())["model"]["vocab"]]
    stay |= {token for token, piece in enumerate(vocabulary) if len(piece) == 1}
    no_more = stay | set(tokenizer.get_added_tokens_decoder())
    rest = [token for token, _ in counts.most_common() if token not in no_more]
    return sorted(stay | set(rest[: max(0, pieces - len(stay))]))


def unknown(tokenizer: Tokenizer, texts: list[str], least: int) -> list[str]:
    """The characters of at least `least` texts that the tokenizer does not know, the most frequent first."""
    counts = Counter(character for text in texts for character in set(text))
    unk = tokenizer.token_to_id("<unk>")
    return [c for c, count in counts.most_common() if count >= least and unk in tokenizer.encode(c).ids]


def pruned(tokenizer: Tokenizer, ids: list[int], new: list[str]) -> Tokenizer:
    file = json.loads(tokenizer.to_str())
    rarest = min(score for _, score in file["model"]["vocab"])
    file["model"]["vocab"] = [file["model"]["vocab"][token] for token in ids] + [(piece, rarest) for piece in new]
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--pieces", type=int, default=8_000)
    parser.add_argument("--keep", metavar="TEXT", default="", help="its pieces stay: a recipe's prompt_template")
    parser.add_argument("--add", metavar="N", type=int, help="unknown characters of N texts become pieces")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = sorted({side for path in arguments.files for row in read(path) for side in row})
    new = unknown(tokenizer, texts, arguments.add) if arguments.add is not None else []
    ids = kept(tokenizer, texts, arguments.pieces - len(new), arguments.keep)
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = load_file(arguments.model / "model.safetensors")
    for name in TABLES:
        if name in weights:
            table = weights[name][ids]
            weights[name] = torch.cat([table, table.mean(dim=0, keepdim=True).expand(len(new), -1)])
    save_file(weights, arguments.out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((arguments.model / "config.json").read_text(encoding="utf-8")) | {
        "vocab_size": len(ids) + len(new)
    }
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copy(arguments.model / "generation_config.json", arguments.out)
    small = pruned(tokenizer, ids, new)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=small, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(arguments.out)
    before, after = (sum(len(e.ids) for e in each.encode_batch(texts)) for each in (tokenizer, small))
    if new:
        print(f"{len(new)} characters are new: {' '.join(new)}")
    print(f"{arguments.out}: {len(ids)} of {tokenizer.get_vocab_size()} pieces; {before} tokens became {after}")


if __name__ == "__main__":
    main()
