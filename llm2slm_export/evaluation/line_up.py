"""Which systems an evaluation compares: the bundle, its models alone, the controls; and where their parts are."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm2slm_export.bundle import Bundle, open_bundle
from llm2slm_export.composition import (
    COMPOSITION_FILE,
    SLM_DIRECTORY,
    TRAINING_FILE,
    read_composition,
)
from llm2slm_export.errors import CompositionError, UsageError, require_extra
from llm2slm_export.evaluation.controls import Constant, Mismatched, Zero
from llm2slm_export.evaluation.progress import Progress
from llm2slm_export.evaluation.systems import System
from llm2slm_export.prompt_ids import PromptTokenizer
from llm2slm_export.recipe import DataSettings
from llm2slm_export.runtime.backend import Backend
from llm2slm_export.runtime.ort import OrtBackend
from llm2slm_export.training.pairs import Row, read_pairs

PAIR, LLM_ALONE, SLM_ALONE = "LLM-to-SLM", "LLM alone", "SLM alone"
AUTHORING = ("torch", "transformers", "onnx", "onnxscript", "datasets")


@dataclass(frozen=True)
class Choice:
    """What was asked for.

    Args:
        composition: what the bundle was built from; None: looked for by the bundle's name.
        baselines: `llm`, `slm` (or `llm=DIR`, `slm=DIR`), or NAME=BUNDLE for any other bundle.
        controls: whether to run them.
        train_data: where the training prompts are; None: where training.json says.
        work: where baseline bundles and what was learned are kept.
    """

    bundle: Path
    head: str | None = None
    composition: Path | None = None
    baselines: tuple[str, ...] = ()
    controls: bool = False
    train_data: Path | None = None
    device: str = "cpu"
    threads: int | None = None
    work: Path = Path("runs/eval")
    seed: int = 0


@dataclass
class LineUp:
    """The systems, the pair first; what the training data was, and what had to be left out."""

    systems: list[System]
    composition: Path | None
    training_rows: list[Row] | None
    training_source: str | None
    notes: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Release every system's graphs."""
        for system in self.systems:
            system.backend.close()


def line_up(choice: Choice, prompts: Sequence[str], *, truncate: bool, progress: Progress) -> LineUp:
    """Open the bundle and make everything it is compared with.

    Args:
        prompts: those to come: the mismatched control must know them.
        progress: told what is being made.

    Raises:
        UsageError: a baseline that means nothing.
        BundleError, CompositionError: parts that are not there or do not fit.
    """
    opened = open_bundle(choice.bundle)
    bundle = opened.select(choice.head) if choice.head is not None else opened
    needs_parts = bool(choice.controls or any(name.partition("=")[0] in ("llm", "slm") for name in choice.baselines))
    if needs_parts:
        require_extra("train", *AUTHORING, purpose="Baselines and controls")
    directory = _composition_directory(bundle, choice, required=needs_parts)
    rows, source = _training_rows(directory, choice.train_data)
    backend = OrtBackend(bundle, device=choice.device, threads=choice.threads)
    pair = System(PAIR, "pair", "the bundle", bundle, backend, _parameters(bundle))
    made = LineUp([pair], directory, rows, source)
    for baseline in dict.fromkeys(choice.baselines):
        progress.start(f"baseline {baseline}")
        made.systems.append(_baseline(baseline, bundle, directory, choice))
    if choice.controls:
        assert directory is not None  # it is required then
        made.systems += _controls(made, bundle, directory, choice, prompts, truncate=truncate, progress=progress)
    return made


def _composition_directory(bundle: Bundle, choice: Choice, *, required: bool) -> Path | None:
    """What the bundle was built from: as it is said, or found by its name, and of the same models."""
    name = bundle.manifest.name
    places = [choice.composition] if choice.composition else [Path("runs") / name / "pair", Path("compositions") / name]
    found = next((place for place in places if (place / COMPOSITION_FILE).is_file()), None)
    if found is None and (required or choice.composition):
        raise CompositionError(
            f"The composition of {bundle.directory} is not at hand: baselines and controls are made from it.",
            *(f"looked for {place / COMPOSITION_FILE}" for place in places),
            remedy="give --composition DIR",
        )
    if found is not None:
        file = read_composition(found)
        ours = (bundle.manifest.fusion, bundle.manifest.tokenizer.strategy, bundle.manifest.llm_layer)
        theirs = (file.fusion, file.tokenizer, file.llm.layer)
        if ours != theirs:
            raise CompositionError(
                f"{found} is not what {bundle.directory} was built from.",
                f"fusion, tokenizer and layer: {ours} in the bundle, {theirs} in the composition",
                remedy="give --composition DIR",
            )
    return found


