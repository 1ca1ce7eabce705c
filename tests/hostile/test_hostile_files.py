"""Files from a stranger: whatever is in them, what reads them works as it did or says what is wrong, and nothing else."""

import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm2slm_export
from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.bundle.external_data import OnnxError, external_data
from llm2slm_export.bundle.manifest import MANIFEST_FILE
from llm2slm_export.bundle.manifest_file import read_manifest, stamped
from llm2slm_export.errors import BundleError, EncodingError, Llm2SlmError
from llm2slm_export.inference.encodings.cache import EncodingCache
from llm2slm_export.inference.encodings.safetensors_file import read_tensors, write_tensors
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.tokenization import _encode, open_tokenizer
from tests.support.hostile import CASES, VALUES, mutated_bytes, mutated_json
from tests.support.paths import DEMO

PROMPTS = ["How are you?", "I am here."]
# Of nothing that runs.
DESCRIPTIVE = ("parity", "sources", "trained", "tool_versions", "weights", "llm_layer")


@pytest.fixture(scope="module")
def demo() -> Iterator[Orchestrator]:
    with llm2slm_export.load(DEMO, threads=1) as pair:
        yield pair


@pytest.fixture(scope="module")
def answers(demo: Orchestrator) -> list[str]:
    return [generation.text for generation in demo.generate(PROMPTS)]


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "twin")


def write_json(path: Path, raw: Any) -> None:
    """A manifest with the digest that belongs to it, where it has a place for one."""
    content = json.dumps(raw).encode()
    try:
        path.write_bytes(stamped(content))
    except ValueError:
        path.write_bytes(content)


# --- manifests ---------------------------------------------------------------------------------------------------


def test_no_changed_byte_of_a_manifest_is_let_through(tmp_path: Path) -> None:
    rng, content = random.Random(1), (DEMO / MANIFEST_FILE).read_bytes()
    for _ in range(CASES):
        (tmp_path / MANIFEST_FILE).write_bytes(mutated_bytes(content, rng))
        with pytest.raises(BundleError):
            read_manifest(tmp_path)


