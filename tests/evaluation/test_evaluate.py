"""A whole evaluation on tiny pairs: what it reports, what it keeps, what it refuses; and the page it draws."""

import json
import pickle
import random
import shutil
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from llm2slm_export.authoring.torch_threads import torch_threads
from llm2slm_export.bundle.manifest_file import read_manifest, write_manifest
from llm2slm_export.cli.app import app
from llm2slm_export.errors import CompositionError, DataError, PromptError, UsageError
from llm2slm_export.evaluation import evaluate as module
from llm2slm_export.evaluation import learned_constant
from llm2slm_export.evaluation.compared_systems import EvaluationRequest
from llm2slm_export.evaluation.evaluate import EvaluationSettings, evaluate
from llm2slm_export.evaluation.html_report import page
from llm2slm_export.evaluation.metrics import METRICS
from llm2slm_export.evaluation.report import EvaluationReport
from llm2slm_export.evaluation.result_cache import JsonlCache, cached_array, fingerprint
from tests.support.hostile import mutated_bytes
from tests.support.tiny_models import LLM_CONFIG, SLM_CONFIGS

ROWS = [
    {"prompt": f"prompt number {i} {'more ' * (i % 5)}", "response": " ".join("abcdefg"[: 1 + i % 7]), "task": "even" if i % 2 else "odd"}
    for i in range(24)
]  # fmt: skip

Bundles = Callable[..., tuple[Path, Path]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def train_data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"training {i}", "response": "a b"}) + "\n" for i in range(40)))
    return path


def settings(data: Path, **changes: Any) -> EvaluationSettings:
    given = {"rows": 12, "metrics": METRICS, "max_new_tokens": 8, "batch_size": 4, "speed_prompts": 2, "speed_tokens": 4,
             "speed_rounds": 1, "task_field": "task"} | changes  # fmt: skip
    return EvaluationSettings(data, "prompt", "response", **given)


