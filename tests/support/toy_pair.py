"""A pair whose logits are known: the loop, its batches and its encodings are tested with it, without a runtime."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer, models, processors
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import (
    CacheEntry,
    FileEntry,
    GenerationDefaults,
    GraphEntry,
    Manifest,
    SpecialIds,
    TokenizerEntry,
)
from llm2slm_export.bundle.parity_report import ParityReport
from llm2slm_export.contract import GRAPHS, PairShape, cross_attention, state
from llm2slm_export.inference.encodings.cache import EncodingCache
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.runtime.backend import Conditioning, rewound

PAD, EOS, OTHER_EOS, VOCAB = 0, 1, 2, 270
ALPHABET = {char: 3 + index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
SHAPE = PairShape(
    slm_kind="encoder-decoder",
    fusion="add",
    encoder_hidden_size=4,
    hidden_size=4,
    num_hidden_layers=1,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=VOCAB,
)


GRAPH_FILES = {
    name: GraphEntry(file=f"{name}.onnx", precision="fp32", opset=20, minimum_runtime={}, inputs=(), outputs=())
    for name in GRAPHS
}


class Toy:
    """Writes the script of each prompt, whose first id is the script's key. What the decoder is conditioned on is the ids.

    `fed` holds the ids given to the decoder, call by call: its length is the calls' number, that of each its rows.
    """

    device = "toy"
    threads = None
    warnings = ()
    runtimes: ClassVar = {}
    precisions: ClassVar = dict.fromkeys(GRAPHS, "fp32")
    limits = None

    def __init__(self, scripts: dict[int, list[int]]) -> None:
        self.scripts, self.calls, self.fed, self.read = scripts, [], [], []

    def encode(self, input_ids: Any, attention_mask: Any) -> Any:
        self.calls.append("encode")
        self.attention_mask = attention_mask
        self.read.append([row[mask == 1].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)])
        return input_ids

    def project(self, hidden: Any, input_ids: Any, attention_mask: Any) -> Conditioning:
        self.calls.append("project")
        assert hidden is input_ids
        kv = np.zeros((*input_ids.shape, 1, 4), np.float32) + (input_ids * attention_mask)[:, :, None, None]
        kv = kv.swapaxes(1, 2).astype(np.float32)  # [batch, heads, context, head_dim]
        return Conditioning({spec.name: kv for spec in cross_attention(SHAPE)}, attention_mask)

    def arrays(self, conditioning: Conditioning) -> dict[str, Any]:
        return dict(conditioning.tensors)

    def conditioning(self, arrays: Any, attention_mask: Any) -> Conditioning:
        return Conditioning(arrays, attention_mask)

    def prefill(self, conditioning: Conditioning) -> tuple[Any, Any]:
        self.calls.append("prefill")
        for kv in conditioning.tensors.values():
            np.testing.assert_array_equal(kv[:, 0, :, 0] > 0, conditioning.attention_mask)
        state = {"keys": kv[:, 0, 0, 0], "lengths": np.ones(len(kv), np.int64)}
        return state, self._logits(state, 1)[:, 0]

    def step(self, state: Any, input_ids: Any) -> Any:
        self.calls.append("step")
        self.fed.append(input_ids[:, 0].tolist())
        assert len(input_ids) == len(state["keys"])
        state["lengths"] = state["lengths"] + input_ids.shape[1]
        return self._logits(state, input_ids.shape[1])

    def rewind(self, state: Any, lengths: Any) -> None:
        state["lengths"] = rewound(state["lengths"], lengths)

    def lengths(self, state: Any) -> Any:
        return state["lengths"].copy()

    def join(self, state: Any, other: Any) -> None:
        self.calls.append("join")
        for name in state:
            state[name] = np.concatenate([state[name], other[name]])

    def step_argmax(self, state: Any, input_ids: Any) -> None:
        """Logits are in host memory as it is."""

    def select(self, state: Any, rows: Any) -> None:
        for name in state:
            state[name] = state[name][rows]

    def head(self, bundle: Bundle) -> "Toy":
        self.calls.append(f"head {bundle.manifest.head}")
        return Toy(self.scripts)

    def _logits(self, state: Any, tokens: int) -> Any:
        """Logits of each row's last positions, [rows, tokens, vocab_size]."""
        logits = np.zeros((len(state["keys"]), tokens, VOCAB), np.float32)
        logits[:, :, ALPHABET["z"]] = 8  # the second choice everywhere
        for row, (key, length) in enumerate(zip(state["keys"], state["lengths"], strict=True)):
            script = self.scripts[int(key)]
            for token in range(tokens):
                logits[row, token, script[min(length - tokens + token, len(script) - 1)]] = 9
        return logits

    def close(self) -> None:
        self.calls.append("close")


def ids_of(text: str) -> list[int]:
    return _tokenizer().encode(text, add_special_tokens=False).ids


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"<pad>": PAD, "</s>": EOS, "<end>": OTHER_EOS, **ALPHABET}, merges=[]))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<end>"])
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return tokenizer


def make_pair(
    directory: Path,
    scripts: dict[str, str],
    *,
    cache: EncodingCache | None = None,
    toy: type[Toy] = Toy,
    **changes: Any,
) -> Orchestrator:
    """A pair that answers a prompt with the script of its first character. `toy`: what runs it."""
    tokenizer = _tokenizer()
    tokenizer.enable_padding(length=99)  # as a training run may leave it
    tokenizer.enable_truncation(3)
    tokenizer.save(str(directory / "tokenizer.json"))
    manifest = Manifest.model_construct(
        **{
            "name": "toy",
            "sources": {},
            "trained": True,
            "shape": SHAPE,
            "fusion": "add",
            "prompt_template": "{prompt}",
            "max_prompt_tokens": 12,
            "tokenizer": TokenizerEntry(
                strategy="shared", llm="tokenizer.json", slm="tokenizer.json", slm_size=3 + len(ALPHABET)
            ),
            "special_ids": SpecialIds(prompt_pad=PAD, pad=PAD, eos=(EOS, OTHER_EOS), decoder_start=PAD),
            "generation": GenerationDefaults(max_new_tokens=32),
            "graphs": GRAPH_FILES,
            "cache": CacheEntry(state=state(SHAPE)),
            "parity": ParityReport(rows=()),
            "tool_versions": {},
            "files": tuple(FileEntry(path=f"{name}.onnx", bytes=1, sha256=name) for name in GRAPH_FILES),
            "head": "main",
            "heads": {},
            "max_total_tokens": None,
            **changes,
        }
    )
    backend = toy({ids_of(key)[0]: ids_of(script) for key, script in scripts.items()})
    return Orchestrator(Bundle(directory, manifest), backend, cache=cache)


def toy_of(pair: Orchestrator) -> Toy:
    backend = pair._backend
    assert isinstance(backend, Toy)
    return backend
