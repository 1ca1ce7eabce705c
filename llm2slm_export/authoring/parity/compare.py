"""Parity: a bundle's outputs against those of the unmodified composition, on shapes other than the export's.

The reference is transformers' own forward pass and `generate`; no code of the exported graphs computes it. At fp32, a
tensor's distance from float64 may be a factor above that of transformers' own float32 (`measurements.py`). Greedy token
ids must be equal, except where rounding of that size decides between two tokens. At a reduced precision, tensors have
an error limit, and teacher-forced next tokens may differ in a small fraction. The gate measures that fraction on
held-out prompts.
"""

from collections.abc import Sequence

from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.authoring.parity.bundle_graphs import BundleGraphs
from llm2slm_export.authoring.parity.gate import Gate
from llm2slm_export.authoring.parity.graph_parity import GraphParity
from llm2slm_export.authoring.parity.reference_outputs import ReferenceBatch
from llm2slm_export.authoring.parity.response_parity import ResponseParity
from llm2slm_export.authoring.parity.token_parity import TokenParity
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.parity_report import ParityReport


def compare(
    bundle: Bundle,
    reference: Reference,
    cases: Sequence[ReferenceBatch],
    gate: Gate | None = None,
    held_out: Sequence[ReferenceBatch] = (),
    *,
    runtime: str = "onnxruntime",
) -> ParityReport:
    """Compare every graph alone, on the reference's tensors, and the three graphs chained.

    The reference's LLM is not used, because `cases` holds its outputs: a caller may release it first.

    Args:
        bundle: the graphs.
        reference: the unmodified models.
        cases: batches with reference outputs; with `exact` if the encoder is at fp32.
        gate: held-out prompts and their limit.
        held_out: batches of the gate's prompts.
        runtime: the graphs' runtime (`inference.runtime.selection.parse_runtime`).
    """
    graphs = BundleGraphs(bundle, runtime)
    alone, tokens = GraphParity(graphs, reference), TokenParity(graphs, reference)
    # Each of these closes its sessions before the next opens its own: one encoder is loaded at a time.
    rows = [*alone.encoder(cases), *alone.projector_and_decoder(cases), *tokens.compare(cases)]
    responses = ResponseParity(graphs, reference, tokens.ties)
    if graphs.float32:
        rows += responses.compare(cases)
    if gate:
        rows += [*tokens.gate(gate, held_out), *responses.gate(gate, held_out)]
    return ParityReport(rows=tuple(rows))


def compare_engine_graphs(
    bundle: Bundle,
    reference: Reference,
    cases: Sequence[ReferenceBatch],
    gate: Gate | None = None,
    held_out: Sequence[ReferenceBatch] = (),
) -> ParityReport:
    """Compare the ONNX graphs of engines, with the engines' roundings: every graph alone, and next tokens of the chain.

    Args:
        bundle: the graphs' directory, with a manifest whose entries are those graphs.
        reference, cases, gate, held_out: as in `compare`.
    """
    graphs = BundleGraphs(bundle, "onnxruntime", engines=True)
    alone, tokens = GraphParity(graphs, reference), TokenParity(graphs, reference)
    rows = [*alone.encoder(cases), *alone.projector_and_decoder(cases), *tokens.compare(cases)]
    if gate:
        rows += tokens.gate(gate, held_out)
    return ParityReport(rows=tuple(rows))
