"""The C++ library against the Python package: the same ids, texts, draws, files and refusals."""

import hashlib
import json
import lzma
import math
import os
import random
import re
import shutil
import stat
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm2slm_export
from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.bundle.manifest_file import stamped
from llm2slm_export.environment.versions import release
from llm2slm_export.inference.batching import batches
from llm2slm_export.inference.encodings.safetensors_file import read_tensors, write_tensors
from llm2slm_export.inference.generation import logits_processors
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.runtime.onnxruntime.decoder import capacity_for
from tests.support.cpp_library import (
    BUNDLE,
    CPP,
    ENCODING,
    OUT_OF_MEMORY,
    PROMPT,
    RUNTIME,
    USAGE,
    Failure,
    Program,
    build,
    check_same,
    edit,
    evidence_of,
    ort_headers,
    ort_library,
    refusal,
    run,
    sanitizers,
    sha256_digests,
    sha256_provider,
)
from tests.support.engine_bundle import with_engines
from tests.support.hostile import CASES, mutated_bytes, mutated_json
from tests.support.pages import BYTES, MEGABYTE, page_sizes, require_huge_pages
from tests.support.paths import DEMO, REPOSITORY

pytestmark = pytest.mark.slow
# Text that breaks tokenizers: combining marks, emoji joined and coloured, both directions, no spaces, controls, the widest code points.
HOSTILE = [
    "e\u0301 a\u0308\u0323 n\u0303 \u0301alone",
    "👨‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇫🇷",
    "שלום עליכם \u202eabc\u202c مرحبا بالعالم",
    "中文字符没有空格。日本語のテキスト、한국어 텍스트",
    "tab\tline\nreturn\rnull\x00bell\x07escape\x1b[0m\x7f\x85",
    "\ufeffzero\u200bwidth\u200d\u2060\ufffd\U0010ffff\ue000",
    "ﬁ ℌ ① ½ Å Å ẛ̣ ‐ ‑ – — … “quoted” «guillemets»",
    "   spaces   before  and after   ",
    "<pad> </s> <unk> <extra_id_0> {prompt} ▁▁",
    "Ａｂｃ ｶﾞ ᄒ\u1161\u11ab ไทย हिन्दी עִבְרִית",
]


@pytest.fixture(scope="module")
def shipped_build(cpp_build: Path) -> Path:
    """The build directory of a build that could be shipped: without sanitizers."""
    if found := sanitizers(cpp_build):
        pytest.skip(f"built with the sanitizers {found}: not a build to ship")
    return cpp_build


@pytest.fixture(scope="module")
def demo(driver: Program) -> Iterator[Orchestrator]:
    """The demo pair, opened in both: in the driver it is pair 0."""
    driver("open", bundle=str(DEMO), threads=1)
    with llm2slm_export.load(DEMO, threads=1) as pair:
        yield pair


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    lines = (REPOSITORY / "tests" / "data" / "held_out.tsv").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 200
    return [line.split("\t")[0] for line in lines[:200]]


# --- the demo pair -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, None])
def test_the_demo_answers_greedily_as_python_does(
    driver: Program, demo: Orchestrator, prompts: list[str], batch_size: int | None
) -> None:
    got = driver("generate", prompts=prompts, batch_size=batch_size or 0)
    check_same(demo.generate(prompts, batch_size=batch_size), got)
    assert all(g["timings_ms"]["total"] > 0 for g in got)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {
            "num_beams": 4,
            "num_return_sequences": 4,
            "length_penalty": 0.2,
            "early_stopping": "never",
            "output_scores": True,
        },
        {"num_beams": 3, "early_stopping": True, "max_new_tokens": 7},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "min_new_tokens": 12},
    ],
    ids=str,
)
def test_the_demo_searches_with_beams_as_python_does(
    driver: Program, demo: Orchestrator, prompts: list[str], options: dict[str, Any]
) -> None:
    prompts = prompts[::2]
    check_same(demo.generate(prompts, **options), driver("generate", prompts=prompts, options=options))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "seed": 1},
        {
            "do_sample": True,
            "seed": 2**63 + 12345,
            "num_return_sequences": 3,
            "temperature": 0.7,
            "output_scores": True,
        },
        {"do_sample": True, "seed": 3, "top_k": 0, "top_p": 0.8},
        {"do_sample": True, "seed": 4, "top_k": 0, "min_p": 0.05},
        {"do_sample": True, "seed": 5, "top_k": 100, "typical_p": 0.6, "top_p": 0.95},
        {
            "do_sample": True,
            "seed": 6,
            "num_beams": 3,
            "num_return_sequences": 2,
            "top_p": 0.9,
            "typical_p": 0.9,
            "min_p": 0.01,
        },
    ],
    ids=str,
)
def test_a_seed_draws_what_it_draws_in_python(
    driver: Program, demo: Orchestrator, prompts: list[str], options: dict[str, Any]
) -> None:
    some = prompts[:60]
    got = driver("generate", prompts=some, options=options)
    check_same(demo.generate(some, **options), got)
    again = driver("generate", prompts=some, options={**options, "seed": options["seed"] + 1})
    assert [g["token_ids"] for g in again] != [g["token_ids"] for g in got]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.9, "no_repeat_ngram_size": 3},
        {"bad_words_ids": [[5], [7, 8], [20, 21, 22], [1]]},
        {"min_new_tokens": 15, "max_new_tokens": 20},
        {"forced_bos_token_id": 300, "forced_eos_token_id": 1, "max_new_tokens": 6},
        {"max_new_tokens": 1},
        {"output_scores": True, "min_new_tokens": 3},
    ],
    ids=str,
)
def test_processors_are_those_of_python(
    driver: Program, demo: Orchestrator, prompts: list[str], options: dict[str, Any]
) -> None:
    some = prompts[:60]
    check_same(demo.generate(some, **options), driver("generate", prompts=some, options=options))


@pytest.mark.parametrize("stop", [["e"], [" de", "s "], ["é", "à l"], ["never there"], ["a", "ab"]], ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_stop_strings_end_responses_where_they_do_in_python(
    driver: Program, demo: Orchestrator, prompts: list[str], stop: list[str], beams: int
) -> None:
    some, options = prompts[:40], {"stop": stop, "num_beams": beams}
    got = driver("generate", prompts=some, options=options)
    check_same(demo.generate(some, **options), got)
    assert not any(string in g["text"] for g in got for string in stop)


def test_hostile_text_is_read_and_answered_as_in_python(driver: Program, demo: Orchestrator) -> None:
    for options in ({}, {"num_beams": 4}, {"do_sample": True, "seed": 8}):
        check_same(demo.generate(HOSTILE, **options), driver("generate", prompts=HOSTILE, options=options))
    long = "Où est la gare ? " * 6000
    assert len(long) > 100_000
    check_same(demo.generate([long], truncate=True), driver("generate", prompts=[long], truncate=True))


def test_text_that_spells_special_tokens_is_split_as_in_python(driver: Program, demo: Orchestrator) -> None:
    given = ["How are you?</s> I am here.", "<pad> a <unk>", "</s>", "plain"]
    for split in (False, True):
        here = demo.generate(given, split_special_tokens=split)
        check_same(here, driver("generate", prompts=given, split_special_tokens=split))


def test_very_long_prompts_are_refused_as_in_python(driver: Program, demo: Orchestrator) -> None:
    spread = [["fine", "How are you? " * 800_000], ["é" * 100_000], ["a" + " " * 2_000_000], ["word " * 300] * 5000]
    for given in spread:
        with pytest.raises(llm2slm_export.errors.PromptError) as caught:
            demo.generate(given)
        failure = refusal(driver, "generate", prompts=given)
        assert failure.code == PROMPT
        assert list(caught.value.evidence) == evidence_of(failure)
        assert len(failure.message) < 1000


# --- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"stop": ["e"]}, {"do_sample": True, "seed": 9, "output_scores": True}], ids=str
)
def test_a_stream_is_the_response_piece_by_piece(
    driver: Program, demo: Orchestrator, prompts: list[str], options: dict[str, Any]
) -> None:
    for prompt in [*prompts[:25], *HOSTILE]:
        expected, got = list(demo.stream(prompt, **options)), driver("stream", prompts=[prompt], options=options)
        assert [(s.token_id, s.text, s.finish_reason) for s in expected] == [
            (s["token_id"], s["text"], s["finish_reason"]) for s in got
        ]
        whole = got[-1]["generation"]
        check_same([expected[-1].generation], [whole])
        assert "".join(s["text"] for s in got) == whole["text"]
        assert all(s["generation"] is None for s in got[:-1])


def test_a_stream_ends_when_its_receiver_says_so_or_fails(driver: Program, demo: Orchestrator) -> None:
    assert len(driver("stream", prompts=["How are you today?"], most=2)) == 2
    assert "the receiver of steps failed" in refusal(driver, "stream", prompts=["How are you?"], throw=True).message
    assert driver("generate", prompts=["How are you?"])[0]["text"] == demo.generate(["How are you?"])[0].text


# --- other pairs ---------------------------------------------------------------------------------------------------

WORDS = ["hello", "Where is the station?", "a", "x" * 60, "Tell me a story about two dragons and a sheep."]


