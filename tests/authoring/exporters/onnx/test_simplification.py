"""The rules that are left out of onnxscript's optimizer change no graph."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from onnxscript import optimizer
from onnxscript.rewriter import onnx_fusions

from llm2slm_export.authoring.exporters.onnx import export
from llm2slm_export.authoring.exporters.onnx.simplification import simplify
from llm2slm_export.authoring.graphs.factory import make_graph
from llm2slm_export.authoring.models.pairing import load_composition
from llm2slm_export.contract import GRAPHS
from tests.support.tiers import tiered
from tests.support.tiny_models import SLM_CONFIGS


@pytest.mark.parametrize("slm", tiered(SLM_CONFIGS.keys(), slow=["t5", "llama", "gpt2"]))
def test_graphs_are_those_of_the_whole_optimizer(slm: str, save_composition: Callable[..., Path]) -> None:
    reference = load_composition(save_composition(slm)).reference
    for graph in GRAPHS:
        whole, simplified = (export.trace(make_graph(graph, reference)) for _ in range(2))
        optimizer.optimize_ir(whole, should_fold=lambda node: False if node.op_type == "Transpose" else None)
        onnx_fusions.fuse(whole)
        simplify(simplified)
        assert _written(simplified) == _written(whole)


def _written(model: ir.Model) -> bytes:
    """A model's file, without the names of the rules that it was rewritten by."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    written: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return written
