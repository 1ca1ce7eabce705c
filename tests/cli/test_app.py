"""The command line: what each command prints, and that every mistake is one message with a remedy and an exit code."""

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from llm2slm_export.authoring.models.pairing import PairConfig
from llm2slm_export.authoring.parity.gate import Gate
from llm2slm_export.authoring.recipe import ModelSource, ProjectorSettings
from llm2slm_export.bundle.manifest import MANIFEST_FILE, GenerationDefaults, Manifest, Source, TokenizerEntry
from llm2slm_export.bundle.manifest_file import read_manifest, stamped
from llm2slm_export.bundle.parity_report import ParityError, ParityReport
from llm2slm_export.cli.app import app
from llm2slm_export.contract import WeightQuantization
from llm2slm_export.errors import PromptError, ResponseError, UnknownTokenError
from llm2slm_export.inference import orchestrator
from llm2slm_export.inference.outputs import Generation, PromptScores, Score
from tests.support.small_bundle import TOKENIZER, parity_row, write_small_bundle

TIMINGS = {"tokenize": 0.5, "encode": 4.0, "project": 1.0, "prefill": 1.0, "decode": 6.0, "total": 12.5}


def invoke(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def refused(result: Result, code: int, *parts: str) -> None:
    """The exit code, the value at fault, a remedy, nothing on stdout, and no traceback."""
    assert result.exit_code == code, result.output
    for part in (*parts, "→"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_small_bundle(tmp_path / "small")
    return tmp_path / "small"


# --- run -----------------------------------------------------------------------------------------------------------


@dataclass
class FakePair:
    """Answers with its prompt reversed, a character a token, and remembers what it was asked."""

    calls: list[dict[str, Any]]
    limit: int = 40
    num_beams: int = 1  # the bundle's default
    warnings: tuple[str, ...] = ()

    def __enter__(self) -> "FakePair":
        return self

    def __exit__(self, *error: object) -> None:
        self.calls.append({"closed": True})

    def options(self, **options: Any) -> Any:
        return SimpleNamespace(
            num_beams=options.get("num_beams", self.num_beams),
            num_return_sequences=options.get("num_return_sequences", 1),
        )

    def at_a_time(self, usual: int, **options: Any) -> int:  # noqa: ARG002
        return usual

    def bad_words_ids(self, words: list[str]) -> tuple[tuple[int, ...], ...]:
        return tuple((len(word),) for word in words)

    def generate(self, prompts: list[str], *, batch_size: int | None = None, **options: Any) -> list[Generation]:
        self.calls.append(options if batch_size is None else {"batch_size": batch_size, **options})
        too_long = {i: f"{len(p)} tokens, at most {self.limit}" for i, p in enumerate(prompts) if len(p) > self.limit}
        if too_long and not options["truncate"]:
            raise PromptError(
                f"{len(too_long)} prompts cannot be run.", remedy="shorten them, or --truncate", prompts=too_long
            )
        unknown = {i: "'<x>' (id 9): 9 rows" for i, prompt in enumerate(prompts) if "<x>" in prompt}
        if unknown:
            raise UnknownTokenError(f"{len(unknown)} prompts cannot be run.", remedy="cut", prompts=unknown)
        return [
            replace(
                self.answer(prompt[: self.limit], len(prompt) - self.limit), batch=i // (batch_size or 1), sequence=j
            )
            for i, prompt in enumerate(prompts)
            for j in range(options.get("num_return_sequences", 1))
        ]

    def generate_batches(self, prompts: list[str], **options: Any) -> Iterator[list[Generation]]:
        """In parts that are those of no batch: two prompts, then the others."""
        answers = self.generate(prompts, **options)
        first = 2 * options.get("num_return_sequences", 1)
        return (part for part in (answers[:first], answers[first:]) if part)

    def stream(self, prompt: str, **options: Any) -> Iterator[Any]:
        (generation,) = self.generate([prompt], **options)
        for character in generation.text[:-1]:
            yield SimpleNamespace(text=character, generation=None)
        yield SimpleNamespace(text=generation.text[-1], generation=generation)

    def encode(self, prompts: list[str], *, truncate: bool) -> Any:
        self.calls.append({"encode": prompts, "truncate": truncate})
        lengths = tuple(map(len, prompts))
        return Encoded(prompt_tokens=lengths, dropped_tokens=(0,) * len(lengths), prompts=prompts)

    def save_encoding(self, encoding: Any, path: Path) -> None:
        path.write_text("\n".join(encoding.prompts))

    def load_encoding(self, path: Path) -> Any:
        return Lines(path.read_text().splitlines())

    def generate_from(self, encoding: list[str], **options: Any) -> list[Generation]:
        return self.generate(encoding, truncate=False, **options)

    def head(self, name: str) -> "FakePair":
        self.calls.append({"head": name})
        return self

    def score_batches(
        self, prompts: list[str], responses: list[list[str]], *, batch_size: int, **reading: Any
    ) -> Iterator[PromptScores]:
        """A response's log-probability is the negative of its length, or of its distance to the prompt's."""
        self.calls.append({"score": prompts, "batch_size": batch_size, **reading})
        unknown = {i: "'<x>' (id 9): 9 rows" for i, prompt in enumerate(prompts) if "<x>" in prompt}
        if unknown:
            raise UnknownTokenError(f"{len(unknown)} prompts cannot be run.", remedy="cut", prompts=unknown)
        long = {(i, j): "too long" for i, row in enumerate(responses) for j, text in enumerate(row) if len(text) > 9}
        if long:
            raise ResponseError(
                f"{len(long)} responses cannot be scored.", remedy="cut", responses=long, prompts=len(prompts)
            )
        return (
            PromptScores(
                len(prompt), max(0, len(prompt) - self.limit), tuple(self.scored(prompt, text) for text in row)
            )
            for prompt, row in zip(prompts, responses, strict=True)
        )

    def score(self, encoding: list[str], responses: list[list[str]]) -> list[Score]:
        return [self.scored(prompt, text) for prompt, row in zip(encoding, responses, strict=True) for text in row]

    def scored(self, prompt: str, text: str) -> Score:
        logprob = -float(abs(len(prompt) - len(text)))
        return Score(text, (len(text), 1), (logprob, 0.0), logprob, is_greedy=prompt == text)

    def answer(self, prompt: str, over: int) -> Generation:
        return Generation(
            text=prompt[::-1], token_ids=(3, 1), finish_reason="stop", prompt_tokens=len(prompt), new_tokens=2,
            dropped_tokens=max(0, over), device="cpu", timings_ms=dict(TIMINGS),
        )  # fmt: skip


class Lines(list[str]):
    """A loaded encoding: its prompts."""

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        return tuple(map(len, self))

    @property
    def dropped_tokens(self) -> tuple[int, ...]:
        return (0,) * len(self)


@dataclass
class Encoded:
    prompt_tokens: tuple[int, ...]
    dropped_tokens: tuple[int, ...]
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> FakePair:
    fake = FakePair([])

    def load(path: Path, **options: Any) -> FakePair:
        fake.calls.append({"path": path, **options})
        return fake

    monkeypatch.setattr(orchestrator, "load", load)
    return fake


def test_run_streams_one_prompt(pair: FakePair) -> None:
    result = invoke("run", "b", "abc")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "cba\n", "")
    loaded = {
        "path": Path("b"),
        "head": None,
        "device": "cpu",
        "threads": None,
        "runtime": "onnxruntime",
        "part": "pair",
        "cache": None,
        "cuda": None,
    }
    assert pair.calls == [loaded, {"truncate": False}, {"closed": True}]


def test_run_says_how_cuda_is_used(pair: FakePair) -> None:
    from llm2slm_export.inference.runtime.onnxruntime.cuda_sessions import CudaOptions

    assert invoke("run", "b", "abc", "--gpu-memory-mb", "5", "--no-cuda-graph").exit_code == 0
    assert pair.calls[0]["cuda"] == CudaOptions(memory_bytes=5_000_000, cuda_graphs=False)


def test_run_answers_standard_input_in_order(pair: FakePair) -> None:
    assert invoke("run", "b", "-", stdin=b"abc\ndef\n").stdout == "cba\nfed\n"
    assert pair.calls[1]["batch_size"] == 8


@pytest.mark.usefixtures("pair")
def test_run_answers_every_prompt_of_several_batches() -> None:
    texts = [f"p{i}" for i in range(20)]
    result = invoke("run", "b", "-", "--json", stdin="\n".join(texts).encode())
    answered = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(a["prompt"], a["text"]) for a in answered] == [(t, t[::-1]) for t in texts]


