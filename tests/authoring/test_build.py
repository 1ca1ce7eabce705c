"""Building: parity on every kind of pair, a gate that closes, weights stored once, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import llm2slm_export
from llm2slm_export.authoring.build import build, build_heads
from llm2slm_export.authoring.build_options import BuildOptions
from llm2slm_export.authoring.exporters.quantization.weight_only import quantize_rows
from llm2slm_export.authoring.graphs.encoder import EncoderGraph
from llm2slm_export.authoring.models.pairing import LoadedPair, PairConfig, compose_untrained, load_composition
from llm2slm_export.authoring.parity.verify import verify
from llm2slm_export.authoring.recipe import ModelSource, ProjectorSettings
from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.bundle.manifest_file import read_manifest
from llm2slm_export.bundle.parity_report import ParityError, ParityReport
from llm2slm_export.contract import GRAPHS, Fusion
from llm2slm_export.errors import BundleError, CompositionError, EncodingError, UsageError
from llm2slm_export.inference.encodings.encoding import EncodingIdentity
from tests.support.cached_command import commands
from tests.support.small_bundle import parity_row
from tests.support.tiers import tiered
from tests.support.tiny_models import LLM_CONFIG, SLM_CONFIGS

Bundles = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("slm_type", ["t5", "llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_every_graph_was_compared_on_shapes_it_was_not_exported_with(
    bundles: Bundles, slm_type: str, precision: str
) -> None:
    _, bundle = bundles(slm_type, precision=precision)
    manifest = read_manifest(bundle)
    assert manifest.parity.passed
    assert {row.graph for row in manifest.parity.rows} == {"encoder", "projector", "decoder", "pair"}
    cases = {row.case for row in manifest.parity.rows}
    assert any("prompt 1" in case for case in cases)
    assert any("batch 5" in case for case in cases)
    assert any("calls of 3, 1" in case for case in cases)
    assert any(row.measure == "prompts that differ" for row in manifest.parity.rows) == (precision == "fp32")


def without_mask(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
    """A wrong `EncoderGraph.forward`: padding is read."""
    return (self.llm(input_ids=input_ids, attention_mask=torch.ones_like(attention_mask)).last_hidden_state,)


def test_a_wrong_graph_fails_the_build_and_leaves_nothing(
    save_composition: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EncoderGraph, "forward", without_mask)
    with pytest.raises(ParityError) as caught:
        build(load_composition(save_composition("t5")), tmp_path / "out")
    failed = {(row.graph, row.case.split(",")[0]) for row in caught.value.report.rows if not row.passed}
    assert ("encoder", "batch 5") in failed, "padding must show"
    assert ("encoder", "batch 1") not in failed
    assert "encoder" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_failed_build_keeps_the_earlier_bundle(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composition, bundle = bundles("t5")
    shutil.copytree(bundle, tmp_path / "out")
    monkeypatch.setattr(EncoderGraph, "forward", without_mask)
    with pytest.raises(ParityError):
        build(load_composition(composition), tmp_path / "out", force=True)
    open_bundle(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_directory_is_refused_without_force(bundles: Bundles) -> None:
    composition, bundle = bundles("t5")
    with pytest.raises(UsageError, match="--force"):
        build(load_composition(composition), bundle)


# cross_attention: keys and values of a projector that starts at zero are all zeros.
@pytest.mark.parametrize(
    ("fusion", "precision"),
    tiered(
        product(["add", "cross_attention"], ["fp32", "int8"]),
        fast=[("add", "fp32")],
    ),
)
def test_untrained_is_recorded(save_model: Callable[..., Path], tmp_path: Path, fusion: Fusion, precision: str) -> None:
    pair = compose_untrained(
        ModelSource(model=str(save_model(LLM_CONFIG))),
        ModelSource(model=str(save_model(SLM_CONFIGS["t5"], 1))),
        pair_config=PairConfig(fusion=fusion, projector=ProjectorSettings(d_hidden=24)),
    )
    manifest = build(pair, tmp_path / "out", BuildOptions(dict.fromkeys(GRAPHS, precision)))
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
@pytest.mark.parametrize("slm_type", ["t5", "llama"])
def test_weights_are_stored_once(bundles: Bundles, slm_type: str, precision: str) -> None:
    _, bundle = bundles(slm_type, precision=precision)
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


@pytest.mark.slow
def test_verify_compares_with_the_composition(bundles: Bundles, save_composition: Callable[..., Path]) -> None:
    composition, bundle = bundles("t5")
    assert verify(bundle, None) is None
    report = verify(bundle, composition)
    assert report is not None
    assert report.passed
    other = verify(bundle, save_composition("t5", seed=9))
    assert other is not None
    assert not other.passed


def test_verify_refuses_another_pairs_composition(bundles: Bundles) -> None:
    _, bundle = bundles("t5")
    other, _ = bundles("llama")
    with pytest.raises(CompositionError, match=r"The head 'main' of .* was not built from") as caught:
        verify(bundle, other)
    assert any(line.startswith("slm_kind: ") for line in caught.value.evidence)


def test_a_report_of_nothing_has_not_passed() -> None:
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
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-7]), "bytes"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:50] + bytes([p.read_bytes()[50] ^ 1]) + p.read_bytes()[51:]),
            "sha256",
        ),
    ],
)
@pytest.mark.parametrize("file", ["decoder.onnx", "encoder.onnx.data", "tokenizer/llm/tokenizer.json"])
def test_a_damaged_bundle_is_refused_by_name(
    bundles: Bundles, tmp_path: Path, damage: Callable[[Path], Any], message: str, file: str
) -> None:
    _, bundle = bundles("t5")
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    damage(copy / file)
    with pytest.raises(BundleError) as caught:
        llm2slm_export.load(copy)
    assert file in str(caught.value)
    assert message in str(caught.value)


def test_a_newer_schema_is_refused(bundles: Bundles, tmp_path: Path) -> None:
    _, bundle = bundles("t5")
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    raw = json.loads((copy / "manifest.json").read_text())
    raw["schema_version"] = 7
    raw["a_field_of_the_future"] = True
    (copy / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=r"schema version 7.*reads up to 4"):
        llm2slm_export.load(copy)


# --- heads ---------------------------------------------------------------------------------------------------------

PROMPTS = ["hello", "Where is the station?", "a"]


@pytest.fixture(scope="module")
def heads(
    bundles: Bundles, save_composition: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    """A bundle with a T5 and a Llama head, of the compositions of `bundles`, over one LLM's directory; what build returned."""
    first, _ = bundles("t5")
    second = save_composition("llama", llm=first / "llm")
    assert not (second / "llm").exists()
    out = tmp_path_factory.mktemp("bundles") / "heads"
    sources = {name: partial(load_composition, path) for name, path in {"fr": first, "es": second}.items()}
    return out, build_heads(sources, out)


