"""The tests' cache of traces: it gives what the exporter gives, with the graph's own weights, and nothing of another graph or code."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from llm2slm_export.authoring.exporters.onnx import export
from llm2slm_export.authoring.graphs.encoder import EncoderGraph
from llm2slm_export.authoring.graphs.factory import make_graph
from llm2slm_export.authoring.models.pairing import load_composition
from tests.support.export_cache import cached

# The exporter's own: tests of this process share a cached one.
TRACE = getattr(export.trace, "uncached", export.trace)


@pytest.fixture(scope="module")
def graphs(save_composition: Callable[..., Path]) -> Callable[..., Any]:
    """graphs(name, slm, seed) → a graph of a random pair."""
    return lambda name, slm, seed=0: make_graph(name, load_composition(save_composition(slm, seed=seed)).reference)


@pytest.fixture(scope="module")
def projector(graphs: Callable[..., Any]) -> Any:
    return graphs("projector", "llama")


def _counting(directory: Path) -> tuple[Callable[..., Any], list[Any]]:
    calls: list[Any] = []

    def trace(*graph: Any) -> Any:
        calls.append(graph)
        return ir.Model(ir.Graph([], [], nodes=[], name="empty"), ir_version=10)

    return cached(trace, directory), calls


def _numbered(model: ir.Model) -> Iterator[Any]:
    """A model's inputs, initializers and nodes, with a number in place of every value's name."""
    numbers: dict[str, int] = {}

    def number(value: Any) -> int | None:
        return None if value is None else numbers.setdefault(value.name, len(numbers))

    yield from (("input", number(value), str(value.shape)) for value in model.graph.inputs)
    for node in model.graph:
        attributes = {name: str(attribute.value) for name, attribute in sorted(node.attributes.items())}
        yield node.op_type, node.domain, list(map(number, node.inputs)), list(map(number, node.outputs)), attributes
    by_number = sorted((number(value), value) for value in model.graph.initializers.values())
    yield from ((place, value.const_value.numpy().tobytes()) for place, value in by_number)
    yield [number(value) for value in model.graph.outputs]


@pytest.mark.parametrize(
    ("name", "slm"),
    [
        pytest.param("projector", "llama", marks=pytest.mark.slow),
        pytest.param("decoder", "t5", marks=pytest.mark.nightly),
    ],
)
def test_what_is_cached_is_the_same_model_with_the_graphs_own_weights(
    graphs: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, slm: str
) -> None:
    calls: list[Any] = []

    def counted(graph: Any) -> Any:
        calls.append(graph)
        return TRACE(graph)

    graph = graphs(name, slm, 1)
    monkeypatch.setattr(export, "trace", TRACE)
    fresh = list(_numbered(export.export_graph(graph)))
    monkeypatch.setattr(export, "trace", cached(counted, tmp_path))
    other = list(_numbered(export.export_graph(graphs(name, slm, 2))))
    assert list(_numbered(export.export_graph(graph))) == fresh != other
    assert len(calls) == 1


def test_a_graph_is_traced_once_whatever_its_weights(projector: Any, tmp_path: Path, monkeypatch: Any) -> None:
    trace, calls = _counting(tmp_path)
    linear = next(m for m in projector.modules() if isinstance(m, torch.nn.Linear))
    for factor in (1, 2, 3):
        monkeypatch.setitem(linear._parameters, "weight", torch.nn.Parameter(linear.weight * factor))
        trace(projector)
    assert len(calls) == 1


def test_a_graph_with_constants_made_of_weights_is_not_kept(projector: Any, tmp_path: Path) -> None:
    def folded(graph: Any) -> Any:
        value = ir.Value(name="folded", const_value=ir.tensor(np.ones(100, np.float32), name="folded"))
        model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], name="folded"), ir_version=10)
        calls.append(graph)
        return model

    calls: list[Any] = []
    trace = cached(folded, tmp_path)
    for _ in range(2):
        trace(projector)
    assert len(calls) == 2


@pytest.mark.parametrize("changed", ["another graph's code", "how weights are drawn"])
def test_what_takes_no_part_in_a_trace_is_not_traced_anew(
    projector: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    trace, calls = _counting(tmp_path)
    trace(projector)
    if changed == "another graph's code":
        monkeypatch.setattr(EncoderGraph, "forward", lambda *inputs: inputs[1:])
    else:
        module = next(m for m in projector.modules() if hasattr(getattr(m, "config", None), "initializer_range"))
        monkeypatch.setattr(module.config, "initializer_range", 0.5)
    trace(projector)
    assert len(calls) == 1


@pytest.mark.parametrize("changed", ["shape", "tie", "setting", "function", "method", "forward", "hook", "opset"])
def test_what_differs_is_traced_anew(
    projector: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    trace, calls = _counting(tmp_path)
    linear = next(m for m in projector.modules() if isinstance(m, torch.nn.Linear))
    assert linear.bias is not None
    monkeypatch.setitem(linear._parameters, "other", torch.nn.Parameter(linear.bias.detach().clone()))
    trace(projector)
    hook = None
    if changed == "shape":
        monkeypatch.setitem(linear._parameters, "weight", torch.nn.Parameter(linear.weight[:-1]))
    elif changed == "tie":
        monkeypatch.setitem(linear._parameters, "other", linear.bias)
    elif changed == "setting":
        monkeypatch.setattr(linear, "factor", 2.0, raising=False)
    elif changed == "function":
        monkeypatch.setattr("llm2slm_export.authoring.models.reference.pack_sequences", lambda *_: None)
    elif changed == "method":
        monkeypatch.setattr(type(projector), "forward", lambda *inputs: inputs[1:])
    elif changed == "forward":
        monkeypatch.setattr(linear, "forward", lambda *given: given)
    elif changed == "opset":
        monkeypatch.setattr(export, "OPSET", 24)
    else:
        hook = linear.register_forward_hook(lambda *given: 2 * given[2])
    trace(projector)
    if hook:
        hook.remove()
    assert len(calls) == 2
