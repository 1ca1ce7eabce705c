"""Huge pages: what is new and filled is moved into them, and nothing else."""

from pathlib import Path

import pytest

from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.inference.runtime.onnxruntime import huge_pages, sessions
from llm2slm_export.inference.runtime.onnxruntime.backend import OrtBackend
from llm2slm_export.inference.runtime.onnxruntime.huge_pages import subtract_intervals
from llm2slm_export.inference.runtime.onnxruntime.sessions import GraphSessions
from tests.support.pages import BYTES, MEGABYTE, address_of, mapped, page_sizes, require_huge_pages
from tests.support.paths import DEMO


def test_what_is_new_and_filled_is_moved() -> None:
    require_huge_pages()
    old = mapped()
    with huge_pages.huge_pages():
        new, empty = mapped(), mapped(filled=False)
    assert page_sizes(address_of(new))[1] >= BYTES // 4  # memory in one piece may run out
    assert new[:] == b"1" * BYTES
    assert page_sizes(address_of(old))[1] == 0
    assert page_sizes(address_of(empty))[0] < MEGABYTE


@pytest.mark.parametrize(
    ("content", "expected"),
    [("always [madvise] never\n", "madvise"), ("[always] madvise never\n", "always"), ("", None), (None, None)],
)
def test_the_setting_is_linux_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    if content is not None:
        (tmp_path / "enabled").write_text(content)
    assert huge_pages.setting() == expected


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_where_there_are_none_nothing_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages, "_mappings", None)  # not to be called
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    with huge_pages.huge_pages():
        pass


def test_an_error_inside_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError), huge_pages.huge_pages():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("others", "left"),
    [
        ([], [(10, 20)]),
        ([(0, 10), (20, 30)], [(10, 20)]),
        ([(12, 14)], [(10, 12), (14, 20)]),
        ([(0, 12), (18, 25)], [(12, 18)]),
        ([(12, 13), (15, 16)], [(10, 12), (13, 15), (16, 20)]),
        ([(10, 20)], []),
        ([(5, 25)], []),
    ],
)
def test_an_interval_without_others(others: list[tuple[int, int]], left: list[tuple[int, int]]) -> None:
    assert subtract_intervals((10, 20), others) == left


def test_the_decoder_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, inside = [], False

    class Watched:
        def __enter__(self) -> None:
            nonlocal inside
            inside = True

        def __exit__(self, *_: object) -> None:
            nonlocal inside
            inside = False

    create = GraphSessions.create

    def watched(self: GraphSessions, name: str, path: str, options: object) -> object:
        import onnxruntime

        session = onnxruntime.InferenceSession

        def noting(*args: object, **kwargs: object) -> object:
            opened.append((name, inside))
            return session(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(onnxruntime, "InferenceSession", noting)
            return create(self, name, path, options)  # type: ignore[arg-type]

    monkeypatch.setattr(sessions, "huge_pages", Watched)
    monkeypatch.setattr(GraphSessions, "create", watched)
    OrtBackend(open_bundle(DEMO), device="cpu", threads=1)
    assert opened == [("encoder", False), ("projector", False), ("decoder", True)]