@pytest.mark.slow
def test_heads_are_files_and_manifests_beside_one_encoder(heads: tuple[Path, Manifest]) -> None:
    bundle, built = heads
    assert {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()} == {
        "manifest.json", "tokenizer/llm/tokenizer.json", "encoder.onnx", "encoder.onnx.data",
        *(f"{head}.{graph}.onnx{data}" for head in ("fr", "es") for graph in ("projector", "decoder") for data in ("", ".data")),
    }  # fmt: skip
    manifest = read_manifest(bundle)
    assert manifest == built
    assert (manifest.head, list(manifest.heads), manifest.shape.slm_kind) == ("fr", ["es"], "encoder-decoder")
    second = manifest.heads["es"]
    assert (second.head, second.heads, second.files) == ("es", {}, ())
    assert second.shape.slm_kind == "decoder-only"
    assert second.graphs["encoder"] == manifest.graphs["encoder"]
    assert second.graphs["decoder"].file == "es.decoder.onnx"
    assert second.tokenizer.slm == manifest.tokenizer.slm == manifest.tokenizer.llm
    assert all(part.parity.passed for part in (manifest, second))
    opened = open_bundle(bundle)
    assert opened.select("es").manifest.files == manifest.files
    with pytest.raises(UsageError, match="no head 'de'") as caught:
        opened.select("de")
    assert caught.value.evidence == ("its heads: fr, es",)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_each_head_answers_as_its_own_bundle_does(
    bundles: Bundles, heads: tuple[Path, Manifest], options: dict[str, Any]
) -> None:
    bundle, _ = heads
    with llm2slm_export.load(bundle) as pair:
        assert pair.heads == ("fr", "es")
        for name, slm_type in (("fr", "t5"), ("es", "llama")):
            with llm2slm_export.load(bundles(slm_type)[1]) as single:
                expected = single.generate(PROMPTS, max_new_tokens=12, **options)
            got = pair.head(name).generate(PROMPTS, max_new_tokens=12, **options)
            assert [(g.text, g.token_ids, g.score) for g in got] == [(g.text, g.token_ids, g.score) for g in expected]


