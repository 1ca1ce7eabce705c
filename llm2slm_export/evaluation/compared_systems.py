"""The systems that an evaluation compares: the bundle, its LLM and SLM alone, other bundles, and controls."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.composition import (
    COMPOSITION_FILE,
    SLM_DIRECTORY,
    read_composition,
)
from llm2slm_export.authoring.progress import Progress
from llm2slm_export.authoring.recipe import DataSettings
from llm2slm_export.authoring.training.pairs import Row, read_further_prompts, read_pairs, refuse_overlap
from llm2slm_export.authoring.training_record import fields_of, read_record, usual_places
from llm2slm_export.bundle.bundle import Bundle, open_bundle
from llm2slm_export.contract import GraphName, Precision
from llm2slm_export.errors import CompositionError, UsageError, require_extra
from llm2slm_export.evaluation.controls import Constant, Mismatched, Zero
from llm2slm_export.evaluation.systems import System
from llm2slm_export.files.data_files import require_file
from llm2slm_export.inference.runtime.backend import Backend
from llm2slm_export.inference.runtime.selection import open_backend
from llm2slm_export.inference.tokenization import PromptTokenizer

PAIR, LLM_ALONE, SLM_ALONE = "LLM-to-SLM", "LLM alone", "SLM alone"
CONTROLS = NONE, ZERO, CONSTANT, MISMATCHED = "no conditioning", "zero", "learned constant", "mismatched"
AUTHORING = ("torch", "transformers", "onnx", "onnxscript", "datasets")


@dataclass(frozen=True)
class EvaluationRequest:
    """The requested systems.

    Args:
        bundle: the bundle.
        head: one of its heads; None: the first.
        composition: the bundle's composition; None: found by the bundle's name.
        baselines: `llm`, `slm` (or `llm=DIR`, `slm=DIR`), or NAME=BUNDLE for another bundle.
        controls: run the controls.
        train_data: training data; None: the path in training.json.
        fields: fields of the training data, as typed, if training.json has none.
        device, threads, runtime: of all systems.
        work: directory of baseline bundles and cached results.
        seed: of the learned constant.
        baseline_precision: precision of LLM alone and SLM alone; None: the pair's, or fp32, with a note, for a model
            that fails its parity check at the pair's.
    """

    bundle: Path
    head: str | None = None
    composition: Path | None = None
    baselines: tuple[str, ...] = ()
    controls: bool = False
    train_data: Path | None = None
    fields: Mapping[str, str | None] = field(default_factory=lambda: {"prompt": None, "response": None})
    device: str = "cpu"
    threads: int | None = None
    runtime: str = "onnxruntime"
    work: Path = Path("runs/eval")
    seed: int = 0
    baseline_precision: Mapping[GraphName, Precision] | None = None


@dataclass
class Comparison:
    """The compared systems, the pair first; the training data; notes on omissions."""

    systems: list[System]
    composition: Path | None
    training_rows: list[Row] | None
    training_source: str | None
    notes: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Close every system's backend."""
        for system in self.systems:
            system.backend.close()


def compared_systems(
    request: EvaluationRequest, prompts: Sequence[str], *, truncate: bool, progress: Progress
) -> Comparison:
    """Open the bundle, and create the systems it is compared with.

    Args:
        request: the requested systems.
        prompts: held-out prompts. The mismatched control uses them, and the training data must not contain them. Empty:
            the training data is not read.
        truncate: truncate prompts that are too long instead of refusing them.
        progress: reports what is being created.

    Raises:
        UsageError: an invalid baseline.
        BundleError, CompositionError: a part is missing or does not match.
    """
    opened = open_bundle(request.bundle)
    bundle = opened.select(request.head) if request.head is not None else opened
    baselines = _parse_baselines(request)
    if request.controls or any(name in ("llm", "slm") for name in baselines):
        require_extra("train", *AUTHORING, purpose="Baselines and controls")
    # Models given as directories do not need the composition.
    needing = [f"--baseline {name}" for name, place in baselines.items() if name in ("llm", "slm") and not place]
    needing += ["--controls"] if request.controls else []
    directory = _composition_directory(bundle, request, needing)
    rows, source = _training_rows(directory, request) if prompts else (None, None)
    if rows is not None:
        refuse_overlap([*(prompt for prompt, _ in rows), *_further_prompts(directory)], prompts, what="held-out")
    backend = open_backend(bundle, device=request.device, threads=request.threads, runtime=request.runtime)
    pair = System(PAIR, "pair", "the bundle", bundle, backend, _parameters(bundle))
    pair.refuse_long_prompts(prompts, truncate=truncate)
    comparison = Comparison([pair], directory, rows, source)
    for name, place in baselines.items():
        progress.start(f"baseline {name}")
        comparison.systems.append(_baseline(name, place, comparison, directory, request))
    if request.controls:
        assert directory is not None  # controls require it
        comparison.systems += _controls(
            comparison, bundle, directory, request, prompts, truncate=truncate, progress=progress
        )
    return comparison


