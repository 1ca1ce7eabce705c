"""The LLM head against transformers' own `generate` of the LLM alone; and everything that cannot be one, refused at once."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

import llm2slm_export
from llm2slm_export.authoring.build import build_heads
from llm2slm_export.authoring.build_engines import EngineChoice
from llm2slm_export.authoring.build_options import BuildOptions
from llm2slm_export.authoring.models.llm_head import load_llm_head
from llm2slm_export.authoring.models.pairing import load_composition
from llm2slm_export.authoring.models.reference import digest
from llm2slm_export.authoring.pair_sources import BuildChoice, FusionOptions, pair_source
from llm2slm_export.authoring.parity.verify import verify
from llm2slm_export.authoring.plan import plan
from llm2slm_export.authoring.recipe import ModelSource
from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.bundle.manifest_file import read_manifest
from llm2slm_export.cli.app import app
from llm2slm_export.contract import GRAPHS, HEAD_GRAPHS, LLM_HEAD, MAIN
from llm2slm_export.environment.hardware import probe
from llm2slm_export.errors import CompositionError, UsageError
from tests.families.models import CONFIGS
from tests.support.oracle import Oracle
from tests.support.paths import DEMO_COMPOSITION
from tests.support.tiers import tiered
from tests.support.tiny_models import LLM_CONFIG, SLM_CONFIGS

PROMPTS = ["hello", "Where is the station?", "a", "one two three", "x y"]
BART = {"d_model": 48, "config": CONFIGS["bart"] | {"encoder_layers": 2, "decoder_layers": 1}}


def alone(llm: Path, prompt: str, **options: Any) -> tuple[int, ...]:
    """The ids of transformers' `generate` of an LLM for one prompt: no code of this package."""
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(llm, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llm)
    beyond = list(range(len(tokenizer), model.config.vocab_size))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        written = model.generate(ids, suppress_tokens=beyond, do_sample=False, max_length=None, **options)[
            0, 1:
        ].tolist()
    eos = model.generation_config.eos_token_id
    ends = [i for i, id in enumerate(written) if id in (eos if isinstance(eos, list) else [eos])]
    return tuple(written[: ends[0] + 1] if ends else written)


@pytest.fixture(scope="module")
def sources(
    save_generating_model: Callable[..., Path], save_composition: Callable[..., Path]
) -> Callable[[str], tuple[Path, Path]]:
    """sources(llm_type) → an LLM that has something to say, and a composition with it and a T5 as its SLM."""
    made: dict[str, tuple[Path, Path]] = {}

    def source(llm_type: str = "t5") -> tuple[Path, Path]:
        if llm_type not in made:
            config = LLM_CONFIG if llm_type == "t5" else BART["config"]
            llm = save_generating_model(config)
            made[llm_type] = llm, save_composition("t5", llm_config=LLM_CONFIG, llm=llm)
        return made[llm_type]

    return source


def built(composition: Path, out: Path, options: BuildOptions | None = None) -> Manifest:
    source = pair_source(BuildChoice(composition=composition, llm_head=True))
    return build_heads(source.heads, out, options or BuildOptions(), inputs=source.inputs)


@pytest.fixture
def bundle(llm_head_bundle: tuple[Path, Path, Path]) -> Path:
    """A bundle of a T5 pair and the LLM head of its T5."""
    return llm_head_bundle[2]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_the_head_writes_what_the_llm_alone_writes(
    llm_head_bundle: tuple[Path, Path, Path], bundle: Path, options: dict[str, Any]
) -> None:
    llm, _ = llm_head_bundle[:2]
    expected = [alone(llm, prompt, max_new_tokens=12, **options) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS), "an LLM that writes the same for every prompt shows nothing"
    with llm2slm_export.load(bundle, head=LLM_HEAD) as pair:
        together = pair.generate(PROMPTS, max_new_tokens=12, **options)
        single = [pair.generate([prompt], max_new_tokens=12, **options)[0] for prompt in PROMPTS]
    assert [tuple(response.token_ids) for response in together] == expected
    assert [tuple(response.token_ids) for response in single] == expected


