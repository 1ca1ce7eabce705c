"""The grammar of options with one value per graph: `VALUE`, or `GRAPH=VALUE,…`."""

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
    """Parse an option with one value per graph.

    Args:
        values: the valid values.
        noun: the name of a value in the problems.
        unnamed: the graphs to which a value without a graph applies.
        objection: the reason why a named graph cannot have a value, or None.

    Returns:
        The value of each graph that has one, and the problems, one sentence each.
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
