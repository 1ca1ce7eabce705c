"""`bench`: what it times, what it counts, what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm2slm_export.bundle.bundle import Bundle, open_bundle
from llm2slm_export.bundle.manifest_file import read_manifest, write_manifest
from llm2slm_export.cli.app import app
from llm2slm_export.environment.hardware import MachineLimits
from llm2slm_export.errors import UsageError
from llm2slm_export.evaluation import latency as module
from llm2slm_export.evaluation.latency import STAGES, BenchReport, BenchSettings, batches, bench
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.runtime.onnxruntime.backend import OrtBackend
from llm2slm_export.inference.tokenization import PromptTokenizer
from tests.support.paths import DEMO

Bundles = Callable[..., tuple[Path, Path]]


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", lambda: MachineLimits(bandwidth=1e9, flops=1e9, seconds=0.0))


def opened(path: Path) -> tuple[Bundle, Orchestrator]:
    bundle = open_bundle(path)
    return bundle, Orchestrator(bundle, OrtBackend(bundle, device="cpu", threads=1))


@pytest.mark.parametrize("tokens", [3, 16, 64, 256])  # 256: the most that the demo reads
def test_prompts_have_the_length_that_is_asked_for(tokens: int) -> None:
    bundle = open_bundle(DEMO)
    prompts = module.random_prompts(bundle, tokens, 5, seed=0)
    assert len(set(prompts)) == 5
    assert [len(row.ids) for row in PromptTokenizer(bundle).read(prompts, truncate=False)] == [tokens] * 5
    assert module.random_prompts(bundle, tokens, 5, seed=0) == prompts
    assert module.random_prompts(bundle, tokens, 5, seed=1) != prompts


def test_a_table_that_is_only_looked_up_is_not_read() -> None:
    manifest = read_manifest(DEMO)
    stored = {entry.path: entry.bytes for entry in manifest.files}
    table = manifest.shape.vocab_size * manifest.shape.encoder_hidden_size  # int8; in the encoder nothing else reads it
    read = {name: graph.bytes_read for name, graph in manifest.graphs.items()}
    assert read["encoder"] == pytest.approx(stored["encoder.onnx.data"] - table, rel=0.02)
    # The SLM's is in the projector's file, which only looks it up (160 wide: blocks of 32, each with a float32 scale); in
    # the decoder it is the output head too.
    table = manifest.shape.vocab_size * manifest.shape.hidden_size * (1 + 4 / 32)
    assert read["decoder"] == pytest.approx(stored["decoder.onnx.data"] + table, rel=0.02)
    assert read["projector"] == pytest.approx(stored["projector.onnx.data"] - table, rel=0.02)


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_every_case_is_timed_and_counted(bundles: Bundles, slm: str) -> None:
    bundle, pair = opened(bundles(slm)[1])
    settings = BenchSettings(prompt_tokens=(8, 20), new_tokens=5, batch_sizes=(1, 3), rounds=2)
    calls: list[int] = []
    report = bench(bundle, {"pair": pair, "again": pair}, settings, threads=1, advance=calls.append)
    assert calls == [1] * batches(2, settings)
    assert [(c.system, c.prompt_tokens, c.batch_size) for c in report.cases] == [
        (system, tokens, rows) for tokens in (8, 20) for rows in (1, 3) for system in ("pair", "again")
    ]
    shape = bundle.manifest.shape
    a_position = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 4
    weights = bundle.manifest.graphs["decoder"].bytes_read
    for case in report.cases:
        assert tuple(case.stages_ms) == STAGES
        assert case.new_tokens == 5
        assert all(0 < times.p50 <= times.p90 <= times.p99 for times in case.stages_ms.values())
        assert case.tokens_per_second == pytest.approx(case.batch_size * 1e3 / case.ms_per_token)
        assert case.step_bytes == weights + case.batch_size * (case.prompt_tokens + 2) * a_position
        assert case.bandwidth_share == pytest.approx(case.step_bytes / (case.ms_per_token / 1e3) / 1e9)
    (entry,) = report.break_even
    own, other = report.cases[:2]
    assert entry.speed_up_per_token == other.ms_per_token / own.ms_per_token
    assert BenchReport.model_validate_json(report.model_dump_json()) == report


def test_what_cannot_be_run_is_named_all_at_once(bundles: Bundles) -> None:
    bundle, pair = opened(bundles("t5")[1])
    most = bundle.manifest.max_prompt_tokens
    with pytest.raises(UsageError) as caught:
        bench(bundle, {"pair": pair}, BenchSettings(prompt_tokens=(8, most + 1, most + 2), new_tokens=1))
    assert len(caught.value.evidence) == 3


def test_a_bundle_that_does_not_say_what_a_step_reads_is_timed_all_the_same(bundles: Bundles, tmp_path: Path) -> None:
    built = bundles("t5")[1]
    path = tmp_path / "older"
    path.mkdir()
    for file in built.rglob("*"):
        if file.is_file():
            target = path / file.relative_to(built)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    manifest = read_manifest(path)
    graphs = {name: graph.model_copy(update={"bytes_read": None}) for name, graph in manifest.graphs.items()}
    write_manifest(path, manifest.model_copy(update={"graphs": graphs}))
    given = ["bench", str(path), "--prompt-tokens", "8", "--new-tokens", "3", "--rounds", "1", "--threads", "1"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "build it again" in result.output


def test_the_command_compares_in_one_run(bundles: Bundles) -> None:
    bundle = bundles("t5")[1]
    given = [
        "bench", str(bundle), "--baseline", f"other={bundle}", "--prompt-tokens", "8, 12", "--new-tokens", "4", "--rounds", "2",
        "--threads", "1", "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [(case["system"], case["prompt_tokens"]) for case in report["cases"]] == [
        ("LLM-to-SLM", 8), ("other", 8), ("LLM-to-SLM", 12), ("other", 12),
    ]  # fmt: skip
    assert report["threads"] == 1
    assert "Against other" in result.stderr


@pytest.mark.parametrize("given", ["0", "64,", "many", "-3"])
def test_lengths_that_are_no_numbers_are_refused(given: str) -> None:
    result = CliRunner().invoke(app, ["bench", str(DEMO), "--prompt-tokens", given])
    assert result.exit_code == 2
    assert "--prompt-tokens" in result.output