@pytest.mark.slow
def test_run_drafts_with_the_pair_and_writes_what_the_llm_writes(
    llm_head_bundle: tuple[Path, Path, Path], bundle: Path, tmp_path: Path
) -> None:
    llm, _ = llm_head_bundle[:2]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = ["run", str(bundle), "--verifier", LLM_HEAD, "--max-new-tokens", "12"]
    result = CliRunner().invoke(app, [*given, "--file", str(tmp_path / "prompts.txt"), "--json", "--profile"])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [tuple(row["token_ids"]) for row in rows] == [alone(llm, p, max_new_tokens=12) for p in PROMPTS]
    drafted, accepted = (sum(row[f"{name}_tokens"] for row in rows) for name in ("drafted", "accepted"))
    assert f"accepted {accepted} of {drafted} draft tokens" in result.stderr
    streamed = CliRunner().invoke(app, [*given, PROMPTS[0], "--num-draft-tokens", "3"])
    assert streamed.stdout == f"{rows[0]['text']}\n"
    deferred = CliRunner().invoke(app, [*given, PROMPTS[0], "--defer", "0", "--json"])
    assert json.loads(deferred.stdout)["drafted_tokens"] == 0


@pytest.mark.slow
def test_the_pair_beside_it_stays_what_it_is(llm_head_bundle: tuple[Path, Path, Path], bundle: Path) -> None:
    expected = Oracle(llm_head_bundle[1]).generate(PROMPTS[:2], 8)
    with llm2slm_export.load(bundle) as pair:
        assert pair.heads == (MAIN, LLM_HEAD)
        assert [tuple(response.token_ids) for response in pair.generate(PROMPTS[:2], max_new_tokens=8)] == expected


@pytest.mark.slow
def test_the_manifest_tells_the_truth(llm_head_bundle: tuple[Path, Path, Path], bundle: Path) -> None:
    manifest = read_manifest(bundle)
    head = manifest.heads[LLM_HEAD]
    assert (manifest.head, manifest.trained, head.trained) == (MAIN, False, True)
    assert (head.fusion, head.llm_layer, head.shape.slm_kind) == ("cross_attention", -1, "encoder-decoder")
    assert head.graphs["encoder"] == manifest.graphs["encoder"]
    assert {part.name for part in head.graphs["projector"].inputs} == {"hidden_states", "attention_mask"}
    assert head.tokenizer.slm == head.tokenizer.llm == manifest.tokenizer.llm
    for fact in ("prompt_template", "prompt_special_tokens", "prompt_strip", "max_prompt_tokens"):
        assert getattr(head, fact) == getattr(manifest, fact)
    own = json.loads((llm_head_bundle[0] / "generation_config.json").read_text())
    assert list(head.special_ids.eos) == own["eos_token_id"]
    assert head.generation.max_new_tokens == manifest.generation.max_new_tokens
    assert head.sources["slm"].model == head.sources["llm"].model
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(llm_head_bundle[0])
    assert head.sources["slm"].parameters == model.num_parameters() > head.sources["llm"].parameters
    assert head.parity.passed
    assert {row.graph for row in head.parity.rows} == {"encoder", "projector", "decoder", "pair"}


def stored(bundle: Path) -> dict[str, dict[str, tuple[str, int]]]:
    """Of each graph, the place of every weight outside of it, by content."""
    graphs: dict[str, dict[str, tuple[str, int]]] = {}
    for path in bundle.glob("*.onnx"):
        places = graphs.setdefault(path.name, {})
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            fields = {entry.key: entry.value for entry in tensor.external_data}
            if not fields:
                continue
            with (bundle / fields["location"]).open("rb") as file:
                file.seek(int(fields["offset"]))
                content = file.read(int(fields["length"]))
            places[hashlib.sha256(content).hexdigest()] = fields["location"], int(fields["offset"])
    return graphs


@pytest.mark.parametrize("precision", tiered(["fp32", "int8"], slow=["fp32"]))
def test_no_weight_of_the_encoder_is_stored_twice(
    llm_head_bundle: tuple[Path, Path, Path],
    save_composition: Callable[..., Path],
    bundle: Path,
    tmp_path: Path,
    precision: str,
) -> None:
    if precision != "fp32":
        bundle = tmp_path / "bundle"
        # The large weights of `sources` lose too much at int8.
        built(save_composition("t5"), bundle, BuildOptions(dict.fromkeys(GRAPHS, precision)))
    graphs = stored(bundle)
    places: dict[str, set[tuple[str, int]]] = {}
    for graph in graphs.values():
        for content, place in graph.items():
            places.setdefault(content, set()).add(place)
    assert [content for content, found in places.items() if len(found) > 1] == []
    encoder = graphs["encoder.onnx"]
    assert {file for file, _ in encoder.values()} == {"encoder.onnx.data"}
    # The embedding table, which is the LLM's LM head too.
    shared = graphs[f"{LLM_HEAD}.decoder.onnx"].keys() & encoder.keys()
    assert shared
    assert "encoder.onnx.data" in read_manifest(bundle).heads[LLM_HEAD].graphs["decoder"].data
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(llm_head_bundle[0])
    if precision == "fp32":
        own = sum((bundle / f"{LLM_HEAD}.{graph}.onnx.data").stat().st_size for graph in HEAD_GRAPHS)
        decoder = sum(p.numel() for p in model.get_decoder().parameters()) - model.get_input_embeddings().weight.numel()
        assert own == pytest.approx(4 * decoder, rel=0.02)


