"""The directory of cached measurements, for users who have no home directory."""

from pathlib import Path

import pytest

from llm2slm_export.environment.hardware import cache_directory
from llm2slm_export.inference.runtime.measurement_file import MeasurementFile


def test_a_user_without_a_home_measures_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    file = MeasurementFile("threads.json", lambda _: True)
    assert file.add("key", 1) is False
    assert file.read() == {}
    assert not cache_directory().parent.is_dir()