def _parse_baselines(request: EvaluationRequest) -> dict[str, str]:
    """The place of each baseline by name; empty for `llm` or `slm` of the composition.

    Raises:
        UsageError: the message lists every invalid baseline.
    """
    found: dict[str, str] = {}
    problems = []
    for baseline in request.baselines:
        name, equals, place = baseline.partition("=")
        if name not in ("llm", "slm") and not (re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) and place):
            problems.append(f"{baseline!r} is not llm, slm, llm=DIR, slm=DIR or NAME=BUNDLE")
        elif equals and not place:
            problems.append(f"{baseline!r} names no directory")
        elif name in found:
            problems.append(f"{baseline!r}: there is already a baseline {name!r}")
        elif name in (PAIR, *CONTROLS):
            problems.append(f"{baseline!r}: {name!r} is the name of another system")
        else:
            found[name] = place
    if problems:
        raise UsageError(
            "The baselines are not valid.",
            *problems,
            remedy="for example --baseline llm --baseline slm=runs/x/slm-alone --baseline fp32=engines/x",
        )
    return found


def _composition_directory(bundle: Bundle, request: EvaluationRequest, needing: Sequence[str]) -> Path | None:
    """The directory of the bundle's composition, given or found by the bundle's name.

    Args:
        bundle: the bundle.
        request: the requested systems.
        needing: the options that require it.

    Raises:
        CompositionError: the given composition is not the bundle's, or a required one was not found.
    """
    name = bundle.manifest.name
    places = [request.composition] if request.composition else usual_places(name)
    there = [place for place in places if (place / COMPOSITION_FILE).is_file()]
    problems = {place: _not_of(bundle, place, weights=bool(needing)) for place in there}
    found = next((place for place in there if not problems[place]), None)
    if found is None and (needing or request.composition):
        mismatches = [f"{place}: {problem}" for place in there for problem in problems[place]]
        ways = [f"{option}=DIR with that model's own directory" for option in needing if option != "--controls"]
        raise CompositionError(
            f"The composition of {bundle.directory} was not found"
            + (f" (needed for {' and '.join(needing)})." if needing else "."),
            *(mismatches or [f"looked for {place / COMPOSITION_FILE}" for place in places]),
            "a bundle does not contain the models that it was built from",
            remedy=" or ".join(["give the bundle's composition with --composition DIR", *ways])
            + ("; comparing with another bundle, --baseline NAME=BUNDLE, does not need it" if needing else ""),
        )
    return found


def _not_of(bundle: Bundle, directory: Path, *, weights: bool) -> list[str]:
    """Evidence that a bundle was not built from a composition; empty if there is none."""
    file, manifest = read_composition(directory), bundle.manifest
    facts: dict[str, tuple[object, object]] = {
        "fusion": (manifest.fusion, file.fusion),
        "tokenizer": (manifest.tokenizer.strategy, file.tokenizer),
        "layer": (manifest.llm_layer, file.llm.layer),
        "encoder_hidden_size": (manifest.shape.encoder_hidden_size, file.projector.d_in * file.projector.layers),
        "hidden_size": (manifest.shape.hidden_size, file.projector.d_out),
    }
    if weights and manifest.weights:
        from llm2slm_export.authoring.models.loading import load_full
        from llm2slm_export.authoring.models.projector import load_projector
        from llm2slm_export.authoring.models.reference import digest

        modules = {
            "projector": load_projector(directory, file.projector),
            "slm": load_full(str(directory / file.slm.model)),
        }
        for name, known in manifest.weights.items():
            facts[f"{name} weights"] = known[:16], digest(modules[name])[:16]
    return [f"{fact} is {theirs}, the bundle's {ours}" for fact, (ours, theirs) in facts.items() if ours != theirs]


def _training_rows(directory: Path | None, request: EvaluationRequest) -> tuple[list[Row] | None, str | None]:
    """The rows that the pair was trained on, and their source; None if they are not available."""
    record = read_record(directory) if directory is not None else None
    data = record.data if record is not None else None
    if request.train_data is not None:
        require_file(request.train_data, "--train-data")
        given = {"prompt": None, "response": None} if data is not None else request.fields
        fields, _ = fields_of(request.train_data, given, data)
        place = str(request.train_data)
        data = DataSettings(
            train=place, validation=place, prompt_field=fields["prompt"], response_field=fields["response"]
        )
    elif data is None or not Path(data.train).is_file():
        return None, None
    return read_pairs(data.train, data), data.train