@pytest.mark.usefixtures("pair")
def test_run_keeps_one_line_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "a\\nb"}\n{"prompt": "c"}\n', encoding="utf-8")
    assert invoke("run", "b", "--file", file).stdout == "b\\na\nc\n"


def write_record(directory: Path, **data: Any) -> None:
    """A trained composition, as far as later commands look at it."""
    directory.mkdir(parents=True)
    fields = {"name": "x", "llm": {"model": "llm"}, "projector": {"d_in": 8, "d_hidden": 8, "d_out": 8}}
    (directory / "composition.json").write_text(json.dumps(fields))
    recipe = {"training": {"data": {"train": "t.csv", "validation": "v.csv"} | data}}
    (directory / "training.json").write_text(json.dumps({"recipe": recipe, "prompts": ["-x", "Where are we?"]}))


@pytest.mark.usefixtures("pair")
def test_run_reads_the_column_that_is_named_else_the_one_that_was_trained_on(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text('en,fr\n"a, b",c\nd,e\n')
    assert invoke("run", bundle, "--file", "x.csv", "--prompt-field", "fr").stdout == "c\ne\n"
    assert invoke("run", bundle, "--file", "x.csv", "--prompt-field", "1").stdout == "rf\nc\ne\n"
    refused(invoke("run", bundle, "--file", "x.csv"), 1, "no column 'prompt'", "'en', 'fr'", "--prompt-field")
    write_record(Path("runs") / read_manifest(bundle).name / "pair", prompt_field="en")
    assert invoke("run", bundle, "--file", "x.csv").stdout == "b ,a\nd\n"
    Path("y.csv").write_text("english\na\n")
    refused(invoke("run", bundle, "--file", "y.csv"), 1, "no column 'en'", "pair/training.json", "'english'")
    refused(invoke("run", bundle, "x", "--prompt-field", "en"), 2, "--prompt-field en goes with --file")
    Path("z.txt").write_text("a\n")
    refused(invoke("run", bundle, "--file", "z.txt", "--prompt-field", "en"), 2, "one prompt per line", ".csv")


@pytest.mark.usefixtures("pair")
def test_run_json_has_every_field() -> None:
    result = invoke("run", "b", "-", "--json", stdin="été\nwhere?\n".encode())
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first == {
        "prompt": "été", "text": "été", "token_ids": [3, 1], "finish_reason": "stop", "prompt_tokens": 3, "new_tokens": 2,
        "device": "cpu", "timings_ms": TIMINGS, "batch": 0,
    }  # fmt: skip
    assert second["text"] == "?erehw"
    assert "é" in result.stdout  # not escaped


def test_run_passes_what_was_said_and_nothing_else(pair: FakePair) -> None:
    invoke(
        "run", "b", "x", "--max-new-tokens", 5, "--do-sample", "--temperature", 0.5, "--top-k", 3, "--seed", 1,
        "--stop", ".", "--stop", "!", "--threads", 2, "--device", "cuda:1", "--typical-p", 0.9, "--no-repeat-ngram-size", 3,
        "--bad-words", "no", "--bad-words", "never", "--head", "fr",
    )  # fmt: skip
    assert pair.calls[0] == {
        "path": Path("b"),
        "head": "fr",
        "device": "cuda:1",
        "threads": 2,
        "runtime": "onnxruntime",
        "part": "pair",
        "cache": None,
        "cuda": None,
    }
    assert pair.calls[1] == {
        "truncate": False, "max_new_tokens": 5, "do_sample": True, "temperature": 0.5, "top_k": 3, "seed": 1,
        "stop": (".", "!"), "typical_p": 0.9, "no_repeat_ngram_size": 3, "bad_words_ids": ((2,), (5,)),
    }  # fmt: skip


@pytest.mark.parametrize(("text", "meant"), [("true", True), ("false", False), ("never", "never")])
def test_run_passes_what_beams_take(pair: FakePair, text: str, meant: object) -> None:
    invoke(
        "run", "b", "x", "--json", "--num-beams", 4, "--num-return-sequences", 2, "--length-penalty", 0.5,
        "--early-stopping", text, "--output-scores",
    )  # fmt: skip
    assert pair.calls[1] == {
        "batch_size": 8, "truncate": False, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5,
        "early_stopping": meant, "output_scores": True,
    }  # fmt: skip


def test_run_prints_beams_when_they_are_complete(pair: FakePair) -> None:
    result = invoke("run", "b", "abc", "--num-beams", 2)
    assert (result.stdout, result.stderr) == ("cba\n", "beam search: responses are printed when they are complete\n")
    pair.num_beams = 2
    assert invoke("run", "b", "abc").stderr == result.stderr
    assert invoke("run", "b", "abc", "--num-beams", 1).stderr == ""
    assert invoke("run", "b", "abc", "--json").stderr == ""


@pytest.mark.usefixtures("pair")
def test_run_prints_every_sequence_of_a_prompt() -> None:
    result = invoke("run", "b", "abc", "--do-sample", "--num-return-sequences", 2)
    assert (result.stdout, result.stderr) == (
        "cba\ncba\n",
        "several sequences: responses are printed when they are complete\n",
    )
    result = invoke("run", "b", "abc", "de", "f", "--json", "--do-sample", "--num-return-sequences", 2)
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(p["prompt"], p["sequence"]) for p in printed] == [(p, i) for p in ("abc", "de", "f") for i in (0, 1)]


@pytest.mark.usefixtures("pair")
def test_run_json_tells_scores_and_cache_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"score": -0.5, "token_logprobs": (-0.1, -0.2), "cached": False}
    answer = FakePair.answer
    monkeypatch.setattr(FakePair, "answer", lambda self, *given: replace(answer(self, *given), **extra))
    printed = json.loads(invoke("run", "b", "abc", "--json").stdout)
    assert {name: printed[name] for name in extra} == extra | {"token_logprobs": [-0.1, -0.2]}


def test_run_keeps_encodings(pair: FakePair, tmp_path: Path) -> None:
    invoke("run", "b", "x", "--cache", tmp_path / "kept", "--cache-mb", 3)
    cache = pair.calls[0]["cache"]
    assert (cache._directory, cache._max_bytes) == (tmp_path / "kept", 3_000_000)


