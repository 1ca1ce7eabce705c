"""Losses and controls against the unpatched models; a model by itself against its own `generate`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2slm_export.authoring.models.loading import load_full, load_tokenizer
from llm2slm_export.authoring.models.pairing import LoadedPair, load_composition
from llm2slm_export.authoring.parity.tolerances import TOLERANCES
from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.bundle.parity_report import ParityError
from llm2slm_export.contract import GRAPHS
from llm2slm_export.errors import CompositionError, UsageError
from llm2slm_export.evaluation.baselines import require_decoder, standalone_bundle
from llm2slm_export.evaluation.controls import Constant, Mismatched, PerturbedBackend, Zero
from llm2slm_export.evaluation.learned_constant import learn_constant
from llm2slm_export.evaluation.systems import System
from llm2slm_export.inference.runtime.onnxruntime.backend import OrtBackend
from llm2slm_export.inference.tokenization import PromptTokenizer
from tests.support.tiers import tiered
from tests.support.tiny_models import SLM_CONFIGS

PROMPTS = ["the cat", "a much longer prompt than that", "dogs", "one more of them", "hello"]
RESPONSES = ["x y z", "w", "some words here", "ab", "a longer response than the others"]

Bundles = Callable[..., tuple[Path, Path]]


def opened(directory: Path) -> System:
    bundle = open_bundle(directory)
    return System("pair", "pair", "", bundle, OrtBackend(bundle, device="cpu", threads=1), 0)


def perturbed(system: System, control: PerturbedBackend) -> System:
    return System("control", "control", "", system.bundle, control, 0)


def reference_loss(pair: LoadedPair, prompt: str, response: str, hidden: torch.Tensor | None = None) -> float:
    """The unpatched models' negative log-likelihood of a response and its end, in nats."""
    ids = pair.llm_tokenizer(prompt, return_tensors="pt").input_ids
    labels = torch.tensor([[*pair.slm_tokenizer(response, add_special_tokens=False).input_ids, 1]])
    with torch.no_grad():
        logits = pair.reference(ids, torch.ones_like(ids), labels, hidden_states=hidden)
    return float(torch.nn.functional.cross_entropy(logits[0].double(), labels[0], reduction="sum"))


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_losses_are_the_reference_s(bundles: Bundles, slm: str) -> None:
    composition, directory = bundles(slm)
    pair = load_composition(composition)
    done = []
    found = opened(directory).loss(PROMPTS, RESPONSES, batch_size=2, truncate=False, advance=done.append)
    expected = [reference_loss(pair, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)
    assert found[:, 1].tolist() == [
        len(pair.slm_tokenizer(r, add_special_tokens=False).input_ids) + 1 for r in RESPONSES
    ]
    assert sum(done) == len(PROMPTS)


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_controls_give_what_they_say_in_place_of_hidden_states(bundles: Bundles, slm: str) -> None:
    composition, directory = bundles(slm)
    pair, system = load_composition(composition), opened(directory)
    width = pair.reference.shape.encoder_hidden_size
    vector = np.random.default_rng(0).standard_normal(width)
    ids = [row.ids for row in PromptTokenizer(system.bundle).read(PROMPTS, truncate=False)]
    manifest = system.bundle.manifest
    controls = {
        "zero": Zero(system.backend, manifest),
        "constant": Constant(system.backend, vector),
        "mismatched": Mismatched(system.backend, manifest, ids),
    }
    found = {
        name: perturbed(system, control).loss(PROMPTS, RESPONSES, batch_size=3, truncate=False, advance=lambda _: None)[
            :, 0
        ]
        for name, control in controls.items()
    }

    def expected(hidden_of: Callable[[int], torch.Tensor]) -> list[float]:
        return [
            reference_loss(pair, p, r, hidden_of(i)) for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
        ]

    lengths = [len(row) for row in ids]
    np.testing.assert_allclose(found["zero"], expected(lambda i: torch.zeros(1, lengths[i], width)), rtol=1e-4)
    constant = torch.tensor(vector, dtype=torch.float32)
    np.testing.assert_allclose(found["constant"], expected(lambda i: constant.expand(1, lengths[i], -1)), rtol=1e-4)

    by_length = sorted(range(len(ids)), key=lambda i: lengths[i])
    states = [
        pair.reference.hidden_states(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64)) for row in ids
    ]
    for own, other in zip(by_length, [*by_length[1:], by_length[-2]], strict=True):
        repeated = states[other][:, np.arange(lengths[own]) % lengths[other]]
        assert found["mismatched"][own] == pytest.approx(
            reference_loss(pair, PROMPTS[own], RESPONSES[own], repeated), rel=1e-4
        )


