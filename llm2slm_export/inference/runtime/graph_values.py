"""The grammar of options that hold a value for each graph: `VALUE`, or `GRAPH=VALUE,…`."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from llm2slm_export.contract import GRAPHS, GraphName

V = TypeVar("V", bound=str)


def parse_graph_values(
    text: str,
    values: Sequence[V],
    *,
    noun: str,
    unnamed: Sequence[GraphName] = GRAPHS,
    objection: Callable[[GraphName, V], str | None] = lambda _graph, _value: None,
) -> tuple[dict[GraphName, V], list[str]]:
    """The value of each graph that the text gives one, and a sentence about each part that cannot be read.

    Args:
        values: the values that can be given.
        noun: what a value is called in the sentences.
        unnamed: the graphs that a value without a graph is for.
        objection: why a graph that is named cannot have a value; None: it can.
    """
    chosen: dict[GraphName, V] = {}
    problems = []
    for part in map(str.strip, text.split(",")):
        name, equals, typed = part.rpartition("=")
        graphs = [graph for graph in GRAPHS if graph == name] if equals else list(unnamed)
        known = [value for value in values if value == typed]
        if not graphs:
            problems.append(f"{part!r}: there is no graph {name!r}")
        if not known:
            problems.append(f"{part!r}: there is no {noun} {typed!r}")
        for graph, value in ((graph, value) for graph in graphs for value in known):
            if equals and (reason := objection(graph, value)) is not None:
                problems.append(f"{part!r}: {reason}")
            chosen[graph] = value
    return chosen, problems