@pytest.mark.parametrize(
    ("slm", "fusion", "precision"),
    [
        ("llama", "prefix", "fp32"),
        ("llama", "add", "fp32"),
        ("gpt2", "add", "fp32"),
        ("gpt2", "replace", "int8"),
        ("t5", "cross_attention", "int4"),
    ],
)
def test_every_kind_of_pair_and_fusion_is_run_as_python_runs_it(
    driver: Program, bundles: Callable[..., tuple[Path, Path]], slm: str, fusion: str, precision: str
) -> None:
    _, bundle = bundles(slm, fusion, precision)
    driver("open", bundle=str(bundle), pair=1, threads=1)
    with llm2slm_export.load(bundle, threads=1) as pair:
        # 80 tokens: the cache grows, more than once.
        for options in (
            {"max_new_tokens": 80},
            {"num_beams": 3, "max_new_tokens": 70, "output_scores": True},
            {"do_sample": True, "seed": 11, "num_return_sequences": 2},
            {"forced_bos_token_id": 40, "repetition_penalty": 1.1},
        ):
            for size in (None, 1):
                expected = pair.generate(WORDS, batch_size=size, **options)
                check_same(expected, driver("generate", pair=1, prompts=WORDS, batch_size=size or 0, options=options))
        check_same(
            [list(pair.stream(WORDS[1]))[-1].generation],
            [driver("stream", pair=1, prompts=[WORDS[1]])[-1]["generation"]],
        )


def test_several_heads_share_an_encoder(
    driver: Program,
    bundles: Callable[..., tuple[Path, Path]],
    save_composition: Callable[..., Path],
    tmp_path: Path,
) -> None:
    from llm2slm_export.authoring.build import build_heads
    from llm2slm_export.authoring.models.pairing import load_composition

    first, _ = bundles("t5")
    second = save_composition("llama", llm=first / "llm")
    sources = {name: partial(load_composition, path) for name, path in {"fr": first, "es": second}.items()}
    build_heads(sources, tmp_path / "heads")
    about = driver("open", bundle=str(tmp_path / "heads"), pair=2, threads=1)
    assert (about["head"], about["heads"]) == ("fr", ["fr", "es"])
    driver("head", pair=2, name="es", **{"as": 3})
    driver("open", bundle=str(tmp_path / "heads"), pair=4, head="es", threads=1)
    with llm2slm_export.load(tmp_path / "heads", threads=1) as pair:
        check_same(pair.generate(WORDS), driver("generate", pair=2, prompts=WORDS))
        other = pair.head("es").generate(WORDS, num_beams=2)
        check_same(other, driver("generate", pair=4, prompts=WORDS, options={"num_beams": 2}))
        # The encoder lives as long as the last head.
        driver("close", pair=2)
        check_same(other, driver("generate", pair=3, prompts=WORDS, options={"num_beams": 2}))
    failure = refusal(driver, "open", bundle=str(tmp_path / "heads"), pair=5, head="de")
    assert failure.code == USAGE
    assert "its heads: fr, es" in failure.message
    # An encoding of one head is not another's.
    driver("encode", pair=4, encoding=2, prompts=WORDS)
    driver("open", bundle=str(tmp_path / "heads"), pair=5, threads=1)
    failure = refusal(driver, "generate_from", pair=5, encoding=2)
    assert failure.code == ENCODING
    assert "projector: this pair has" in failure.message


# --- encodings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["demo", "llama", "prefix"])
def test_encodings_pass_between_python_and_cpp(
    driver: Program, bundles: Callable[..., tuple[Path, Path]], tmp_path: Path, prompts: list[str], kind: str
) -> None:
    bundle = DEMO if kind == "demo" else bundles("llama", "prefix" if kind == "prefix" else "add")[1]
    some = prompts[:5] if kind == "demo" else WORDS
    driver("open", bundle=str(bundle), pair=6, threads=1)
    with llm2slm_export.load(bundle, threads=1) as pair:
        pair.save_encoding(pair.encode([*some, "y " * 300], truncate=True), tmp_path / "python")
        driver("load", pair=6, path=str(tmp_path / "python"))
        driver("encode", pair=6, encoding=1, prompts=[*some, "y " * 300], truncate=True)
        driver("save", pair=6, encoding=1, path=str(tmp_path / "cpp"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cpp", "python"]
        assert stat.S_IMODE((tmp_path / "cpp").stat().st_mode) == 0o600
        # What C++ wrote and Python reads, and the other way round; each twice, for an encoding stays as it was.
        for options in ({}, {"num_beams": 3}, {}):
            expected = pair.generate_from(pair.load_encoding(tmp_path / "cpp"), **options)
            assert expected[-1].dropped_tokens > 0
            check_same(expected, driver("generate_from", pair=6, options=options))
            check_same(expected, driver("generate_from", pair=6, encoding=1, options=options))


def test_reader_and_writer_hold_their_own_graphs(driver: Program, demo: Orchestrator, tmp_path: Path) -> None:
    driver("open", bundle=str(DEMO), pair=7, part="reader")
    driver("open", bundle=str(DEMO), pair=8, part="writer")
    driver("encode", pair=7, encoding=3, prompts=["How are you?"])
    driver("save", pair=7, encoding=3, path=str(tmp_path / "x"))
    driver("load", pair=8, encoding=4, path=str(tmp_path / "x"))
    check_same(demo.generate(["How are you?"]), driver("generate_from", pair=8, encoding=4))
    assert refusal(driver, "generate_from", pair=7, encoding=3).code == USAGE
    assert "decoder graph is not open" in refusal(driver, "generate_from", pair=7, encoding=3).message
    assert "encoder graph is not open" in refusal(driver, "generate", pair=8, prompts=["x"]).message


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if how == "bit":
        content[-3] ^= 1
    elif how == "short":
        del content[-10:]
    elif how == "empty":
        content.clear()
    elif how == "header length":
        content[:8] = (2**63).to_bytes(8, "little")
    elif how == "not JSON":
        content[8] = ord("x")
    else:
        metadata = header["__metadata__"]
        if how == "no checksum":
            del metadata["sha256"]
        elif how == "prompt":
            metadata["prompt_tokens"] = "[1]"
        elif how == "offsets":
            header["input_ids"]["data_offsets"] = [0, 2**62]
        elif how == "shape":
            header["input_ids"]["shape"] = [2**40, 2**40]
        text = json.dumps(header).encode()
        content[: 8 + length] = len(text).to_bytes(8, "little") + text
    path.write_bytes(content)


DAMAGE = ["bit", "short", "empty", "header length", "not JSON", "no checksum", "prompt", "offsets", "shape"]


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_encodings_are_refused(driver: Program, demo: Orchestrator, tmp_path: Path, how: str) -> None:
    path = tmp_path / "x.encoding"
    demo.save_encoding(demo.encode(["How are you?", "Fine."]), path)
    driver("load", path=str(path), encoding=5)
    damaged(path, how)
    failure = refusal(driver, "load", path=str(path), encoding=5)
    assert failure.code == ENCODING
    assert str(path) in failure.message
    assert "→ copy it again, or encode again" in failure.message


@pytest.mark.parametrize("how", ["header length", "no checksum", "shape"])
def test_damaged_encodings_are_refused_in_the_words_of_python(
    driver: Program, demo: Orchestrator, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "x.encoding"
    demo.save_encoding(demo.encode(["How are you?", "Fine."]), path)
    damaged(path, how)
    with pytest.raises(llm2slm_export.errors.EncodingError) as caught:
        demo.load_encoding(path)
    assert evidence_of(refusal(driver, "load", path=str(path), encoding=5)) == list(caught.value.evidence)


def test_a_header_that_is_not_json_is_named(driver: Program, demo: Orchestrator, tmp_path: Path) -> None:
    path = tmp_path / "x.encoding"
    demo.save_encoding(demo.encode(["How are you?", "Fine."]), path)
    damaged(path, "not JSON")
    with pytest.raises(llm2slm_export.errors.EncodingError, match="its header is not JSON: "):
        demo.load_encoding(path)
    assert "its header is not JSON: " in refusal(driver, "load", path=str(path), encoding=5).message


@pytest.mark.usefixtures("demo")
def test_other_files_and_places_are_refused(driver: Program, tmp_path: Path) -> None:
    assert "No such file" in refusal(driver, "load", path=str(tmp_path / "none")).message
    assert "directory" in refusal(driver, "load", path=str(tmp_path)).message
    driver("encode", prompts=["x"], encoding=6)
    for place in (tmp_path, tmp_path / "no" / "where"):
        assert refusal(driver, "save", encoding=6, path=str(place)).code == ENCODING
    assert list(tmp_path.iterdir()) == []


# --- logits that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"output_scores": True, "repetition_penalty": 1.1}, {"do_sample": True, "seed": 1, "num_return_sequences": 2},
     {"num_beams": 3}, {"num_beams": 2, "do_sample": True, "seed": 1}],
    ids=str,
)  # fmt: skip
def test_logits_that_are_not_finite_are_the_error_that_they_are_in_python(
    driver: Program, tmp_path: Path, options: dict[str, Any]
) -> None:
    driver("open", bundle=str(DEMO), pair=10, threads=1)
    with llm2slm_export.load(DEMO, threads=1) as pair:
        encoding = pair.encode(WORDS)
        for value in encoding.conditioning.tensors.values():
            array = value.numpy()
            # Finite, and with sums beyond float32.
            signs = np.random.default_rng(0).random(array[[1, 3]].shape) < 0.5
            array[[1, 3]] = np.where(signs, -3e38, 3e38)
        pair.save_encoding(encoding, tmp_path / "x")
        with pytest.raises(llm2slm_export.errors.BundleError) as caught:
            pair.generate_from(encoding, **options)
    driver("load", pair=10, encoding=10, path=str(tmp_path / "x"))
    failure = refusal(driver, "generate_from", pair=10, encoding=10, options=options)
    assert failure.code == BUNDLE
    assert failure.message == str(caught.value)
    assert "for new token 1." in failure.message
    found = evidence_of(failure)[:-1]
    assert [line.partition(":")[0] for line in found] == ["prompt 1", "prompt 3"]
    assert all(line.endswith("the projector's output is finite") for line in found)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "bundle")


