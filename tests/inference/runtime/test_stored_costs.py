"""What calls cost is kept between runs, so that a new process drafts from its first response on."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm2slm_export.inference.generation.call_costs import CallCosts
from tests.support.toy_pair import make_pair

SCRIPT = "abababababababababababababab"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llm2slm-export" / "draft_costs.json"


def closed_pair(directory: Path, **options: Any) -> CallCosts:
    """The costs of a pair that has answered and was closed."""
    with make_pair(directory, {"a": SCRIPT}) as pair:
        costs = pair._costs.of(None)
        before = CallCosts.from_json(costs.to_json())
        pair.generate(["a"], drafter="ngram", **options)
    return before


def test_a_later_pair_starts_with_the_times_of_an_earlier_one(tmp_path: Path, stored: Path) -> None:
    assert closed_pair(tmp_path, num_draft_tokens=3).plain_ms is None
    (entry,) = json.loads(stored.read_text(encoding="utf-8")).values()
    assert entry["plain_ms"] > 0
    assert entry["drafted_ms"]
    again = closed_pair(tmp_path)
    assert again.to_json() == entry
    # Nothing was recorded: nothing is written.
    stored.unlink()
    with make_pair(tmp_path, {"a": SCRIPT}) as pair:
        pair._costs.of(None)
    assert not stored.exists()


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", '{"K": 1}', '{"K": {}}', '{"K": {"plain_ms": "1", "drafted_ms": {}, "draft_token_ms": 0}}',
        '{"K": {"plain_ms": 1, "drafted_ms": {"x": 1}, "draft_token_ms": 0}}',
        '{"K": {"plain_ms": 1, "drafted_ms": {"²": 1}, "draft_token_ms": 0}}',
        '{"K": {"plain_ms": 1, "drafted_ms": {"2": -1}, "draft_token_ms": 0}}',
        '{"K": {"plain_ms": NaN, "drafted_ms": {}, "draft_token_ms": 0}}',
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_replaced(tmp_path: Path, stored: Path, content: str) -> None:
    closed_pair(tmp_path)
    (key,) = json.loads(stored.read_text(encoding="utf-8"))
    stored.write_text(content.replace('"K"', json.dumps(key)), encoding="utf-8")
    assert closed_pair(tmp_path).plain_ms is None
    (entry,) = json.loads(stored.read_text(encoding="utf-8")).values()
    assert CallCosts.is_json(entry)


def test_a_cache_that_cannot_be_written_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("no directory", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert closed_pair(tmp_path).plain_ms is None


def test_each_verifier_and_number_of_threads_has_its_own(tmp_path: Path, stored: Path) -> None:
    for threads in (1, 2):
        with make_pair(tmp_path, {"a": SCRIPT}) as pair:
            pair._backend.threads = threads  # type: ignore[union-attr, misc]
            pair.generate(["a"], drafter="ngram")
    assert len(json.loads(stored.read_text(encoding="utf-8"))) == 2


def test_a_long_running_pair_writes_before_it_is_closed(tmp_path: Path, stored: Path) -> None:
    with make_pair(tmp_path, {"a": SCRIPT}) as pair:
        for _ in range(60):
            pair.generate(["a"], drafter="ngram", num_draft_tokens=1)
        assert stored.exists()
