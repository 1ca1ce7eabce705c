"""A bundle whose manifest and hashes are real and whose graphs are a few bytes: for what never runs one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2slm_export import contract
from llm2slm_export.bundle import (
    CacheEntry,
    GenerationDefaults,
    GraphEntry,
    Manifest,
    ParityReport,
    ParityRow,
    Source,
    SpecialIds,
    TokenizerEntry,
    file_entries,
    write_manifest,
)

SHAPE = contract.PairShape("encoder-decoder", "add", d_llm=16, d_slm=8, layers=1, heads=2, d_head=4, vocab=32)


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


def write_small_bundle(
    directory: Path,
    *,
    runtime: str = "1.20",
    trained: bool = True,
    heads: Mapping[str, Mapping[str, Any]] | None = None,
) -> Manifest:
    """Write it. `heads`: for a bundle of several, what each one's manifest says otherwise, by its name."""
    directory.mkdir(parents=True)
    specs = contract.graph_specs(SHAPE)
    source = Source(model="tiny", revision=None, model_type="t5", parameters=1234, weights="random", seed=7)

    def graph(name: contract.GraphName, prefix: str) -> GraphEntry:
        file = f"{prefix}{name}.onnx"
        (directory / file).write_bytes(name.encode() * 10)
        data = f"{file}.data" if name == "decoder" else None
        if data:
            (directory / data).write_bytes(b"weights" * 100)
        return GraphEntry(
            file=file, data=(data,) if data else (), precision="fp32", opset=20,
            minimum_runtime={"onnxruntime": runtime}, inputs=specs[name].inputs, outputs=specs[name].outputs,
        )  # fmt: skip

    def made(head: str, prefix: str, changes: Mapping[str, Any]) -> Manifest:
        manifest = Manifest(
            name="small",
            sources={"llm": source, "slm": source},
            trained=trained,
            shape=SHAPE,
            fusion="add",
            prompt_template="{prompt}",
            max_prompt_tokens=64,
            tokenizer=TokenizerEntry(strategy="shared", llm="tokenizer/llm", slm="tokenizer/slm", slm_size=32),
            special_ids=SpecialIds(prompt_pad=0, pad=0, eos=(1,), decoder_start=0),
            generation=GenerationDefaults(max_new_tokens=16),
            graphs={name: graph(name, "" if name == "encoder" else prefix) for name in contract.GRAPHS},
            cache=CacheEntry(layout="static", state=contract.state(SHAPE)),
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
