"""Encodings that outlive a call: in files, in a cache, shared by heads; and what is refused of them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm2slm_export.bundle.manifest import FileEntry
from llm2slm_export.contract import projector_spec
from llm2slm_export.errors import EncodingError, UsageError
from llm2slm_export.files.atomic import cached_file
from llm2slm_export.inference.encodings.cache import EncodingCache
from llm2slm_export.inference.encodings.encoding import EncodingIdentity, join_rows, prompt_mask, split_rows
from llm2slm_export.inference.orchestrator import Orchestrator, load
from llm2slm_export.inference.runtime.backend import context_mask
from tests.support.toy_pair import SHAPE, ids_of, make_pair, toy_of

SCRIPTS = {"a": "alpha</s>", "b": "be</s>", "c": "ciao</s>"}
PROMPTS = ["a", "bbb", "cc"]


@pytest.fixture
def pair(tmp_path: Path) -> Orchestrator:
    return make_pair(tmp_path, SCRIPTS)


def other_pair(directory: Path, **hashes: str) -> Orchestrator:
    """A pair of which some graphs are others."""
    names = {"encoder": "encoder", "projector": "projector", "decoder": "decoder"} | hashes
    files = tuple(FileEntry(path=f"{name}.onnx", bytes=1, sha256=sha256) for name, sha256 in names.items())
    return make_pair(directory, SCRIPTS, files=files)


def texts(generations: Any) -> list[str]:
    return [generation.text for generation in generations]


# --- files ---------------------------------------------------------------------------------------------------------


def test_an_encoding_comes_back_from_its_file(pair: Orchestrator, tmp_path: Path) -> None:
    encoding = pair.encode([*PROMPTS, "c" * 20], truncate=True)
    pair.save_encoding(encoding, tmp_path / "x.encoding")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    toy_of(pair).calls.clear()
    loaded = pair.load_encoding(str(tmp_path / "x.encoding"))
    assert texts(pair.generate_from(loaded)) == ["alpha", "be", "ciao", "ciao"]
    assert toy_of(pair).calls[0] == "prefill"
    assert loaded.prompt_tokens == encoding.prompt_tokens == (2, 4, 3, 12)
    assert loaded.dropped_tokens == (0, 0, 0, 9)
    assert loaded.identity == encoding.identity
    np.testing.assert_array_equal(loaded.input_ids, encoding.input_ids)
    np.testing.assert_array_equal(loaded.attention_mask, encoding.attention_mask)
    assert set(loaded.timings_ms.values()) == {0.0}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"encoder": "new"}, ["encoder"]),
        ({"projector": "new"}, ["projector"]),
        ({"encoder": "new", "projector": "new"}, ["encoder", "projector"]),
        ({"decoder": "new"}, []),
    ],
)
def test_what_another_pair_made_is_refused_by_what_differs(
    pair: Orchestrator, tmp_path: Path, changed: dict[str, str], named: list[str]
) -> None:
    encoding, path = pair.encode(PROMPTS), tmp_path / "x.encoding"
    pair.save_encoding(encoding, path)
    (tmp_path / "other").mkdir()
    other = other_pair(tmp_path / "other", **changed)
    if not named:  # another decoder behind the same encoder can use its encodings
        assert texts(other.generate_from(encoding)) == texts(other.generate_from(other.load_encoding(path)))
        return
    for call in (
        lambda: other.generate_from(encoding),
        lambda: other.load_encoding(path),
        lambda: other.save_encoding(encoding, path),
    ):
        with pytest.raises(EncodingError, match="belongs to another pair") as error:
            call()
        assert [line.split(":")[0] for line in error.value.evidence] == named
        mine = getattr(EncodingIdentity.of(other.manifest), named[0])[:12]
        theirs = getattr(encoding.identity, named[0])[:12]
        assert mine in error.value.evidence[0]
        assert theirs in error.value.evidence[0]
        assert mine != theirs


def test_another_template_or_tokenizer_is_another_encoder(tmp_path: Path) -> None:
    made = {EncodingIdentity.of(make_pair(tmp_path, {}, **changes).manifest).tokenizer for changes in (
        {}, {"prompt_template": "x {prompt}"}, {"files": (FileEntry(path="tokenizer.json", bytes=1, sha256="new"),)},
    )}  # fmt: skip
    assert len(made) == 3


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "incomplete"),
        (lambda path: path.write_bytes(path.read_bytes()[:5]), "header"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x07"), "expected sha256"),
        (lambda path: path.write_bytes(b"PK\x03\x04 something else altogether"), "header"),
        (lambda path: save_file({"x": np.zeros(3)}, path), "this package did not write it"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
        (
            lambda path: path.write_bytes(b"\xff" * 9),
            f"its header is declared as {2**64 - 1} bytes; at most 4000000 are",
        ),
    ],
    ids=[
        "missing",
        "truncated",
        "very truncated",
        "flipped",
        "foreign",
        "foreign safetensors",
        "directory",
        "long header",
    ],
)
def test_files_that_are_no_encoding(pair: Orchestrator, tmp_path: Path, damage: Any, reason: str) -> None:
    path = tmp_path / "x.encoding"
    pair.save_encoding(pair.encode(PROMPTS), path)
    damage(path)
    with pytest.raises(EncodingError, match=reason) as error:
        pair.load_encoding(path)
    assert str(path) in error.value.fact


def test_a_changed_header_is_damage_too(pair: Orchestrator, tmp_path: Path) -> None:
    path = tmp_path / "x.encoding"
    pair.save_encoding(pair.encode(PROMPTS), path)
    raw = path.read_bytes()
    assert raw.count(b"[2, 4, 3]") == 1
    path.write_bytes(raw.replace(b"[2, 4, 3]", b"[2, 3, 3]"))
    with pytest.raises(EncodingError, match="expected sha256"):
        pair.load_encoding(path)


def test_a_cached_row_is_no_encoding(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, SCRIPTS, cache=EncodingCache(directory=tmp_path / "kept"))
    pair.encode(["a"])
    (path,) = (tmp_path / "kept").iterdir()
    with pytest.raises(EncodingError, match="is not an encoding"):
        pair.load_encoding(path)


# --- cache ---------------------------------------------------------------------------------------------------------


def test_only_prompts_that_are_missing_are_read(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, SCRIPTS, cache=EncodingCache())
    plain = make_pair(tmp_path, SCRIPTS)
    first = pair.encode(["bbb", "a", "a"])
    assert toy_of(pair).read == [[[*ids_of("bbb"), 1], [*ids_of("a"), 1]]]  # each once
    assert first.cached == (False, False, False)
    toy_of(pair).read.clear()
    encoding = pair.encode(["a", "cc", "bbb"])
    assert toy_of(pair).read == [[[*ids_of("cc"), 1]]]
    assert encoding.cached == (True, False, True)
    expected = plain.encode(["a", "cc", "bbb"])
    assert plain.encode(["a"]).cached == ()
    for name, tensor in expected.conditioning.tensors.items():
        np.testing.assert_array_equal(encoding.conditioning.tensors[name], tensor)
    np.testing.assert_array_equal(encoding.conditioning.attention_mask, expected.conditioning.attention_mask)
    toy_of(pair).read.clear()
    generations = pair.generate(["cc", "a"])
    assert texts(generations) == ["ciao", "alpha"]
    assert [g.cached for g in generations] == [True, True]
    assert [g.cached for g in plain.generate(["cc"])] == [None]
    assert toy_of(pair).read == []
    timings = generations[0].timings_ms
    assert list(timings) == ["tokenize", "cache", "encode", "project", "prefill", "decode", "total"]
    assert timings["encode"] == timings["project"] == 0.0
    assert timings["total"] == pytest.approx(sum(timings.values()) - timings["total"])


def test_a_cut_prompt_is_known_by_the_ids_really_read(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, SCRIPTS, cache=EncodingCache())
    pair.encode(["a" * 30], truncate=True)
    encoding = pair.encode(["a" * 20, "a" * 11], truncate=True)
    assert encoding.cached == (True, True)
    assert encoding.dropped_tokens == (9, 0)


def test_two_pairs_share_a_cache_and_not_its_rows(tmp_path: Path) -> None:
    cache = EncodingCache()
    one = make_pair(tmp_path, SCRIPTS, cache=cache)
    two = make_pair(tmp_path, SCRIPTS, cache=cache, prompt_template="{prompt} ")
    three = make_pair(tmp_path, SCRIPTS, cache=cache)
    one.encode(["a "])
    assert two.encode(["a"]).cached == (False,)  # the same ids, from another encoder
    assert three.encode(["a "]).cached == (True,)


def row(size: int) -> dict[str, Any]:
    return {"x": np.arange(size, dtype=np.float32)}


def test_memory_is_capped_and_what_was_not_used_for_longest_goes() -> None:
    cache = EncodingCache(max_bytes=1000)
    cache.store({"1": row(100), "2": row(100)})
    assert cache.find("1") is not None
    cache.store({"3": row(100)})
    assert [key for key in "123" if cache.find(key) is not None] == ["1", "3"]
    assert cache.bytes == 800
    cache.store({"4": row(251)})  # larger than the cache
    assert [key for key in "1234" if cache.find(key) is not None] == ["1", "3"]
    with pytest.raises(UsageError, match="max_bytes is 0"):
        EncodingCache(max_bytes=0)


def test_the_directory_is_capped_by_use_and_foreign_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine" * 1000)
    keys = [f"{number:064x}" for number in range(4)]
    size = 700  # a row of 400 bytes, and its header
    for index, key in enumerate(keys[:3]):
        EncodingCache(max_bytes=3 * size, directory=tmp_path).store({key: row(100)})
        os.utime(tmp_path / f"{key}.safetensors", (index, index))
    assert EncodingCache(max_bytes=3 * size, directory=tmp_path).find(keys[0]) is not None  # used: now the newest
    abandoned = tmp_path / f".{keys[0]}.safetensors.partial-0123456789abcdef"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    (abandoned / "new").write_bytes(b"half")
    with cached_file(tmp_path / f"{keys[1]}.safetensors") as unfinished:
        EncodingCache(max_bytes=3 * size, directory=tmp_path).store({keys[3]: row(100)})
        left = {path.name for path in tmp_path.iterdir()}
        unfinished.touch()
    (tmp_path / f"{keys[1]}.safetensors").unlink()
    assert left == {"notes.txt", unfinished.parent.name, *(f"{keys[index]}.safetensors" for index in (0, 2, 3))}
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 3 * size


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-3], lambda raw: raw[:-1] + b"\x07", lambda _: b"", lambda _: b"not tensors" * 9]
)
def test_a_damaged_file_is_a_miss_and_is_removed(tmp_path: Path, damage: Any) -> None:
    make_pair(tmp_path, SCRIPTS, cache=EncodingCache(directory=tmp_path / "kept")).encode(["a"])
    (path,) = (tmp_path / "kept").iterdir()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    with pytest.warns(RuntimeWarning, match="cannot be used: .*; it is removed"):
        assert EncodingCache(directory=tmp_path / "kept").find(path.stem) is None
    assert not path.exists()
    pair = make_pair(tmp_path, SCRIPTS, cache=EncodingCache(directory=tmp_path / "kept"))
    assert pair.encode(["a"]).cached == (False,)
    assert load_file(path).keys() == {"past_key_values.0.encoder.key", "past_key_values.0.encoder.value"}


# --- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slm_kind", ["encoder-decoder", "decoder-only"])
@pytest.mark.parametrize("fusion", ["add", "prefix"])
def test_rows_are_cut_out_and_put_together_where_the_decoder_wants_them(slm_kind: Any, fusion: Any) -> None:
    shape, tokens = replace(SHAPE, slm_kind=slm_kind, fusion=fusion), [3, 1, 2]
    mask = context_mask(shape, prompt_mask(tokens))
    assert mask.sum(axis=1).tolist() == [n * shape.context_per_token for n in tokens]
    sizes = {"batch": 3, "context": mask.shape[1]}
    numbers = np.random.default_rng(0)
    arrays = {}
    for spec in projector_spec(shape).outputs:
        whole = numbers.random([axis if isinstance(axis, int) else sizes[axis] for axis in spec.axes], np.float32)
        along = [sizes.get(axis, 1) if axis in sizes else 1 for axis in spec.axes]
        arrays[spec.name] = whole * mask.reshape(along)
    rows = split_rows(arrays, shape, tokens)
    assert [next(iter(row.values())).size for row in rows] == [4 * shape.context_per_token * n for n in tokens]
    joined = join_rows(rows, shape, tokens)
    assert joined.keys() == arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(joined[name], arrays[name])
    # Without the longest, the others need less padding.
    shorter = join_rows(rows[1:], shape, tokens[1:])
    np.testing.assert_array_equal(
        context_mask(shape, prompt_mask(tokens[1:])).sum(axis=1), [n * shape.context_per_token for n in tokens[1:]]
    )
    assert all(2 * shape.context_per_token in array.shape for array in shorter.values())


# --- heads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_heads(tmp_path: Path) -> Orchestrator:
    directory = tmp_path / "heads"
    directory.mkdir()
    second = make_pair(directory, {}, head="second").manifest
    graphs = {**second.graphs, "projector": second.graphs["projector"].model_copy(update={"file": "second.onnx"})}
    second = second.model_copy(update={"graphs": graphs, "files": ()})
    files = tuple(FileEntry(path=f"{name}.onnx", bytes=1, sha256=name) for name in ("encoder", "projector", "second"))
    return make_pair(directory, SCRIPTS, heads={"second": second}, files=files)


def test_heads_share_the_encoder_and_not_their_encodings(two_heads: Orchestrator) -> None:
    assert two_heads.heads == ("main", "second")
    second = two_heads.head("second")
    assert second is two_heads.head("second") is second.head("second")
    assert two_heads.head("main") is second.head("main") is two_heads
    assert toy_of(two_heads).calls == ["head second"]
    assert second.heads == ("main", "second")
    assert second.manifest.head == "second"
    assert texts(second.generate(["a"])) == ["alpha"]
    with pytest.raises(EncodingError) as error:
        second.generate_from(two_heads.encode(["a"]))
    assert [line.split(":")[0] for line in error.value.evidence] == ["projector"]
    with pytest.raises(UsageError, match="no head 'third'") as unknown:
        two_heads.head("third")
    assert "main, second" in str(unknown.value)


def test_closing_a_head_closes_it_alone_and_closing_the_pair_closes_all(two_heads: Orchestrator) -> None:
    second = two_heads.head("second")
    second.close()
    assert texts(two_heads.generate(["a"])) == ["alpha"]
    with pytest.raises(UsageError, match="has been closed"):
        second.generate(["a"])
    again = two_heads.head("second")
    assert texts(again.generate(["b"])) == ["be"]
    two_heads.close()
    for call in (
        lambda: again.generate(["a"]),
        lambda: two_heads.head("second"),
        lambda: again.head("main").encode(["a"]),
    ):
        with pytest.raises(UsageError, match="has been closed"):
            call()


# --- between processes, on ONNX Runtime ----------------------------------------------------------------------------


def command(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "llm2slm_export", "run", *map(str, arguments), "--threads", "1"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_an_encoding_of_one_process_gives_the_same_ids_in_another(
    bundles: Callable[..., tuple[Path, Path]], tmp_path: Path, slm: str
) -> None:
    bundle, file = bundles(slm)[1], tmp_path / "x.encoding"
    prompts = ["Hi", "Where is the station?", "She reads a book."]
    command(bundle, *prompts, "--save-encoding", file)
    written = command(bundle, "--encoding", file, "--max-new-tokens", 8, "--num-beams", 2, "--json").splitlines()
    with load(bundle, threads=1) as pair:
        expected = pair.generate_from(pair.encode(prompts), max_new_tokens=8, num_beams=2)
        assert [tuple(json.loads(line)["token_ids"]) for line in written] == [g.token_ids for g in expected]
        loaded = pair.load_encoding(file)
        again = pair.generate_from(loaded, max_new_tokens=8, num_beams=2)
        assert [g.token_ids for g in again] == [g.token_ids for g in expected]


def test_reading_and_writing_need_only_their_own_graphs(
    bundles: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    bundle, file = bundles("t5")[1], tmp_path / "x.encoding"
    with load(bundle, threads=1, part="reader") as reader, load(bundle, threads=1, part="writer") as writer:
        reader.save_encoding(reader.encode(["Hi"]), file)
        assert writer.generate_from(writer.load_encoding(file), max_new_tokens=3)[0].new_tokens > 0
        assert (list(reader._backend.runtimes), list(writer._backend.runtimes)) == (
            ["encoder", "projector"],
            ["decoder"],
        )
        with pytest.raises(UsageError, match="encoder graph is not open"):
            writer.encode(["Hi"])
        with pytest.raises(UsageError, match="decoder graph is not open"):
            reader.generate(["Hi"])
    stream = (pair := load(bundle, threads=1)).stream("Hi")
    next(stream)
    pair.close()
    with pytest.raises(UsageError, match="decoder graph is not open"):
        list(stream)


def test_a_bundle_refuses_what_another_bundle_encoded(
    bundles: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    with load(bundles("t5")[1], threads=1) as one, load(bundles("llama")[1], threads=1) as other:
        encoding = one.encode(["Hi"])
        one.save_encoding(encoding, tmp_path / "x.encoding")
        for call in (lambda: other.generate_from(encoding), lambda: other.load_encoding(tmp_path / "x.encoding")):
            with pytest.raises(EncodingError, match="projector: this pair has"):
                call()


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_a_cache_on_disk_serves_the_next_process(
    bundles: Callable[..., tuple[Path, Path]], tmp_path: Path, slm: str
) -> None:
    bundle, kept = bundles(slm)[1], tmp_path / "kept"
    command(bundle, "Hi", "She reads a book.", "--cache", kept, "--max-new-tokens", 4)
    prompts = ["She reads a book.", "Where is the station?", "Hi"]
    with load(bundle, threads=1, cache=EncodingCache(directory=kept)) as pair, load(bundle, threads=1) as plain:
        encoding = pair.encode(prompts)
        assert encoding.cached == (True, False, True)
        got = pair.generate_from(encoding, max_new_tokens=12)
        assert [g.token_ids for g in got] == [g.token_ids for g in plain.generate(prompts, max_new_tokens=12)]
    printed = command(bundle, *prompts, "--cache", kept, "--max-new-tokens", 4, "--json").splitlines()
    assert [json.loads(line)["cached"] for line in printed] == [True, True, True]


# --- places that cannot be written ---------------------------------------------------------------------------------


def test_a_link_is_followed_and_what_is_no_file_is_left_alone(pair: Orchestrator, tmp_path: Path) -> None:
    encoding = pair.encode(["a"])
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    pair.save_encoding(encoding, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o077 == 0, "what is made of prompts is as private as they are"
    assert texts(pair.generate_from(pair.load_encoding(tmp_path / "real"))) == ["alpha"]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EncodingError, match="it is not an encoding"):
        pair.save_encoding(encoding, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    pair.save_encoding(encoding, tmp_path / "link")  # an encoding in the place of another
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EncodingError, match="it is not a file"):
        pair.save_encoding(encoding, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(EncodingError, match=r"x\.safetensors cannot be written"):
        pair.save_encoding(encoding, tmp_path / "missing" / "x.safetensors")


def test_a_cache_that_cannot_be_written_costs_no_response(tmp_path: Path) -> None:
    cache = EncodingCache(directory=tmp_path / "cache")
    pair = make_pair(tmp_path, SCRIPTS, cache=cache)
    (tmp_path / "cache").rmdir()
    with pytest.warns(RuntimeWarning, match="could not be written"):
        assert texts(pair.generate(["a"])) == ["alpha"]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be used"):
        EncodingCache(directory=tmp_path / "file")


def test_heads_asked_for_at_once_are_one(two_heads: Orchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = type(toy_of(two_heads))
    make = toy.head

    def slow(self: Any, bundle: Any) -> Any:
        time.sleep(0.05)
        return make(self, bundle)

    monkeypatch.setattr(toy, "head", slow)
    with ThreadPoolExecutor(6) as threads:
        assert len({id(found) for found in threads.map(two_heads.head, ["second"] * 6)}) == 1
