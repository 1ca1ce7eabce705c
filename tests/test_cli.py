"""The command line: what each command prints, and that every mistake is one message with a remedy and an exit code."""

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_bundle import parity_row, write_small_bundle
from typer.testing import CliRunner, Result

from llm2slm_export import orchestrator
from llm2slm_export.bundle import MANIFEST_FILE, Manifest, ParityReport
from llm2slm_export.cli import app
from llm2slm_export.errors import ParityError, PromptError
from llm2slm_export.orchestrator import Generation
from llm2slm_export.recipe import ModelSource

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

    def __enter__(self) -> "FakePair":
        return self

    def __exit__(self, *error: object) -> None:
        self.calls.append({"closed": True})

    def generate(self, prompts: list[str], **options: Any) -> list[Generation]:
        self.calls.append(options)
        too_long = [
            f"prompt {i}: {len(p)} tokens, at most {self.limit}" for i, p in enumerate(prompts) if len(p) > self.limit
        ]
        if too_long and not options["truncate"]:
            raise PromptError(
                f"{len(too_long)} prompts cannot be run.", *too_long, remedy="shorten them, or --truncate"
            )
        return [self.answer(prompt[: self.limit], len(prompt) - self.limit) for prompt in prompts]

    def generate_batches(self, prompts: list[str], *, batch_size: int, **options: Any) -> Iterator[list[Generation]]:
        answers = self.generate(prompts, batch_size=batch_size, **options)
        return (answers[start : start + batch_size] for start in range(0, len(answers), batch_size))

    def stream(self, prompt: str, **options: Any) -> Iterator[Any]:
        (generation,) = self.generate([prompt], **options)
        for character in generation.text[:-1]:
            yield SimpleNamespace(text=character, generation=None)
        yield SimpleNamespace(text=generation.text[-1], generation=generation)

    def answer(self, prompt: str, over: int) -> Generation:
        return Generation(
            text=prompt[::-1], token_ids=(3, 1), finish_reason="stop", prompt_tokens=len(prompt), new_tokens=2,
            dropped_tokens=max(0, over), device="cpu", timings_ms=dict(TIMINGS),
        )  # fmt: skip


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
    assert pair.calls == [{"path": Path("b"), "device": "cpu", "threads": None}, {"truncate": False}, {"closed": True}]


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


@pytest.mark.usefixtures("pair")
def test_run_json_has_every_field() -> None:
    result = invoke("run", "b", "-", "--json", stdin="été\nwhere?\n".encode())
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first == {
        "prompt": "été", "text": "été", "token_ids": [3, 1], "finish_reason": "stop", "prompt_tokens": 3, "new_tokens": 2,
        "device": "cpu", "timings_ms": TIMINGS,
    }  # fmt: skip
    assert second["text"] == "?erehw"
    assert "é" in result.stdout  # not escaped


def test_run_passes_what_was_said_and_nothing_else(pair: FakePair) -> None:
    invoke(
        "run", "b", "x", "--max-new-tokens", 5, "--do-sample", "--temperature", 0.5, "--top-k", 3, "--seed", 1,
        "--stop", ".", "--stop", "!", "--threads", 2, "--device", "cuda:1",
    )  # fmt: skip
    assert pair.calls[0] == {"path": Path("b"), "device": "cuda:1", "threads": 2}
    assert pair.calls[1] == {
        "truncate": False, "max_new_tokens": 5, "do_sample": True, "temperature": 0.5, "top_k": 3, "seed": 1,
        "stop": (".", "!"),
    }  # fmt: skip


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
def test_run_profiles_on_stderr() -> None:
    result = invoke("run", "b", "-", "--profile", "--batch-size", 2, stdin=b"ab\ncd\nef\n")
    assert result.stdout == "ba\ndc\nfe\n"
    decode = next(line.split() for line in result.stderr.splitlines() if line.startswith("decode"))
    assert decode == ["decode", "12.00", "3", "4.000", "250"]  # two batches of 6 ms; prefill wrote 3 of 6 tokens


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "value"),
    [
        ([], None, 2, "There is no prompt"),
        (["x", "--file", "y.txt"], None, 2, "given twice"),
        (["--file", "y.csv"], None, 2, "y.csv"),
        (["--file", "absent.txt"], None, 1, "absent.txt"),
        ([""], None, 1, "prompt 1: empty"),
        (["-"], b"a\n\xff\n", 1, "line 2: not UTF-8"),
        (["-"], b"a\n\nb\n\n\n", 1, "line 2: empty"),
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


@pytest.mark.usefixtures("pair")
def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(FakePair, "stream", fail)
    assert isinstance(invoke("run", "b", "x").exception, ZeroDivisionError)


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m llm2slm_export recipes show tatoeba-en-fr | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, timeout=60)
    assert result.stderr == ""


# --- verify, inspect, doctor ------------------------------------------------------------------------------------