def test_run_encodes_here_and_writes_there(pair: FakePair, tmp_path: Path) -> None:
    file = tmp_path / "two.encoding"
    result = invoke("run", "b", "abc", "de", "--save-encoding", file, "--json")
    assert json.loads(result.stdout) == {
        "encoding": str(file), "bytes": 6, "prompts": 2, "prompt_tokens": [3, 2], "dropped_tokens": [0, 0],
    }  # fmt: skip
    assert f"Next: llm2slm-export run b --encoding {file}" in result.stderr.replace("\n", " ").replace("  ", " ")
    assert pair.calls[1] == {"encode": ["abc", "de"], "truncate": False}
    assert pair.calls[0]["part"] == "reader"
    calls = len(pair.calls)
    refused(
        invoke("run", "b", "abc", "--save-encoding", file), 2, f"{file} cannot be replaced", "it is not an encoding"
    )
    assert len(pair.calls) == calls, "refused before anything is loaded"
    other = tmp_path / "other"
    result = invoke("run", "b", "abc", "de", "--head", "es", "--save-encoding", other)
    assert f"run b --head es --encoding {other}" in result.stdout.replace("\n", " ").replace("  ", " ")
    pair.calls.clear()
    assert invoke("run", "b", "--encoding", file, "--max-new-tokens", 3).stdout == "cba\ned\n"
    assert pair.calls[0]["part"] == "writer"
    first, second = (json.loads(line) for line in invoke("run", "b", "--encoding", file, "--json").stdout.splitlines())
    assert (first["text"], second["text"], "prompt" in first) == ("cba", "ed", False)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["x", "--output-scores"], ["--output-scores goes with --json"]),
        (["x", "--cache-mb", "3"], ["--cache-mb goes with --cache"]),
        (["x", "--cache", "b/c"], ["--cache b/c lies in the bundle"]),
        (["x", "--encoding", "e"], ["--encoding replaces prompts"]),
        (
            ["--encoding", "e", "--file", "f.txt", "--save-encoding", "g", "--truncate", "--output-scores"],
            ["replaces prompts", "is an encoding already", "--truncate and --cache", "goes with --json"],
        ),
        (["x", "--save-encoding", "g", "--num-beams", "2"], ["generation options are for responses"]),
        (["x", "--save-encoding", "g", "--batch-size", "2"], ["an encoding is one batch"]),
    ],
)
def test_run_refuses_options_that_do_not_go_together(pair: FakePair, arguments: list[str], parts: list[str]) -> None:
    refused(invoke("run", "b", *arguments), 2, *parts)
    assert pair.calls == []


def test_what_is_read_is_not_written_into(pair: FakePair, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    bundle.mkdir()
    refused(invoke("run", bundle, "x", "--save-encoding", bundle / "e"), 2, "it lies in", "which is read")
    assert (pair.calls, list(bundle.iterdir())) == ([], [])


@pytest.mark.usefixtures("pair")
def test_run_says_what_truncation_dropped() -> None:
    result = invoke("run", "b", "-", "--truncate", "--json", stdin=b"ok\n" + b"x" * 45 + b"\n")
    assert "line 2 of standard input: 5 tokens of the prompt were dropped" in result.stderr
    assert [json.loads(line).get("dropped_tokens") for line in result.stdout.splitlines()] == [None, 5]


@pytest.mark.usefixtures("pair")
def test_run_names_the_line_of_a_prompt_over_the_limit() -> None:
    result = invoke("run", "b", "-", stdin=b"ok\n" + b"x" * 45 + b"\n")
    refused(result, 1, "line 2 of standard input: 45 tokens, at most 40", "--truncate")
    assert result.stdout == ""


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("json_lines", [False, True])
def test_run_answers_the_prompts_beside_those_with_unknown_tokens(json_lines: bool) -> None:
    given = ["run", "b", "-", *(["--json"] if json_lines else [])]
    result = invoke(*given, stdin=b"<x>\nabc\nd <x>\nef\n<x>!\n")
    assert result.exit_code == 1
    assert "line 1 of standard input: '<x>' (id 9)" in result.stderr
    assert "line 3 of standard input" in result.stderr
    if json_lines:
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert [row["prompt"] for row in rows] == ["<x>", "abc", "d <x>", "ef", "<x>!"]
        assert [row.get("text") for row in rows] == [None, "cba", None, "fe", None]
        assert ["error" in row for row in rows] == [True, False, True, False, True]
    else:
        assert result.stdout == "\ncba\n\nfe\n\n"
    refused(invoke("run", "b", "-", stdin=b"<x>\n<x>\n"), 1, "line 2 of standard input: '<x>'")
    refused(invoke("run", "b", "a <x>"), 1, "prompt 1: '<x>'")


def test_run_hands_split_special_tokens_on(pair: FakePair) -> None:
    invoke("run", "b", "abc", "--split-special-tokens")
    assert pair.calls[1] == {"truncate": False, "split_special_tokens": True}
    refused(invoke("run", "b", "--encoding", "e", "--split-special-tokens"), 2, "not for --encoding")


@pytest.mark.usefixtures("pair")
def test_run_profiles_on_stderr() -> None:
    result = invoke("run", "b", "-", "--profile", "--batch-size", 2, stdin=b"ab\ncd\nef\n")
    assert result.stdout == "ba\ndc\nfe\n"
    decode = next(line.split() for line in result.stderr.splitlines() if line.startswith("decode"))
    assert decode == ["decode", "12.00", "3", "4.000", "250"]  # two batches of 6 ms; prefill wrote 3 of 6 tokens


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    file = tmp_path / "responses.txt"
    file.write_text("abcd\nabc\na\n")
    return file


def test_run_scores_the_lines_of_a_file_best_first(pair: FakePair, responses: Path) -> None:
    result = invoke("run", "b", "xyz", "x", "--score", responses, "--truncate", "--batch-size", 3)
    assert (result.exit_code, result.stderr) == (0, "")
    columns = "log-probability\ttokens\tresponse\n"
    assert result.stdout == (
        f"xyz\n{columns}-0.0000\t2\tabc\n-1.0000\t2\tabcd\n-2.0000\t2\ta\n"
        f"x\n{columns}-0.0000\t2\ta\n-2.0000\t2\tabc\n-3.0000\t2\tabcd\n"
    )
    assert pair.calls[1] == {"score": ["xyz", "x"], "batch_size": 3, "truncate": True}


@pytest.mark.usefixtures("pair")
def test_run_scores_as_json_in_the_order_of_the_file(responses: Path) -> None:
    result = invoke("run", "b", "-", "--score", responses, "--json", "--truncate", stdin=b"abc\n" + b"x" * 45 + b"\n")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["prompt"], first["prompt_tokens"], "dropped_tokens" in first) == ("abc", 3, False)
    assert [score["text"] for score in first["scores"]] == ["abcd", "abc", "a"]
    assert first["scores"][0] == {
        "text": "abcd", "token_ids": [4, 1], "token_logprobs": [-1.0, 0.0], "logprob": -1.0, "is_greedy": False,
    }  # fmt: skip
    assert first["scores"][1]["is_greedy"]
    assert second["dropped_tokens"] == 5
    assert "line 2 of standard input: 5 tokens of the prompt were dropped" in result.stderr


def test_run_scores_an_encoding(pair: FakePair, responses: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.encoding"
    file.write_text("ab\nabcd")
    result = invoke("run", "b", "--encoding", file, "--score", responses, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["prompt_tokens"], [s["logprob"] for s in row["scores"]]) for row in rows] == [
        (2, [-2.0, -1.0, -1.0]), (4, [0.0, -1.0, -3.0]),
    ]  # fmt: skip
    assert pair.calls[0]["part"] == "writer"
    text = invoke("run", "b", "--encoding", file, "--score", responses).stdout
    assert text.startswith("prompt 1 of the encoding\n")
    assert "prompt 2 of the encoding\n" in text


@pytest.mark.usefixtures("pair")
def test_run_scores_the_prompts_beside_those_with_unknown_tokens(responses: Path) -> None:
    result = invoke("run", "b", "<x>", "abc", "--score", responses, "--json")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (result.exit_code, first["error"], second["prompt"]) == (1, "'<x>' (id 9): 9 rows", "abc")
    assert "prompt 1: '<x>'" in result.stderr


def test_run_names_the_lines_of_responses_that_cannot_be_scored(pair: FakePair, tmp_path: Path) -> None:
    file = tmp_path / "responses.txt"
    file.write_text("a\n0123456789\nb\n01234567890\n")
    result = invoke("run", "b", "x", "y", "--score", file)
    refused(result, 1, f"line 2 of {file}: too long", f"line 4 of {file}: too long")
    assert result.stderr.count("line 2 of") == 1
    pair.calls.clear()
    file.write_bytes(b"a\n\n\xff\n")
    refused(
        invoke("run", "b", "x", "--score", file),
        1,
        "2 of 3 responses",
        "line 2: an empty response",
        "line 3: not UTF-8",
    )
    file.write_text("")
    refused(invoke("run", "b", "x", "--score", file), 1, "is empty")
    refused(invoke("run", "b", "x", "--score", tmp_path / "absent"), 1, "There is no file")
    refused(invoke("run", "b", "x", "--score", "r.jsonl"), 2, "r.jsonl is JSONL", "one response per line")
    assert pair.calls == []