@pytest.mark.slow
def test_the_plan_has_the_sizes_of_the_bundle(
    llm_head_bundle: tuple[Path, Path, Path], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2slm_export.authoring.plan.probe", partial(probe, megabytes=8, width=128))
    llm, composition = llm_head_bundle[:2]
    asked = partial(
        plan, ModelSource(model=str(llm)), ModelSource(model=str(composition / "slm")),
        precision=dict.fromkeys(("encoder", "projector", "decoder"), "fp32"),
    )  # fmt: skip
    made, without = asked(llm_head={}), asked()
    assert made.llm_head is not None
    manifest = read_manifest(bundle).heads[LLM_HEAD]
    for size in made.llm_head.graphs:
        weights = onnx.load(bundle / f"{LLM_HEAD}.{size.graph}.onnx").graph.initializer
        assert size.bytes == pytest.approx(sum(onnx.numpy_helper.to_array(t).nbytes for t in weights), rel=0.02)
        assert size.bytes_read == pytest.approx(manifest.graphs[size.graph].bytes_read, rel=0.02)
    # The encoder is counted once, and with it the table that the LLM's decoder reads.
    assert (made.graphs, made.cache) == (without.graphs, without.cache)
    assert made.bundle_bytes - without.bundle_bytes == 4 * (made.parameters.llm - made.parameters.llm_encoder)
    assert made.run_ram_bytes > without.run_ram_bytes
    stages = {stage.stage: stage.ms for stage in made.stages}
    assert stages["llm: total"] == pytest.approx(stages["encode"] + stages["llm: project"] + 128 * stages["llm: step"])
    small = asked(llm_head={"projector": "fp32", "decoder": "int8"}).llm_head
    assert small is not None
    assert [size.precision for size in small.graphs] == ["fp32", "int8"]
    assert small.graphs[1].bytes < made.llm_head.graphs[1].bytes / 3


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_the_commands_know_the_head(llm_head_bundle: tuple[Path, Path, Path], bundle: Path) -> None:
    llm, composition = llm_head_bundle[:2]
    shown = command("inspect", bundle)
    assert "LLM with its decoder" in shown
    assert re.search(rf"Head {LLM_HEAD}\s+trained\s+yes", shown)
    assert "opens here" in command("doctor", bundle)
    report = verify(bundle, composition, LLM_HEAD)
    assert report is not None
    assert report.passed
    text = alone(llm, "hello", max_new_tokens=4)
    response = json.loads(command("run", bundle, "--head", LLM_HEAD, "--max-new-tokens", 4, "--json", "hello"))
    assert tuple(response.get("token_ids") or response["responses"][0]["token_ids"]) == text


# --- every way to name a pair ---------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("llm_type", ["bart"])
def test_a_bart_by_itself(sources: Callable[..., tuple[Path, Path]], tmp_path: Path, llm_type: str) -> None:
    llm, composition = sources(llm_type)
    manifest = built(composition, tmp_path / "out").heads[LLM_HEAD]
    assert manifest.max_total_tokens == BART["config"]["max_position_embeddings"]
    expected = [alone(llm, prompt, max_new_tokens=12) for prompt in PROMPTS]
    with llm2slm_export.load(tmp_path / "out", head=LLM_HEAD) as pair:
        assert [tuple(r.token_ids) for r in pair.generate(PROMPTS, max_new_tokens=12)] == expected
        assert tuple(pair.generate([PROMPTS[1]], max_new_tokens=12)[0].token_ids) == expected[1]


@pytest.fixture
def configurations(tmp_path: Path) -> Mapping[str, str]:
    """Directories with nothing but a configuration."""
    found = {}
    for name, config in {"llm": LLM_CONFIG, "slm": SLM_CONFIGS["t5"], "gpt2": SLM_CONFIGS["gpt2"]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        found[name] = str(tmp_path / name)
    return found


@pytest.mark.parametrize("slm", ["slm", "gpt2"])
def test_random_weights_are_drawn_once_for_both_heads(configurations: Mapping[str, str], slm: str) -> None:
    join = FusionOptions(fusion="replace") if slm == "gpt2" else FusionOptions()
    source = pair_source(
        BuildChoice(
            llm=configurations["llm"], slm=configurations[slm], join=join, random_weights=True, seed=3, llm_head=True
        )
    )
    first, head, again = (source.heads[name]() for name in (MAIN, LLM_HEAD, LLM_HEAD))
    assert digest(head.reference.llm) == digest(first.reference.llm)
    assert digest(head.reference.slm) == digest(again.reference.slm)
    model: Any = head.reference.slm
    assert model.get_encoder() is head.reference.llm
    assert model.get_decoder().embed_tokens.weight is model.get_encoder().embed_tokens.weight
    assert (head.trained, head.stand_in_tokenizer) == (False, True)
    assert head.sources["slm"]["weights"] == "random"
    assert head.sources["slm"]["seed"] == 3
    assert head.file.max_prompt_tokens == first.file.max_prompt_tokens


@pytest.mark.nightly
def test_a_bundle_of_random_weights(configurations: Mapping[str, str], tmp_path: Path) -> None:
    arguments = ("--llm", configurations["llm"], "--slm", configurations["slm"], "--random-weights", "--seed", 3)
    output = command(
        "build", *arguments, "--llm-head", "--llm-head-precision", "decoder=int8", "--out", tmp_path / "out"
    )
    assert "WARNING: the head 'llm' is untrained: the LLM has random weights." in output
    manifest = read_manifest(tmp_path / "out")
    head = manifest.heads[LLM_HEAD]
    assert (manifest.trained, head.trained) == (False, False)
    assert {name: graph.precision for name, graph in manifest.graphs.items()} == dict.fromkeys(manifest.graphs, "fp32")
    assert {name: graph.precision for name, graph in head.graphs.items()} == {
        "encoder": "fp32", "projector": "fp32", "decoder": "int8",
    }  # fmt: skip


@pytest.mark.nightly
def test_beside_several_heads(sources: Callable[..., tuple[Path, Path]], save_composition: Callable[..., Path]) -> None:
    llm, first = sources("t5")
    second = save_composition("llama", llm=llm)
    source = pair_source(BuildChoice(heads=(f"fr={first}", f"es={second}"), llm_head=True))
    assert (source.name, list(source.heads)) == ("fr_es", ["fr", "es", LLM_HEAD])
    pairs = [load() for load in source.heads.values()]
    assert len({digest(pair.reference.llm) for pair in pairs}) == 1
    assert pairs[-1].file.fusion == "cross_attention"


def test_a_recipe_has_the_head(configurations: Mapping[str, str], tmp_path: Path) -> None:
    recipe = {
        "name": "mine", "llm": {"model": configurations["llm"]}, "slm": {"model": configurations["slm"]},
        "export": {"llm_head": {"precision": {"decoder": "int8"}}}, "generation": {"max_new_tokens": 9},
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(recipe))
    source = pair_source(BuildChoice(recipe=str(path)))
    assert (list(source.heads), source.llm_head, source.max_new_tokens) == ([MAIN, LLM_HEAD], {"decoder": "int8"}, 9)
    path.write_text(json.dumps(recipe | {"export": {}}))
    assert list(pair_source(BuildChoice(recipe=str(path))).heads) == [MAIN]
    assert pair_source(BuildChoice(recipe=str(path), llm_head=True)).llm_head == {}


@pytest.mark.nightly
def test_engines_cover_the_head(
    sources: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_graph(file: Path, _shapes: object) -> SimpleNamespace:
        compiled.append(file.name)
        return SimpleNamespace(plan=b"plan", layers=None, aliases={})

    monkeypatch.setattr(EngineChoice, "compiler", SimpleNamespace(compile=compile_graph))
    choice = EngineChoice("tensorrt-rtx", SimpleNamespace(__version__="1.0"), dict.fromkeys(GRAPHS, "fp32"))
    manifest = built(sources("t5")[1], tmp_path / "out", BuildOptions(engines=choice))
    (first,), (own,) = (head.engines.values() for head in (manifest, manifest.heads[LLM_HEAD]))
    assert own.graphs["encoder"] == first.graphs["encoder"]
    assert own.limits == first.limits
    assert [Path(own.graphs[graph].file).name for graph in HEAD_GRAPHS] == [
        "llm.projector.engine",
        "llm.decoder.engine",
    ]
    assert sum("encoder" in name for name in compiled) == 1
    past = next(tensor for tensor in own.graphs["decoder"].inputs if tensor.name == "past_key_values.0.decoder.key")
    assert past.axes[1] == LLM_CONFIG["num_heads"]


# --- what cannot be one ---------------------------------------------------------------------------------------------


def refusal(choice: BuildChoice) -> CompositionError:
    with pytest.raises(CompositionError, match="The LLM's own decoder cannot be a head") as caught:
        pair_source(choice)
    assert "leave out --llm-head" in caught.value.remedy
    return caught.value


@pytest.fixture
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a refusal must come before weights are read")

    monkeypatch.setattr("llm2slm_export.authoring.models.loading._load", loaded)
    monkeypatch.setattr("llm2slm_export.authoring.models.loading._made", loaded)


@pytest.mark.usefixtures("no_weights_are_read")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", "'llama' is decoder-only"),
        ("bert", "'bert' is encoder-only"),
        ("longt5-local", "'longt5': its decoder is not supported; supported: t5, "),
    ],
)
def test_llms_without_a_decoder_of_their_own(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    error = refusal(BuildChoice(llm=str(tmp_path), slm="t5-small", join=FusionOptions(layer="1,-1"), llm_head=True))
    layers, own = error.evidence
    assert layers.startswith("the pair reads LLM layer 1, -1;")
    assert reason in own
    assert "leave out --layer" in error.remedy
    assert "an LLM of encoder and decoder" in error.remedy
    with pytest.raises(CompositionError) as planned:
        plan(
            ModelSource(model=str(tmp_path)), ModelSource(model="t5-small"), llm_head={},
            precision=dict.fromkeys(("encoder", "projector", "decoder"), "fp32"),
        )  # fmt: skip
    assert planned.value.evidence == (own,)


@pytest.mark.usefixtures("no_weights_are_read")
def test_layers_other_than_the_last(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLM_CONFIG))
    recipe = {"name": "mine", "llm": {"model": str(tmp_path), "layer": 1}, "slm": {"model": "t5-small"}}
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(recipe | {"export": {"llm_head": {}}}))
    (reason,) = refusal(BuildChoice(recipe=str(path))).evidence
    assert reason == "the pair reads LLM layer 1; the LLM's own decoder attends to its output, layer -1"
    pair_source(BuildChoice(llm=str(tmp_path), slm="t5-small", join=FusionOptions(layer="-1"), llm_head=True))