def test_a_head_costs_no_more_than_its_own_files(bundles: Bundles, heads: tuple[Path, Manifest]) -> None:
    whole = {entry.path: entry.bytes for entry in heads[1].files}
    first, second = (
        {entry.path: entry.bytes for entry in read_manifest(bundles(slm_type)[1]).files} for slm_type in ("t5", "llama")
    )
    own = sum(size for path, size in second.items() if not path.startswith(("encoder", "tokenizer/llm")))
    assert sum(whole.values()) <= 1.01 * (sum(first.values()) + own)


def test_heads_share_one_encoder_session(heads: tuple[Path, Manifest]) -> None:
    with llm2slm_export.load(heads[0]) as pair:
        sessions = [pair.head(name)._backend.sessions for name in ("fr", "es")]
        assert sessions[0].get("encoder") is sessions[1].get("encoder")
        assert sessions[0].get("projector") is not sessions[1].get("projector")
        assert pair.head("es") is pair.head("es").head("fr").head("es")


def test_heads_share_what_was_read_up_to_the_projector(heads: tuple[Path, Manifest], tmp_path: Path) -> None:
    with llm2slm_export.load(heads[0]) as pair:
        other = pair.head("es")
        mine, theirs = (EncodingIdentity.of(head.manifest) for head in (pair, other))
        assert (mine.encoder, mine.tokenizer) == (theirs.encoder, theirs.tokenizer)
        assert mine.projector != theirs.projector
        encoding = pair.encode(PROMPTS)
        pair.save_encoding(encoding, tmp_path / "x.encoding")
        for refused in (
            lambda: other.generate_from(encoding),
            lambda: other.load_encoding(tmp_path / "x.encoding"),
            lambda: other.save_encoding(encoding, tmp_path / "y.encoding"),
        ):
            with pytest.raises(EncodingError) as caught:
                refused()
            assert [line.split(":")[0] for line in caught.value.evidence] == ["projector"]
        assert not (tmp_path / "y.encoding").exists()