def test_run_refuses_what_generates_beside_responses_to_score(pair: FakePair, responses: Path) -> None:
    refused(
        invoke(
            "run", "b", "x", "--score", responses, "--num-beams", 2, "--seed", 1, "--bad-words", "a", "--profile",
            "--drafter", "ngram", "--num-draft-tokens", 3, "--save-encoding", "e", "--stop", ".",
        ),
        2,
        "--score generates nothing, unlike --num-beams, --seed, --stop, --drafter, --num-draft-tokens, --bad-words, "
        "--profile, --save-encoding",
        "--profile and generation options are for responses",
    )  # fmt: skip
    assert pair.calls == []


def test_run_passes_drafting_options_to_what_generates(pair: FakePair) -> None:
    assert invoke("run", "b", "abc", "--drafter", "ngram", "--num-draft-tokens", 4).stdout == "cba\n"
    assert pair.calls[1] == {"truncate": False, "drafter": "ngram", "num_draft_tokens": 4}
    pair.calls.clear()
    assert invoke("run", "b", "abc", "--verifier", "llm", "--defer", 0.25, "--max-new-tokens", 3).stdout == "cba\n"
    assert pair.calls[1:3] == [
        {"head": "llm"}, {"truncate": False, "max_new_tokens": 3, "verifier": "llm", "defer": 0.25},
    ]  # fmt: skip
    pair.calls.clear()
    invoke("run", "b", "abc", "de", "--drafter", "ngram", "--json", "--batch-size", 2)
    assert pair.calls[1] == {"batch_size": 2, "truncate": False, "drafter": "ngram"}
    refused_choice = invoke("run", "b", "abc", "--drafter", "oracle")
    assert (refused_choice.exit_code, "ngram" in refused_choice.output) == (2, True)


@pytest.mark.usefixtures("pair")
def test_run_tells_how_many_draft_tokens_were_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"drafted_tokens": 17, "accepted_tokens": 12}
    answer = FakePair.answer
    monkeypatch.setattr(FakePair, "answer", lambda self, *given: replace(answer(self, *given), **extra))
    result = invoke("run", "b", "abc", "de", "f", "--drafter", "ngram", "--json", "--profile")
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    assert [{name: row[name] for name in extra} for row in printed] == [extra] * 3
    assert "accepted 36 of 51 draft tokens" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "value"),
    [
        ([], None, 2, "There is no prompt"),
        (["x", "--file", "y.txt"], None, 2, "given twice"),
        (["--file", "y.parquet"], None, 2, "y.parquet"),
        (["--file", "absent.txt"], None, 1, "absent.txt"),
        ([""], None, 1, "prompt 1: empty"),
        (["-"], b"a\n\xff\n", 1, "line 2: not UTF-8"),
        (["-"], b"a\n\nb\n\n\n", 1, "line 2: an empty prompt"),
        (["-"], b"", 1, "standard input"),
    ],
)
def test_run_refuses_bad_prompts_before_loading(
    pair: FakePair, arguments: list[str], stdin: bytes | None, code: int, value: str
) -> None:
    refused(invoke("run", "b", *arguments, stdin=stdin), code, value)
    assert pair.calls == []


def test_run_on_a_jsonl_line_that_is_not_json_runs_nothing(pair: FakePair, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "a"}\noops\n', encoding="utf-8")
    refused(invoke("run", "b", "--file", file), 1, "line 2: not JSON", "'oops'", "nothing was run")
    assert pair.calls == []


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize(("error", "code", "message"), [
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device", "/full"), 1, "No space left on device: /full"),
    (PermissionError(errno.EACCES, "Permission denied", "/closed"), 1, "Permission denied: /closed"),
])  # fmt: skip
def test_what_the_system_does_is_a_message(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(FakePair, "stream", fail)
    result = invoke("run", "b", "x")
    assert (result.exit_code, "Traceback" in result.stderr) == (code, False)
    assert message in result.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m llm2slm_export recipes show tatoeba-en-fr | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, timeout=60)
    assert result.stderr == ""


# --- verify, inspect, doctor ------------------------------------------------------------------------------------


def test_verify_checks_hashes_without_torch(bundle: Path) -> None:
    result = invoke("verify", bundle, "--json")
    assert json.loads(result.stdout) == {"bundle": str(bundle), "files": 5, "hashes": True, "parity": None}
    assert "Only hashes were checked" in result.stderr


def test_verify_compares_with_a_composition(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = ParityReport(rows=(parity_row(), parity_row(value=1.0)))
    monkeypatch.setitem(
        sys.modules, "llm2slm_export.authoring.parity.verify", SimpleNamespace(verify=lambda *_, **__: report)
    )
    result = invoke("verify", bundle, "--composition", bundle)
    assert result.exit_code == 1
    assert "Parity FAILED." in result.stdout
    assert "NO" in result.stdout


def test_verify_compares_one_head(two_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def verify(*given: Any, gate: Any, runtime: str) -> ParityReport:
        assert gate is None
        assert runtime == "onnxruntime"
        asked.append(given)
        return ParityReport(rows=(parity_row(),))

    monkeypatch.setitem(sys.modules, "llm2slm_export.authoring.parity.verify", SimpleNamespace(verify=verify))
    assert invoke("verify", two_heads, "--composition", tmp_path, "--head", "es").exit_code == 0
    assert invoke("verify", two_heads, "--composition", tmp_path).exit_code == 0
    assert asked == [(two_heads, tmp_path, "es"), (two_heads, tmp_path, None)]
    refused(invoke("verify", two_heads, "--head", "es"), 2, "--head es goes with --composition")
    refused(
        invoke("verify", two_heads, "--head", "es", "--gate", "x.txt"),
        2,
        "--head es and --gate x.txt go with --composition",
    )
    refused(invoke("verify", two_heads, "--max-differing", "0.1"), 2, "--max-differing 0.1 goes with --composition")


def test_verify_refuses_a_head_that_is_not_there(two_heads: Path, tmp_path: Path) -> None:
    result = invoke("verify", two_heads, "--composition", tmp_path, "--head", "de")
    refused(result, 2, "no head 'de'", "its heads: fr, es")


def test_run_refuses_a_head_that_is_not_there(two_heads: Path) -> None:
    refused(invoke("run", two_heads, "x", "--head", "de"), 2, "no head 'de'", "its heads: fr, es")


@pytest.mark.parametrize("command", ["verify", "inspect", "run", "doctor"])
def test_a_directory_that_is_no_bundle(tmp_path: Path, command: str) -> None:
    result = invoke(command, tmp_path, *(["hello"] if command == "run" else []))
    assert result.exit_code == 1
    assert f"{tmp_path} is not a bundle" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "expected 700 bytes, got 699"),
        (lambda path: path.write_bytes(b"W" + path.read_bytes()[1:]), "expected sha256"),
    ],
    ids=["missing", "truncated", "flipped"],
)
def test_damage_is_named_by_file(bundle: Path, damage: Any, reason: str) -> None:
    damage(bundle / "decoder.onnx.data")
    refused(invoke("verify", bundle), 1, "decoder.onnx.data", reason, "copy it again")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_newer_schema_is_refused(bundle: Path, command: str) -> None:
    path = bundle / MANIFEST_FILE
    path.write_text(
        path.read_text(encoding="utf-8").replace('"schema_version": 4', '"schema_version": 9'), encoding="utf-8"
    )
    refused(invoke(command, bundle), 1, "schema version 9", "pip install --upgrade")


def test_a_bundle_from_before_caches_had_a_capacity_is_refused(bundle: Path) -> None:
    path = bundle / MANIFEST_FILE
    path.write_bytes(stamped(path.read_bytes().replace(b'"fusion": "add"', b'"fusion": "multiply"')))
    refused(invoke("verify", bundle), 1, "fusion", "'add'", "build the bundle again")