def test_one_prompt_has_no_other(bundles: Bundles) -> None:
    system = opened(bundles("t5")[1])
    with pytest.raises(UsageError, match="two different prompts"):
        Mismatched(system.backend, system.bundle.manifest, [(5, 1), (5, 1)])


@pytest.mark.slow
def test_the_learned_constant_beats_the_mean_and_leaves_the_pair_alone(bundles: Bundles) -> None:
    composition, _ = bundles("t5")
    pair = load_composition(composition)
    before = {name: tensor.clone() for name, tensor in pair.reference.state_dict().items()}
    rows = [(p, "w w w") for p in PROMPTS] * 8
    vector = learn_constant(pair, rows, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.reference.state_dict().items())

    def loss(hidden: torch.Tensor) -> float:
        count = len(pair.llm_tokenizer(PROMPTS[0]).input_ids)
        return reference_loss(pair, PROMPTS[0], "w w w", hidden.expand(1, count, -1))

    ids = pair.llm_tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    mean = pair.reference.hidden_states(ids, torch.ones_like(ids))[0].mean(dim=0)
    assert loss(torch.tensor(vector)) < loss(mean) - 0.01


@pytest.mark.parametrize("slm", tiered(["t5", "llama"], slow=["t5"]))
def test_a_model_by_itself_writes_what_its_own_generate_does(
    bundles: Bundles, save_model: Callable[..., Path], tmp_path: Path, slm: str
) -> None:
    _, directory = bundles("t5")
    model_directory = save_model(SLM_CONFIGS[slm], seed=3)
    like = open_bundle(directory).manifest
    bundle = standalone_bundle(model_directory, model_directory, like, tmp_path / "work").bundle
    backend = OrtBackend(bundle, device="cpu", threads=1, graphs=("projector", "decoder"))
    system = System("alone", "baseline", "", bundle, Zero(backend, bundle.manifest), 0)
    answered = [
        g
        for part in system.respond(PROMPTS, batch_size=2, truncate=False, num_beams=1, max_new_tokens=12)
        for g in part
    ]
    model, tokenizer = load_full(str(model_directory)), load_tokenizer(str(model_directory))
    for prompt, generation in zip(PROMPTS, answered, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        beyond = list(range(len(tokenizer), 307)) or None
        written = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, suppress_tokens=beyond
        )
        new = written[0, 1:] if slm == "t5" else written[0, ids.shape[1] :]
        assert generation.token_ids == tuple(new.tolist())
    before = bundle.directory.stat().st_mtime_ns
    again = standalone_bundle(model_directory, model_directory, like, tmp_path / "work").bundle
    assert (again.directory, again.directory.stat().st_mtime_ns) == (bundle.directory, before), "built once"


@pytest.mark.slow
def test_a_model_that_loses_too_much_at_the_pair_s_precision_is_exported_at_fp32_and_says_so(
    bundles: Bundles, save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, like = save_model(SLM_CONFIGS["t5"], seed=3), open_bundle(bundles("t5", precision="int8")[1]).manifest
    monkeypatch.setitem(TOLERANCES, "int8", replace(TOLERANCES["int8"], tensor=1e-9))
    alone = standalone_bundle(model, model, like, tmp_path / "work")
    assert {graph.precision for graph in alone.bundle.manifest.graphs.values()} == {"fp32"}
    assert alone.note is not None
    assert (
        "at fp32, because it fails the parity check at the pair's precision, encoder=int8, projector=int8, decoder=int8"
        in alone.note
    )
    before = alone.bundle.directory.stat().st_mtime_ns
    again = standalone_bundle(model, model, like, tmp_path / "work")
    assert (again.bundle.directory.stat().st_mtime_ns, again.note) == (before, alone.note), "tried once"
    assert len(list((tmp_path / "work").iterdir())) == 1
    # What was asked for is that or an error.
    with pytest.raises(ParityError):
        standalone_bundle(model, model, like, tmp_path / "work", precision=dict.fromkeys(GRAPHS, "int8"))
    monkeypatch.undo()
    asked = standalone_bundle(model, model, like, tmp_path / "work", precision=dict.fromkeys(GRAPHS, "int8"))
    assert asked.note is None
    assert {graph.precision for graph in asked.bundle.manifest.graphs.values()} == {"int8"}


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match="LLM alone was not found") as caught:
        require_decoder(tmp_path / "nowhere", "LLM alone", "--baseline llm")
    assert "nowhere" in str(caught.value)
    assert "--baseline llm=DIR" in str(caught.value)
