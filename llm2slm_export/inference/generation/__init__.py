"""From logits to tokens to text, as transformers' `generate` does it: numpy only, no runtime, no tokenizer."""
