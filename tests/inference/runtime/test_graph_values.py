"""The grammar `VALUE` or `GRAPH=VALUE,…`, which the options --precision and --runtime share."""

import pytest

from llm2slm_export.contract import GraphName
from llm2slm_export.inference.runtime.graph_values import parse_graph_values

VALUES = ("int8", "int4")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("int8", {"encoder": "int8", "projector": "int8", "decoder": "int8"}),
        ("decoder=int4", {"decoder": "int4"}),
        (" encoder=int8 , decoder=int4 ", {"encoder": "int8", "decoder": "int4"}),
        ("int8,decoder=int4", {"encoder": "int8", "projector": "int8", "decoder": "int4"}),
    ],
)
def test_a_value_is_for_all_graphs_or_for_one(text: str, chosen: dict[str, str]) -> None:
    assert parse_graph_values(text, VALUES, noun="precision") == (chosen, [])


def test_every_part_that_cannot_be_read_is_named() -> None:
    _, problems = parse_graph_values("enc=int8,int3,decoder=", VALUES, noun="precision")
    assert problems == [
        "'enc=int8': there is no graph 'enc'",
        "'int3': there is no precision 'int3'",
        "'decoder=': there is no precision ''",
    ]


def test_a_graph_can_refuse_a_value_and_a_value_can_be_for_some_graphs() -> None:
    def objection(graph: GraphName, value: str) -> str | None:
        return "too coarse" if (graph, value) == ("decoder", "int4") else None

    only_encoder: tuple[GraphName, ...] = ("encoder",)
    chosen, problems = parse_graph_values(
        "int4,decoder=int4", VALUES, noun="precision", unnamed=only_encoder, objection=objection
    )
    assert chosen == {"encoder": "int4", "decoder": "int4"}
    assert problems == ["'decoder=int4': too coarse"]
