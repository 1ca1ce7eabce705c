"""Train the demo's tokenizer: 8,000 unigram pieces over both languages, with T5's special ids and layout.

Usage: python demo/train_tokenizer.py TRAIN.tsv OUT
"""

import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "</s>", "<unk>"]  # T5's ids 0, 1, 2


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python demo/train_tokenizer.py TRAIN.tsv OUT")
    rows = [line.split("\t")[:2] for line in pathlib.Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=8_000, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    texts = sorted({side for row in rows for side in row})
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    out = pathlib.Path(sys.argv[2])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    print(f"{out}: {len(fast)} pieces; 'How are you?' = {fast('How are you?').input_ids}")


if __name__ == "__main__":
    main()