def test_a_changed_field_is_refused_or_does_no_harm(twin: Path) -> None:
    rng, raw = random.Random(2), json.loads((DEMO / MANIFEST_FILE).read_bytes())
    opened = 0
    for _ in range(CASES):
        name, changed = mutated_json(raw, rng)
        write_json(twin / MANIFEST_FILE, changed)
        try:
            manifest = open_bundle(twin).manifest
            if name.partition(".")[0] in DESCRIPTIVE:
                continue
            opened += 1
            # So that a case takes no minutes; how many tokens there may be is checked on reading.
            most = min(8, manifest.generation.max_new_tokens)
            with llm2slm_export.load(twin, threads=1) as pair:
                pair.generate(PROMPTS[:1], max_new_tokens=most, truncate=True)
        except Llm2SlmError:
            continue
    assert opened


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("files",), [], "graphs.encoder.file: 'encoder.onnx' is not listed"),
        (("graphs", "encoder", "file"), "../demo/encoder.onnx", "graphs.encoder.file: .* leaves the bundle"),
        (("graphs", "encoder", "file"), "/etc/passwd", "graphs.encoder.file: .* leaves the bundle"),
        (("graphs", "encoder", "file"), "encoder.onnx.data", "must end in .onnx"),
        (("graphs", "encoder", "file"), "projector.onnx", "reads weights from 'projector.onnx.data'"),
        (("graphs", "encoder", "data"), [], "reads weights from 'encoder.onnx.data', which is not in its `data`"),
        (("graphs", "encoder", "data"), ["encoder.onnx", "encoder.onnx.data"], "reads nothing from 'encoder.onnx'"),
        (("tokenizer", "llm"), "../x.json", "tokenizer.llm: .* leaves the bundle"),
        (("tokenizer", "slm"), "./tokenizer/llm/tokenizer.json", "shortest form"),
        (("files", 0, "path"), "../../etc/passwd", "leaves the bundle"),
        (("files", 0, "path"), "encoder.onnx", "is listed twice"),
        (("graphs",), {}, "graphs.encoder: is missing"),
        (("cache", "state"), [], "cache.state: must have 6 parts, got 0"),
        (("graphs", "decoder", "inputs", 0, "axes", 0), "rows", "graphs.decoder.inputs.0: must be input_ids"),
        (("special_ids", "decoder_start"), None, "an encoder-decoder SLM has one"),
        (("special_ids", "decoder_start"), 8000, "must be an id below 8000, got 8000"),
        (("special_ids", "eos"), [2**40], "special_ids.eos.0"),
        (("shape", "vocab_size"), 0, "shape.vocab_size: must be from 1"),
        (("shape", "num_hidden_layers"), 2**31, "shape.num_hidden_layers: must be from 1 to 4096"),
        (("tokenizer", "slm_size"), 8001, "above the vocabulary's 8000"),
        (("generation", "max_new_tokens"), 10**9, "less than or equal to 1000000"),
        (("generation", "num_beams"), 10**9, "less than or equal to 1024"),
        (("generation", "forced_bos_token_id"), 8000, "must be ids below 8000"),
        (("prompt_template",), "{prompt}" * 200_000, "exactly once, it does 200000 times"),
        (("name",), "../../x", "name: String should match pattern"),
        (("tool_versions", "llm2slm-export"), "\x1b]0;owned\x07", r"tool_versions.llm2slm-export: holds the character"),
        (("max_prompt_tokens",), "64", "valid integer"),
        (("schema_version",), 4.0, "schema_version: must be a whole number"),
        (("graphs", "encoder", "minimum_runtime", "onnxruntime"), "9" * 5000, "at most 64 characters"),
    ],
)
def test_each_relation_is_named(twin: Path, place: tuple[Any, ...], value: Any, reason: str) -> None:
    raw = json.loads((DEMO / MANIFEST_FILE).read_bytes())
    *way, last = place
    holder = raw
    for key in way:
        holder = holder[key]
    holder[last] = value
    write_json(twin / MANIFEST_FILE, raw)
    with pytest.raises(BundleError, match=reason) as caught:
        open_bundle(twin)
    assert "\x1b" not in str(caught.value)


# --- files -------------------------------------------------------------------------------------------------------