@pytest.fixture(scope="session")
def alone(save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An LLM, an SLM, and where their bundles are kept: built once a session, of one architecture, which is traced once."""
    llm, slm = (save_model(SLM_CONFIGS["t5"], seed=seed) for seed in (4, 5))
    return llm, slm, tmp_path_factory.mktemp("alone")


@pytest.fixture
def whole(
    bundles: Bundles,
    alone: tuple[Path, Path, Path],
    data: Path,
    train_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., EvaluationReport]:
    """whole(…) → a report with every kind of system in it. How good the learned constant gets is tested with the systems."""
    monkeypatch.setattr(learned_constant, "STEPS", 10)
    composition, bundle = bundles("t5")
    llm, slm, kept = alone
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "alone").symlink_to(kept)

    def run(**changes: Any) -> EvaluationReport:
        choice = EvaluationRequest(
            bundle,
            composition=composition,
            baselines=(f"llm={llm}", f"slm={slm}", f"again={bundle}"),
            controls=True,
            train_data=train_data,
            threads=1,
            work=tmp_path / "work",
        )
        return evaluate(choice, settings(data, **changes))

    return run


@pytest.mark.slow
def test_every_system_is_scored_and_timed(whole: Callable[..., EvaluationReport], train_data: Path) -> None:
    report = whole()
    assert [s.name for s in report.systems] == [
        "LLM-to-SLM", "LLM alone", "SLM alone", "again", "no conditioning", "zero", "learned constant", "mismatched",
    ]  # fmt: skip
    for system in report.systems:
        assert set(system.scores) == {"bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match", "loss"}
        assert (system.speed is None) == (system.kind == "control")
        assert sum(bucket.examples for bucket in system.buckets) == 12
        assert set(system.tasks) == {"even", "odd"}
    assert {score.p for score in report.pair.scores.values()} == {None}
    again = report.systems[3]
    assert {name: s.value for name, s in again.scores.items()} == {n: s.value for n, s in report.pair.scores.items()}
    assert {score.p for score in again.scores.values()} == {1.0}, "the same bundle does not differ from itself"
    losses = {system.name: system.scores["loss"].value for system in report.systems}
    assert losses["zero"] != losses["LLM-to-SLM"] != losses["mismatched"]
    assert [entry.against for entry in report.break_even] == ["LLM alone", "SLM alone", "again"]
    assert set(report.gap_recovered) <= set(report.pair.scores)
    assert report.data.overlap_checked == str(train_data)
    assert report.data.tasks == {"even": report.data.tasks["even"], "odd": 12 - report.data.tasks["even"]}
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report

    # The page of the same report.
    text = page(report)
    for system in report.systems:
        assert system.name in text
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "src=" not in text
    assert text.count("<svg") == 3
    parser = Outline()
    parser.feed(text)
    assert parser.open == []
    assert page(report) == text


@pytest.mark.slow
def test_the_constant_is_learned_on_as_many_threads_as_are_asked_for(
    bundles: Bundles,
    alone: tuple[Path, Path, Path],
    data: Path,
    train_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    composition, bundle = bundles("t5")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "alone").symlink_to(alone[2])
    choice = EvaluationRequest(
        bundle, composition=composition, controls=True, train_data=train_data, threads=1, work=tmp_path / "work"
    )
    used = []

    def learn(*_: Any, **__: Any) -> np.ndarray[Any, Any]:
        used.append(torch.get_num_threads())
        return np.zeros(LLM_CONFIG["d_model"], np.float32)

    monkeypatch.setattr(learned_constant, "learn_constant", learn)
    with torch_threads(2):
        evaluate(choice, settings(data, rows=2, metrics=("bleu",), speed_prompts=0))
        assert torch.get_num_threads() == 2
    assert used == [1]


class Outline(HTMLParser):
    """Which tags are open: none, at the end of a page that is whole."""

    VOID = frozenset({"meta", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        del attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        """Opens nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
def test_what_was_answered_is_kept(
    whole: Callable[..., EvaluationReport], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = whole(speed_prompts=0)
    files = sorted((tmp_path / "work" / "answers").iterdir())
    part = next(f for f in files if f.name.startswith("slm-alone") and f.suffix == ".jsonl")
    lines = [line for line in part.read_text().split("\n") if line]
    part.write_text("\n".join([*lines[:5], lines[5][:9]]))  # killed in the middle of a line

    asked: list[int] = []
    original = module.System.respond

    def counted(self: Any, prompts: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        return original(self, prompts, **options)

    monkeypatch.setattr(module.System, "respond", counted)
    second = whole(speed_prompts=0)
    assert asked == [7]
    timeless = {"seconds", "hardware"}
    assert second.model_dump(exclude=timeless) == first.model_dump(exclude=timeless)
    assert whole(speed_prompts=0, max_new_tokens=3).pair.unfinished >= first.pair.unfinished
    assert asked[1:] == [12] * 8, "other options are other answers"


def test_what_answers_depend_on_is_not_forgotten(bundles: Bundles, data: Path, tmp_path: Path) -> None:
    """Another template, or another option in the manifest, is another system, though every file is the same."""
    changed = tmp_path / "changed"
    shutil.copytree(bundles("t5")[1], changed)

    def texts(template: str) -> list[str]:
        manifest = read_manifest(changed).model_copy(update={"prompt_template": template})
        write_manifest(changed, manifest)
        evaluate(EvaluationRequest(changed, work=tmp_path / "work"), settings(data, speed_prompts=0, metrics=("bleu",)))
        return sorted(path.name for path in (tmp_path / "work" / "answers").iterdir())

    assert len(texts("{prompt}")) == 1
    assert len(texts("say {prompt}")) == 2
    assert len(texts("{prompt}")) == 2


def test_kept_rows_survive_what_can_happen_to_a_file(tmp_path: Path) -> None:
    kept = JsonlCache(tmp_path / "rows.jsonl")
    assert kept.read() == {}
    kept.append({0: {"text": "a\u2028b\u0085c\nd"}, 2: {"text": "é"}})
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(b'[3, {"te')
    kept.append({1: {"text": "y"}, 0: {"text": "a\u2028b\u0085c\nd"}})
    assert kept.read() == {0: {"text": "a\u2028b\u0085c\nd"}, 2: {"text": "é"}, 1: {"text": "y"}}
    assert fingerprint("n", 1, 28) != fingerprint("n", 12, 8)
    before = kept.read()
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(
            b'5\n[[], 1]\n[1]\n["0", {}]\n[true, {}]\n{"a": 1}\n[1, '
            + b"[" * 100_000
            + b"\n"
            + b"1" * 5000
            + b"\n\xff\n"
        )
    assert kept.read() == before


def test_an_array_that_cannot_be_read_is_made_again(tmp_path: Path) -> None:
    rng, path, array = random.Random(0), tmp_path / "a.npy", np.arange(6, dtype=np.float32).reshape(2, 3)
    cached_array(path, lambda: array)
    content, made = path.read_bytes(), 0
    header = content.index(b"\n") + 1

    def make() -> Any:
        nonlocal made
        made += 1
        return array

    for cut in (b"", b"PK\x03\x04", content[:-1], b"x" * 200, pickle.dumps(array)):
        path.write_bytes(cut)
        with pytest.warns(RuntimeWarning, match=r"a\.npy is unreadable and is computed again"):
            np.testing.assert_array_equal(cached_array(path, make), array)
        assert path.read_bytes() == content
    assert made == 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(200):
            path.write_bytes(mutated_bytes(content[:header], rng) + content[header:])
            cached_array(path, make)


def test_a_composition_of_another_pair_is_not_taken_for_the_bundle_s(
    bundles: Bundles, save_composition: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, other = bundles("t5")[1], save_composition("t5", seed=7)
    with pytest.raises(CompositionError, match="was not found") as caught:
        evaluate(EvaluationRequest(bundle, composition=other, controls=True, work=tmp_path / "work"), settings(data))
    assert "slm weights" in str(caught.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compositions").mkdir()
    (tmp_path / "compositions" / "tiny-t5").symlink_to(save_composition("t5", "replace"))
    report = evaluate(
        EvaluationRequest(bundle, work=tmp_path / "work"), settings(data, speed_prompts=0, metrics=("bleu",))
    )
    assert report.composition is None, "found by its name, and not of this bundle"


def test_speed_is_measured_on_prompts_of_all_lengths() -> None:
    for count in (5, 24, 31, 47):
        prompts = ["x" * length for length in range(1, count + 1)]
        chosen = [len(prompt) for prompt in module._of_all_lengths(prompts, 16)]
        assert len(chosen) == len(set(chosen)) == min(16, count)
        assert sum(chosen) / len(chosen) == pytest.approx((count + 1) / 2, abs=1)


def test_prompts_that_are_too_long_are_named_before_anything_is_answered(
    bundles: Bundles, data: Path, tmp_path: Path
) -> None:
    with data.open("a") as file:
        file.writelines(
            json.dumps({"prompt": f"long {i} " * 90, "response": "x", "task": "odd"}) + "\n" for i in range(7)
        )
    with pytest.raises(PromptError, match="7 of 31 prompts exceed the 200 prompt tokens") as caught:
        evaluate(EvaluationRequest(bundles("t5")[1], work=tmp_path / "work"), settings(data, rows=None))
    assert "and 2 more" in str(caught.value)
    assert not (tmp_path / "work").exists()
    given = settings(data, rows=None, truncate=True, speed_prompts=0, metrics=("bleu",))
    assert evaluate(EvaluationRequest(bundles("t5")[1], work=tmp_path / "work"), given).pair.truncated == 7


@pytest.mark.slow
def test_positions_that_an_slm_does_not_know_are_refused_first(bundles: Bundles, data: Path, tmp_path: Path) -> None:
    choice = EvaluationRequest(bundles("gpt2")[1], work=tmp_path / "work")
    with pytest.raises(UsageError, match="speed_tokens is 700"):
        evaluate(choice, settings(data, speed_tokens=700))
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "p", "response": "word " * 300, "task": "odd"}) + "\n")
    with pytest.raises(DataError, match="1 of 25 references exceed the 600 positions"):
        evaluate(choice, settings(data, rows=None, speed_prompts=0))
    assert not (tmp_path / "work").exists()


def test_prompts_that_were_trained_on_are_refused(bundles: Bundles, data: Path, tmp_path: Path) -> None:
    choice = EvaluationRequest(bundles("t5")[1], train_data=data, work=tmp_path / "work")
    with pytest.raises(DataError, match="12 of 12 held-out prompts are also training prompts"):
        evaluate(choice, settings(data))


def test_prompts_that_the_teacher_answered_are_refused(
    bundles: Bundles, data: Path, train_data: Path, tmp_path: Path
) -> None:
    composition, bundle = bundles("t5")
    shutil.copytree(composition, tmp_path / "pair")
    further = tmp_path / "further.jsonl"
    further.write_text(json.dumps({"prompt": ROWS[0]["prompt"]}) + "\n")
    with_teacher_rows = {
        "data": {"train": str(train_data), "validation": "elsewhere"},
        "teacher": {"further_prompts": str(further)},
    }
    (tmp_path / "pair" / "training.json").write_text(json.dumps({"recipe": {"training": with_teacher_rows}}))
    choice = EvaluationRequest(bundle, composition=tmp_path / "pair", work=tmp_path / "work")
    with pytest.raises(DataError, match="1 of 24 held-out prompts are also training prompts"):
        evaluate(choice, settings(data, rows=None))
    further.unlink()
    assert evaluate(choice, settings(data, speed_prompts=0)).data.overlap_checked == str(train_data)


def test_without_its_parts_a_bundle_is_scored_alone_and_says_so(bundles: Bundles, data: Path, tmp_path: Path) -> None:
    choice = EvaluationRequest(bundles("t5")[1], work=tmp_path / "work")
    report = evaluate(choice, settings(data, speed_prompts=0))
    assert [s.name for s in report.systems] == ["LLM-to-SLM"]
    assert any("not checked" in note for note in report.notes)
    assert page(report).count("<svg") == 1


def test_baselines_that_cannot_be_had_are_refused(
    bundles: Bundles, save_composition: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    composition, bundle = bundles("t5")
    with pytest.raises(CompositionError, match=r"composition of .* was not found"):
        evaluate(EvaluationRequest(bundle, baselines=("llm",), work=tmp_path), settings(data))
    with pytest.raises(CompositionError, match="SLM alone was not found"):
        evaluate(EvaluationRequest(bundle, composition=composition, baselines=("slm",), work=tmp_path), settings(data))
    wrong = ("teacher", f"zero={bundle}", f"a b={bundle}", "x=", f"y={bundle}", f"y={composition}")
    with pytest.raises(UsageError) as refused:
        evaluate(EvaluationRequest(bundle, baselines=wrong, work=tmp_path), settings(data))
    assert len(refused.value.evidence) == 5
    other = save_composition("t5", "replace")
    with pytest.raises(CompositionError, match="fusion is replace, the bundle's add"):
        evaluate(EvaluationRequest(bundle, composition=other, controls=True, work=tmp_path), settings(data))


def test_the_command_prints_json_and_writes_the_page(bundles: Bundles, data: Path, tmp_path: Path) -> None:
    arguments = [
        "eval", bundles("t5")[1], "--data", data, "--rows", 6, "--max-new-tokens", 5, "--metrics", "rouge,exact_match",
        "--speed-prompts", 1, "--speed-rounds", 1, "--speed-tokens", 3, "--work", tmp_path / "work", "--html", tmp_path / "page.html",
        "--json", "--baseline", f"other={bundles('t5')[1]}",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    report = EvaluationReport.model_validate_json(result.stdout)
    assert report.data.examples == 6
    assert "rougeL" in result.stderr
    assert "times its speed per token" in result.stderr
    assert (tmp_path / "page.html").read_text() == page(report)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_wrong_names_are_refused_by_the_command(bundles: Bundles, data: Path) -> None:
    for extra, message in (
        (["--metrics", "blue"], "'blue'"),
        (["--baseline", "x"], "'x' is not llm"),
        (["--html", "."], "directory"),
        (["--data", "no.txt"], "no.txt"),
    ):
        result = CliRunner().invoke(app, ["eval", str(bundles("t5")[1]), "--data", str(data), *extra])
        assert result.exit_code in (1, 2)
        assert message in result.stderr
