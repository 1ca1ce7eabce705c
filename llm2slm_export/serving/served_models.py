"""The models of a server: the bundles, and their other heads."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm2slm_export.errors import UsageError
from llm2slm_export.inference.orchestrator import BundlePart, Orchestrator
from llm2slm_export.inference.scheduler import Scheduler
from llm2slm_export.serving.api_errors import ApiError

_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class ServedModel:
    """A head of a bundle.

    Args:
        name: the bundle's name, and for every head but the first `/` and the head's.
        scheduler: runs the bundle's requests.
        pair: the head.
    """

    name: str
    scheduler: Scheduler
    pair: Orchestrator


class ServedModels:
    """The models of a server, by name.

    Args:
        schedulers: the bundles: the name in the server, what runs the requests, and the pair.
        part: the part of the bundles that is loaded.

    Raises:
        UsageError: two models have the same name.
    """

    def __init__(self, schedulers: Sequence[tuple[str, Scheduler, Orchestrator]], *, part: BundlePart = "pair") -> None:
        self.part: BundlePart = part
        self.schedulers = {name: scheduler for name, scheduler, _ in schedulers}
        found: dict[str, ServedModel] = {}
        for bundle, scheduler, pair in schedulers:
            for head in pair.heads:
                name = bundle if head == pair.manifest.head else f"{bundle}/{head}"
                if name in found:
                    raise UsageError(
                        f"Two models are named {name!r}.", remedy="give one bundle another name: NAME=BUNDLE"
                    )
                found[name] = ServedModel(name, scheduler, pair.head(head))
        self._models = found

    def __iter__(self) -> Iterator[ServedModel]:
        """The models, the first head of the first bundle first."""
        return iter(self._models.values())

    @property
    def are_open(self) -> bool:
        """Whether all bundles take requests."""
        return not any(scheduler.is_closed for scheduler in self.schedulers.values())

    def find(self, name: str) -> ServedModel:
        """The model of a name.

        Raises:
            ApiError: there is none.
        """
        model = self._models.get(name)
        if model is None:
            raise ApiError(
                404, f"There is no model {name!r}.\n  - models: {', '.join(self._models)}\n  → give one of these as model",
                param="model", code="model_not_found",
            )  # fmt: skip
        return model


def named_bundle(argument: str) -> tuple[str, Path]:
    """The model's name and the bundle of `[NAME=]BUNDLE`. The name is the directory's by default.

    Raises:
        UsageError: the name has other characters than letters, digits, dots, hyphens and underscores.
    """
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return Path(argument).resolve().name, Path(argument)
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"The model name {name!r} cannot be used.",
            remedy="use letters, digits, dots, hyphens and underscores: NAME=BUNDLE",
        )
    return name, Path(path)
