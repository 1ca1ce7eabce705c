"""Where the pair overtakes another system, in tokens: counted one by one."""

import pytest

from llm2slm_export.evaluation.report import SpeedEntry, break_even, gap_recovered


def speed(read_ms: float, ms_per_token: float) -> SpeedEntry:
    return SpeedEntry(stages_ms={}, read_ms=read_ms, ms_per_token=ms_per_token, total_ms={}, new_tokens=1, points=())


@pytest.mark.parametrize(
    ("pair", "other"),
    [
        (speed(10, 1), speed(4, 2.5)), (speed(10, 1), speed(4, 2)), (speed(10, 1), speed(10, 2)), (speed(3, 1), speed(4, 2)),
        (speed(10, 2), speed(4, 1)), (speed(4, 2), speed(10, 1)), (speed(4, 2), speed(9.5, 1)), (speed(4, 1), speed(9, 1)),
        (speed(9, 1), speed(4, 1)),
    ],
)  # fmt: skip
def test_break_even_is_where_the_totals_cross(pair: SpeedEntry, other: SpeedEntry) -> None:
    faster = [n for n in range(1, 200) if pair.total_at(n) < other.total_at(n)]
    found = break_even("other", pair, other)
    assert found.speed_up_per_token == other.ms_per_token / pair.ms_per_token
    assert found.never == (not faster)
    if faster:
        assert found.first == faster[0]
        assert (found.last or 199) == faster[-1]


def test_the_share_of_the_gap() -> None:
    assert gap_recovered(45.0, 50.0, 40.0, lower_is_better=False) == 0.5
    assert gap_recovered(38.0, 50.0, 40.0, lower_is_better=False) == -0.2
    assert gap_recovered(45.0, 40.0, 40.0, lower_is_better=False) is None
    assert gap_recovered(45.0, 39.0, 40.0, lower_is_better=False) is None
    assert gap_recovered(1.5, 1.0, 2.0, lower_is_better=True) == 0.5
    assert gap_recovered(2.5, 1.0, 2.0, lower_is_better=True) == -0.5
    assert gap_recovered(1.5, 2.0, 1.0, lower_is_better=True) is None
