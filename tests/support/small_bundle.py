"""A bundle whose manifest, hashes and tokenizer are real and whose graphs have no nodes: for what never runs one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from llm2slm_export import contract
from llm2slm_export.bundle.files import file_entries
from llm2slm_export.bundle.manifest import (
    CacheEntry,
    GenerationDefaults,
    GraphEntry,
    Manifest,
    Source,
    SpecialIds,
    TokenizerEntry,
)
from llm2slm_export.bundle.manifest_file import write_manifest
from llm2slm_export.bundle.parity_report import ParityReport, ParityRow

SHAPE = contract.PairShape(
    "encoder-decoder",
    "add",
    encoder_hidden_size=16,
    hidden_size=8,
    num_hidden_layers=1,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=32,
)

TOKENIZER = "tokenizer/llm/tokenizer.json"


def parity_row(graph: contract.GraphName = "decoder", *, value: float = 1e-6) -> ParityRow:
    return ParityRow(
        graph=graph,
        case="batch 3",
        tensor="logits",
        measure="max |error|",
        value=value,
        tolerance=1e-4,
        passed=value <= 1e-4,
    )


def field(number: int, content: bytes) -> bytes:
    """A field of protobuf that holds bytes, text or a message, of fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(content)]) + content


def onnx_bytes(name: str, *locations: str) -> bytes:
    """An ONNX model of that name without nodes, whose weights lie in these files: ten bytes for each letter of its name."""
    entries = [field(13, field(1, b"location") + field(2, location.encode())) for location in locations]
    tensors = [field(5, field(8, b"w") + entry) for entry in entries]
    model = b"\x08\x0a" + field(7, field(2, name.encode()) + b"".join(tensors))
    return model + field(6, b" " * (10 * len(name) - len(model) - 2))


def write_small_bundle(
    directory: Path,
    *,
    runtime: str = "1.20",
    trained: bool = True,
    heads: Mapping[str, Mapping[str, Any]] | None = None,
) -> Manifest:
    """Write it. `heads`: for a bundle of several, what each one's manifest says otherwise, by its name."""
    directory.mkdir(parents=True)
    (directory / "tokenizer" / "llm").mkdir(parents=True)
    words = {f"w{index}": index for index in range(SHAPE.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.save(str(directory / TOKENIZER))
    source = Source(model="tiny", revision=None, model_type="t5", parameters=1234, weights="random", seed=7)

    def graph(name: contract.GraphName, prefix: str, shape: contract.PairShape) -> GraphEntry:
        spec = contract.graph_specs(shape)[name]
        file = f"{prefix}{name}.onnx"
        data = f"{file}.data" if name == "decoder" else None
        (directory / file).write_bytes(onnx_bytes(name, *([data] if data else [])))
        if data:
            (directory / data).write_bytes(b"weights" * 100)
        return GraphEntry(
            file=file, data=(data,) if data else (), precision="fp32", opset=20,
            minimum_runtime={"onnxruntime": runtime}, inputs=spec.inputs, outputs=spec.outputs,
        )  # fmt: skip

    def made(head: str, prefix: str, changes: Mapping[str, Any]) -> Manifest:
        shape = replace(SHAPE, fusion=changes.get("fusion", SHAPE.fusion))
        manifest = Manifest(
            name="small",
            sources={"llm": source, "slm": source},
            trained=trained,
            shape=shape,
            fusion="add",
            prompt_template="{prompt}",
            max_prompt_tokens=64,
            tokenizer=TokenizerEntry(strategy="shared", llm=TOKENIZER, slm=TOKENIZER, slm_size=32),
            special_ids=SpecialIds(prompt_pad=0, pad=0, eos=(1,), decoder_start=0),
            generation=GenerationDefaults(max_new_tokens=16),
            graphs={name: graph(name, "" if name == "encoder" else prefix, shape) for name in contract.GRAPHS},
            cache=CacheEntry(state=contract.state(shape)),
            parity=ParityReport(rows=(parity_row(),)),
            tool_versions={"llm2slm-export": "0.1.0"},
            files=(),
            head=head,
        )
        return manifest.model_copy(update=dict(changes))

    if heads is None:
        first, others = made(contract.MAIN, "", {}), {}
    else:
        (_, first), *rest = ((name, made(name, f"{name}.", changes)) for name, changes in heads.items())
        others = dict(rest)
    manifest = first.model_copy(update={"heads": others, "files": file_entries(directory)})
    write_manifest(directory, manifest)
    return manifest