def test_inspect_tells_everything(bundle: Path) -> None:
    text = invoke("inspect", bundle).stdout
    for part in (
        "small", "onnxruntime ≥ 1.20", "[batch, prompt, 16]", "tensors like past_key_values", "random (seed 7)", "eos 1", "max_new_tokens 16",
        "1 of 1 comparisons", "past_key_values.0.decoder.key", "decoder.onnx, fp32, 770 B",
    ):  # fmt: skip
        assert part in text


def test_inspect_json_is_the_manifest_with_sizes(bundle: Path) -> None:
    raw = json.loads(invoke("inspect", bundle, "--json").stdout)
    sizes = {"encoder": 70, "projector": 90, "decoder": 770}
    assert (raw.pop("graph_bytes"), raw.pop("graph_bytes_by_head")) == (sizes, {"main": sizes})
    assert raw.pop("total_bytes") > 930
    assert Manifest.model_validate(raw).name == "small"


TWO_HEADS: dict[str, dict[str, Any]] = {
    "fr": {"llm_layer": (4, 8, -1), "max_total_tokens": 600},
    "es": {
        "llm_layer": (4, 8, -1), "fusion": "prefix", "trained": False, "prompt_template": "user: {prompt}\nmodel: ",
        "sources": dict.fromkeys(
            ("llm", "slm"),
            Source(model="other", revision="abc", model_type="gpt2", parameters=2_000_000, weights="pretrained"),
        ),
        "tokenizer": TokenizerEntry(strategy="llm", llm=TOKENIZER, slm=TOKENIZER, slm_size=32),
        "generation": GenerationDefaults(max_new_tokens=9, num_beams=4, bad_words_ids=((5, 6), (7,))),
    },
}  # fmt: skip


@pytest.fixture
def two_heads(tmp_path: Path) -> Path:
    write_small_bundle(tmp_path / "two", heads=TWO_HEADS)
    return tmp_path / "two"


def test_inspect_tells_of_every_head(two_heads: Path) -> None:
    text = invoke("inspect", two_heads).stdout
    rows = [" ".join(line.split()) for line in text.splitlines()]
    for row in (
        "heads fr, es (default: fr)",
        "head SLM fusion tokenizer trained projector decoder",
        "fr tiny add (LLM layers 4, 8, -1) shared yes 90 B 770 B",
        "es other prefix (LLM layers 4, 8, -1) llm no 90 B 770 B",
        "SLM of fr tiny t5 0.0 M random (seed 7) -",
        "SLM of es other gpt2 2.0 M pretrained abc",
        "Head fr",
        "SLM's positions 600",
        "generation max_new_tokens 16",
        "Head es",
        "trained no: its projector has random weights",
        "prompt template user: {prompt}\\nmodel:",
        "generation max_new_tokens 9, num_beams 4, bad_words_ids (5, 6)/(7,)",
        "encoder: encoder.onnx, fp32, 70 B, opset 20, onnxruntime ≥ 1.20",
        "decoder: es.decoder.onnx, fp32, 770 B, opset 20, onnxruntime ≥ 1.20, weights in es.decoder.onnx.data",
    ):
        assert row in rows
    assert sum(row.startswith("encoder:") for row in rows) == 1


def test_inspect_json_tells_of_every_head(two_heads: Path) -> None:
    raw = json.loads(invoke("inspect", two_heads, "--json").stdout)
    sizes = {"encoder": 70, "projector": 90, "decoder": 770}
    assert raw.pop("graph_bytes_by_head") == {"fr": sizes, "es": sizes}
    assert raw.pop("graph_bytes") == sizes
    assert raw.pop("total_bytes") > 70 + 2 * (90 + 770)
    manifest = Manifest.model_validate(raw)
    assert manifest.heads["es"].generation == TWO_HEADS["es"]["generation"]
    assert (manifest.llm_layer, manifest.heads["es"].graphs["decoder"].data) == ((4, 8, -1), ("es.decoder.onnx.data",))


def test_doctor_prints_and_checks(bundle: Path) -> None:
    assert invoke("doctor", bundle).exit_code == 0
    raw = json.loads(invoke("doctor", bundle, "--json").stdout)
    assert raw["bundle"]["ok"] is True
    assert {extra["name"] for extra in raw["extras"]} == {
        "base", "cpu", "gpu", "openvino", "tensorrt", "tensorrt-rtx", "build", "sentencepiece", "train", "eval", "serve",
        "ray",
    }  # fmt: skip


