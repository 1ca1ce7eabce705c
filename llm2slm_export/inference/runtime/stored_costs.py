"""Costs of decoder calls that later runs start from, in the user's cache directory."""

import os
from importlib.metadata import version

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.contract import GraphName
from llm2slm_export.environment.hardware import processor
from llm2slm_export.inference.generation.call_costs import CallCosts
from llm2slm_export.inference.runtime.backend import Backend
from llm2slm_export.inference.runtime.measurement_file import MeasurementFile, measurement_key

_SAVE_EVERY = 500  # decoder calls


class StoredCosts:
    """The costs of a head's calls, by what is drafted and verified.

    A file keeps their times per processor, device, number of threads and decoder files.

    Args:
        bundle: the bundle.
        manifest: the drafting head's.
        backend: the drafting head's.
    """

    def __init__(self, bundle: Bundle, manifest: Manifest, backend: Backend) -> None:
        self._bundle, self._manifest, self._backend = bundle, manifest, backend
        self._file = MeasurementFile("draft_costs.json", CallCosts.is_json)
        self._costs: dict[str, CallCosts] = {}
        self._keys: dict[str | None, str] = {}
        self._saved: dict[str, int] = {}  # the calls that were recorded when the costs were read or written

    def of(self, verifier: str | None) -> CallCosts:
        """The costs of drafts that a head verifies; None: of prompt lookup for the head itself."""
        if verifier not in self._keys:
            self._keys[verifier] = self._key(verifier)
        key = self._keys[verifier]
        costs = self._costs.get(key)
        if costs is None:
            stored = self._file.read().get(key)
            costs = self._costs[key] = CallCosts() if stored is None else CallCosts.from_json(stored)
        elif costs.calls - self._saved.get(key, 0) >= _SAVE_EVERY:
            self._save(key)
        return costs

    def save(self) -> None:
        """Write the costs of calls since the last time."""
        for key in self._costs:
            self._save(key)

    def _save(self, key: str) -> None:
        costs = self._costs[key]
        if costs.calls > self._saved.get(key, 0) and CallCosts.is_json(value := costs.to_json()):
            # A cache directory that cannot be written leaves the next run without them.
            self._file.add(key, value)
        self._saved[key] = costs.calls

    def _key(self, verifier: str | None) -> str:
        verifying = [] if verifier is None else [self._bundle.select(verifier).manifest]
        graphs: list[tuple[Manifest, GraphName]] = [(own, "decoder") for own in (self._manifest, *verifying)]
        backend = self._backend
        # What other versions of a runtime cost is found by the moving averages.
        facts = [
            processor(), os.cpu_count(), backend.device, backend.threads, backend.precisions.get("decoder"),
            version("llm2slm-export"),
        ]  # fmt: skip
        return measurement_key(self._bundle, graphs, facts=facts)
