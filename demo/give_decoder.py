"""Give a T5 encoder a decoder that has learned nothing yet, so that it can be trained to write by itself.

A composition holds its LLM's encoder alone. `train --only llm training.freeze_encoder=true` on what this writes makes
the LLM alone that the pair is compared with: the same reader, with a decoder of its own. The decoder has as many layers
as the encoder's configuration says; the embedding table is the encoder's, and its output layer is tied to it.

Usage: python demo/give_decoder.py ENCODER TOKENIZER OUT
"""

import pathlib
import sys

import torch
from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5ForConditionalGeneration


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit("usage: python demo/give_decoder.py ENCODER TOKENIZER OUT")
    source, tokenizer, out = sys.argv[1:]
    encoder = T5EncoderModel.from_pretrained(source, dtype=torch.float32)
    fields = {
        k: v for k, v in encoder.config.to_dict().items() if k not in ("architectures", "is_decoder", "use_cache")
    }
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**fields | {"is_encoder_decoder": True}))
    missing, unexpected = model.load_state_dict(encoder.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(("decoder.", "lm_head.")) for name in missing), missing
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)
    print(f"{out}: a decoder of {model.config.num_decoder_layers} layers, not trained, on {pathlib.Path(source).name}")


if __name__ == "__main__":
    main()