# --- build, plan, train -----------------------------------------------------------------------------------------


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Loading and building that take no time: what they were called with."""
    calls: list[dict[str, Any]] = []
    read: list[list[Path]] = []

    def compose_untrained(llm: ModelSource, slm: ModelSource, **options: Any) -> str:
        calls.append({"llm": llm.model, "slm": slm.model, **options})
        return "pair"

    def load_composition(directory: Path) -> str:
        return f"pair of {directory}"

    def build_heads(
        sources: Any,
        out: Path,
        options: Any,
        *,
        force: bool,
        inputs: Any,
        on_start: Any,
        on_stage: Any,
    ) -> Manifest:
        assert options.engines is None
        heads = {name: load() for name, load in sources.items()}
        calls.append(
            {
                "heads": heads,
                "precision": options.precision,
                "weight_quantization": options.weight_quantization,
                "force": force,
            }
            | ({"head_precision": own} if (own := dict(filter(itemgetter(1), options.head_precision.items()))) else {})
        )
        read.append(list(inputs))
        if options.gate or options.calibration:
            calls.append({"gate": options.gate, "calibration": options.calibration})
        on_start("encoder")
        print("noise of a library")
        on_stage(SimpleNamespace(name="encoder", seconds=1.5, bytes=2_500_000))
        several: dict[str, dict[str, Any]] = {name: {} for name in heads}
        return write_small_bundle(out, trained=False, heads=several if len(several) > 1 else None)

    monkeypatch.setattr("llm2slm_export.authoring.models.pairing.compose_untrained", compose_untrained)
    monkeypatch.setattr("llm2slm_export.authoring.models.pairing.load_composition", load_composition)
    monkeypatch.setitem(sys.modules, "llm2slm_export.authoring.build", SimpleNamespace(build_heads=build_heads))
    return calls


def test_build_from_two_models(exporter: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "pair"
    result = invoke(
        "build", "--llm", "t5-xl", "--slm", "t5-small", "--random-weights", "--seed", 3, "--out", out,
        "--precision", "encoder=int8,decoder=int8",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert exporter[0] == {
        "llm": "t5-xl", "slm": "t5-small", "pair_config": PairConfig(), "random_weights": True, "seed": 3, "name": "t5-xl_t5-small",
    }  # fmt: skip
    assert exporter[1] == {
        "heads": {"main": "pair"}, "precision": {"encoder": "int8", "projector": "fp32", "decoder": "int8"},
        "weight_quantization": WeightQuantization(), "force": False,
    }  # fmt: skip
    lines = result.stdout.splitlines()
    assert any(line.split() == ["encoder", "1.5", "s", "2.5", "MB"] for line in lines)
    assert any("the LLM adds nothing until `train` has run" in line for line in lines)
    assert lines[-1] == f'Next: llm2slm-export run {out} "How are you?"'


def test_build_with_a_gate_and_prompts_to_fit_to(exporter: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "held_out.txt").write_text("one\ntwo\n")
    (tmp_path / "fit.jsonl").write_text('{"prompt": "three", "response": "drei"}\n')
    result = invoke(
        "build", "--llm", "t5-xl", "--slm", "t5-small", "--out", tmp_path / "pair", "--precision", "decoder=int4",
        "--gate", tmp_path / "held_out.txt", "--max-differing", "0.03", "--calibrate", tmp_path / "fit.jsonl",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (given,) = exporter[2:]
    assert given == {"gate": Gate(("one", "two"), 0.03), "calibration": ("three",)}


@pytest.mark.usefixtures("exporter")
def test_build_json_is_alone_on_stdout(tmp_path: Path) -> None:
    out = tmp_path / "pair"
    result = invoke("build", "--llm", "t5-xl", "--slm", "t5-small", "--out", out, "--json")
    raw = json.loads(result.stdout)
    assert (raw["bundle"], raw["parity_passed"], raw["trained"]) == (str(out), True, False)
    assert [stage["name"] for stage in raw["stages"]] == ["encoder"]
    assert raw["heads"] == ["main"]
    assert raw["bytes"] > 0
    assert raw["peak_rss_mb"] > 0
    assert "noise of a library" in result.stderr


def test_build_refuses_an_existing_directory_before_loading(exporter: list[dict[str, Any]], bundle: Path) -> None:
    refused(invoke("build", "--llm", "a", "--slm", "b", "--out", bundle), 2, f"{bundle} exists already", "--force")
    assert exporter == []


def composition_at(directory: Path, **fields: Any) -> Path:
    """What `build` reads of a composition before it loads models, with a file of each of its parts."""
    (directory / "slm").mkdir(parents=True)
    (directory / "llm").mkdir()
    for part in ("projector.safetensors", "slm/model.safetensors", "llm/model.safetensors"):
        (directory / part).write_text(part)
    file = {
        "format": "llm2slm-composition", "version": 1, "name": "tiny", "llm": {"model": "llm"}, "slm": {"model": "slm"},
        "projector": {"kind": "mlp", "d_in": 4, "d_hidden": 4, "d_out": 4},
    }  # fmt: skip
    (directory / "composition.json").write_text(json.dumps(file | fields))
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_build_replaces_nothing_that_it_reads(
    exporter: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = composition_at(tmp_path / "all" / "pair")
    (tmp_path / "link").symlink_to(made)
    before = contents(tmp_path)
    for target, message in (
        (made, "it is "), (made.parent, "it holds "), (made / "llm", "it is "), (made / "bundle", "it lies in "),
        (tmp_path / "link" / ".." / "pair", "it is "),
    ):  # fmt: skip
        refused(invoke("build", "--composition", made, "--out", target, "--force"), 2, message, "which is read")
    refused(
        invoke("build", "--head", f"one={made}", "--head", f"two={tmp_path / 'link'}", "--out", made, "--force"),
        2,
        "it is ",
    )
    refused(
        invoke("build", "--llm", made / "llm", "--slm", made / "slm", "--out", made / "slm", "--force"), 2, "it is "
    )
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "gate.txt").write_text("one\n")
    refused(
        invoke("build", "--composition", made, "--gate", prompts / "gate.txt", "--out", prompts, "--force"), 2,
        f"it holds {prompts / 'gate.txt'}, which is read", "it is not a bundle",
    )  # fmt: skip
    monkeypatch.chdir(made)
    refused(invoke("build", "--composition", ".", "--out", ".", "--force"), 2, "it is the working directory", "it is .")
    assert exporter == []
    assert contents(tmp_path) == before | contents(prompts)


def test_build_replaces_nothing_but_a_bundle(exporter: list[dict[str, Any]], bundle: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "docs").mkdir(parents=True)
    (home / "docs" / "thesis.txt").write_text("years of work")
    made = composition_at(home / "pair")
    (bundle / "notes.txt").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = contents(tmp_path)
    for target, message in (
        (home, "it is not a bundle"), (home / "docs", "it is not a bundle"), (bundle, "notes.txt is no part of it"),
        (home / "docs" / "thesis.txt", "it is a file"), (tmp_path / "dangling", "it is a link"), ("/", "it is the root"),
    ):  # fmt: skip
        refused(
            invoke("build", "--composition", made, "--out", target, "--force"),
            2,
            f"{target} cannot be replaced",
            message,
        )
    assert exporter == []
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["/victim", "../../escaped", "..", ".", "", "a/b", "x\ny", "x\n", "\ud800", "-x", "é" * 3]
)
def test_a_composition_cannot_name_the_place_that_is_written(
    exporter: list[dict[str, Any]], tmp_path: Path, name: str
) -> None:
    made = composition_at(tmp_path / "pair", name=name)
    before = contents(tmp_path)
    for force in ((), ("--force",)):
        reason = "a lone surrogate" if name == "\ud800" else "is not a composition this release can read"
        refused(invoke("build", "--composition", made, *force), 1, reason)
    assert exporter == []
    assert contents(tmp_path) == before


def test_two_directories_make_a_name_that_is_a_name(exporter: list[dict[str, Any]], tmp_path: Path) -> None:
    result = invoke("build", "--llm", "my models/T5 (v1)", "--slm", "a/..b", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert exporter[0]["name"] == "T5-v1-_..b"


@pytest.mark.usefixtures("exporter")
def test_build_shows_what_missed_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        report = ParityReport(rows=(parity_row("encoder"), parity_row(value=0.5)))
        raise ParityError("The graphs do not match.", remedy="report it", report=report)

    monkeypatch.setitem(sys.modules, "llm2slm_export.authoring.build", SimpleNamespace(build_heads=build))
    result = invoke("build", "--llm", "a", "--slm", "b", "--out", tmp_path / "x")
    refused(result, 1, "decoder", "batch 3", "0.5", "The graphs do not match.")
    assert "encoder" not in result.stderr


@pytest.mark.usefixtures("exporter")
def test_build_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise RuntimeError("serialization failed: No space left on device (os error 28)")

    monkeypatch.setitem(sys.modules, "llm2slm_export.authoring.build", SimpleNamespace(build_heads=build))
    out = tmp_path / "x"
    refused(
        invoke("build", "--llm", "a", "--slm", "b", "--out", out), 1, f"No space left on device while writing {out}"
    )


TWO_MODELS = ("--llm", "a", "--slm", "b")
T5_PAIR = ["--llm", "t5-xl", "--slm", "t5-small"]


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        ([], 2, ["none of them", "recipes ls"]),
        (["tatoeba-en-fr", *TWO_MODELS], 2, ["RECIPE and --llm and --slm"]),
        (["--composition", "x", "--llm", "a"], 2, ["--composition and --llm"]),
        (["--llm", "t5-xl"], 2, ["--llm t5-xl", "add --slm MODEL"]),
        (["tatoeba-en-fr", "--random-weights"], 2, ["--random-weights goes with --llm and --slm"]),
        (["--composition", "x", "--seed", "1"], 2, ["--seed goes with"]),
        (
            ["--composition", "x", "--fusion", "add", "--tokenizer", "llm", "--layer", "1"],
            2,
            ["--fusion, --tokenizer, --layer go with --llm and --slm", "leave out the options named"],
        ),
        (["tatoeba-en-fr", "--layer", "1"], 2, ["--layer goes with --llm and --slm"]),
        (["--head", "fr=x", "--fusion", "add", "--seed", "1"], 2, ["--fusion, --seed go with --llm and --slm"]),
        (["--head", "fr=x", "--composition", "x"], 2, ["given: --composition and --head"]),
        ([*TWO_MODELS, "--layer", "4,last"], 2, ["--layer '4,last' cannot be read", "--layer 4,8,-1"]),
        ([*TWO_MODELS, "--layer", ""], 2, ["--layer '' cannot be read"]),
        (["--composition", "nowhere"], 1, ["nowhere is not a composition", "llm2slm-export train"]),
        (["nothing-like-it"], 2, ["nothing-like-it", "recipes ls"]),
        (["tatoeba-en-fr"], 1, ["pair/composition.json", "llm2slm-export train tatoeba-en-fr"]),
        ([*TWO_MODELS, "--precision", "int4", "--block-size", "48"], 2, ["--block-size 48", "16, 32, 64, 128, 256"]),
        (
            [*TWO_MODELS, "--block-size", "64", "--quantize-lm-head"],
            2,
            ["no graph is int8 or int4", "no graph is int4", "decoder=fp32"],
        ),
        ([*TWO_MODELS, "--precision", "int8", "--quantize-lm-head"], 2, ["--quantize-lm-head: no graph is int4"]),
        ([*TWO_MODELS, "--precision", "int3"], 2, ["'int3'", "fp32 or fp16 or bf16 or int8 or int4"]),
        (
            [*TWO_MODELS, "--calibrate", "x.txt"],
            2,
            ["--calibrate x.txt is for a decoder at int8 or int4", "an encoder at w8a8", "decoder: fp32"],
        ),
        ([*TWO_MODELS, "--precision", "encoder=w8a8"], 2, ["needs calibration prompts", "add --calibrate FILE"]),
        (
            [*TWO_MODELS, "--precision", "w8a8"],
            2,
            ["not of projector and decoder", "--precision encoder=w8a8,projector=int8,decoder=int8"],
        ),
        ([*TWO_MODELS, "--max-differing", "0.1"], 2, ["--max-differing 0.1", "add --gate FILE"]),
        ([*TWO_MODELS, "--llm-head-precision", "int8"], 2, ["no effect without the LLM head", "add --llm-head"]),
        (
            [*T5_PAIR, "--llm-head", "--llm-head-precision", "encoder=int8,step=fp32,decoder=w8a8"],
            2,
            [
                "heads share the encoder; give --precision encoder=P",
                "graph 'step'",
                "precision 'w8a8'",
                "projector, decoder",
            ],
        ),
        ([*T5_PAIR, "--llm-head", "--layer", "4,8,-1"], 1, ["reads LLM layer 4, 8, -1", "leave out --layer"]),
        (
            ["--llm", "gpt2", "--slm", "t5-small", "--llm-head"],
            1,
            ["'gpt2' is decoder-only", "an LLM of encoder and decoder"],
        ),
        (
            ["--head", "llm=x", "--head", "fr"],
            2,
            ["the head 'llm' is the LLM's own decoder", "'fr' is not NAME=COMPOSITION"],
        ),
        ([*TWO_MODELS, "--gate", "nowhere.txt"], 1, ["no file nowhere.txt", "path given with --gate"]),
        ([*TWO_MODELS, "--gate", "prompts.xlsx"], 2, ["--gate prompts.xlsx is neither .jsonl, .tsv, .csv nor .txt"]),
        ([*TWO_MODELS, "--precision", "enc=int8,decoder=fp8"], 2, ["graph 'enc'", "precision 'fp8'", "projector"]),
    ],
)
def test_build_refuses(
    exporter: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], code: int, parts: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    refused(invoke("build", *arguments), code, *parts)
    assert exporter == []


def test_build_adds_the_llm_head(
    exporter: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load_head = "llm2slm_export.authoring.models.llm_head.load_llm_head"
    monkeypatch.setattr(load_head, lambda load, llm: f"{llm.model} beside {load()}")
    (tmp_path / "fit.txt").write_text("one\n")
    arguments = ["build", *T5_PAIR, "--llm-head", "--llm-head-precision", "decoder=int8", "--calibrate", "fit.txt"]
    result = invoke(*arguments, "--block-size", "64", "--json")
    assert result.exit_code == 0, result.output
    built = next(call for call in exporter if "heads" in call)
    assert built["heads"] == {"main": "pair", "llm": "t5-xl beside pair"}
    assert built["head_precision"] == {"llm": {"projector": "fp32", "decoder": "int8"}}
    assert set(built["precision"].values()) == {"fp32"}
    assert json.loads(result.stdout)["heads"] == ["main", "llm"]


def test_build_takes_a_recipe_of_two_models(
    exporter: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "name: mine\nllm: {model: a, layer: [2, 4, -1]}\nprojector: {kind: identity}\nslm: {model: b}\n"
        "fusion: prefix\ntokenizer: llm\nprompt_template: chat\n"
        "export: {precision: {decoder: int4}, block_size: 64, quantize_lm_head: true}\n",
        encoding="utf-8",
    )
    result = invoke("build", "mine.yaml", "--block-size", "128")
    assert result.exit_code == 0, result.output
    composed, built = exporter
    assert composed == {
        "llm": "a", "slm": "b", "name": "mine",
        "pair_config": PairConfig("prefix", "llm", (2, 4, -1), ProjectorSettings(kind="identity"), "chat", 512, 128),
    }  # fmt: skip
    assert built["precision"]["decoder"] == "int4"
    assert built["weight_quantization"] == WeightQuantization(128, quantize_lm_head=True)
    assert (tmp_path / "engines" / "mine" / MANIFEST_FILE).is_file()


@pytest.mark.parametrize(
    ("options", "pair_config"),
    [
        (["--fusion", "cross_attention"], PairConfig(fusion="cross_attention")),
        (["--tokenizer", "llm", "--layer", "-2"], PairConfig(tokenizer="llm", layer=-2)),
        (["--layer", "4,8,-1", "--fusion", "prefix"], PairConfig(fusion="prefix", layer=(4, 8, -1))),
    ],
)
def test_build_joins_two_models_as_it_is_told(
    exporter: list[dict[str, Any]], tmp_path: Path, options: list[str], pair_config: PairConfig
) -> None:
    result = invoke("build", *TWO_MODELS, *options, "--out", tmp_path / "x")
    assert result.exit_code == 0, result.output
    assert exporter[0]["pair_config"] == pair_config


def write_composition(directory: Path) -> Path:
    directory.mkdir()
    projector = {"d_in": 4, "d_hidden": 4, "d_out": 4}
    fields = {"name": directory.name, "llm": {"model": "llm"}, "projector": projector}
    (directory / "composition.json").write_text(json.dumps(fields), encoding="utf-8")
    return directory


def test_build_of_several_heads(
    exporter: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    heads = {name: write_composition(tmp_path / f"{name}-pair") for name in ("fr", "es")}
    arguments = [part for name, path in heads.items() for part in ("--head", f"{name}={path}")]
    result = invoke("build", *arguments)
    assert result.exit_code == 0, result.output
    assert exporter[0]["heads"] == {name: f"pair of {path}" for name, path in heads.items()}
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("WARNING")] == [
        f"WARNING: the head '{name}' is untrained: the LLM adds nothing until `train` has run." for name in heads
    ]
    out = Path("engines") / "fr_es"
    assert lines[-2:] == [
        "Heads: fr, es (default: fr).",
        f'Next: llm2slm-export run {out} --head es "How are you?"',
    ]
    raw = json.loads(invoke("build", *arguments, "--force", "--out", "again", "--json").stdout)
    assert (raw["heads"], raw["trained"], raw["parity_passed"]) == (["fr", "es"], False, True)


def test_build_knows_the_training_data_s_columns_and_prompts(
    exporter: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_record(Path("c"), prompt_field="en", response_field="fr")
    Path("gate.csv").write_text("fr,en\nc,a\ne,d\n")
    Path("fit.tsv").write_text("b\tx\n")
    arguments = ["build", "--composition", "c", "--precision", "int8", "--gate", "gate.csv"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert exporter[1]["gate"].prompts == ("a", "d")
    assert result.stdout.splitlines()[-1] == "Next: llm2slm-export run engines/x 'Where are we?'"
    invoke(*arguments, "--out", "o", "--calibrate", "fit.tsv", "--prompt-field", "0")
    assert (exporter[3]["gate"].prompts, exporter[3]["calibration"]) == (("fr", "c", "e"), ("b",))
    refused(invoke(*arguments, "--out", "p", "--prompt-field", "EN"), 1, "did you mean 'en'?")
    refused(invoke(*arguments[:-2], "--out", "p", "--prompt-field", "en"), 2, "goes with --gate or --calibrate")


def test_build_refuses_heads_that_cannot_be_read(exporter: list[dict[str, Any]], tmp_path: Path) -> None:
    good = write_composition(tmp_path / "good")
    items = [f"fr={good}", "es", "=x", "de=", "no.dots=x", "-it=x", f"fr={good}"]
    result = invoke("build", *(part for item in items for part in ("--head", item)))
    refused(result, 2, "'fr=", "there is a head 'fr' already", "--head es=compositions/es")
    for item in items[1:-1]:
        assert f"{item!r} is not NAME=COMPOSITION" in result.stderr.replace("\n", " ")
    result = invoke("build", "--head", f"fr={good}", "--head", "es=nowhere", "--head", "de=nothing")
    refused(
        result,
        1,
        "2 of 3 heads cannot be built",
        "es: nowhere is not a composition",
        "de: nothing is not a composition",
    )
    assert exporter == []


@pytest.mark.parametrize(
    ("command", "extra"),
    [(["build", *TWO_MODELS], "build"), (["plan", *TWO_MODELS], "build"), (["train", "tatoeba-en-fr"], "train")],
)
def test_a_missing_extra_names_the_pip_line(monkeypatch: pytest.MonkeyPatch, command: list[str], extra: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    refused(invoke(*command), 1, "not installed: torch", f"pip install 'llm2slm-export[{extra}]'")


@pytest.fixture
def trained(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of `train`, which trains nothing, in a directory where nothing has been trained or built."""
    calls: list[Any] = []
    monkeypatch.chdir(tmp_path_factory.mktemp("nothing"))

    def train(recipe: Any, out: Path, **options: Any) -> Any:
        calls.append((recipe, out, options))
        options["progress"].start("training", 2)
        return SimpleNamespace(
            directory=out, metrics={"eval_loss": 1.25}, seconds=3.0, is_main_process=recipe.training.epochs != 9
        )

    monkeypatch.setitem(sys.modules, "llm2slm_export.authoring.training.train", SimpleNamespace(train=train))
    monkeypatch.setattr("llm2slm_export.authoring.training.inputs.refuse_missing", lambda *_: None)
    return calls