def test_a_decoder_with_fewer_positions_than_the_response(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["bart"] | {"max_position_embeddings": 100}))
    error = refusal(BuildChoice(llm=str(tmp_path), slm="t5-small", llm_head=True))
    assert error.evidence == ("max_new_tokens is 128; the LLM's decoder has 100 positions",)


def test_checkpoints_saved_without_their_decoder(sources: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import T5EncoderModel

    llm, composition = sources("t5")
    T5EncoderModel.from_pretrained(llm).save_pretrained(tmp_path / "encoder")
    stripped = shutil.copytree(llm, tmp_path / "stripped")
    weights = {name: w for name, w in load_file(llm / "model.safetensors").items() if not name.startswith("decoder.")}
    save_file(weights, stripped / "model.safetensors", metadata={"format": "pt"})
    copy = shutil.copytree(composition, tmp_path / "composition")
    fields = json.loads((copy / "composition.json").read_text())
    (copy / "composition.json").write_text(json.dumps(fields | {"llm": {"model": "../stripped"}}))
    reasons = [
        refusal(BuildChoice(llm=str(tmp_path / "encoder"), slm=str(llm), llm_head=True)).evidence[0],
        refusal(BuildChoice(composition=copy, llm_head=True)).evidence[0],
        refusal(BuildChoice(heads=(f"fr={copy}",), llm_head=True)).evidence[0],
    ]
    assert "saved without its decoder: config.json has architectures T5EncoderModel" in reasons[0]
    assert all("tensors, none of them of a decoder" in reason for reason in reasons[1:])
    assert "saved without its decoder" in refusal(BuildChoice(composition=DEMO_COMPOSITION, llm_head=True)).evidence[0]


@pytest.mark.parametrize("llm_head", [True, False])
def test_the_heads_name_is_taken(llm_head: bool) -> None:
    with pytest.raises(UsageError, match="heads cannot be read") as caught:
        pair_source(BuildChoice(heads=("llm=compositions/x",), llm_head=llm_head))
    assert caught.value.evidence == ("'llm=compositions/x': the head 'llm' is the LLM's own decoder (--llm-head)",)


def test_another_llm_than_the_pairs_is_not_loaded_as_its_head(
    sources: Callable[..., tuple[Path, Path]], save_model: Callable[..., Path]
) -> None:
    """The encoder is read with its decoder: that it is the pair's is what `build_heads` checks by digest."""
    _, composition = sources("t5")
    other = save_model(LLM_CONFIG, 9)
    head = load_llm_head(partial(load_composition, composition), ModelSource(model=str(other)))
    assert digest(head.reference.llm) != digest(load_composition(composition).reference.llm)
