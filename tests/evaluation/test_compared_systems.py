"""Baselines without the bundle's composition: what is missing is named before anything is opened."""

from pathlib import Path

import pytest

from llm2slm_export.authoring.progress import SILENT
from llm2slm_export.errors import CompositionError
from llm2slm_export.evaluation.compared_systems import EvaluationRequest, compared_systems
from tests.support.paths import DEMO


def refused(
    directory: Path, *baselines: str, controls: bool = False, composition: Path | None = None
) -> CompositionError:
    choice = EvaluationRequest(DEMO, None, composition, baselines, controls, work=directory)
    with pytest.raises(CompositionError) as caught:
        compared_systems(choice, [], truncate=True, progress=SILENT)
    return caught.value


def test_a_bundle_without_its_composition_says_what_else_can_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(tmp_path, "llm", "slm=x", controls=True)
    assert error.fact == f"The composition of {DEMO} was not found (needed for --baseline llm and --controls)."
    assert "looked for compositions/tatoeba-en-fr/composition.json" in error.evidence
    for part in ("--composition DIR", "--baseline llm=DIR", "--baseline NAME=BUNDLE"):
        assert part in error.remedy
    assert "SLM alone was not found" in refused(tmp_path, "slm=x").fact, "which needs no composition"
    assert "was not found." in refused(tmp_path, composition=tmp_path).fact


def test_an_llm_that_only_reads_is_no_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    error = refused(tmp_path, f"llm={tmp_path}")
    assert "has no decoder" in error.fact
    assert error.remedy.startswith("leave --baseline llm out, or give with --baseline llm=DIR a complete model")