def test_no_changed_byte_of_a_file_is_let_through(twin: Path) -> None:
    rng = random.Random(3)
    files = [entry.path for entry in read_manifest(DEMO).files]
    for _ in range(CASES // 4):
        file = rng.choice(files)
        content = (DEMO / file).read_bytes()
        (twin / file).write_bytes(mutated_bytes(content, rng))
        with pytest.raises(BundleError, match=file):
            open_bundle(twin)
        (twin / file).write_bytes(content)
    open_bundle(twin)


def test_what_is_no_file_is_not_opened(twin: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((DEMO / "encoder.onnx").read_bytes()[:-1] + b"?")
    path = twin / "encoder.onnx"

    def refused(reason: str) -> None:
        with pytest.raises(BundleError, match=f"encoder.onnx: {reason}") as caught:
            open_bundle(twin)
        assert "sha256" not in str(caught.value)

    path.unlink()
    os.mkfifo(path)
    refused("cannot be read: it is not a regular file")
    for target in (secret, Path("/dev/zero")):
        path.unlink()
        path.symlink_to(target)
        refused("is a link that leaves the bundle")
    path.unlink()
    path.symlink_to(path)
    refused("cannot be read")
    path.unlink()
    path.mkdir()
    refused("cannot be read: it is not a regular file")


def test_a_manifest_that_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST_FILE)
    with pytest.raises(BundleError, match="not a regular file"):
        read_manifest(tmp_path)


def test_graphs_that_are_none_are_told_from_graphs(tmp_path: Path) -> None:
    rng, read = random.Random(4), 0
    path = tmp_path / "graph.onnx"
    content = (DEMO / "decoder.onnx").read_bytes()
    assert external_data(DEMO / "decoder.onnx") == {"decoder.onnx.data", "projector.onnx.data"}
    for _ in range(CASES):
        path.write_bytes(mutated_bytes(content, rng))
        try:
            external_data(path)
            read += 1
        except OnnxError:
            continue
    assert 0 < read < CASES


# --- tokenizers --------------------------------------------------------------------------------------------------


def test_a_changed_tokenizer_opens_or_is_refused(tmp_path: Path) -> None:
    opened, rng, path = 0, random.Random(5), tmp_path / "tokenizer.json"
    raw = json.loads((DEMO / "tokenizer" / "llm" / "tokenizer.json").read_bytes())
    # Of a long vocabulary the changes would all be in it.
    raw["model"]["vocab"] = raw["model"]["vocab"][:50]
    content = json.dumps(raw).encode()
    for case in range(CASES):
        if case % 2:
            path.write_bytes(mutated_bytes(content, rng))
        else:
            path.write_text(json.dumps(mutated_json(raw, rng)[1]), encoding="utf-8")
        try:
            _encode(open_tokenizer(path), "How are you?", special_tokens=True)
            opened += 1
        except BundleError:
            continue
    assert 0 < opened < CASES


# --- encodings and the cache -------------------------------------------------------------------------------------


def test_no_changed_byte_of_an_encoding_is_let_through(demo: Orchestrator, tmp_path: Path) -> None:
    rng, path = random.Random(6), tmp_path / "e.safetensors"
    demo.save_encoding(demo.encode(PROMPTS), path)
    content = path.read_bytes()
    for _ in range(CASES):
        path.write_bytes(mutated_bytes(content, rng))
        with pytest.raises(EncodingError):
            demo.load_encoding(path)


def test_an_encoding_with_a_right_checksum_is_refused_or_used(
    demo: Orchestrator, answers: list[str], tmp_path: Path
) -> None:
    rng, path = random.Random(7), tmp_path / "e.safetensors"
    demo.save_encoding(demo.encode(PROMPTS), path)
    tensors, about = read_tensors(path)
    for _ in range(CASES):
        changed, metadata = dict(tensors), dict(about)
        if rng.random() < 0.5:
            key = rng.choice(list(metadata))
            value = rng.choice(
                (*VALUES, "1" * 5000, "-1", "[" * 100_000, "[5, 5]", "[1000000000, 4]", "[0, 0]", "[true, 4]")
            )
            if rng.random() < 0.2 or value == "\ud800":
                del metadata[key]
            else:
                metadata[key] = value if isinstance(value, str) else json.dumps(value)
        else:
            name = rng.choice(list(changed))
            changed[name] = _other(changed[name], rng)
            if rng.random() < 0.2:
                del changed[name]
        write_tensors(path, changed, metadata, cached=True)
        try:
            encoding = demo.load_encoding(path)
        except EncodingError:
            continue
        written = [generation.text for generation in demo.generate_from(encoding)]
        same = all(np.array_equal(changed[name], tensors[name]) for name in tensors if name != "input_ids")
        assert not same or written == answers


def _other(array: Any, rng: random.Random) -> Any:
    match rng.randrange(7):
        case 0:
            return array[..., :-1]
        case 1:
            return array.astype(rng.choice(["float16", "float64", "int32", "int64", "float32"]))
        case 2:
            return array[None]
        case 3:
            return np.full_like(
                array, rng.choice([np.nan, np.inf]) if array.dtype.kind == "f" else rng.choice([-1, 2**62])
            )
        case 4:
            return np.concatenate([array, array])
        case 5:
            return np.zeros((0, 4), array.dtype)
        case _:
            return array * 2


@pytest.mark.filterwarnings("ignore:.*encoding cache:RuntimeWarning")
def test_a_changed_cache_file_is_a_miss(answers: list[str], tmp_path: Path) -> None:
    rng = random.Random(8)
    with llm2slm_export.load(DEMO, threads=1, cache=EncodingCache(directory=tmp_path)) as pair:
        pair.generate(PROMPTS)
        kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert len(kept) == len(PROMPTS)
        for _ in range(CASES // 4):
            path = rng.choice(list(kept))
            other = next(content for name, content in kept.items() if name != path)
            path.write_bytes(other if rng.random() < 0.1 else mutated_bytes(kept[path], rng))
            # What it has in memory would hide the file.
            pair._cache = EncodingCache(directory=tmp_path)
            generations = pair.generate(PROMPTS)
            assert [generation.text for generation in generations] == answers
            assert sum(bool(generation.cached) for generation in generations) == 1
            assert read_tensors(path)[1]["key"] == path.stem


def test_a_cache_file_is_bound_to_its_key_and_a_bad_one_is_told_and_removed(tmp_path: Path) -> None:
    row, key, other = {"x": np.ones((1, 2), np.float32)}, "a" * 64, "b" * 64
    EncodingCache(directory=tmp_path).store({key: row})
    file, moved = tmp_path / f"{key}.safetensors", tmp_path / f"{other}.safetensors"
    file.rename(moved)
    with pytest.warns(
        RuntimeWarning, match=f"{other}.safetensors .* cannot be used: it is the file of aaaaaaaaaaaa…; it is removed"
    ):
        assert EncodingCache(directory=tmp_path).find(other) is None
    assert not moved.exists()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(file)
        with pytest.warns(RuntimeWarning, match="not a regular file; it is removed"):
            assert EncodingCache(directory=tmp_path).find(key) is None
        assert not file.is_symlink()
        assert not file.exists()
    file.mkdir()
    with pytest.warns(RuntimeWarning, match="cannot be removed"):
        assert EncodingCache(directory=tmp_path).find(key) is None


def test_a_cache_without_permission_costs_no_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    cache = EncodingCache(directory=tmp_path)
    monkeypatch.setattr(Path, "lstat", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.warns(RuntimeWarning, match="Permission denied") as warned:
        assert cache.find("a" * 64) is None
    assert len(warned) == 1


def test_a_row_that_is_not_the_prompts_is_read_anew(answers: list[str], tmp_path: Path) -> None:
    with llm2slm_export.load(DEMO, threads=1, cache=EncodingCache(directory=tmp_path)) as pair:
        pair.generate(PROMPTS)
        first, *_ = sorted(tmp_path.iterdir())
        tensors, about = read_tensors(first)
        for change in (lambda a: a[..., :1, :], lambda a: a * np.nan, lambda a: a.astype(np.int64), lambda a: a[0]):
            write_tensors(first, {name: change(array) for name, array in tensors.items()}, about, cached=True)
            pair._cache = EncodingCache(directory=tmp_path)
            with pytest.warns(RuntimeWarning, match="cannot be used: the tensor"):
                assert [generation.text for generation in pair.generate(PROMPTS)] == answers


# --- requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 10**9},
        {"num_beams": 2**62},
        {"max_new_tokens": 10**9},
        {"num_return_sequences": 1025, "do_sample": True},
    ],
)
def test_requests_beyond_any_memory_are_refused_before_it_is_taken(demo: Orchestrator, options: dict[str, int]) -> None:
    with pytest.raises(Llm2SlmError, match="at most 1,0"):
        demo.generate(PROMPTS, **options)


def test_a_failing_graph_is_told_with_its_name_and_what_it_was_given(demo: Orchestrator) -> None:
    encoding = demo.encode(PROMPTS)
    backend = demo._backend
    assert backend is not None
    arrays = {name: array[:, :, :-1] for name, array in backend.arrays(encoding.conditioning).items()}
    with (
        warnings.catch_warnings(),
        pytest.raises(BundleError, match=r"cannot run decoder.onnx on cpu(.|\n)*given: 2 × 1"),
    ):
        backend.prefill(backend.conditioning(arrays, encoding.conditioning.attention_mask))


def test_text_of_a_file_is_shown_and_not_obeyed() -> None:
    error = Llm2SlmError("a\x1b]0;b\x07", "c\x9bd", "é\u202e\ud800", remedy="e\x00\n\tf")
    assert str(error) == "a\\x1b]0;b\\x07\n  - c\\x9bd\n  - é\\u202e\\ud800\n  → e\\x00\n\tf"