def test_missing_and_altered_files_are_named_together(driver: Program, copy: Path) -> None:
    (copy / "encoder.onnx").unlink()
    data = bytearray((copy / "decoder.onnx.data").read_bytes())
    data[1000] ^= 1
    (copy / "decoder.onnx.data").write_bytes(data)
    (copy / "projector.onnx").write_bytes(b"short")
    failure = refusal(driver, "open", bundle=str(copy), pair=9)
    assert failure.code == BUNDLE
    assert "encoder.onnx: missing" in failure.message
    assert "decoder.onnx.data: expected sha256" in failure.message
    assert "projector.onnx: expected 20581 bytes, got 5" in failure.message
    with pytest.raises(llm2slm_export.errors.BundleError) as caught:
        llm2slm_export.load(copy)
    # Python's message, word for word.
    assert str(caught.value) == failure.message


def test_engines_are_nothing_to_a_library_that_runs_graphs(driver: Program, demo: Orchestrator, tmp_path: Path) -> None:
    with_engines(DEMO, tmp_path / "engines")
    driver("open", bundle=str(tmp_path / "engines"), pair=9)
    check_same(demo.generate(["How are you?"]), driver("generate", pair=9, prompts=["How are you?"]))
    driver("close", pair=9)


def test_manifests_that_cannot_be_read_are_refused(driver: Program, copy: Path, tmp_path: Path) -> None:
    assert "is not a bundle: it has no manifest.json" in refusal(driver, "open", bundle=str(tmp_path), pair=9).message
    original = (copy / "manifest.json").read_bytes()
    edit(copy, lambda m: m.update(schema_version=5, tool_versions={"llm2slm-export": "7.0"}))
    failure = refusal(driver, "open", bundle=str(copy), pair=9)
    assert failure.code == BUNDLE
    assert "schema version 5; this release reads up to 4" in failure.message
    assert "llm2slm-export 7.0" in failure.message

    def spoil(manifest: dict[str, Any]) -> None:
        manifest.update(schema_version=4, new_field=1, max_prompt_tokens="many")
        del manifest["special_ids"]["pad"]

    def contradict(manifest: dict[str, Any]) -> None:
        manifest["graphs"]["decoder"]["file"] = "../../decoder.onnx"
        manifest["shape"]["num_key_value_heads"] = -1

    for change, names in (
        (spoil, ("new_field", "max_prompt_tokens", "special_ids.pad")),
        (contradict, ("graphs.decoder.file", "shape.num_key_value_heads")),
    ):
        (copy / "manifest.json").write_bytes(original)
        edit(copy, change)
        failure = refusal(driver, "open", bundle=str(copy), pair=9)
        assert failure.code == BUNDLE
        for named in names:
            assert f"- {named}: " in failure.message
    (copy / "manifest.json").write_text("{no JSON")
    assert "cannot be read as JSON" in refusal(driver, "open", bundle=str(copy), pair=9).message
    (copy / "manifest.json").write_text("[" * 100_000)
    assert "cannot be read as JSON" in refusal(driver, "open", bundle=str(copy), pair=9).message


def test_graphs_of_float16_are_refused_with_the_precisions_that_are_taken(driver: Program, copy: Path) -> None:
    edit(copy, lambda m: m["graphs"]["decoder"].update(precision="fp16"))
    failure = refusal(driver, "open", bundle=str(copy), pair=9)
    assert failure.code == BUNDLE
    assert evidence_of(failure) == [
        "graphs.decoder.precision: must be one of 'fp32', 'bf16', 'int8', 'int4', 'w8a8', got 'fp16'"
    ]
    assert failure.message.endswith("→ build the bundle again with --precision fp32, or with bf16, int8 or int4")


