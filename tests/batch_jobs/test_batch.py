"""`batch`: what a job writes, the reasons of bad rows, what is refused, and that nothing of a job is lost."""

import errno
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from llm2slm_export.batch_jobs import part_runner
from llm2slm_export.batch_jobs.job_file import read_job
from llm2slm_export.batch_jobs.output_directory import OutputDirectory
from llm2slm_export.cli.app import app
from llm2slm_export.errors import Llm2SlmError
from llm2slm_export.files.workplace import occupied
from llm2slm_export.inference.orchestrator import Orchestrator
from tests.support.small_bundle import write_small_bundle
from tests.support.toy_pair import Toy, ids_of, make_pair, toy_of

SCRIPTS = {"a": "one</s>", "b": "zwei</s>", "c": "drei é漢</s>", "d": '"\n\t\u2028</s>', "e": "fünf", "n": "nan</s>"}


class _Spoiled(Toy):
    """A toy whose logits for the prompts that begin with n are not finite."""

    def _logits(self, state: Any, tokens: int) -> Any:
        logits = super()._logits(state, tokens)
        logits[state["keys"] == ids_of("n")[0]] = np.nan
        return logits


class Job:
    """A job of a toy pair."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory, self.bundle, self.out = directory, directory / "bundle", directory / "out"
        self.toys: list[Toy] = []
        write_small_bundle(self.bundle)

        def load(path: Path, **_: Any) -> Orchestrator:
            assert path == self.bundle
            pair = make_pair(directory, SCRIPTS, toy=_Spoiled)
            self.toys.append(toy_of(pair))
            return pair

        monkeypatch.setattr(part_runner, "load", load)

    def write(self, content: str, name: str = "in.txt") -> Path:
        path = self.directory / name
        path.write_text(content, encoding="utf-8")
        return path

    def run(self, content: str | Path, *arguments: object, out: Path | None = None) -> Result:
        path = self.write(content) if isinstance(content, str) else content
        words = ["batch", self.bundle, path, out or self.out, "--part-rows", 2, *arguments]
        return CliRunner().invoke(app, [str(word) for word in words], prog_name="llm2slm-export")

    def rows(self, out: Path | None = None) -> list[dict[str, Any]]:
        lines = b"".join(path.read_bytes() for path in sorted((out or self.out).glob("part-*"))).split(b"\n")
        assert lines.pop() == b""
        return [json.loads(line) for line in lines]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    for part in (*parts, "→"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_job_writes_rows_in_order_in_parts(job: Job) -> None:
    result = job.run("bb\na\nccccc\ndd\ne\n", "--json")
    assert result.exit_code == 0, result.output
    assert sorted(content_of(job.out)) == ["job.json", "part-00000.jsonl", "part-00001.jsonl", "part-00002.jsonl"]
    rows = job.rows()
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["text"] for row in rows[:4]] == ["zwei", "one", "drei é漢", '"\n\t\u2028']
    assert (rows[4]["finish_reason"], rows[4]["new_tokens"]) == ("length", 32)
    assert list(rows[0]) == ["index", "key", "text", "finish_reason", "new_tokens", "prompt_tokens"]
    assert (rows[0]["finish_reason"], rows[0]["new_tokens"], rows[0]["prompt_tokens"]) == ("stop", 5, 3)
    assert "é漢" in (job.out / "part-00001.jsonl").read_text(encoding="utf-8"), "text is not escaped"
    summary = json.loads(result.stdout)
    assert summary["seconds"] > 0
    assert summary == {
        "out": str(job.out), "rows": 5, "failed": 0, "parts": 3, "new_rows": 5, "seconds": summary["seconds"],
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows), "new_tokens": sum(row["new_tokens"] for row in rows),
    }  # fmt: skip


def test_the_result_does_not_depend_on_parts_that_exist(job: Job) -> None:
    content = "".join(f"{letter * (1 + i % 5)}\n" for i, letter in enumerate("abcdeabcdnaae"))
    assert job.run(content).exit_code == 0
    whole = content_of(job.out)
    rng = random.Random(0)
    for _ in range(6):
        for name in rng.sample([name for name in whole if name != "job.json"], rng.randrange(1, 7)):
            (job.out / name).unlink()
        left = sum(path.read_bytes().count(b"\n") for path in job.out.glob("part-*"))
        result = job.run(content)
        assert result.exit_code == 0, result.output
        assert f"answering 13 rows{f', {left} are answered' if left else ''} …" in result.stderr
        assert content_of(job.out) == whole


def test_a_job_that_is_complete_is_not_run_again(job: Job) -> None:
    assert job.run("a\nb\nc\n").exit_code == 0
    before = {path.name: path.stat().st_mtime_ns for path in job.out.iterdir()}
    result = job.run("a\nb\nc\n", "--json")
    assert result.exit_code == 0
    assert "was complete already: 3 rows in 2 parts; nothing was run" in result.stderr
    assert (json.loads(result.stdout)["new_rows"], json.loads(result.stdout)["rows"]) == (0, 3)
    assert {path.name: path.stat().st_mtime_ns for path in job.out.iterdir()} == before
    assert len(job.toys) == 1, "no pair is loaded"


def test_rows_that_cannot_be_run_have_their_reason(job: Job) -> None:
    lines = [
        '{"prompt": "a", "id": "x"}',
        '{"prompt": "aaaaaaaaaaaaaaaa", "id": "long"}',
        '{"text": "a", "id": 3}',
        '{"prompt": ["a"]}',
        "{",
        '{"prompt": "n", "id": "\\ud800"}',
        '{"prompt": "b"}',
    ]
    result = job.run(job.write("\n".join(lines), "in.jsonl"), "--part-rows", 4, "--json")
    assert result.exit_code == 0, result.output
    rows = job.rows()
    assert [row.get("text") for row in rows] == ["one", None, None, None, None, None, "zwei"]
    assert [row["error"] for row in rows[1:5]] == [
        "17 tokens, at most 12",
        "no 'prompt' (its keys: 'text', 'id')",
        "'prompt' is a list, not text",
        "not JSON (Expecting property name enclosed in double quotes at column 2): '{'",
    ]
    assert "returns non-finite logits for new token 1" in rows[5]["error"]
    assert [row.get("id") for row in rows] == ["x", "long", 3, None, None, "\ud800", None]
    assert [row.get("line") for row in rows] == [None, 2, 3, 4, 5, 6, None]
    assert ["key" in row for row in rows] == [True, True, False, False, False, True, True]
    assert json.loads(result.stdout)["failed"] == 5
    assert "5 rows have no response:\n  - row 1: 17 tokens, at most 12\n" in result.stderr
    assert job.run(job.directory / "in.jsonl", "--part-rows", 4, "--truncate", out=job.directory / "cut").exit_code == 0
    assert job.rows(job.directory / "cut")[1]["dropped_tokens"] == 5


def test_a_row_beside_one_that_fails_in_the_decoder_is_answered(job: Job) -> None:
    result = job.run("a\nn\nb\nc\n", "--part-rows", 4)
    assert result.exit_code == 0, result.output
    assert [row.get("text") for row in job.rows()] == ["one", None, "zwei", "drei é漢"]


def test_a_job_without_any_response_fails(job: Job) -> None:
    result = job.run("n\nn\n")
    refused(result, 1, "No row has a response.", "row 0: ")
    assert len(job.rows()) == 2


def test_several_responses_of_a_prompt_are_in_its_row(job: Job) -> None:
    arguments = ("--num-beams", 3, "--num-return-sequences", 2, "--output-scores")
    assert job.run("a\nb\n", *arguments).exit_code == 0
    for row in job.rows():
        assert list(row) == ["index", "key", "responses", "prompt_tokens"]
        assert len(row["responses"]) == 2
        for response in row["responses"]:
            assert {"text", "finish_reason", "new_tokens", "score", "token_logprobs"} == set(response)
            assert len(response["token_logprobs"]) == response["new_tokens"]


def test_samples_depend_on_the_seed_and_the_row_alone(job: Job) -> None:
    content = "a\n" * 9
    sampling = ("--do-sample", "--temperature", 20, "--max-new-tokens", 8)
    outs = [job.directory / str(number) for number in range(5)]
    assert job.run(content, *sampling, "--seed", 1, out=outs[0]).exit_code == 0
    assert job.run(content, *sampling, "--seed", 1, "--part-rows", 4, "--batch-size", 3, out=outs[1]).exit_code == 0
    assert job.run(content, *sampling, "--seed", 2, out=outs[2]).exit_code == 0
    assert job.run(content, *sampling, out=outs[3]).exit_code == 0
    assert job.run(content, *sampling, out=outs[4]).exit_code == 0
    texts = [[row["text"] for row in job.rows(out)] for out in outs]
    assert texts[0] == texts[1]
    assert len({tuple(each) for each in texts}) == 4
    assert len(set(texts[0])) == 9, "rows with the same prompt have other samples"
    pair = make_pair(job.directory, SCRIPTS)
    alone = pair.generate(["a"] * 9, do_sample=True, temperature=20.0, max_new_tokens=8, seed=1)
    assert texts[0] == [generation.text for generation in alone], "as `run` with the same seed"


def test_a_job_that_samples_without_a_seed_keeps_its_own(job: Job) -> None:
    sampling = ("--do-sample", "--temperature", 20, "--max-new-tokens", 8)
    assert job.run("a\n" * 9, *sampling).exit_code == 0
    whole = content_of(job.out)
    for name in ("part-00001.jsonl", "part-00003.jsonl"):
        (job.out / name).unlink()
    assert job.run("a\n" * 9, *sampling).exit_code == 0
    assert content_of(job.out) == whole
    refused(job.run("a\n" * 9, *sampling, "--seed", 2**64), 2, "--seed is")
    started = read_job(job.out)
    assert started is not None
    refused(job.run("a\n" * 9, *sampling, "--seed", 5), 2, f"options.seed: the job has {started.seed}, this run 5")


def test_equal_prompts_have_equal_keys_and_other_options_other_keys(job: Job) -> None:
    keys = []
    for number, options in enumerate([(), ("--max-new-tokens", 3), ("--truncate",), ("--bad-words", "z")]):
        out = job.directory / str(number)
        assert job.run("a\nb\na\n", *options, out=out).exit_code == 0
        keys.append([row["key"] for row in job.rows(out)])
        assert keys[-1][0] == keys[-1][2] != keys[-1][1]
    assert len({key for each in keys for key in each}) == 8


def test_another_job_is_refused_with_every_difference(job: Job) -> None:
    assert job.run("a\nb\nc\n").exit_code == 0
    before = content_of(job.out)
    changed = (
        "--max-new-tokens",
        5,
        "--truncate",
        "--batch-size",
        3,
        "--part-rows",
        3,
        "--bad-words",
        "x",
        "--threads",
        1,
    )
    refused(
        job.run("a\nb\nd\n", *changed), 2, "is the output of another job.",
        "options.max_new_tokens: the job has 16, this run 5", "truncate: the job has false, this run true",
        "batch_size: the job has 32, this run 3", "part_rows: the job has 2, this run 3",
        'bad_words: the job has [], this run ["x"]', "input.sha256: the job has ",
    )  # fmt: skip
    manifest = json.loads((job.bundle / "manifest.json").read_text())
    (job.bundle / "manifest.json").unlink()
    for path in sorted(job.bundle.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    job.bundle.rmdir()
    write_small_bundle(job.bundle, trained=False)
    refused(job.run("a\nb\nc\n"), 2, f'bundle.digest: the job has "{manifest["digest"][:20]}')
    assert content_of(job.out) == before


def test_the_input_may_be_moved(job: Job) -> None:
    assert job.run("a\nb\nc\n").exit_code == 0
    whole = content_of(job.out)
    (job.out / "part-00000.jsonl").unlink()
    assert job.run(job.write("a\nb\nc\n", "moved.txt")).exit_code == 0
    assert content_of(job.out) == whole


def test_a_job_of_which_nothing_was_answered_is_begun_again(job: Job) -> None:
    assert job.run("a\n", "--max-new-tokens", 4).exit_code == 0
    (job.out / "part-00000.jsonl").unlink()
    assert job.run("a\n", "--max-new-tokens", 5).exit_code == 0
    started = read_job(job.out)
    assert started is not None
    assert started.options["max_new_tokens"] == 5


def test_a_directory_of_something_else_is_refused(job: Job) -> None:
    job.out.mkdir()
    (job.out / "thesis.txt").write_text("years of work")
    refused(job.run("a\n"), 2, "cannot be written.", "it holds no job.json of one")
    (job.out / "job.json").write_text('{"format": "other"}')
    refused(job.run("a\n"), 2, "it holds no job.json of one")
    refused(job.run("a\n", out=job.bundle), 2, "which is read")
    refused(job.run("a\n", out=job.bundle / "out"), 2, "it lies in")
    refused(job.run("a\n", out=job.directory / "in.txt"), 2, "it is a file")
    assert (job.out / "thesis.txt").read_text() == "years of work"
    empty = job.directory / "empty"
    empty.mkdir()
    assert job.run("a\n", out=empty).exit_code == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda _: b"",
        lambda content: content.split(b"\n")[0] + b"\n",
        lambda content: content.replace(b'"index": 0', b'"index": 1'),
        lambda content: b"{}\n" + content,
    ],
)
def test_a_part_that_is_damaged_is_named(job: Job, damage: Callable[[bytes], bytes]) -> None:
    assert job.run("a\nb\nc\n").exit_code == 0
    path, whole = job.out / "part-00000.jsonl", content_of(job.out)
    path.write_bytes(damage(path.read_bytes()))
    refused(job.run("a\nb\nc\n"), 1, f"{path} is damaged.", "rows 0 to 1", "remove this file")
    path.unlink()
    assert job.run("a\nb\nc\n").exit_code == 0
    assert content_of(job.out) == whole


def test_a_job_file_that_is_damaged_or_newer_is_named(job: Job) -> None:
    assert job.run("a\n").exit_code == 0
    path = job.out / "job.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"version": 2}))
    refused(job.run("a\n"), 1, "has version 2; this release reads up to 1")
    path.write_text(json.dumps(raw | {"part_rows": 0}))
    refused(job.run("a\n"), 1, "is not a batch job this release can read", "part_rows")


def test_another_run_on_the_same_directory_is_refused(job: Job) -> None:
    with occupied(job.out):
        refused(job.run("a\n"), 1, "Another run is writing to")
    assert not job.out.exists()
    assert job.run("a\n").exit_code == 0


@pytest.mark.parametrize("fails", [0, 2])
def test_a_full_disk_ends_the_job_and_keeps_what_is_complete(
    job: Job, fails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, real = "a\nb\nc\nd\na\n", Path.write_bytes
    written: list[Path] = []

    def write_bytes(self: Path, data: bytes) -> int:
        written.append(self)
        if len(written) > fails:
            real(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        refused(
            job.run(content),
            1,
            "No space left on device",
            f"{fails} of 3 parts are complete",
            "complete parts are kept",
        )
    assert len(list(job.out.glob("part-*"))) == fails
    assert [path.name for path in job.out.iterdir() if path.name.startswith(".")] == []
    assert job.run(content).exit_code == 0
    assert len(job.rows()) == 5


def test_an_error_that_is_not_about_a_row_ends_the_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise Llm2SlmError("There is too little memory for the responses.", remedy="use a smaller batch_size")

    monkeypatch.setattr(part_runner.PartRunner, "_generated", fail)
    refused(job.run("a\nb\n"), 1, "There is too little memory")
    assert list(job.out.glob("part-*")) == []


@pytest.mark.parametrize(
    ("content", "arguments", "parts"),
    [
        ("", (), ["is empty"]),
        ("a\n", ("--prompt-field", "x"), ["has one prompt per line, and no fields"]),
        ("a\n", ("--id-field", "x"), ["has no id"]),
        ("a\n", ("--workers", 2), ["--workers goes with --ray"]),
        ("a\n", ("--runtime", "auto"), ["may choose another runtime"]),
        ("a\n", ("--runtime", "x"), ["x"]),
        ("a\n", ("--device", "x"), ["x"]),
        ("a\n", ("--temperature", 2), ["temperature: has no effect without do_sample=True"]),
        ("a\n", ("--max-new-tokens", 0), ["max_new_tokens"]),
        ("a\n", ("--head", "x"), ["has no head 'x'"]),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    job: Job, content: str, arguments: tuple[object, ...], parts: list[str]
) -> None:
    result = job.run(content, *arguments)
    refused(result, result.exit_code, *parts)
    assert result.exit_code in (1, 2)
    assert not job.out.exists()


def test_a_missing_ray_is_named(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    refused(job.run("a\n", "--ray", "local"), 1, "pip install 'llm2slm-export[ray]'")


def test_other_releases_are_told(job: Job) -> None:
    assert job.run("a\nb\nc\n").exit_code == 0
    (job.out / "part-00000.jsonl").unlink()
    path = job.out / "job.json"
    path.write_text(path.read_text().replace('"llm2slm-export": "0.1.0"', '"llm2slm-export": "0.0.9"'))
    result = job.run("a\nb\nc\n")
    assert result.exit_code == 0
    assert "llm2slm-export 0.0.9 is now 0.1.0" in result.stderr


def test_part_files_sort_by_number(tmp_path: Path) -> None:
    directory = OutputDirectory(tmp_path, [])
    assert directory.file(7).name == "part-00007.jsonl"


def test_prompts_of_similar_length_share_a_batch(job: Job) -> None:
    assert job.run("a\naaaaaaaa\nb\nbbbbbbbb\nc\ncccccccc\n", "--part-rows", 6, "--batch-size", 3).exit_code == 0
    assert [len(batch) for batch in job.toys[0].read] == [3, 3]
    assert [row["text"] for row in job.rows()] == ["one", "one", "zwei", "zwei", "drei é漢", "drei é漢"]