def test_verify_checks_hashes_without_torch(bundle: Path) -> None:
    result = invoke("verify", bundle, "--json")
    assert json.loads(result.stdout) == {"bundle": str(bundle), "files": 4, "hashes": True, "parity": None}
    assert "Only hashes were checked" in result.stderr


def test_verify_compares_with_a_composition(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = ParityReport(rows=(parity_row(), parity_row(value=1.0)))
    monkeypatch.setitem(sys.modules, "llm2slm_export.verify", SimpleNamespace(verify=lambda *_: report))
    result = invoke("verify", bundle, "--composition", bundle)
    assert result.exit_code == 1
    assert "Parity FAILED." in result.stdout
    assert "NO" in result.stdout


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
        path.read_text(encoding="utf-8").replace('"schema_version": 1', '"schema_version": 9'), encoding="utf-8"
    )
    refused(invoke(command, bundle), 1, "schema version 9", "pip install --upgrade")


def test_inspect_tells_everything(bundle: Path) -> None:
    text = invoke("inspect", bundle).stdout
    for part in (
        "small", "onnxruntime ≥ 1.20", "[batch, prompt, 16]", "growing", "random (seed 7)", "eos 1", "max_new_tokens 16",
        "1 of 1 comparisons", "past_key_values.0.decoder.key", "decoder.onnx, fp32, 770 B",
    ):  # fmt: skip
        assert part in text


def test_inspect_json_is_the_manifest_with_sizes(bundle: Path) -> None:
    raw = json.loads(invoke("inspect", bundle, "--json").stdout)
    assert raw.pop("graph_bytes") == {"encoder": 70, "projector": 90, "decoder": 770}
    assert raw.pop("total_bytes") > 930
    assert Manifest.model_validate(raw).name == "small"


def test_doctor_prints_and_checks(bundle: Path) -> None:
    assert invoke("doctor", bundle).exit_code == 0
    raw = json.loads(invoke("doctor", bundle, "--json").stdout)
    assert raw["bundle"]["ok"] is True
    assert {extra["name"] for extra in raw["extras"]} == {"base", "cpu", "gpu", "build", "train"}