@pytest.fixture
def graphless(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> list[ParityReport]:
    """Builds that export and compare nothing: the reports of their gates, in order."""
    graphs = read_manifest(bundles("t5")[1]).graphs
    reports = [ParityReport(rows=(parity_row(),))]
    monkeypatch.setattr(
        "llm2slm_export.authoring.build._BundleBuilder._graph", lambda _self, _pair, name, _file, *_: graphs[name]
    )
    monkeypatch.setattr("llm2slm_export.authoring.build.compare", lambda *_: reports.pop(0))
    return reports


@pytest.mark.usefixtures("graphless")
def test_a_head_over_another_llm_is_refused(
    bundles: Bundles, save_composition: Callable[..., Path], tmp_path: Path
) -> None:
    other = save_composition("t5", seed=9)
    sources = {"fr": partial(load_composition, bundles("t5")[0]), "es": partial(other_layer_and_tokenizer, other)}
    with pytest.raises(CompositionError, match="The head 'es' has another encoder") as caught:
        build_heads(sources, tmp_path / "out")
    assert [line.split(":")[0] for line in caught.value.evidence] == ["LLM weights", "LLM layer", "LLM tokenizer"]
    assert "-1 of the first head, 1 of 'es'" in caught.value.evidence[1]
    assert list(tmp_path.iterdir()) == []


def other_layer_and_tokenizer(composition: Path) -> LoadedPair:
    pair = load_composition(composition)
    pair.llm_tokenizer.add_tokens(["another"])
    llm = pair.file.llm.model_copy(update={"layer": 1})
    return replace(pair, file=pair.file.model_copy(update={"llm": llm}))


@pytest.mark.slow
def test_a_second_head_that_fails_its_gate_leaves_nothing(
    bundles: Bundles, graphless: list[ParityReport], tmp_path: Path
) -> None:
    graphless.append(ParityReport(rows=(parity_row(), parity_row("projector", value=0.5))))
    load = partial(load_composition, bundles("t5")[0])
    with pytest.raises(ParityError, match="1 of 2 comparisons failed") as caught:
        build_heads({"fr": load, "es": load}, tmp_path / "out")
    assert caught.value.evidence[0].startswith("projector, batch 3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_second_head_takes_no_memory_for_the_encoder(save_composition: Callable[..., Path], tmp_path: Path) -> None:
    """An encoder of 31 M parameters (123 MB), heads of 1.3 M: an encoder held twice could not be overlooked."""
    llm_config = LLM_CONFIG | {"d_model": 1024, "d_kv": 64, "num_heads": 8, "d_ff": 9216, "num_layers": 1}
    layers = {"num_layers": 1, "num_decoder_layers": 1}
    small = SLM_CONFIGS["t5"] | layers | {"d_model": 192, "d_kv": 32, "num_heads": 6, "d_ff": 1024}
    first = save_composition("t5", llm_config=llm_config, fields=small)
    second = save_composition("t5", llm_config=llm_config, fields=small, seed=1, llm=first / "llm")
    sources = {name: partial(load_composition, path) for name, path in {"fr": first, "es": second}.items()}
    manifest = build_heads(sources, tmp_path / "out")
    encoder, own = (
        sum(entry.bytes for entry in manifest.files if entry.path.startswith(name)) for name in ("encoder.", "es.")
    )

    def resident(*steps: str) -> int:
        """Bytes held after a response of each pair that the steps open."""
        command = [sys.executable, "-c", RESIDENT, str(tmp_path / "out"), *steps]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    one, two, loaded_twice = (resident("load fr", *more) for more in ((), ("head es",), ("load es",)))
    assert two <= one + own + TWO_SESSIONS, (one, two, own)
    assert loaded_twice > one + own + TWO_SESSIONS + encoder / 2, "an encoder held twice must show"


# What two sessions hold beside their weights: 3 MB measured on x86-64 (ONNX Runtime 1.31), and some for its arenas.
TWO_SESSIONS = 12_000_000
RESIDENT = r"""
import re, sys
from pathlib import Path
import llm2slm_export

bundle, *steps = sys.argv[1:]
pairs = []
for step in steps:
    how, name = step.split()
    pairs.append(llm2slm_export.load(bundle, head=name, threads=1) if how == "load" else pairs[0].head(name))
    pairs[-1].generate(["Where is the station?"], max_new_tokens=8)
print(1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.parametrize("shares", tiered({"late": [0.97], "others": [0.3, 0.5, 0.6, 0.7, 0.85]}))
def test_a_killed_build_leaves_nothing_that_loads_and_keeps_what_was_there(
    bundles: Bundles, traces: Path, tmp_path: Path, shares: list[float]
) -> None:
    """The shares are of a build's time without its imports, which write nothing."""
    composition, bundle = bundles("t5")
    out = tmp_path / "out"
    shutil.copytree(bundle, out)
    command = ["build", "--composition", str(composition), "--out", str(out), "--force"]
    with commands(traces) as processes:
        started = time.monotonic()
        assert processes.start(command).wait() == 0
        whole = time.monotonic() - started
        for share in shares:
            process = processes.start(command)
            time.sleep(share * whole)
            process.kill()
            process.wait()
            open_bundle(out)
            for other in tmp_path.iterdir():
                if other != out:
                    with pytest.raises(BundleError):
                        open_bundle(other)
        assert processes.start(command).wait() == 0
    open_bundle(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.nightly
def test_the_gate_leaves_out_prompts_that_leave_no_room(save_composition: Callable[..., Path], tmp_path: Path) -> None:
    composition = save_composition("gpt2", fields=SLM_CONFIGS["gpt2"] | {"n_positions": 60})
    kept, left_out = "a few words", "x" * 50  # and 24 tokens of response
    (composition / "training.json").write_text(json.dumps({"prompts": [kept, left_out]}))
    build(load_composition(composition), tmp_path / "bundle")
    (composition / "training.json").write_text(json.dumps({"prompts": [left_out]}))
    with pytest.raises(CompositionError, match="None of the 1 prompts") as error:
        build(load_composition(composition), tmp_path / "other")
    assert error.value.evidence[0].startswith("the SLM has 60 positions, of which 24 are for the response")


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(bundles: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    composition, first = bundles("t5", "add", "int8")
    precision = dict.fromkeys(GRAPHS, "int8")
    build(load_composition(composition), tmp_path / "second", BuildOptions(precision))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "second") for path in (tmp_path / "second").rglob("*") if path.is_file()
    )
    assert [f for f in files if (first / f).read_bytes() != (tmp_path / "second" / f).read_bytes()] == []
