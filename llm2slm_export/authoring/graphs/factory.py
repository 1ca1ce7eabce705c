"""The three graphs of a reference."""

from llm2slm_export.authoring.graphs.decoder import DecoderOnlyDecoderGraph, EncoderDecoderDecoderGraph
from llm2slm_export.authoring.graphs.encoder import EncoderGraph
from llm2slm_export.authoring.graphs.graph import Graph
from llm2slm_export.authoring.graphs.projector import DecoderOnlyProjectorGraph, EncoderDecoderProjectorGraph
from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.contract import GraphName


def make_graph(name: GraphName, reference: Reference) -> Graph:
    """One of a reference's graphs, in evaluation mode: a graph exported in training mode would contain dropout."""
    graph: Graph
    if name == "encoder":
        graph = EncoderGraph(reference)
    elif reference.shape.slm_kind == "encoder-decoder":
        graph = (EncoderDecoderProjectorGraph if name == "projector" else EncoderDecoderDecoderGraph)(reference)
    else:
        graph = (DecoderOnlyProjectorGraph if name == "projector" else DecoderOnlyDecoderGraph)(reference)
    graph.eval()
    return graph
