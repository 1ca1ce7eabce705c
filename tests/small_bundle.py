"""A bundle whose manifest and hashes are real and whose graphs are a few bytes: for what never runs one."""

from pathlib import Path

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


def write_small_bundle(directory: Path, *, runtime: str = "1.20", trained: bool = True) -> Manifest:
    directory.mkdir(parents=True)
    for name in contract.GRAPHS:
        (directory / f"{name}.onnx").write_bytes(name.encode() * 10)
    (directory / "decoder.onnx.data").write_bytes(b"weights" * 100)
    specs = contract.graph_specs(SHAPE)
    source = Source(model="tiny", revision=None, model_type="t5", parameters=1234, weights="random", seed=7)
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
        graphs={
            name: GraphEntry(
                file=f"{name}.onnx", precision="fp32", opset=20, minimum_runtime={"onnxruntime": runtime},
                inputs=specs[name].inputs, outputs=specs[name].outputs,
            )
            for name in contract.GRAPHS
        },
        cache=CacheEntry(state=contract.state(SHAPE)),
        parity=ParityReport(rows=(parity_row(),)),
        tool_versions={"llm2slm-export": "0.1.0"},
        files=file_entries(directory),
    )  # fmt: skip
    write_manifest(directory, manifest)
    return manifest
