"""Building: parity on every kind of pair, a gate that closes, weights stored once, nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import llm2slm_export
from llm2slm_export.build import build
from llm2slm_export.bundle import open_bundle, read_manifest
from llm2slm_export.errors import BundleError, ParityError, UsageError
from llm2slm_export.exporters.quantize import quantize_rows
from llm2slm_export.graphs.encoder import EncoderGraph
from llm2slm_export.models.loading import compose_untrained, load_composition
from llm2slm_export.recipe import ModelSource
from llm2slm_export.verify import verify
from tests.conftest import READER, WRITERS

Bundles = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("writer", list(WRITERS))
def test_every_graph_was_compared_on_shapes_it_was_not_exported_with(
    bundles: Bundles, writer: str, precision: str
) -> None:
    _, bundle = bundles(writer, precision=precision)
    manifest = read_manifest(bundle)
    assert manifest.parity.passed
    assert {row.graph for row in manifest.parity.rows} == {"encoder", "projector", "decoder", "pair"}
    cases = {row.case for row in manifest.parity.rows}
    assert any("prompt 1" in case for case in cases)
    assert any("batch 5" in case for case in cases)
    assert any("calls of 3, 1" in case for case in cases)
    assert any(row.measure == "prompts that differ" for row in manifest.parity.rows) == (precision == "fp32")


def test_a_wrong_graph_fails_the_build_and_leaves_nothing(
    save_composition: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_mask(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.llm(input_ids=input_ids, attention_mask=torch.ones_like(attention_mask)).last_hidden_state,)

    monkeypatch.setattr(EncoderGraph, "forward", without_mask)
    with pytest.raises(ParityError) as caught:
        build(load_composition(save_composition("t5")), tmp_path / "out", precision={}, force=False)
    failed = {(row.graph, row.case.split(",")[0]) for row in caught.value.report.rows if not row.passed}
    assert ("encoder", "batch 5") in failed, "padding must show"
    assert ("encoder", "batch 1") not in failed
    assert "encoder" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_keeps_the_earlier_bundle(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composition, bundle = bundles("t5")
    shutil.copytree(bundle, tmp_path / "out")
    monkeypatch.setattr(EncoderGraph, "forward", lambda self, ids, _: (self.llm(ids).last_hidden_state * 2,))
    with pytest.raises(ParityError):
        build(load_composition(composition), tmp_path / "out", precision={}, force=True)
    open_bundle(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_directory_is_refused_without_force(bundles: Bundles) -> None:
    composition, bundle = bundles("t5")
    with pytest.raises(UsageError, match="--force"):
        build(load_composition(composition), bundle, precision={}, force=False)


def test_untrained_is_recorded(save_model: Callable[..., Path], tmp_path: Path) -> None:
    pair = compose_untrained(
        ModelSource(model=str(save_model(READER))), ModelSource(model=str(save_model(WRITERS["t5"], 1)))
    )
    manifest = build(pair, tmp_path / "out", precision={}, force=False)
    assert not manifest.trained
    assert manifest.sources["llm"].weights == "pretrained"


def unique_weight_bytes(bundle: Path) -> int:
    """Bytes of the distinct initializers of a bundle's graphs, at the precision they are stored in."""
    seen: dict[bytes, int] = {}
    for path in bundle.glob("*.onnx"):
        for tensor in onnx.load(path).graph.initializer:
            content = onnx.numpy_helper.to_array(tensor).tobytes()
            seen[content] = len(content)
    return sum(seen.values())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("writer", ["t5", "llama"])
def test_weights_are_stored_once(bundles: Bundles, writer: str, precision: str) -> None:
    _, bundle = bundles(writer, precision=precision)
    stored = sum(p.stat().st_size for p in bundle.glob("*.data"))
    assert stored <= 1.05 * unique_weight_bytes(bundle)


def test_the_slms_table_is_in_one_file_and_read_by_two_graphs(bundles: Bundles) -> None:
    _, bundle = bundles("t5")

    def locations(graph: str) -> set[str]:
        model = onnx.load(bundle / graph, load_external_data=False)
        return {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}

    assert locations("decoder.onnx") == {"projector.onnx.data", "decoder.onnx.data"}


def test_no_graph_names_the_machine_that_exported_it(bundles: Bundles) -> None:
    _, bundle = bundles("t5")
    for path in bundle.glob("*.onnx"):
        assert str(Path.home()).encode() not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()


def test_a_bundle_loads_from_another_directory(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bundle = bundles("t5")
    monkeypatch.chdir(tmp_path)
    with llm2slm_export.load(os.path.relpath(bundle)) as pair:
        assert pair.generate(["hello"], max_new_tokens=3)[0].new_tokens == 3


def test_verify_compares_with_the_composition(bundles: Bundles, save_composition: Callable[..., Path]) -> None:
    composition, bundle = bundles("t5")
    assert verify(bundle, None) is None
    report = verify(bundle, composition)
    assert report is not None
    assert report.passed
    other = verify(bundle, save_composition("t5", seed=9))
    assert other is not None
    assert not other.passed


def test_a_report_of_nothing_has_not_passed() -> None:
    from llm2slm_export.bundle import ParityReport

    assert not ParityReport(rows=()).passed


@pytest.mark.parametrize("columns", [16, 128, 200])
def test_quantised_rows_are_within_half_a_step(columns: int) -> None:
    weight = np.random.default_rng(0).standard_normal((7, columns)).astype(np.float32)
    weight[3] = 0
    q, scales = quantize_rows(weight, 128)
    restored = ((q.astype(np.float32) - 128) * scales[:, :, None]).reshape(7, -1)[:, :columns]
    step = np.repeat(scales, 128, axis=1)[:, :columns]
    assert (np.abs(restored - weight) <= step / 2 + 1e-7).all()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: p.unlink(), "missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-7]), "bytes"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:50] + bytes([p.read_bytes()[50] ^ 1]) + p.read_bytes()[51:]),
            "sha256",
        ),
    ],
)
@pytest.mark.parametrize("file", ["decoder.onnx", "encoder.onnx.data", "tokenizer/slm/tokenizer.json"])
def test_a_damaged_bundle_is_refused_by_name(
    bundles: Bundles, tmp_path: Path, damage: Callable[[Path], Any], said: str, file: str
) -> None:
    _, bundle = bundles("t5")
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    damage(copy / file)
    with pytest.raises(BundleError) as caught:
        llm2slm_export.load(copy)
    assert file in str(caught.value)
    assert said in str(caught.value)


def test_a_newer_schema_is_refused(bundles: Bundles, tmp_path: Path) -> None:
    _, bundle = bundles("t5")
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    raw = json.loads((copy / "manifest.json").read_text())
    raw["schema_version"] = 7
    raw["a_field_of_the_future"] = True
    (copy / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=r"schema version 7.*reads up to 1"):
        llm2slm_export.load(copy)


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_that_loads_and_keeps_what_was_there(bundles: Bundles, tmp_path: Path) -> None:
    composition, bundle = bundles("t5")
    out = tmp_path / "out"
    shutil.copytree(bundle, out)
    command = [
        sys.executable, "-m", "llm2slm_export", "build", "--composition", str(composition), "--out", str(out), "--force",
    ]  # fmt: skip
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.monotonic() - started
    for share in (0.3, 0.5, 0.7, 0.85, 0.97):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(share * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        open_bundle(out)
        for other in tmp_path.iterdir():
            if other != out:
                with pytest.raises(BundleError):
                    open_bundle(other)
    subprocess.run(command, check=True, capture_output=True)
    open_bundle(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