def test_train_passes_recipe_and_overrides(tmp_path: Path, trained: list[Any]) -> None:
    calls = trained
    result = invoke("train", "tatoeba-en-fr", "training.epochs=2", "--only", "llm", "--json")
    assert result.exit_code == 0, result.output
    recipe, out, options = calls[0]
    assert (recipe.training.epochs, out) == (2, Path("runs/tatoeba-en-fr/llm"))
    assert (options["part"], options["resume"], options["force"]) == ("llm", False, False)
    assert json.loads(result.stdout)["metrics"] == {"eval_loss": 1.25}
    assert result.stderr.splitlines()[-1] == "Next: llm2slm-export train tatoeba-en-fr"
    assert invoke("train", "tatoeba-en-fr", "--out", tmp_path / "x").stdout.splitlines()[-1] == (
        f"Next: llm2slm-export build --composition {tmp_path / 'x'}"
    )


def test_train_reads_other_fields_than_the_recipe_s(trained: list[Any]) -> None:
    data = ["training.data.train=a.csv", "training.data.validation=b.csv"]
    invoke("train", "debian-synopsis", *data, "--prompt-field", "2", "--response-field", "title")
    invoke("train", "debian-synopsis", *data, "training.data.response_field=x", "--prompt-field", "text")
    invoke("train", "debian-synopsis", "--prompt-field", "2")
    found = [recipe.training.data for recipe, _, _ in trained]
    assert [(data.prompt_field, data.response_field) for data in found] == [
        (2, "title"),
        ("text", "x"),
        ("2", "response"),
    ]


