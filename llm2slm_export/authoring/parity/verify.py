"""Verification of a bundle on disk against the composition that it was built from."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from llm2slm_export.authoring.composition import read_composition
from llm2slm_export.authoring.models.llm_head import load_llm_head
from llm2slm_export.authoring.models.pairing import LoadedPair, composition_llm, load_composition
from llm2slm_export.authoring.parity.compare import compare
from llm2slm_export.authoring.parity.gate import Gate
from llm2slm_export.authoring.parity.reference_outputs import gate_batches, reference_batches
from llm2slm_export.bundle.bundle import Bundle, open_bundle
from llm2slm_export.bundle.parity_report import ParityReport
from llm2slm_export.contract import LLM_HEAD
from llm2slm_export.errors import CompositionError


def verify(
    directory: Path,
    composition: Path | None,
    head: str | None = None,
    *,
    gate: Gate | None = None,
    runtime: str = "onnxruntime",
) -> ParityReport | None:
    """Check a bundle's hashes and, if a composition is given, one head's outputs against it.

    Args:
        directory: the bundle.
        composition: the composition of the head, for the LLM head of any head; None: check the hashes only.
        head: the head to compare; None: the bundle's first.
        gate: additional prompts to compare on.
        runtime: the graphs' runtime (`inference.runtime.selection.parse_runtime`).

    Returns:
        the comparison; None if only the hashes were checked.

    Raises:
        BundleError: files are missing or altered.
        UsageError: no head has that name, or the runtime is unknown.
        MissingExtraError: the runtime is not installed.
        CompositionError: the head was not built from that composition.
    """
    bundle = open_bundle(directory)
    bundle = bundle.select(head or bundle.manifest.head)
    if composition is None:
        return None
    pair = _pair(composition, bundle.manifest.head)
    _require_same_pair(bundle, pair, composition)
    ids = bundle.manifest.special_ids
    held_out = gate_batches(pair, ids, gate.prompts) if gate else ()
    exact = bundle.manifest.graphs["encoder"].precision == "fp32"
    return compare(bundle, pair.reference, reference_batches(pair, ids, exact=exact), gate, held_out, runtime=runtime)


def _pair(composition: Path, head: str) -> LoadedPair:
    """The pair that a head was exported from: the composition's, or the LLM head of its LLM."""
    if head != LLM_HEAD:
        return load_composition(composition)
    return load_llm_head(
        partial(load_composition, composition), composition_llm(composition, read_composition(composition))
    )


def _require_same_pair(bundle: Bundle, pair: LoadedPair, composition: Path) -> None:
    """Refuse a composition whose shapes, layer or tokenizer differ from the head's, before tensors are compared."""
    manifest = bundle.manifest
    ours = {**asdict(manifest.shape), "llm_layer": manifest.llm_layer, "tokenizer": manifest.tokenizer.strategy}
    theirs = {**asdict(pair.reference.shape), "llm_layer": pair.file.llm.layer, "tokenizer": pair.file.tokenizer}
    differing = [
        f"{name}: the bundle's is {ours[name]}, the composition's {theirs[name]}"
        for name in ours
        if ours[name] != theirs[name]
    ]
    if differing:
        raise CompositionError(
            f"The head {manifest.head!r} of {bundle.directory} was not built from {composition}.",
            *differing,
            remedy="give the head's own composition, or select another head with --head",
        )
