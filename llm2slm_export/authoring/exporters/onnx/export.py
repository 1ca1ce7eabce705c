"""Export of one graph to an ONNX model in memory, with torch's dynamo exporter. Weights share torch's memory."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch

from llm2slm_export.authoring.exporters.onnx.fusions import fuse
from llm2slm_export.authoring.exporters.onnx.linear_layers import transposed_initializer
from llm2slm_export.authoring.exporters.onnx.simplification import simplify
from llm2slm_export.authoring.graphs.graph import Graph
from llm2slm_export.errors import CompositionError

# The first opset with RMSNormalization.
OPSET = 23
# The first opset with TensorScatter. The exporter still writes opset 23, because torch 2.13 and onnxscript fuse norms
# for 23 only. For the operators here, opset 24 only extends the accepted types.
DECODER_OPSET = 24
MINIMUM_ONNXRUNTIME = "1.25"  # the first release with TensorScatter


def export_graph(graph: Graph, *, contrib: bool = True) -> ir.Model:
    """Export with the contract's dynamic axes. Linear weights are stored as [in, out]; shared tables are stored once.

    Args:
        graph: the graph, in evaluation mode.
        contrib: use ONNX Runtime's contrib operators where they are faster.

    Returns:
        a model whose initializers refer to the module's tensors; nothing is copied until it is saved.

    Raises:
        CompositionError: torch cannot export the graph.
    """
    model = trace(graph)
    with _quiet():
        simplify(model)
    if graph.name == "decoder":
        model.opset_imports[""] = DECODER_OPSET
    fuse(model, graph.name, contrib=contrib)
    _strip_metadata(model)
    return model


def trace(graph: Graph) -> ir.Model:
    """The graph as torch's exporter writes it, before any pass. Initializers refer to the module's own tensors.

    Raises:
        CompositionError: an operation of the graph has no ONNX form.
    """
    with _quiet(), torch.no_grad(), _explained(graph):
        program = torch.onnx.export(
            graph,
            graph.example_inputs(),
            dynamo=True,
            opset_version=OPSET,
            input_names=graph.spec.input_names,
            output_names=graph.spec.output_names,
            dynamic_shapes=graph.dynamic_shapes(),
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model: ir.Model = program.model
    return model


def transpose_weights(model: ir.Model) -> None:
    """Store the weight W of `Transpose(W) → MatMul` transposed, unless another node uses W.

    ONNX Runtime would fold the transpose at load time and hold both copies meanwhile: 5 GB for a T5-XL encoder.
    """
    for node in list(model.graph):
        weight = transposed_initializer(node)
        if weight is None or len(list(weight.uses())) != 1:
            continue
        value = weight.const_value
        assert value is not None
        stored = ir.LazyTensor(
            lambda value=value: ir.tensor(value.numpy().T.copy()),  # type: ignore[misc]
            dtype=value.dtype,
            shape=ir.Shape(value.shape.numpy()[::-1]),
            name=weight.name,
        )
        weight.const_value, weight.shape = stored, stored.shape
        node.outputs[0].replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)


def _strip_metadata(model: ir.Model) -> None:
    """Remove the exporter's metadata and the intermediate shapes.

    The metadata contains stack traces of the exporting machine. Intermediate shapes are a tenth to a fifth of a small
    graph's file, and runtimes infer them. Shapes of `Attention`'s inputs stay: ONNX Runtime 1.32 infers an output of
    width 0 from inputs of unknown width, and refuses the graph.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "llm2slm-export", None, None
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            attends = any(user.op_type == "Attention" for user, _ in output.uses())
            if not (output.is_graph_output() or attends):
                output.shape, output.type = None, None


@contextmanager
def _explained(graph: Graph) -> Iterator[None]:
    """Convert errors of torch's exporter to an error that names the graph.

    Raises:
        CompositionError: the block raised an exception.
    """
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CompositionError(
            f"The {graph.name} graph of this pair cannot be exported.",
            f"torch {torch.__version__}: {type(error).__name__}: {lines[0] if lines else ''}",
            *(line for line in lines[1:] if "Unsupported" in line or "GuardOnDataDependent" in line),
            remedy="choose another model: an operation of this one has no ONNX equivalent",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's log messages and warnings; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Inputs share axis names (batch, prompt) on purpose.
            warnings.filterwarnings("ignore", message=".*The axis name.*will not be used")
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*treespec.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*|copyreg|onnxscript\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