def test_train_says_where_runs_share_their_caches(tmp_path: Path, trained: list[Any]) -> None:
    invoke("train", "tatoeba-en-fr", "--only", "slm-alone", "--cache", tmp_path, "--work", tmp_path / "w")
    invoke("train", "tatoeba-en-fr")
    (_, out, options), (_, _, plain) = trained
    assert (out, options["part"]) == (Path("runs/tatoeba-en-fr/slm-alone"), "slm-alone")
    assert (options["cache"], options["work"]) == (tmp_path, tmp_path / "w")
    assert (plain["cache"], plain["work"], plain["part"]) == (None, None, "pair")


def test_train_says_what_comes_next(tmp_path: Path, trained: list[Any]) -> None:
    for arguments, after in (
        ((), "build tatoeba-en-fr"),
        (("--only", "llm"), "train tatoeba-en-fr"),
        (("--only", "slm-alone"), "train tatoeba-en-fr"),
        (("--only", "slm", "--out", tmp_path / "x"), f"train tatoeba-en-fr slm.model={tmp_path / 'x'}"),
        (
            ("--only", "llm", "llm.model=t5-small", "llm.config=null"),
            "train tatoeba-en-fr llm.model=runs/tatoeba-en-fr/llm",
        ),
    ):
        assert invoke("train", "tatoeba-en-fr", *arguments).stdout.splitlines()[-1] == f"Next: llm2slm-export {after}"
    assert len(trained) == 5


def test_train_with_a_teacher(trained: list[Any]) -> None:
    invoke("train", "debian-synopsis", "--teacher")
    invoke("train", "debian-synopsis", "--teacher", "training.teacher.num_beams=4", "--only", "slm-alone")
    invoke("train", "debian-synopsis")
    teachers = [recipe.training.teacher for recipe, _, _ in trained]
    assert teachers[2] is None
    assert [(teacher.num_beams, teacher.batch_size, teacher.rows) for teacher in teachers[:2]] == [
        (1, 64, "replaced"), (4, 64, "replaced"),
    ]  # fmt: skip


def test_of_several_processes_the_main_one_speaks(trained: list[Any]) -> None:
    result = invoke("train", "tatoeba-en-fr", "training.epochs=9")
    assert result.exit_code == 0
    assert len(trained) == 1
    assert "written" not in result.output


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["tatoeba-en-fr", "--teacher", "--only", "llm"], ["--teacher", "not its own teacher"]),
        (["tatoeba-en-fr", "training.epochs"], ["'training.epochs' is not an override", "key.sub=value"]),
        (["tatoeba-en-fr", "traning.epochs=2"], ["traning", "did you mean 'training'?"]),
        (["tatoeba-en-fr", "training.epochs=many", "fusion=blend"], ["2 mistakes", "'many'", "'blend'"]),
    ],
)
def test_train_refuses(arguments: list[str], parts: list[str]) -> None:
    refused(invoke("train", *arguments), 2, *parts)


@pytest.mark.slow
def test_plan_of_a_recipe_and_of_two_models() -> None:
    raw = json.loads(invoke("plan", "tatoeba-en-fr", "--json", "--precision", "decoder=int8").stdout)
    assert raw["graphs"][2]["precision"] == "int8"
    text = invoke("plan", "--llm", "t5-small", "--slm", "t5-small", "--prompt-tokens", 16).stdout
    for part in (
        "t5-small → t5-small",
        "60.5 M",
        "to build (estimate)",
        "16 prompt tokens, 128 new tokens",
        "not a measurement",
    ):
        assert part in text


# --- recipes, usage ---------------------------------------------------------------------------------------------


def test_recipes_are_listed_shown_and_copied(tmp_path: Path) -> None:
    assert "tatoeba-en-fr" in invoke("recipes", "ls").stdout
    shown = invoke("recipes", "show", "tatoeba-en-fr").stdout
    assert invoke("recipes", "cp", "tatoeba-en-fr", tmp_path).exit_code == 0
    assert (tmp_path / "tatoeba-en-fr.yaml").read_text(encoding="utf-8") == shown
    refused(invoke("recipes", "cp", "tatoeba-en-fr", tmp_path), 2, "exists already")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "mine.yaml").write_text("mine")
    (tmp_path / "link.yaml").symlink_to("mine.yaml")
    for name in ("mine.yaml", "link.yaml"):
        refused(invoke("recipes", "cp", "tatoeba-en-fr", tmp_path / name), 2, "exists already")
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert invoke("recipes", "cp", "tatoeba-en-fr", tmp_path / "empty.yaml").exit_code == 0
    assert invoke("recipes", "cp", "tatoeba-en-fr", tmp_path / "my-pair.yaml").exit_code == 0
    mine = (tmp_path / "my-pair.yaml").read_text(encoding="utf-8")
    assert mine == shown.replace("\nname: tatoeba-en-fr\n", "\nname: my-pair\n"), "a pair of its own"
    refused(invoke("recipes", "show", "nothing"), 2, "'nothing'", "recipes ls")


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["run"], ["run", "b", "x", "--batch-size", "0"], ["train", "r", "--only", "both"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_the_version_is_printed() -> None:
    assert invoke("--version").stdout.strip()