def _training_rows(directory: Path | None, train_data: Path | None) -> tuple[list[Row] | None, str | None]:
    """The rows that the pair was trained on, where they are at hand, and where that is."""
    settings = _recorded(directory).get("recipe", {}).get("training", {}).get("data") if directory else None
    if train_data is not None:
        fields = (
            {key: settings[key] for key in ("prompt_field", "response_field")} if settings else _by_ending(train_data)
        )
        data = DataSettings(train=str(train_data), validation=str(train_data), **fields)
    elif settings and Path(settings["train"]).is_file():
        data = DataSettings.model_validate(settings)
    else:
        return None, None
    return read_pairs(data.train, data), data.train


def _by_ending(path: Path) -> dict[str, Any]:
    return {"prompt_field": 0, "response_field": 1} if path.suffix == ".tsv" else {}


def _recorded(directory: Path) -> dict[str, Any]:
    path = directory / TRAINING_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _baseline(baseline: str, bundle: Bundle, directory: Path | None, choice: Choice) -> System:
    name, equals, place = baseline.partition("=")
    if name not in ("llm", "slm"):
        if not equals or not place:
            raise UsageError(
                f"{baseline!r} is not a baseline.", remedy="give llm, slm, llm=MODEL_DIR, slm=MODEL_DIR or NAME=BUNDLE"
            )
        other = open_bundle(Path(place))
        backend = OrtBackend(other, device=choice.device, threads=choice.threads)
        return System(name, "baseline", f"the bundle {place}", other, backend, _parameters(other))
    assert directory is not None  # it is required then
    file = read_composition(directory)
    if name == "llm":
        model = Path(place) if place else directory / file.llm.model
        tokenizer = directory / file.llm.tokenizer if file.llm.tokenizer else model
        return _alone(LLM_ALONE, "the LLM reads and writes", model, tokenizer, bundle, choice, "--baseline llm")
    model = Path(place) if place else directory.with_name("slm-alone")
    says = "an SLM trained by itself reads and writes"
    return _alone(SLM_ALONE, says, model, model, bundle, choice, "--baseline slm")


def _controls(
    made: LineUp,
    bundle: Bundle,
    directory: Path,
    choice: Choice,
    prompts: Sequence[str],
    *,
    truncate: bool,
    progress: Progress,
) -> Iterator[System]:
    pair = made.systems[0]
    progress.start("controls")

    def misled(name: str, says: str, backend: Backend) -> System:
        return System(name, "control", says, bundle, backend, pair.parameters)

    slm = directory / SLM_DIRECTORY
    says = "the pair's SLM reads by itself"
    none = _alone("no conditioning", says, slm, slm, bundle, choice, "--composition")
    yield System(none.name, "control", says, none.bundle, none.backend, none.parameters)
    yield misled("zero", "hidden states that are zero", Zero(pair.backend, bundle.manifest))
    if made.training_rows is not None:
        vector = _constant(directory, made.training_rows, choice, progress)
        yield misled("learned constant", "one learned vector at every position", Constant(pair.backend, vector))
    else:
        made.notes.append("the learned constant was left out: the training data is not at hand (--train-data FILE)")
    ids = [row.ids for row in PromptTokenizer(bundle).read(list(prompts), truncate=truncate)]
    mismatched = Mismatched(pair.backend, bundle.manifest, ids)
    yield misled("mismatched", "another prompt's hidden states", mismatched)


def _constant(directory: Path, rows: list[Row], choice: Choice, progress: Progress) -> Any:
    """The learned constant, from the work directory where an earlier run has learned it."""
    from llm2slm_export.evaluation.constant import STEPS, learn_constant
    from llm2slm_export.evaluation.kept import fingerprint, keep_array
    from llm2slm_export.models.pairing import load_composition

    def learn() -> np.ndarray[Any, Any]:
        progress.start("control: learning the constant", STEPS)
        return learn_constant(load_composition(directory), rows, seed=choice.seed, advance=progress.advance)

    return keep_array(choice.work / f"constant-{fingerprint(directory, rows, choice.seed)}.npy", learn)


def _alone(name: str, says: str, model: Path, tokenizer: Path, bundle: Bundle, choice: Choice, option: str) -> System:
    from llm2slm_export.evaluation.baselines import alone_bundle, require_writer

    require_writer(model, name, option)
    own = alone_bundle(model, tokenizer, bundle.manifest, choice.work / "alone")
    backend = OrtBackend(own, device=choice.device, threads=choice.threads, graphs=("projector", "decoder"))
    return System(name, "baseline", says, own, Zero(backend, own.manifest), own.manifest.sources["slm"].parameters)


def _parameters(bundle: Bundle) -> int:
    return sum(entry.parameters for entry in bundle.manifest.sources.values())
