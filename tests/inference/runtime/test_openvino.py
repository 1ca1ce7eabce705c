"""Encoder and projector on OpenVINO: the same as on ONNX Runtime; which runtime is chosen, and what is refused."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from typer.testing import CliRunner

import llm2slm_export
from llm2slm_export.authoring.parity.verify import verify
from llm2slm_export.bundle.bundle import Bundle, open_bundle
from llm2slm_export.cli.app import app
from llm2slm_export.contract import GRAPHS, GraphName
from llm2slm_export.errors import BundleError, MissingExtraError, UsageError
from llm2slm_export.inference.runtime import selection
from llm2slm_export.inference.runtime.backend import Backend, Ids, hidden_array
from llm2slm_export.inference.runtime.openvino import OpenVinoGraph
from llm2slm_export.inference.runtime.selection import chosen_runtimes, measure, open_backend, parse_runtime
from tests.support.tiers import tiered

Bundles = Callable[..., tuple[Path, Path]]
PROMPTS = ["How are you?", "x", "A longer prompt, of more tokens than the others have."]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def prompts(lengths: list[int]) -> tuple[Ids, Ids]:
    """Ids and mask [batch, prompt] of prompts of these lengths."""
    mask = np.zeros((len(lengths), max(lengths)), np.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return (np.arange(mask.size).reshape(mask.shape) % 90 + 3) * mask, mask


def read(backend: Backend, lengths: list[int]) -> dict[str, Any]:
    """What encoder and projector make of prompts of these lengths, where it is not padding."""
    ids, mask = prompts(lengths)
    hidden = backend.encode(ids, mask)
    conditioning = backend.project(hidden, ids, mask)
    made: dict[str, Any] = {"hidden": hidden_array(backend, hidden)[mask.astype(bool)]}
    real = conditioning.attention_mask.astype(bool)
    for name, array in backend.arrays(conditioning).items():
        made[name] = array.swapaxes(1, 2)[real] if array.ndim == 4 else array[real]
    return made


@pytest.mark.parametrize("runtime", ["openvino", "encoder=openvino", "projector=openvino"])
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_it_computes_what_onnxruntime_computes(bundles: Bundles, slm: str, runtime: str) -> None:
    bundle = open_bundle(bundles(slm)[1])
    expected, got = open_backend(bundle), open_backend(bundle, runtime=runtime, threads=1)
    for lengths in ([7], [1], [5, 9, 2], [7], [3] * 5):
        for name, array in read(got, lengths).items():
            other = read(expected, lengths)[name]
            np.testing.assert_allclose(array, other, atol=1e-4 * np.abs(other).max(), err_msg=f"{name}, {lengths}")
    assert set(got.runtimes) == set(GRAPHS)
    assert got.runtimes["decoder"] == "onnxruntime"
    assert got.device == "cpu"
    for backend in (expected, got):
        backend.close()


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_a_pair_writes_the_same(bundles: Bundles, slm: str) -> None:
    _, bundle = bundles(slm)
    with llm2slm_export.load(bundle) as plain, llm2slm_export.load(bundle, runtime="openvino") as pair:
        assert pair.runtimes == {"encoder": "openvino", "projector": "openvino", "decoder": "onnxruntime"}
        for options in ({}, {"num_beams": 3}):
            expected = [row.token_ids for row in plain.generate(PROMPTS, max_new_tokens=12, **options)]
            assert [row.token_ids for row in pair.generate(PROMPTS, max_new_tokens=12, **options)] == expected
        assert list(pair.stream(PROMPTS[0], max_new_tokens=5))[-1].generation is not None


def test_one_side_reads_and_the_other_writes(bundles: Bundles, tmp_path: Path) -> None:
    _, bundle = bundles("t5")
    with llm2slm_export.load(bundle, runtime="openvino", part="reader") as reader:
        assert reader.runtimes == {"encoder": "openvino", "projector": "openvino"}
        reader.save_encoding(reader.encode(PROMPTS), tmp_path / "encoding.safetensors")
    with llm2slm_export.load(bundle, runtime="openvino", part="writer") as writer, llm2slm_export.load(bundle) as plain:
        assert writer.runtimes == {"decoder": "onnxruntime"}
        got = writer.generate_from(writer.load_encoding(tmp_path / "encoding.safetensors"), max_new_tokens=8)
        expected = plain.generate(PROMPTS, max_new_tokens=8)
        assert [row.token_ids for row in got] == [row.token_ids for row in expected]


def test_heads_share_the_encoder(bundles: Bundles) -> None:
    bundle = open_bundle(bundles("t5")[1])
    backend: Any = open_backend(bundle, runtime="openvino")
    other: Any = backend.head(bundle)
    assert other._open["encoder"] is backend._open["encoder"]
    assert other._open["projector"] is not backend._open["projector"]
    backend.close()
    assert read(other, [4])  # the encoder lives until the last of them is closed
    other.close()


def test_threads_may_read_at_the_same_time(bundles: Bundles) -> None:
    backend = open_backend(open_bundle(bundles("t5")[1]), runtime="openvino", threads=1)
    lengths = [[length] for length in (3, 4, 5, 6)] * 8
    alone = [read(backend, one)["hidden"] for one in lengths]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: read(backend, one)["hidden"], lengths))
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("precision", tiered(["fp32", "bf16", "int8"], slow=["bf16"]))
def test_the_parity_check_runs_on_it(bundles: Bundles, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    composition, bundle = bundles("t5", precision=precision)
    opened: list[str] = []
    plain = OpenVinoGraph.__init__

    def init(self: OpenVinoGraph, bundle: Bundle, name: GraphName, **given: Any) -> None:
        opened.append(name)
        plain(self, bundle, name, **given)

    monkeypatch.setattr(OpenVinoGraph, "__init__", init)
    report = verify(bundle, composition, runtime="openvino")
    assert report is not None
    assert [row for row in report.rows if not row.passed] == []
    assert set(opened) == {"encoder", "projector"}


@pytest.mark.slow
def test_the_parity_check_fails_where_openvino_computes_something_else(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    composition, bundle = bundles("t5")
    plain = OpenVinoGraph.__call__
    monkeypatch.setattr(
        OpenVinoGraph, "__call__", lambda self, feeds: {k: v * 1.01 for k, v in plain(self, feeds).items()}
    )
    report = verify(bundle, composition, runtime="openvino")
    assert report is not None
    assert {row.graph for row in report.rows if not row.passed} >= {"encoder", "projector"}


def test_it_brings_no_telemetry(bundles: Bundles) -> None:
    """OpenVINO's package sends an event when it is imported, unless the package that sends is not there."""
    import subprocess

    _, bundle = bundles("t5")
    code = (
        "import sys, llm2slm_export\n"
        f"llm2slm_export.load({str(bundle)!r}, runtime='openvino')\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])\n"
        "import openvino_telemetry  # not in the way of who wants it"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- which runtime -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("onnxruntime", ["onnxruntime"] * 3),
        ("openvino", ["openvino", "openvino", "onnxruntime"]),
        ("auto", ["auto", "auto", "onnxruntime"]),
        ("encoder=openvino", ["openvino", "onnxruntime", "onnxruntime"]),
        ("encoder=openvino, projector=auto", ["openvino", "auto", "onnxruntime"]),
        ("openvino,projector=onnxruntime,decoder=onnxruntime", ["openvino", "onnxruntime", "onnxruntime"]),
    ],
)
def test_a_runtime_is_said_for_each_graph(text: str, expected: list[str]) -> None:
    assert parse_runtime(text) == dict(zip(GRAPHS, expected, strict=True))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["no runtime ''"]),
        ("tensorrt", ["no runtime 'tensorrt'"]),
        ("encode=openvino,projector=x", ["no graph 'encode'", "no runtime 'x'"]),
        ("decoder=openvino", ["TensorScatter"]),
        ("decoder=auto", ["TensorScatter"]),
    ],
)
def test_a_runtime_that_means_nothing_is_refused(text: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        parse_runtime(text)
    for part in [repr(text), *parts]:
        assert part in str(error.value)


def test_it_is_of_the_cpu(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(bundles("t5")[1])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(UsageError, match="'openvino' needs the device 'cpu'; the device is 'cuda:1'"):
        open_backend(bundle, device="cuda:1", runtime="openvino")


def test_without_openvino_the_pip_line_is_named(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bundle = bundles("t5")
    find = llm2slm_export.errors.importlib.util.find_spec  # type: ignore[attr-defined]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else find(name))
    with pytest.raises(MissingExtraError, match=r"pip install 'llm2slm-export\[openvino\]'"):
        llm2slm_export.load(bundle, runtime="openvino")


def test_a_graph_that_it_cannot_load_is_named(bundles: Bundles) -> None:
    bundle = open_bundle(bundles("t5")[1])
    with pytest.raises(BundleError, match=r"OpenVINO cannot load decoder\.onnx") as error:
        OpenVinoGraph(bundle, "decoder", threads=None)
    assert "TensorScatter" in str(error.value)
    assert "runtime 'onnxruntime'" in error.value.remedy


def test_the_faster_one_is_measured_once_and_kept(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(bundles("t5")[1])
    (encoder,) = measure(bundle, "encoder=auto")
    assert encoder.graph == "encoder"
    assert set(encoder.ms) == {"onnxruntime", "openvino"}
    assert all(ms > 0 for ms in encoder.ms.values())
    assert encoder.fastest == min(encoder.ms, key=lambda name: encoder.ms[name])
    assert encoder.cache_file == tmp_path / "cache" / "llm2slm-export" / "runtimes.json"

    # What is kept decides, whatever it says; and nothing is measured again.
    cached = json.loads(encoder.cache_file.read_text(encoding="utf-8"))
    (key,) = cached
    for faster in ("openvino", "onnxruntime"):
        cached[key] = {name: 1.0 if name == faster else 2.0 for name in cached[key]}
        encoder.cache_file.write_text(json.dumps(cached), encoding="utf-8")
        assert chosen_runtimes(bundle, "encoder=auto")["encoder"] == faster
        assert open_backend(bundle, runtime="encoder=auto").runtimes["encoder"] == faster

    # Other threads, another graph, another bundle: measured by themselves.
    asked: list[Any] = []
    monkeypatch.setattr(selection, "_ms", lambda *given: asked.append(given) or 1.0)
    measure(bundle, "encoder=auto", threads=1)
    measure(bundle, "auto")
    measure(open_bundle(bundles("t5", precision="int8")[1]), "encoder=auto")
    assert [given[1:] for given in asked] == [
        (name, threads, runtime)
        for name, threads in (("encoder", 1), ("projector", None), ("encoder", None))
        for runtime in ("onnxruntime", "openvino")
    ]


def test_a_file_that_cannot_be_read_is_measured_anew(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(bundles("t5")[1])
    monkeypatch.setattr(selection, "_ms", lambda *_: 1.0)
    path = tmp_path / "cache" / "llm2slm-export" / "runtimes.json"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(selection, "_key", lambda *_: "k")
    for text in (
        "{",
        "[]",
        "[" * 100_000,
        '{"k": []}',
        '{"k": {}}',
        '{"k": {"onnxruntime": "x", "openvino": 1}}',
        '{"k": 1}',
    ):
        path.write_text(text, encoding="utf-8")
        assert measure(bundle, "encoder=auto")[0].fastest == "onnxruntime"
        assert len(json.loads(path.read_text(encoding="utf-8"))) == 1


def test_what_cannot_be_kept_holds_all_the_same(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bundle = bundles("t5")
    (tmp_path / "cache").write_text("no directory", encoding="utf-8")
    monkeypatch.setattr(selection, "_ms", lambda *given: {"onnxruntime": 2.0, "openvino": 1.5}[given[3]])
    (encoder,) = measure(open_bundle(bundle), "encoder=auto")
    assert (encoder.fastest, encoder.cache_file) == ("openvino", None)
    result = CliRunner().invoke(app, ["run", str(bundle), "x", "--runtime", "auto", "--max-new-tokens", "2"])
    assert result.exit_code == 0, result.output
    assert "openvino 1.50 ms; not cached: the cache directory cannot be written)" in result.stderr


def test_onnxruntime_for_gpus_is_onnxruntime_too(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package has another name than its module."""
    bundle, plain = open_bundle(bundles("t5")[1]), selection.version
    monkeypatch.setattr(selection, "_ms", lambda *_: 1.0)
    monkeypatch.setattr(selection, "version", lambda name: plain({"onnxruntime": "no-such-package"}.get(name, name)))
    assert measure(bundle, "encoder=auto")[0].fastest == "onnxruntime"


def test_where_only_onnxruntime_is_installed_it_is_the_one(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(bundles("t5")[1])
    monkeypatch.setattr(selection, "find_spec", lambda _: None)
    assert chosen_runtimes(bundle, "auto") == dict.fromkeys(GRAPHS, "onnxruntime")


def test_run_says_what_auto_has_chosen(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bundle = bundles("t5")
    monkeypatch.setattr(selection, "_ms", lambda *given: {"onnxruntime": 2.0, "openvino": 1.5}[given[3]])
    result = CliRunner().invoke(app, ["run", str(bundle), "x", "--runtime", "auto", "--max-new-tokens", "2"])
    assert result.exit_code == 0, result.output
    for graph in ("encoder", "projector"):
        assert f"{graph}: openvino (onnxruntime 2.00 ms, openvino 1.50 ms; cached in " in result.stderr


def test_bench_says_what_ran(bundles: Bundles) -> None:
    _, bundle = bundles("t5")
    arguments = ["bench", str(bundle), "--rounds", "1", "--new-tokens", "3", "--prompt-tokens", "8"]
    result = CliRunner().invoke(app, [*arguments, "--runtime", "encoder=openvino", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["runtimes"] == {
        "encoder": "openvino", "projector": "onnxruntime", "decoder": "onnxruntime",
    }  # fmt: skip


def test_the_modules_import_no_runtime() -> None:
    import subprocess

    code = (
        "import sys, llm2slm_export.inference.runtime.selection; "
        "print([m for m in ('onnxruntime', 'openvino', 'torch', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- weights as bfloat16 ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_bf16_halves_the_weights(bundles: Bundles, slm: str) -> None:
    """Large ones are stored as bfloat16; tables are looked up in as they are, and the rows widened."""
    sizes = {
        precision: sum(
            f.bytes
            for f in open_bundle(bundles(slm, precision=precision)[1]).manifest.files
            if f.path.endswith(".data")
        )
        for precision in ("fp32", "bf16")
    }
    assert sizes["bf16"] < 0.95 * sizes["fp32"]  # of models this small tables, and weights that are not large, are most
    bundle = open_bundle(bundles(slm, precision="bf16")[1])
    for name, entry in bundle.manifest.graphs.items():
        graph = onnx.load(bundle.path(entry.file), load_external_data=False).graph
        types = {value.name: value.data_type for value in graph.initializer}
        large = {value.name for value in graph.initializer if len(value.dims) > 1 and np.prod(value.dims) >= 4096}
        assert large, name
        assert {types[value] for value in large} == {onnx.TensorProto.BFLOAT16}
        for node in graph.node:
            assert node.op_type in ("Cast", "Gather") or not large & set(node.input), (name, node.op_type)