def put(bundle: Path, name: str, content: bytes) -> None:
    """Write a file of a bundle and its entry in the manifest."""
    (bundle / name).write_bytes(content)
    entry = {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(bundle, lambda m: m.update(files=[*(e for e in m["files"] if e["path"] != name), entry]))


@pytest.mark.parametrize("threads", [-1, 100_000])
def test_threads_without_a_core_are_refused(driver: Program, threads: int) -> None:
    failure = refusal(driver, "open", bundle=str(DEMO), pair=11, threads=threads)
    assert failure.code == USAGE
    cores = len(os.sched_getaffinity(0))
    assert f"threads is {threads}." in failure.message
    assert f"cores that this process may use: {cores}" in failure.message


def test_graphs_that_are_none_are_refused(driver: Program, copy: Path) -> None:
    put(copy, "encoder.onnx", b"encoder" * 10)
    failure = refusal(driver, "open", bundle=str(copy), pair=9)
    assert (failure.code, "encoder.onnx is not an ONNX model" in failure.message) == (BUNDLE, True)
    put(copy, "encoder.onnx", b"\x08\x07")  # a model of IR version 7 without a graph
    edit(copy, lambda m: m["graphs"]["encoder"].update(data=[]))
    failure = refusal(driver, "open", bundle=str(copy), pair=9)
    assert (failure.code, "ONNX Runtime cannot load" in failure.message) == (BUNDLE, True)


def test_a_bundle_that_needs_a_newer_runtime_is_refused_by_its_version(driver: Program, copy: Path) -> None:
    edit(copy, lambda m: m["graphs"]["decoder"].update(minimum_runtime={"onnxruntime": "99.1"}))
    failure = refusal(driver, "open", bundle=str(copy), pair=9)
    assert failure.code == RUNTIME
    assert "decoder.onnx: needs onnxruntime 99.1, found 1." in failure.message


# --- strangers' bundles and encodings: the same verdict as Python's ------------------------------------------------


def set_at(*path: Any) -> Callable[[Any], Callable[[Path], None]]:
    """set_at("shape", "num_key_value_heads")(6): a change of a bundle's manifest."""

    def to(value: Any) -> Callable[[Path], None]:
        def change(manifest: dict[str, Any]) -> None:
            place: Any = manifest
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value

        return lambda bundle: edit(bundle, change)

    return to


def listed(bundle: Path, name: str) -> dict[str, Any]:
    manifest = json.loads((bundle / "manifest.json").read_text())
    return next(entry for entry in manifest["files"] if entry["path"] == name)


def without_files(bundle: Path) -> None:
    (bundle / "encoder.onnx.data").write_bytes(os.urandom(400_000))
    edit(bundle, lambda m: m.update(files=[]))


def unlisted(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(files=[e for e in m["files"] if e["path"] != "projector.onnx.data"]))


def also_listed(path: str, content: bytes = b"", **fields: Any) -> Callable[[Path], None]:
    entry = {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} | fields
    return lambda bundle: edit(bundle, lambda m: m["files"].append(entry))


def listed_twice(bundle: Path) -> None:
    edit(bundle, lambda m: m["files"].append(m["files"][0]))


def fifo(bundle: Path) -> None:
    os.mkfifo(bundle / "pipe")
    also_listed("pipe")(bundle)


def device(bundle: Path) -> None:
    (bundle / "zeros").symlink_to("/dev/zero")
    also_listed("zeros")(bundle)


def link_out(bundle: Path) -> None:
    shutil.move(bundle / "encoder.onnx.data", bundle.parent / "elsewhere")
    (bundle / "encoder.onnx.data").symlink_to(bundle.parent / "elsewhere")


def directory_link_out(bundle: Path) -> None:
    shutil.move(bundle / "tokenizer", bundle.parent / "tokenizer")
    (bundle / "tokenizer").symlink_to(bundle.parent / "tokenizer")


def link_in_a_circle(bundle: Path) -> None:
    (bundle / "encoder.onnx").unlink()
    (bundle / "encoder.onnx").symlink_to("encoder.onnx")


def other_weights(bundle: Path) -> None:
    """The graph names a file that is listed, but not as its data: `data` is not what runs."""
    put(bundle, "encoder.onnx.dat0", os.urandom(100))
    put(bundle, "encoder.onnx", (bundle / "encoder.onnx").read_bytes().replace(b".onnx.data", b".onnx.dat0", 1))


def weights_outside(bundle: Path) -> None:
    put(
        bundle,
        "encoder.onnx",
        (bundle / "encoder.onnx").read_bytes().replace(b"encoder.onnx.data", b"../../../er.onnx1", 1),
    )


def borrowed_identity(bundle: Path) -> None:
    """The encoder runs another graph, while its `data` names the demo's files."""
    put(bundle, "evil.onnx", (bundle / "encoder.onnx").read_bytes() + b"\x12\x01x")

    def change(manifest: dict[str, Any]) -> None:
        manifest["graphs"]["encoder"] |= {"file": "evil.onnx", "data": ["encoder.onnx", "encoder.onnx.data"]}

    edit(bundle, change)


def graphs_in_each_others_place(bundle: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        encoder, projector = manifest["graphs"]["encoder"], manifest["graphs"]["projector"]
        for name in ("file", "data"):
            encoder[name], projector[name] = projector[name], encoder[name]

    edit(bundle, change)


def altered(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"max_new_tokens": 96', b'"max_new_tokens": 95'))


def no_digest(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(re.sub(rb' "digest": "[0-9a-f]{64}",\n', b"", path.read_bytes()))


def replaced(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        path = bundle / "manifest.json"
        assert old in path.read_bytes()
        path.write_bytes(stamped(path.read_bytes().replace(old, new, 1)))

    return change


def head_with_another_encoder(bundle: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        head = {name: value for name, value in manifest.items() if name not in ("digest", "heads")}
        encoder = manifest["graphs"]["encoder"] | {"file": "projector.onnx", "data": ["projector.onnx.data"]}
        head |= {"head": "es", "files": [], "graphs": manifest["graphs"] | {"encoder": encoder}}
        manifest["heads"] = {"es": head}

    edit(bundle, change)


HOSTILE_BUNDLES: dict[str, Callable[[Path], None]] = {
    "no files": without_files,
    "a file that is not listed": unlisted,
    "a file that is listed twice": listed_twice,
    "a pipe": fifo,
    "a device": device,
    "a link out": link_out,
    "a directory's link out": directory_link_out,
    "a link in a circle": link_in_a_circle,
    "files above": also_listed("../elsewhere"),
    "an absolute path": also_listed("/etc/passwd"),
    "a path not in its shortest form": set_at("graphs", "encoder", "file")("./encoder.onnx"),
    "data above": set_at("graphs", "encoder", "data")(["../../encoder.onnx.data"]),
    "a tokenizer above": set_at("tokenizer", "slm")("../bundle/tokenizer/llm/tokenizer.json"),
    "a graph of another format": set_at("graphs", "encoder", "file")("encoder.onnx.data"),
    "weights that are not data": other_weights,
    "weights outside": weights_outside,
    "data that is not read": set_at("graphs", "encoder", "data")(["encoder.onnx.data", "projector.onnx.data"]),
    "another's identity": borrowed_identity,
    "graphs in each other's place": graphs_in_each_others_place,
    "no hash": set_at("files", 0, "sha256")("x" * 64),
    "altered": altered,
    "no digest": no_digest,
    "deep": replaced(b'"bad_words_ids": []', b'"bad_words_ids": ' + b"[" * 100_000 + b"]" * 100_000),
    "a number of 5000 digits": replaced(b'"max_prompt_tokens": 256', b'"max_prompt_tokens": ' + b"1" * 5000),
    "a name twice": replaced(b'"trained": true', b'"trained": true, "trained": true'),
    "NaN": replaced(b'"temperature": 1.0', b'"temperature": NaN'),
    "a schema that is no whole number": set_at("schema_version")(4.0),
    "no whole number": set_at("max_prompt_tokens")(256.0),
    "a number in quotes": set_at("max_prompt_tokens")("256"),
    "true for 1": set_at("shape", "num_hidden_layers")(True),
    "too many heads": set_at("shape", "num_key_value_heads")(6),
    "a huge layer count": set_at("shape", "num_hidden_layers")(2**40),
    "another vocabulary": set_at("shape", "vocab_size")(9000),
    "no state": set_at("cache", "state")([]),
    "another state": set_at("cache", "state", 3, "past", "axes")(["batch", 5, "capacity", 33]),
    "other inputs": set_at("graphs", "decoder", "inputs", 0, "name")("ids"),
    "other axes": set_at("graphs", "decoder", "inputs", 2, "axes")([1]),
    "no graphs": set_at("graphs")({}),
    "another graph": set_at("graphs", "evil")({}),
    "another fusion": set_at("fusion")("replace"),
    "no tokens": set_at("tokenizer", "slm_size")(0),
    "more tokens than rows": set_at("tokenizer", "slm_size")(8001),
    "no start": set_at("special_ids", "decoder_start")(None),
    "a start beyond the table": set_at("special_ids", "decoder_start")(8000),
    "an id of 2^62": set_at("special_ids", "pad")(2**62),
    "a negative id": set_at("special_ids", "eos")([-1]),
    "a milliard tokens": set_at("generation", "max_new_tokens")(10**9),
    "a milliard beams": set_at("generation", "num_beams")(10**9),
    "a word of no token": set_at("generation", "bad_words_ids")([[8000]]),
    "no place in the template": set_at("prompt_template")("hello"),
    "many places in the template": set_at("prompt_template")("{prompt}" * 200_000),
    "an escape in a version": set_at("tool_versions", "x")("\x1b]0;owned\x07"),
    "an escape in a name": set_at("tool_versions", "\x1b[2J")("1"),
    "a name that is a path": set_at("name")("../../escaped"),
    "a source that is none": set_at("sources", "llm")({"model": 1}),
    "engines that are none": set_at("engines")({"x": {}}),
    "a parity that is none": set_at("parity")({}),
    "a head with another encoder": head_with_another_encoder,
}


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize("how", HOSTILE_BUNDLES)
def test_a_strangers_bundle_is_refused_here_and_in_python(driver: Program, copy: Path, how: str) -> None:
    HOSTILE_BUNDLES[how](copy)
    failure = refusal(driver, "open", bundle=str(copy), pair=9)
    assert failure.code == BUNDLE
    assert "→" in failure.message
    with pytest.raises(llm2slm_export.errors.BundleError):
        llm2slm_export.load(copy)


@pytest.mark.usefixtures("demo")
def test_a_changed_manifest_is_read_as_in_python(driver: Program, copy: Path) -> None:
    rng, content = random.Random(1), (DEMO / "manifest.json").read_bytes()
    verdicts = set()
    for case in range(CASES // 2):
        if case % 2:
            (copy / "manifest.json").write_bytes(mutated_bytes(content, rng))
        else:
            changed = json.dumps(mutated_json(json.loads(content), rng)[1]).encode()
            with suppress(ValueError):  # without a place for a digest
                changed = stamped(changed)
            (copy / "manifest.json").write_bytes(changed)
        try:
            open_bundle(copy)
            python = 0
        except llm2slm_export.errors.BundleError:
            python = BUNDLE
        try:
            driver("open", bundle=str(copy), pair=9)
            cpp = 0
        except Failure as failure:
            cpp = failure.code
        assert cpp == python, (copy / "manifest.json").read_bytes()
        verdicts.add(cpp)
    assert verdicts == {0, BUNDLE}


def test_no_changed_byte_of_an_encoding_is_let_through(driver: Program, demo: Orchestrator, tmp_path: Path) -> None:
    rng, path = random.Random(2), tmp_path / "x"
    demo.save_encoding(demo.encode(["Yes.", "How are you?"]), path)
    content = path.read_bytes()
    for _ in range(CASES):
        path.write_bytes(mutated_bytes(content, rng))
        assert refusal(driver, "load", path=str(path), encoding=5).code == ENCODING


def floats(*shape: int, value: float = 0.5) -> Any:
    return np.full(shape, value, np.float32)


def numbers(*shape: int, value: int = 5) -> Any:
    return np.full(shape, value, np.int64)


KEY = "past_key_values.0.encoder.key"  # [batch, 5, memory, 32]: of two prompts of at most four tokens below
Change = Callable[[dict[str, Any], dict[str, str]], Any]


def with_metadata(**fields: str | None) -> Change:
    """A change of a file's metadata; None removes the entry."""

    def change(_: dict[str, Any], about: dict[str, str]) -> None:
        for name, value in fields.items():
            about.pop(name)
            if value is not None:
                about[name] = value

    return change


def holding(**tensors: Any) -> Change:
    """A change of a file's tensors; None removes the tensor."""

    def change(held: dict[str, Any], _: dict[str, str]) -> None:
        for name, value in tensors.items():
            held.pop(name, None)
            if value is not None:
                held[name] = value

    return change


HOSTILE_ENCODINGS: dict[str, Change] = {
    **{f"no {name}": with_metadata(**{name: None}) for name in
       ("format", "version", "bundle", "head", "encoder", "projector", "tokenizer", "prompt_tokens", "dropped_tokens")},
    **{f"version {value[:9]}": with_metadata(version=value) for value in ("x", "", "-1", "3", "1" * 5000)},
    **{f"prompt tokens {value[:12]}": with_metadata(prompt_tokens=value) for value in
       ("x", "[]", "5", '["3", "4"]', "[3.0, 4.0]", "[true, 4]", "[0, 4]", "[-3, 4]", "[1000000000, 4]", "[3, 4, 4]",
        "[" * 5000, "[null, 4]", "[3, 99999999999999999999]")},
    **{f"dropped tokens {value}": with_metadata(dropped_tokens=value) for value in ("x", "[]", "[0]", "[-1, 0]", '"00"')},
    "another encoder": with_metadata(encoder="0" * 64),
    "ids of another shape": holding(input_ids=numbers(2, 5)),
    "ids of another type": holding(input_ids=floats(2, 4)),
    "no ids": holding(input_ids=None),
    "a negative id": holding(input_ids=numbers(2, 4, value=-1)),
    "an id of 2^40": holding(input_ids=numbers(2, 4, value=2**40)),
    "no tensor": holding(**{KEY: None}),
    "another tensor": holding(other=floats(2, 5, 4, 32)),
    "a tensor of another shape": holding(**{KEY: floats(2, 5, 5, 32)}),
    "a tensor of another type": holding(**{KEY: numbers(2, 5, 4, 32)}),
    "a tensor without rank": holding(**{KEY: np.float32(1).reshape(())}),
    "NaN": holding(**{KEY: floats(2, 5, 4, 32, value=math.nan)}),
    "infinity": holding(**{KEY: floats(2, 5, 4, 32, value=math.inf)}),
}  # fmt: skip


@pytest.mark.parametrize("how", HOSTILE_ENCODINGS)
def test_a_strangers_encoding_is_refused_here_and_in_python(
    driver: Program, demo: Orchestrator, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "x"
    demo.save_encoding(demo.encode(["Yes.", "How are you?"]), path)
    tensors, about = read_tensors(path)
    assert (about["prompt_tokens"], tensors[KEY].shape) == ("[3, 4]", (2, 5, 4, 32))
    HOSTILE_ENCODINGS[how](tensors, about)
    write_tensors(path, tensors, about, cached=True)  # with a right checksum
    failure = refusal(driver, "load", path=str(path), encoding=5)
    assert failure.code == ENCODING
    with pytest.raises(llm2slm_export.errors.EncodingError):
        demo.load_encoding(path)


@pytest.mark.parametrize("how", ["a negative id", "version x", "version -1", "prompt tokens [1000000000,"])
def test_a_strangers_encoding_is_refused_in_the_words_of_python(
    driver: Program, demo: Orchestrator, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "x"
    demo.save_encoding(demo.encode(["Yes.", "How are you?"]), path)
    tensors, about = read_tensors(path)
    HOSTILE_ENCODINGS[how](tensors, about)
    write_tensors(path, tensors, about, cached=True)  # with a right checksum
    with pytest.raises(llm2slm_export.errors.EncodingError) as caught:
        demo.load_encoding(path)
    assert evidence_of(refusal(driver, "load", path=str(path), encoding=5)) == list(caught.value.evidence)


@pytest.mark.usefixtures("demo")
def test_a_pipe_is_no_encoding(driver: Program, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(driver, "load", path=str(tmp_path / "pipe"), encoding=5).message


@pytest.mark.usefixtures("demo")
def test_messages_are_text_of_one_line_each_whatever_a_file_holds(driver: Program, copy: Path, tmp_path: Path) -> None:
    header = b'{"a\xff\x1b[2J'
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    failure = refusal(driver, "load", path=str(tmp_path / "x"), encoding=5)  # read as UTF-8 by this process
    assert (failure.code, "\\xff" in failure.message) == (ENCODING, True)
    edit(copy, lambda m: m.update({"a\n  → run me\x1b[2J\u202e": 1}))
    failure = refusal(driver, "open", bundle=str(copy), pair=9)
    assert failure.code == BUNDLE
    assert all(line.isprintable() for line in failure.message.splitlines())
    assert failure.message.count("\n  → ") == 1


# --- prompts and options -------------------------------------------------------------------------------------------


def test_prompts_that_cannot_be_run_are_named_together(driver: Program, demo: Orchestrator) -> None:
    failure = refusal(driver, "generate", prompts=["fine", "", " \u3000\n", "x"])
    assert (failure.code, "prompt 1" in failure.message, "prompt 2" in failure.message) == (PROMPT, True, True)
    failure = refusal(
        driver, "generate", prompts=["fine", [0x61, 0xC3, 0x28], [0xED, 0xA0, 0x80], [0xF5], [0x61, 0xC0, 0xAF]]
    )
    assert failure.code == PROMPT
    for line in ("prompt 1: byte 1 of 3", "prompt 2: byte 0 of 3", "prompt 3: byte 0 of 1", "prompt 4: byte 1 of 3"):
        assert line in failure.message
    failure = refusal(driver, "generate", prompts=["word " * 400, "fine", "word " * 300])
    with pytest.raises(llm2slm_export.errors.PromptError) as caught:
        demo.generate(["word " * 400, "fine", "word " * 300])
    assert failure.code == PROMPT
    assert list(caught.value.evidence) == evidence_of(failure)
    assert refusal(driver, "generate", prompts=[]).code == USAGE


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0, "num_beams": 0, "temperature": -1}, ["max_new_tokens", "num_beams", "temperature"]),
        (
            {"max_new_tokens": 10**9, "num_beams": 2**62, "num_return_sequences": 2**62},
            [
                "max_new_tokens: must be a whole number, at least 1 and at most 1,000,000, got 1000000000",
                "num_beams: must be a whole number, at least 1 and at most 1,024 (1: no beam search), got",
                "num_return_sequences: must be a whole number, at least 1 and at most 1,024, got",
            ],
        ),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, ["min_new_tokens: 9 is above max_new_tokens, 3"]),
        ({"temperature": 0.5}, ["temperature: has no effect without do_sample"]),
        ({"seed": 3, "length_penalty": 2.0}, ["seed", "length_penalty"]),
        ({"num_return_sequences": 2}, ["num_return_sequences: 2 is above num_beams, 1; use sampling"]),
        ({"bad_words_ids": [[1], []]}, ["bad_words_ids"]),
        (
            {"bad_words_ids": [[9_000, 3]], "forced_bos_token_id": 8_000},
            ["bad_words_ids: 9000", "forced_bos_token_id: 8000"],
        ),
        ({"stop": [""]}, ["stop"]),
        ({"do_sample": True, "top_p": 1.5, "typical_p": 0.0, "min_p": -0.1}, ["top_p", "typical_p", "min_p"]),
        ({"bad_words_ids": [[i] for i in range(8000) if i != 1], "min_new_tokens": 1}, ["exclude every token"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_that_mean_nothing_are_named_together(
    driver: Program, demo: Orchestrator, options: Any, named: Any
) -> None:
    failure = refusal(driver, "generate", prompts=["x"], options=options)
    assert failure.code == USAGE
    for line in named:
        assert line in failure.message
    assert "→" in failure.message
    with pytest.raises(llm2slm_export.errors.UsageError):
        demo.generate(["x"], **options)


@pytest.mark.usefixtures("demo")
def test_what_cannot_be_streamed_is_refused(driver: Program) -> None:
    failure = refusal(driver, "stream", prompts=["x"], options={"num_beams": 2, "num_return_sequences": 2})
    assert failure.code == USAGE
    assert "num_beams is 2" in failure.message
    assert "num_return_sequences is 2" in failure.message


def test_positions_that_the_decoder_does_not_know_are_refused(
    driver: Program, bundles: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    bundle = shutil.copytree(bundles("gpt2")[1], tmp_path / "short")
    edit(bundle, lambda m: m.update(max_total_tokens=40))
    driver("open", bundle=str(bundle), pair=9, threads=1)
    with llm2slm_export.load(bundle, threads=1) as pair:
        for given in (["x" * 19, "x" * 21, "y" * 50],):
            with pytest.raises(llm2slm_export.errors.PromptError) as caught:
                pair.generate(given)
            failure = refusal(driver, "generate", pair=9, prompts=given)
            assert failure.code == PROMPT
            assert list(caught.value.evidence) == evidence_of(failure)
        check_same(pair.generate(given, truncate=True), driver("generate", pair=9, prompts=given, truncate=True))


# --- ONNX Runtime --------------------------------------------------------------------------------------------------


def test_onnx_runtime_is_found_where_it_is_named(cpp_build: Path, tmp_path: Path) -> None:
    program = cpp_build / "tests" / "llm2slm_driver"
    with Program(program, LLM2SLM_ORT_LIBRARY="/no/such/library.so") as driver:
        failure = refusal(driver, "open", bundle=str(DEMO))
        assert failure.code == RUNTIME
        assert "ONNX Runtime was not found" in failure.message
        assert "/no/such/library.so" in failure.message
        # An option comes before the variable.
        assert driver("open", bundle=str(DEMO), ort_library=str(ort_library()))["runtime_version"].startswith("1.")
    with Program(program, LLM2SLM_ORT_LIBRARY="") as driver:
        failure = refusal(driver, "open", bundle=str(DEMO))
        assert "the program itself: has no function OrtGetApiBase" in failure.message
        assert "libonnxruntime.so.1" in failure.message
        failure = refusal(driver, "open", bundle=str(DEMO), ort_library="libm.so.6")
        assert "so it is not ONNX Runtime" in failure.message
    # By the name that systems give it, as a package would install it.
    (tmp_path / "libonnxruntime.so.1").symlink_to(ort_library())
    with Program(program, LLM2SLM_ORT_LIBRARY="", LD_LIBRARY_PATH=str(tmp_path)) as driver:
        assert driver("open", bundle=str(DEMO))["name"] == "tatoeba-en-fr"
    # Loaded by the program already; a sanitizer's library, where there is one, would have to be before it.
    preloaded = {"LD_PRELOAD": str(ort_library()), "ASAN_OPTIONS": "verify_asan_link_order=0"}
    with Program(program, LLM2SLM_ORT_LIBRARY="", **preloaded) as driver:
        assert driver("open", bundle=str(DEMO))["name"] == "tatoeba-en-fr"


@pytest.mark.parametrize("version", ["1.10.0", "1.15.1", "1.16.0"])
def test_an_older_onnx_runtime_is_refused_by_its_version(cpp_build: Path, version: str) -> None:
    fake = cpp_build / "tests" / "libllm2slm_fake_ort.so"
    with Program(
        cpp_build / "tests" / "llm2slm_driver", LLM2SLM_ORT_LIBRARY=str(fake), FAKE_ORT_VERSION=version
    ) as driver:
        failure = refusal(driver, "open", bundle=str(DEMO))
    assert failure.code == RUNTIME
    assert f"ONNX Runtime {version} is too old: this library needs 1.16" in failure.message
    assert str(fake) in failure.message


def test_nothing_is_linked_against_onnx_runtime_and_nothing_else_is_shown(shipped_build: Path) -> None:
    library = shipped_build / "libllm2slm.so"
    needed = [line for line in run(["readelf", "-d", str(library)]).splitlines() if "NEEDED" in line]
    assert needed
    assert not any(name in line for line in needed for name in ("onnxruntime", "utf8proc", "pcre"))
    assert any("libcrypto" in line for line in needed) == (sha256_provider(shipped_build) == "openssl")
    shown = [line.split()[-1] for line in run(["nm", "-DC", "--defined-only", str(library)]).splitlines()]
    assert "llm2slm_generate" in shown
    foreign = [
        line
        for line in run(["nm", "-D", "--defined-only", str(library)]).splitlines()
        if "pcre2" in line or "utf8proc" in line
    ]
    assert foreign == []


# --- parts ---------------------------------------------------------------------------------------------------------


def test_what_is_new_and_filled_is_moved_into_huge_pages(inside: Program) -> None:
    require_huge_pages()
    made = inside.ask({"do": "huge_pages", "bytes": BYTES})
    assert page_sizes(made["new"], inside.pid)[1] >= BYTES // 4  # memory in one piece may run out
    assert page_sizes(made["old"], inside.pid)[1] == 0
    assert page_sizes(made["empty"], inside.pid)[0] < MEGABYTE


def test_random_numbers_are_numpys(inside: Program) -> None:
    for words in ([0], [1, 2, 3], [2**32, 0], [2**64 - 1, 17, 2**40], list(range(9))):
        generator = np.random.default_rng(words)
        drawn = inside.ask({"do": "uniform", "words": words, "count": 500})
        assert drawn == generator.random(500).tolist()
    words = [5, 6]
    drawn = inside.ask({"do": "exponential", "words": words, "count": 200_000})
    expected = np.random.default_rng(words).standard_exponential(200_000)
    # A few units in the last place, for tables that are computed; the order of draws is the same, or all later ones would differ.
    np.testing.assert_allclose(drawn, expected, rtol=1e-15)


def test_scores_are_numpys(inside: Program) -> None:
    rng = np.random.default_rng(0)
    warpers: dict[str, Any] = {
        "top_k": (logits_processors.keep_top_k, [1, 5, 300]), "top_p": (logits_processors.keep_top_p, [0.0, 0.3, 0.9, 0.999]),
        "min_p": (logits_processors.keep_min_p, [0.01, 0.3, 1.0]), "typical_p": (logits_processors.keep_typical_p, [0.1, 0.5, 0.95]),
    }  # fmt: skip
    for size in (3, 64, 257, 5000):
        for scale in (0.1, 1, 10):
            scores = (rng.standard_normal(size) * scale).astype(np.float32)
            scores[rng.integers(size, size=size // 3)] = np.float32(0.25)  # ties
            given = [float(score) for score in scores]
            assert inside.ask({"do": "argmax", "scores": given}) == int(scores.argmax())
            assert inside.ask({"do": "maximum", "scores": given}) == float(scores.max())
            for count in (1, 2, size // 2 + 1, size):
                got = inside.ask({"do": "highest", "scores": given, "count": count})
                assert got == logits_processors.highest(scores[None], count)[0].tolist()
            for name, of in (("softmax", logits_processors.softmax), ("log_softmax", logits_processors.log_softmax)):
                got = inside.ask({"do": name, "scores": given})
                np.testing.assert_allclose(got, of(scores[None])[0], rtol=2e-6, atol=1e-6)
            for name, (of, values) in warpers.items():
                for value in values:
                    for least in (1, 3):
                        got = inside.ask({"do": name, "scores": given, "value": value, "least": least})
                        kept = of(scores[None], value, least=least)[0] > -np.inf
                        assert [score is not None for score in got] == kept.tolist(), (name, value, least, size)


def test_a_nan_is_the_highest_score_wherever_it_is(inside: Program) -> None:
    for size in (1, 15, 16, 17, 100):
        scores = np.random.default_rng(size).standard_normal(size).astype(np.float32)
        for place in range(size):
            asked = {"scores": [float(score) for score in scores], "nan": place}
            assert inside.ask({"do": "maximum", **asked}) is None  # JSON's word for it
            assert inside.ask({"do": "argmax", **asked}) == place


def test_small_parts_are_pythons(inside: Program) -> None:
    import hashlib
    import unicodedata

    rng = np.random.default_rng(1)
    for size in (None, 1, 3, 16):
        for count in (1, 2, 40, 700):
            lengths = rng.integers(1, 200, size=count).tolist()
            assert inside.ask({"do": "batches", "lengths": lengths, "size": size or 0}) == list(
                batches(lengths, size=size)
            )
    assert [inside.ask({"do": "capacity", "needed": n}) for n in range(1, 3000, 7)] == [
        capacity_for(n) for n in range(1, 3000, 7)
    ]
    for length in (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000):
        assert inside.ask({"do": "sha256", "text": "a" * length}) == hashlib.sha256(b"a" * length).hexdigest()
    # But for characters that only one side's Unicode knows.
    known = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and unicodedata.category(chr(c)) != "Cn"]
    for text in (
        "it's",
        'say "it\'s"',
        "back\\slash",
        *("".join(known[at : at + 5000]) for at in range(0, len(known), 5000)),
    ):
        assert inside.ask({"do": "repr", "text": text}) == repr(text)
    for c in [*range(0x3100), 0xFEFF, 0x1F600]:
        assert inside.ask({"do": "blank", "text": chr(c)}) == (not chr(c).strip()), hex(c)
    for version, other in (("1.24.1rc2", "1.25"), ("1.9.0", "1.10.0"), ("1.32.0", "1.25"), ("2.0", "1.99")):
        assert inside.ask({"do": "older", "version": version, "other": other}) == (release(version) < release(other))


# --- SHA-256 -------------------------------------------------------------------------------------------------------

# Examples of FIPS 180-4.
SHA256_EXAMPLES = {
    b"": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    b"abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq": (
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
    ),
    b"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu": (
        "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"
    ),
    b"a" * 1_000_000: "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
}


@pytest.fixture(scope="module")
def openssl_build(cpp_build: Path) -> Path:
    """A build that hashes with OpenSSL."""
    if sha256_provider(cpp_build) != "openssl":
        pytest.skip("OpenSSL was not found when the library was configured: its SHA-256 is not tested")
    return cpp_build


@pytest.fixture(scope="module")
def own_sha256_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build that must not use OpenSSL, of the program that hashes."""
    return build(tmp_path_factory.mktemp("own"), "-DLLM2SLM_OPENSSL=OFF", targets=("llm2slm_sha256",))


@pytest.fixture(params=["openssl", "own"])
def sha256_build(request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A build directory, and the provider that it must use."""
    name = "openssl_build" if request.param == "openssl" else "own_sha256_build"
    return request.getfixturevalue(name), request.param


def test_sha256_is_that_of_the_standard(sha256_build: tuple[Path, str], tmp_path: Path) -> None:
    directory, provider = sha256_build
    for content, digest in SHA256_EXAMPLES.items():
        (tmp_path / "x").write_bytes(content)
        for piece in (1, 63, 64, 65, 1 << 20):
            assert sha256_digests(directory, tmp_path / "x", piece) == [(provider, digest), ("own", digest)]


def test_sha256_of_any_size_is_that_of_python(sha256_build: tuple[Path, str], tmp_path: Path) -> None:
    directory, provider = sha256_build
    rng = random.Random(3)
    for size in [*range(1, 130, 3), 4095, 4096, 1_000_003, *(rng.randrange(1, 5000) for _ in range(20))]:
        content = rng.randbytes(size)
        (tmp_path / "x").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        got = sha256_digests(directory, tmp_path / "x", rng.randrange(1, 200))
        assert got == [(provider, digest), ("own", digest)]


def test_the_build_summary_names_the_sha256_in_use(sha256_build: tuple[Path, str]) -> None:
    directory, provider = sha256_build
    summary = run(["cmake", str(directory)])
    assert ("SHA-256: OpenSSL " in summary, "SHA-256: own code" in summary) == (
        provider == "openssl",
        provider == "own",
    )


def test_sha256_is_computed_where_openssl_is_configured_without_it(openssl_build: Path, tmp_path: Path) -> None:
    lines = ["openssl_conf = all", "[all]", "providers = list", "[list]", "null = one", "[one]", "activate = 1"]
    (tmp_path / "openssl.cnf").write_text("\n".join(lines) + "\n")  # only the provider without algorithms
    (tmp_path / "x").write_bytes(b"abc")
    configuration = {"OPENSSL_CONF": str(tmp_path / "openssl.cnf")}
    expected = SHA256_EXAMPLES[b"abc"]
    assert [d for _, d in sha256_digests(openssl_build, tmp_path / "x", 64, **configuration)] == [expected] * 2
    with Program(openssl_build / "tests" / "llm2slm_driver", **configuration) as driver:
        assert driver("open", bundle=str(DEMO))["name"] == "tatoeba-en-fr"


# --- programs, and the installed library ---------------------------------------------------------------------------


def test_the_example_translates_and_says_what_is_wrong_in_a_line(cpp_build: Path, demo: Orchestrator) -> None:
    import subprocess

    environment = os.environ | {"LLM2SLM_ORT_LIBRARY": str(ort_library())}
    done = subprocess.run(
        [cpp_build / "translate", DEMO, "How are you?"], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == demo.generate(["How are you?"])[0].text + "\n"
    assert "tokens/s" in done.stderr
    for arguments in ([], ["/no/bundle", "x"], [str(DEMO), ""]):
        failed = subprocess.run(
            [cpp_build / "translate", *arguments], capture_output=True, text=True, check=False, env=environment
        )
        assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (1, "", 1)


def test_threads_share_a_pair(cpp_build: Path, prompts: list[str]) -> None:
    environment = os.environ | {"LLM2SLM_ORT_LIBRARY": str(ort_library())}
    output = run([str(cpp_build / "server_threads"), str(DEMO), "8", "40"], input="\n".join(prompts), env=environment)
    assert "0 failed, 0 threads differ from the first" in output


def test_the_example_is_small_and_memory_does_not_grow(shipped_build: Path, prompts: list[str], tmp_path: Path) -> None:
    run(["strip", "-o", str(tmp_path / "translate"), str(shipped_build / "translate")])
    assert (tmp_path / "translate").stat().st_size <= 2_300_000
    environment = os.environ | {"LLM2SLM_ORT_LIBRARY": str(ort_library())}
    program = str(shipped_build / "tests" / "llm2slm_heap_growth")
    grown = json.loads(run([program, str(DEMO), "1000"], input="\n".join(prompts), env=environment))
    before, after = grown["allocated_mb"]
    assert after - before < 0.5
    assert grown["resident_mb"][1] - grown["resident_mb"][0] < 4


@pytest.mark.parametrize("kind", ["static", "shared"])
def test_another_project_finds_and_uses_the_installed_library(shipped_build: Path, tmp_path: Path, kind: str) -> None:
    prefix, project = tmp_path / "prefix", tmp_path / "project"
    run(["cmake", "--install", str(shipped_build), "--prefix", str(prefix)])
    project.mkdir()
    # The programs of the headers' first comments, as written.
    for header, source in (("llm2slm.hpp", "program.cpp"), ("llm2slm.h", "program.c")):
        (project / source).write_text(program_in(CPP / "include" / "llm2slm" / header))
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(user LANGUAGES C CXX)\nfind_package(llm2slm 0.1 REQUIRED)\n"
        "foreach(language cpp c)\n  add_executable(user_${language} program.${language})\n"
        "  target_link_libraries(user_${language} PRIVATE llm2slm::llm2slm)\n"
        "  set_target_properties(user_${language} PROPERTIES LINKER_LANGUAGE CXX)\nendforeach()\n"
    )
    shared = "ON" if kind == "shared" else "OFF"
    run(
        [
            "cmake",
            "-S",
            str(project),
            "-B",
            str(tmp_path / "b"),
            f"-DCMAKE_PREFIX_PATH={prefix}",
            f"-DBUILD_SHARED_LIBS={shared}",
        ]
    )
    run(["cmake", "--build", str(tmp_path / "b")])
    environment = os.environ | {"LLM2SLM_ORT_LIBRARY": str(ort_library())}
    expected = run([str(shipped_build / "translate"), str(DEMO), "How are you?"], env=environment)
    for language in ("cpp", "c"):
        program = str(tmp_path / "b" / f"user_{language}")
        assert run([program, str(DEMO), "How are you?"], env=environment) == expected
        assert ("libllm2slm.so" in run(["readelf", "-d", program])) == (kind == "shared")


def test_pkg_config_finds_the_installed_library(shipped_build: Path, tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("no pkg-config")
    prefix = tmp_path / "prefix"
    run(["cmake", "--install", str(shipped_build), "--prefix", str(prefix)])
    (tmp_path / "program.cpp").write_text(program_in(CPP / "include" / "llm2slm" / "llm2slm.hpp"))
    library_dir = next(prefix.glob("**/libllm2slm.so")).parent
    paths = {
        "PKG_CONFIG_PATH": str(library_dir / "pkgconfig"),
        "LD_LIBRARY_PATH": str(library_dir),
        "LLM2SLM_ORT_LIBRARY": str(ort_library()),
    }
    environment = os.environ | paths
    flags = run(["pkg-config", "--define-prefix", "--cflags", "--libs", "llm2slm"], env=environment).split()
    compiler = os.environ.get("CXX", "c++")
    run([compiler, "-std=c++17", str(tmp_path / "program.cpp"), *flags, "-o", str(tmp_path / "program")])
    output = run([str(tmp_path / "program"), str(DEMO), "How are you?"], env=environment)
    assert output == run([str(shipped_build / "translate"), str(DEMO), "How are you?"], env=environment)


def program_in(header: Path) -> str:
    """The indented lines of a header's first comment, up to its last brace."""
    lines = header.read_text().splitlines()
    marks = ("//     ", " *     ")
    program = []
    for line in lines:
        if line.startswith(marks):
            program.append(line[len(marks[0]) :])
        elif program and not line.rstrip(" /*") and line.startswith(("//", " *")):
            program.append("")
        elif program:
            break
    text = "\n".join(program)
    return text[: text.rindex("\n}") + 3]


# --- the C ABI -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def c_abi(cpp_build: Path) -> Any:
    """The library through ctypes, as a binding of another language would use it."""
    import ctypes as c

    if sanitizers(cpp_build) and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("Python loads a sanitized library only where libasan.so is preloaded: docs/embedding.md")
    library = c.CDLL(str(cpp_build / "libllm2slm.so"))
    header = (CPP / "include" / "llm2slm" / "llm2slm.h").read_text()
    for name in (
        "version",
        "error_message",
        "pair_name",
        "pair_head_name",
        "pair_head_at",
        "pair_runtime_version",
    ):
        getattr(library, f"llm2slm_{name}").restype = c.c_char_p
    library.llm2slm_generations_text.restype = c.c_char_p
    library.llm2slm_generations_token_ids.restype = c.POINTER(c.c_int64)
    library.llm2slm_generations_logprobs.restype = c.POINTER(c.c_float)
    library.llm2slm_generations_number.restype = c.c_double
    for name in ("generations_count", "pair_max_prompt_tokens", "pair_head_count", "encoding_size"):
        getattr(library, f"llm2slm_{name}").restype = c.c_size_t
    assert (
        header.count("LLM2SLM_API ")
        == len(run(["nm", "-D", "--defined-only", str(cpp_build / "libllm2slm.so")]).split(" T llm2slm_")) - 1
    )
    return library


class Handle:
    """Calls of the C ABI that check the status and raise the error."""

    def __init__(self, library: Any) -> None:
        import ctypes as c

        self.c, self.library, self.error = c, library, c.c_void_p()

    def make(self, function: str, *arguments: Any) -> Any:
        made = self.c.c_void_p()
        status = getattr(self.library, f"llm2slm_{function}")(*arguments, self.c.byref(made), self.c.byref(self.error))
        self.check(status)
        return made

    def do(self, function: str, *arguments: Any) -> None:
        self.check(getattr(self.library, f"llm2slm_{function}")(*arguments, self.c.byref(self.error)))

    def check(self, status: int) -> None:
        if status:
            message = self.library.llm2slm_error_message(self.error).decode()
            assert self.library.llm2slm_error_status(self.error) == status
            self.library.llm2slm_error_free(self.error)
            raise Failure(status, message)
        assert not self.error


def test_the_c_abi_does_what_python_does(c_abi: Any, demo: Orchestrator, tmp_path: Path) -> None:
    import ctypes as c

    call, library = Handle(c_abi), c_abi
    assert library.llm2slm_version() == b"0.1.0"
    assert library.llm2slm_abi_version() == 4
    settings = call.make("pair_options_new")
    call.do("pair_options_set_int", settings, b"threads", c.c_int64(1))
    call.do("pair_options_set_string", settings, b"ort_library", str(ort_library()).encode())
    pair = call.make("pair_open", str(DEMO).encode(), settings)
    library.llm2slm_pair_options_free(settings)
    assert library.llm2slm_pair_name(pair) == b"tatoeba-en-fr"
    assert library.llm2slm_pair_max_prompt_tokens(pair) == 256
    assert (library.llm2slm_pair_head_count(pair), library.llm2slm_pair_head_at(pair, c.c_size_t(0))) == (
        1,
        b"main",
    )

    options = call.make("generation_options_new")
    for name, value in {"num_beams": 2, "num_return_sequences": 2, "output_scores": 1, "batch_size": 2}.items():
        call.do("generation_options_set_int", options, name.encode(), c.c_int64(value))
    call.do("generation_options_set_number", options, b"length_penalty", c.c_double(0.5))
    call.do("generation_options_set_string", options, b"early_stopping", b"never")
    call.do("generation_options_set_string", options, b"stop", "ê".encode())
    call.do("generation_options_add_bad_word", options, (c.c_int64 * 2)(20, 21), c.c_size_t(2))
    texts = ["How are you?", "It is nice to meet you.", "See you tomorrow."]
    given = (c.c_char_p * 3)(*(text.encode() for text in texts))
    responses = call.make("generate", pair, given, None, c.c_size_t(3), options)
    expected = demo.generate(
        texts, num_beams=2, num_return_sequences=2, output_scores=True, batch_size=2, length_penalty=0.5,
        early_stopping="never", stop=["ê"], bad_words_ids=[[20, 21]],
    )  # fmt: skip
    check_same(
        expected, [generation_of(library, responses, i) for i in range(library.llm2slm_generations_count(responses))]
    )
    library.llm2slm_generations_free(responses)
    library.llm2slm_generation_options_free(options)

    options = call.make("generation_options_new")
    call.do("generation_options_set_string", options, b"drafter", b"ngram")
    call.do("generation_options_set_int", options, b"num_draft_tokens", c.c_int64(3))
    responses = call.make("generate", pair, given, None, c.c_size_t(3), options)
    drafted = demo.generate(texts, drafter="ngram", num_draft_tokens=3)
    check_same(drafted, [generation_of(library, responses, i) for i in range(3)])
    for name in ("drafted_tokens", "accepted_tokens"):
        numbers = [library.llm2slm_generations_number(responses, c.c_size_t(i), name.encode()) for i in range(3)]
        assert numbers == [getattr(g, name) for g in drafted]
    call.do("generation_options_set_string", options, b"verifier", b"llm")
    with pytest.raises(Failure, match="with a verifier the pair itself drafts"):
        call.make("generate", pair, given, None, c.c_size_t(3), options)
    library.llm2slm_generations_free(responses)
    library.llm2slm_generation_options_free(options)

    encoding = call.make("encode", pair, given, None, c.c_size_t(3), None)
    call.do("encoding_save", pair, encoding, str(tmp_path / "x").encode())
    library.llm2slm_encoding_free(encoding)
    encoding = call.make("encoding_load", pair, str(tmp_path / "x").encode())
    assert library.llm2slm_encoding_size(encoding) == 3
    responses = call.make("generate_from", pair, encoding, None)
    check_same(demo.generate_from(demo.encode(texts)), [generation_of(library, responses, i) for i in range(3)])
    library.llm2slm_generations_free(responses)
    library.llm2slm_encoding_free(encoding)

    class Step(c.Structure):
        _fields_ = [
            ("struct_size", c.c_size_t), ("token_id", c.c_int64), ("text", c.c_char_p), ("text_length", c.c_size_t),
            ("finish_reason", c.c_int), ("logprob", c.c_float),
        ]  # fmt: skip

    pieces: list[bytes] = []

    def on_step(step: Any, user: int) -> int:
        assert (step.contents.struct_size, user) == (c.sizeof(Step), 42)
        pieces.append(step.contents.text)
        return 1

    callback = c.CFUNCTYPE(c.c_int, c.POINTER(Step), c.c_void_p)(on_step)
    call.do("stream", pair, texts[0].encode(), c.c_size_t(2**64 - 1), None, callback, c.c_void_p(42))
    assert b"".join(pieces).decode() == demo.generate(texts[:1])[0].text
    library.llm2slm_pair_free(pair)


def generation_of(library: Any, responses: Any, index: int) -> dict[str, Any]:
    import ctypes as c

    at, count = c.c_size_t(index), c.c_size_t()
    number = {
        name: library.llm2slm_generations_number(responses, at, name.encode())
        for name in ("prompt_tokens", "dropped_tokens", "batch", "sequence", "score", "decode")
    }
    assert number["decode"] >= 0
    ids = library.llm2slm_generations_token_ids(responses, at, c.byref(count))
    token_ids = ids[: count.value]
    logprobs = library.llm2slm_generations_logprobs(responses, at, c.byref(count))
    return {
        **{name: int(value) for name, value in number.items() if name not in ("score", "decode")},
        "score": None if math.isnan(number["score"]) else number["score"],
        "text": library.llm2slm_generations_text(responses, at, None).decode(),
        "token_ids": token_ids,
        "finish_reason": {1: "stop", 2: "length"}[library.llm2slm_generations_finish_reason(responses, at)],
        "token_logprobs": logprobs[: count.value] if logprobs else [],
    }


def test_null_and_nonsense_are_errors_of_the_c_abi(c_abi: Any) -> None:
    import ctypes as c

    library, call, made, error = c_abi, Handle(c_abi), c.c_void_p(), c.c_void_p()
    null, one = None, c.c_size_t(1)
    calls: dict[str, tuple[Any, ...]] = {
        "pair_options_new": (null,),
        "pair_options_set_int": (null, b"threads", c.c_int64(1)),
        "pair_options_set_string": (null, b"head", b"x"),
        "pair_options_set_ort_api_base": (null, null),
        "generation_options_new": (null,),
        "generation_options_set_int": (null, b"top_k", c.c_int64(1)),
        "generation_options_set_number": (null, b"top_p", c.c_double(1)),
        "generation_options_set_string": (null, b"stop", b"x"),
        "generation_options_add_bad_word": (null, null, one),
        "pair_open": (null, null, c.byref(made)),
        "pair_head": (null, b"x", c.byref(made)),
        "generate": (null, null, null, one, null, c.byref(made)),
        "stream": (null, b"x", one, null, null, null),
        "encode": (null, null, null, one, null, c.byref(made)),
        "generate_from": (null, null, null, c.byref(made)),
        "encoding_save": (null, null, b"x"),
        "encoding_load": (null, b"x", c.byref(made)),
    }
    for name, arguments in calls.items():
        function = getattr(library, f"llm2slm_{name}")
        assert function(*arguments, c.byref(error)) == USAGE, name
        assert "is NULL" in library.llm2slm_error_message(error).decode(), name
        library.llm2slm_error_free(error)
        assert function(*arguments, None) == USAGE, name
        assert not made
    for name in ("pair", "pair_options", "generation_options", "generations", "encoding", "error"):
        getattr(library, f"llm2slm_{name}_free")(None)
    assert library.llm2slm_error_status(None) == 0
    assert library.llm2slm_pair_name(None) is None
    assert library.llm2slm_generations_text(None, one, None) is None
    assert math.isnan(library.llm2slm_generations_number(None, one, b"score"))

    options = call.make("generation_options_new")
    for function, name, value in (
        ("set_int", b"temperature", c.c_int64(1)),
        ("set_number", b"top_k", c.c_double(1)),
        ("set_string", b"nothing", b"x"),
        ("set_string", b"early_stopping", b"perhaps"),
        ("set_string", b"drafter", b"oracle"),
        ("set_int", b"do_sample", c.c_int64(2)),
        ("set_int", b"seed", c.c_int64(-1)),
    ):
        with pytest.raises(Failure) as caught:
            call.do(f"generation_options_{function}", options, name, value)
        assert (caught.value.code, name.decode() in caught.value.message) == (USAGE, True)
    library.llm2slm_generation_options_free(options)
    with pytest.raises(Failure, match="is not a bundle") as caught:
        call.make("pair_open", b"/no/such/bundle", ort_settings(call))
    assert caught.value.code == BUNDLE


def test_memory_that_runs_out_is_an_error_and_the_pair_goes_on(cpp_build: Path, c_abi: Any, demo: Orchestrator) -> None:
    import ctypes as c
    import resource

    if sanitizers(cpp_build):
        pytest.skip("AddressSanitizer's operator new ends the program where there is no memory")
    call, library = Handle(c_abi), c_abi
    pair = call.make("pair_open", str(DEMO).encode(), ort_settings(call))
    prompt = (c.c_char_p * 1)(b"How are you?")
    options = call.make("generation_options_new")
    call.do("generation_options_set_int", options, b"num_beams", c.c_int64(1024))
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        # Less than what the scores of so many beams take.
        resource.setrlimit(resource.RLIMIT_AS, (taken + 5_000_000, before[1]))
        with pytest.raises(Failure) as caught:
            call.make("generate", pair, prompt, None, c.c_size_t(1), options)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert caught.value.code == OUT_OF_MEMORY
    assert "→" in caught.value.message
    library.llm2slm_generation_options_free(options)
    responses = call.make("generate", pair, prompt, None, c.c_size_t(1), None)
    assert generation_of(library, responses, 0)["text"] == demo.generate(["How are you?"])[0].text
    library.llm2slm_generations_free(responses)
    library.llm2slm_pair_free(pair)


def test_a_host_gives_its_own_onnx_runtime(c_abi: Any, demo: Orchestrator) -> None:
    import ctypes as c

    runtime = c.CDLL(str(ort_library()))
    runtime.OrtGetApiBase.restype = c.c_void_p
    call, prompt = Handle(c_abi), (c.c_char_p * 1)(b"How are you?")
    settings = call.make("pair_options_new")
    call.do("pair_options_set_ort_api_base", settings, c.c_void_p(runtime.OrtGetApiBase()))
    # Opened and closed again and again, beside Python's sessions, which go on.
    for _ in range(3):
        pair = call.make("pair_open", str(DEMO).encode(), settings)
        responses = call.make("generate", pair, prompt, None, c.c_size_t(1), None)
        assert generation_of(c_abi, responses, 0)["text"] == demo.generate(["How are you?"])[0].text
        c_abi.llm2slm_generations_free(responses)
        c_abi.llm2slm_pair_free(pair)
    c_abi.llm2slm_pair_options_free(settings)


def ort_settings(call: Handle) -> Any:
    settings = call.make("pair_options_new")
    call.do("pair_options_set_string", settings, b"ort_library", str(ort_library()).encode())
    return settings


# Inputs that fuzzing found, by target: each is replayed.
CORPORA = {"manifest": 335, "encoding": 184, "tokenizer": 433}


def unpacked(target: str, directory: Path) -> list[Path]:
    """The files of a fuzz target's corpus, in a new directory."""
    directory.mkdir()
    with tarfile.open(CPP / "fuzz" / "corpus" / f"{target}.tar.xz") as archive:
        # Python 3.11.3 and older have no filter of what is extracted, and newer ones warn without one.
        for member in archive:
            content = archive.extractfile(member)
            if content is not None:
                (directory / Path(member.name).name).write_bytes(content.read())
    return sorted(directory.iterdir())


@pytest.mark.parametrize("target", CORPORA)
def test_what_fuzzing_found_is_read_or_refused(cpp_build: Path, tmp_path: Path, target: str) -> None:
    files = unpacked(target, tmp_path / "corpus")
    environment = {**os.environ, "LLM2SLM_FUZZ_BUNDLE": str(DEMO)}
    printed = run([str(cpp_build / "tests" / f"llm2slm_replay_{target}"), str(tmp_path / "corpus")], env=environment)
    assert sorted(printed.splitlines()) == [str(path) for path in files]
    assert len(files) == CORPORA[target]


@pytest.mark.parametrize("target", CORPORA)
def test_the_documented_command_packs_the_same_archive(tmp_path: Path, target: str) -> None:
    unpacked(target, tmp_path / "corpus")
    run([sys.executable, str(CPP / "tools" / "pack_corpus.py"), str(tmp_path / "corpus"), str(tmp_path / "x.tar.xz")])
    packed, shipped = tmp_path / "x.tar.xz", CPP / "fuzz" / "corpus" / f"{target}.tar.xz"
    # Not the compressed bytes: they may change with liblzma.
    assert lzma.decompress(packed.read_bytes()) == lzma.decompress(shipped.read_bytes())


def test_headers_are_c_and_every_public_header_stands_alone(tmp_path: Path) -> None:
    if ort_headers() is None:
        pytest.skip("no ONNX Runtime headers")
    (tmp_path / "a.c").write_text("#include <llm2slm/llm2slm.h>\n")
    (tmp_path / "a.cpp").write_text("#include <llm2slm/llm2slm.hpp>\n#include <llm2slm/llm2slm.h>\n")
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", f"-I{CPP / 'include'}"]
    run([os.environ.get("CC", "cc"), "-std=c99", *strict, str(tmp_path / "a.c")])
    run([os.environ.get("CXX", "c++"), "-std=c++17", *strict, str(tmp_path / "a.cpp")])