# --- build, plan, train -----------------------------------------------------------------------------------------


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Loading and building that take no time: what they were called with."""
    calls: list[dict[str, Any]] = []

    def compose_untrained(llm: ModelSource, slm: ModelSource, **options: Any) -> str:
        calls.append({"llm": llm.model, "slm": slm.model, **options})
        return "pair"

    def build(pair: Any, out: Path, *, precision: Any, force: bool, on_start: Any, on_stage: Any) -> Manifest:
        calls.append({"pair": pair, "precision": precision, "force": force})
        on_start("encoder")
        print("noise of a library")
        on_stage(SimpleNamespace(name="encoder", seconds=1.5, bytes=2_500_000))
        return write_small_bundle(out, trained=False)

    monkeypatch.setattr("llm2slm_export.models.loading.compose_untrained", compose_untrained)
    monkeypatch.setitem(sys.modules, "llm2slm_export.build", SimpleNamespace(build=build))
    return calls


def test_build_from_two_models(exporter: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "pair"
    result = invoke(
        "build", "--llm", "t5-xl", "--slm", "t5-small", "--random-weights", "--seed", 3, "--out", out,
        "--precision", "encoder=int8,decoder=int8",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert exporter[0] == {
        "llm": "t5-xl",
        "slm": "t5-small",
        "random_weights": True,
        "seed": 3,
        "name": "t5-xl_t5-small",
    }
    assert exporter[1] == {
        "pair": "pair", "precision": {"encoder": "int8", "projector": "fp32", "decoder": "int8"}, "force": False,
    }  # fmt: skip
    lines = result.stdout.splitlines()
    assert any(line.split() == ["encoder", "1.5", "s", "2.5", "MB"] for line in lines)
    assert any("the LLM adds nothing until `train` has run" in line for line in lines)
    assert lines[-1] == f'Next: llm2slm-export run {out} "How are you?"'


@pytest.mark.usefixtures("exporter")
def test_build_json_is_alone_on_stdout(tmp_path: Path) -> None:
    out = tmp_path / "pair"
    result = invoke("build", "--llm", "t5-xl", "--slm", "t5-small", "--out", out, "--json")
    raw = json.loads(result.stdout)
    assert (raw["bundle"], raw["parity_passed"], raw["trained"]) == (str(out), True, False)
    assert [stage["name"] for stage in raw["stages"]] == ["load", "encoder"]
    assert raw["bytes"] > 0
    assert raw["peak_rss_mb"] > 0
    assert "noise of a library" in result.stderr


def test_build_refuses_an_existing_directory_before_loading(exporter: list[dict[str, Any]], bundle: Path) -> None:
    refused(invoke("build", "--llm", "a", "--slm", "b", "--out", bundle), 2, f"{bundle} exists already", "--force")
    assert exporter == []


@pytest.mark.usefixtures("exporter")
def test_build_shows_what_missed_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        report = ParityReport(rows=(parity_row("encoder"), parity_row(value=0.5)))
        raise ParityError("The graphs do not match.", remedy="report it", report=report)

    monkeypatch.setitem(sys.modules, "llm2slm_export.build", SimpleNamespace(build=build))
    result = invoke("build", "--llm", "a", "--slm", "b", "--out", tmp_path / "x")
    refused(result, 1, "decoder", "batch 3", "0.5", "The graphs do not match.")
    assert "encoder" not in result.stderr


@pytest.mark.usefixtures("exporter")
def test_build_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise RuntimeError("serialization failed: No space left on device (os error 28)")

    monkeypatch.setitem(sys.modules, "llm2slm_export.build", SimpleNamespace(build=build))
    out = tmp_path / "x"
    refused(
        invoke("build", "--llm", "a", "--slm", "b", "--out", out), 1, f"No space left on device while writing {out}"
    )


TWO_MODELS = ("--llm", "a", "--slm", "b")


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        ([], 2, ["none of them", "recipes ls"]),
        (["tatoeba-en-fr", *TWO_MODELS], 2, ["RECIPE and --llm and --slm"]),
        (["--composition", "x", "--llm", "a"], 2, ["--composition and --llm"]),
        (["--llm", "t5-xl"], 2, ["--llm t5-xl", "add --slm MODEL"]),
        (["tatoeba-en-fr", "--random-weights"], 2, ["--random-weights goes with --llm and --slm"]),
        (["--composition", "x", "--seed", "1"], 2, ["--seed goes with"]),
        (["--composition", "nowhere"], 1, ["nowhere is not a composition", "llm2slm-export train"]),
        (["nothing-like-it"], 2, ["nothing-like-it", "recipes ls"]),
        (["tatoeba-en-fr"], 1, ["pair/composition.json", "llm2slm-export train tatoeba-en-fr"]),
        ([*TWO_MODELS, "--precision", "int4"], 2, ["'int4'", "fp32 or int8"]),
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


def test_build_takes_a_recipe_of_two_models(
    exporter: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "name: mine\nllm: {model: a, layer: 2}\nprojector: {d_hidden: 7}\nslm: {model: b}\nprompt_template: 'say {prompt}'\nexport: {precision: {decoder: int8}}\n",
        encoding="utf-8",
    )

    @dataclass(frozen=True)
    class Pair:
        file: Any

    def compose_untrained(llm: ModelSource, slm: ModelSource, **options: Any) -> Pair:
        given = {"llm": llm.model, "slm": slm.model, **options}
        return Pair(SimpleNamespace(model_copy=lambda update: given | update))

    monkeypatch.setattr("llm2slm_export.models.loading.compose_untrained", compose_untrained)
    result = invoke("build", "mine.yaml")
    assert result.exit_code == 0, result.output
    (call,) = exporter
    assert call["pair"].file == {
        "llm": "a", "slm": "b", "layer": 2, "d_hidden": 7, "name": "mine", "prompt_template": "say {prompt}", "max_prompt_tokens": 512,
        "max_new_tokens": 128,
    }  # fmt: skip
    assert call["precision"]["decoder"] == "int8"
    assert (tmp_path / "engines" / "mine" / MANIFEST_FILE).is_file()


@pytest.mark.parametrize(
    ("command", "extra"),
    [(["build", *TWO_MODELS], "build"), (["plan", *TWO_MODELS], "build"), (["train", "tatoeba-en-fr"], "train")],
)
def test_a_missing_extra_names_the_pip_line(monkeypatch: pytest.MonkeyPatch, command: list[str], extra: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    refused(invoke(*command), 1, "not installed: torch", f"pip install 'llm2slm-export[{extra}]'")


def test_train_passes_recipe_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def train(recipe: Any, out: Path, **options: Any) -> Any:
        calls.append((recipe, out, options))
        print("{'loss': 1.0}")
        return SimpleNamespace(directory=out, metrics={"eval_loss": 1.25}, seconds=3.0)

    monkeypatch.setitem(sys.modules, "llm2slm_export.training.trainer", SimpleNamespace(train=train))
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


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["tatoeba-en-fr", "training.epochs"], ["'training.epochs' is not an override", "key.sub=value"]),
        (["tatoeba-en-fr", "traning.epochs=2"], ["traning", "did you mean 'training'?"]),
        (["tatoeba-en-fr", "training.epochs=many", "fusion=blend"], ["2 mistakes", "'many'", "'blend'"]),
    ],
)
def test_train_refuses(arguments: list[str], parts: list[str]) -> None:
    refused(invoke("train", *arguments), 2, *parts)


def test_plan_of_a_recipe_and_of_two_models() -> None:
    raw = json.loads(invoke("plan", "tatoeba-en-fr", "--json", "--precision", "decoder=int8").stdout)
    assert raw["graphs"][2]["precision"] == "int8"
    text = invoke("plan", "--llm", "t5-base", "--slm", "t5-small", "--prompt-tokens", 16).stdout
    for part in (
        "t5-base → t5-small",
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