def _further_prompts(directory: Path | None) -> list[str]:
    """The teacher's further prompts; empty if they are not available."""
    record = read_record(directory) if directory is not None else None
    if record is None or record.data is None or record.further_prompts is None:
        return []
    return read_further_prompts(record.further_prompts, record.data) if Path(record.further_prompts).is_file() else []


def _baseline(
    name: str, place: str, comparison: Comparison, directory: Path | None, request: EvaluationRequest
) -> System:
    if name not in ("llm", "slm"):
        other = open_bundle(Path(place))
        backend = open_backend(other, device=request.device, threads=request.threads, runtime=request.runtime)
        return System(name, "baseline", f"the bundle {place}", other, backend, _parameters(other))
    label, description = (
        (LLM_ALONE, "the LLM generates the response")
        if name == "llm"
        else (SLM_ALONE, "an SLM trained without the LLM")
    )
    model = tokenizer = Path(place)
    if not place:
        assert directory is not None  # these baselines require it
        model = tokenizer = directory.with_name("slm-alone")
        if name == "llm":
            file = read_composition(directory)
            model = directory / file.llm.model
            tokenizer = model if file.llm.tokenizer is None else directory / file.llm.tokenizer
    return _standalone_system(label, description, model, tokenizer, comparison, request, f"--baseline {name}")


def _controls(
    comparison: Comparison,
    bundle: Bundle,
    directory: Path,
    request: EvaluationRequest,
    prompts: Sequence[str],
    *,
    truncate: bool,
    progress: Progress,
) -> Iterator[System]:
    pair = comparison.systems[0]
    progress.start("controls")

    def perturbed(name: str, description: str, backend: Backend, key: str = "") -> System:
        return System(name, "control", description, bundle, backend, pair.parameters, f"{name} {key}")

    slm = directory / SLM_DIRECTORY
    description = "the pair's SLM without the LLM"
    if bundle.manifest.fusion in ("replace", "cross_attention") or bundle.manifest.tokenizer.strategy == "llm":
        description += ", which it was not trained for"
    none = _standalone_system(NONE, description, slm, slm, comparison, request, "--composition")
    yield replace(none, kind="control")
    yield perturbed(ZERO, "hidden states of zeros", Zero(pair.backend, bundle.manifest))
    if comparison.training_rows is not None:
        vector = _constant(directory, comparison.training_rows, request, progress)
        description = "one learned vector at every position"
        yield perturbed(CONSTANT, description, Constant(pair.backend, vector), sha256(vector.tobytes()).hexdigest())
    else:
        comparison.notes.append(
            "the learned constant was left out: the training data is not available (--train-data FILE)"
        )
    ids = [row.ids for row in PromptTokenizer(bundle).read(list(prompts), truncate=truncate)]
    mismatched = Mismatched(pair.backend, bundle.manifest, ids)
    yield perturbed(MISMATCHED, "another prompt's hidden states", mismatched)


def _constant(directory: Path, rows: list[Row], request: EvaluationRequest, progress: Progress) -> Any:
    """The learned constant; cached in the work directory."""
    from llm2slm_export.authoring.models.pairing import load_composition
    from llm2slm_export.authoring.torch_threads import torch_threads
    from llm2slm_export.evaluation.learned_constant import STEPS, learn_constant
    from llm2slm_export.evaluation.result_cache import cached_array, fingerprint

    def learn() -> Array:
        progress.start("control: learning the constant", STEPS)
        with torch_threads(request.threads):
            return learn_constant(load_composition(directory), rows, seed=request.seed, advance=progress.advance)

    return cached_array(request.work / f"constant-{fingerprint(directory, rows, request.seed)}.npy", learn)


def _standalone_system(
    name: str,
    description: str,
    model: Path,
    tokenizer: Path,
    comparison: Comparison,
    request: EvaluationRequest,
    option: str,
) -> System:
    from llm2slm_export.evaluation.baselines import require_decoder, standalone_bundle

    require_decoder(model, name, option)
    like = comparison.systems[0].bundle.manifest
    standalone = standalone_bundle(model, tokenizer, like, request.work / "alone", precision=request.baseline_precision)
    own = standalone.bundle
    if standalone.note is not None:
        comparison.notes.append(f"{name}: {standalone.note}")
    backend = open_backend(
        own, device=request.device, threads=request.threads, graphs=("projector", "decoder"), runtime=request.runtime
    )
    return System(
        name, "baseline", description, own, Zero(backend, own.manifest), own.manifest.sources["slm"].parameters
    )


def _parameters(bundle: Bundle) -> int:
    return sum(entry.parameters for entry in bundle.manifest.sources.values())
