"""The tests' cache of exports: it gives what the exporter gives, and nothing of another graph or of other code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from llm2slm_export.authoring.exporters.onnx.export import export_graph
from llm2slm_export.authoring.graphs.factory import make_graph
from llm2slm_export.authoring.models.pairing import load_composition
from tests.support.export_cache import cached


@pytest.fixture(scope="module")
def projector(save_composition: Callable[..., Path]) -> Any:
    return make_graph("projector", load_composition(save_composition("llama")).reference)


def _counting(directory: Path) -> tuple[Callable[..., Any], list[Any]]:
    calls: list[Any] = []

    def export(*graph: Any, **_: Any) -> Any:
        calls.append(graph)
        return ir.Model(ir.Graph([], [], nodes=[], name="empty"), ir_version=10)

    return cached(export, directory), calls


def test_what_is_cached_is_the_same_model(projector: Any, tmp_path: Path) -> None:
    fresh, again = export_graph(projector), cached(export_graph, tmp_path)
    for _ in range(2):
        model = again(projector)
        assert ir.to_proto(model).graph.node == ir.to_proto(fresh).graph.node
        assert [v.name for v in model.graph.inputs] == [v.name for v in fresh.graph.inputs]
        assert list(model.graph.initializers) == list(fresh.graph.initializers)
        for name, value in fresh.graph.initializers.items():
            np.testing.assert_array_equal(value.const_value, model.graph.initializers[name].const_value)


def test_a_graph_is_exported_once(projector: Any, tmp_path: Path) -> None:
    export, calls = _counting(tmp_path)
    for _ in range(3):
        export(projector)
    assert len(calls) == 1
    export(projector, contrib=False)
    assert len(calls) == 2


@pytest.mark.parametrize("changed", ["weight", "setting", "function", "method", "forward", "hook"])
def test_what_differs_is_exported_anew(
    projector: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    export, calls = _counting(tmp_path)
    export(projector)
    linear = next(m for m in projector.modules() if isinstance(m, torch.nn.Linear))
    hook = None
    if changed == "weight":
        monkeypatch.setattr(linear, "weight", torch.nn.Parameter(linear.weight * 2))
    elif changed == "setting":
        monkeypatch.setattr(linear, "factor", 2.0, raising=False)
    elif changed == "function":
        monkeypatch.setattr("llm2slm_export.authoring.exporters.onnx.export._strip_metadata", lambda *_: None)
    elif changed == "method":
        monkeypatch.setattr(type(projector), "forward", lambda *inputs: inputs[1:])
    elif changed == "forward":
        monkeypatch.setattr(linear, "forward", lambda *given: given)
    else:
        hook = linear.register_forward_hook(lambda *given: 2 * given[2])
    export(projector)
    if hook:
        hook.remove()
    assert len(calls) == 2
