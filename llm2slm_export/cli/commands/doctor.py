"""`doctor`: show what this machine can run."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm2slm_export.cli import console
from llm2slm_export.cli.console import Table, facts_table, size
from llm2slm_export.cli.options import JsonOption

if TYPE_CHECKING:
    from rich.console import Console

    from llm2slm_export.doctor import Diagnosis, EngineCheck
EXAMPLES = """
llm2slm-export doctor
llm2slm-export doctor engines/demo
"""


def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Bundle directory to check on this machine.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what this machine can run, and how to install the rest.

    With a bundle, check that it opens here; the exit code is 1 if it does not.
    """
    from llm2slm_export.doctor import diagnose

    found = diagnose(bundle)
    if json:
        extras = [asdict(extra) | {"complete": extra.complete, "pip": extra.pip} for extra in found.extras]
        checked = asdict(found.bundle) | {"ok": found.bundle.ok} if found.bundle else None
        console.print_json(asdict(found) | {"extras": extras, "bundle": checked})
    else:
        print_diagnosis(console.console(), found)
    if found.bundle is not None and not found.bundle.ok:
        raise typer.Exit(1)


_HUGE_PAGES: dict[str | None, str] = {
    "always": "always", "madvise": "madvise: on request, as a decoder's session makes it",
    "never": "never: a token takes 1 to 6 % longer than with madvise in /sys/kernel/mm/transparent_hugepage/enabled",
}  # fmt: skip


def print_diagnosis(to: "Console", found: "Diagnosis") -> None:
    """Print the diagnosis as tables."""
    machine = found.machine
    ram = size(machine.ram_bytes) if machine.ram_bytes is not None else "unknown"
    providers = ", ".join(found.onnxruntime_providers) or f"none ({found.onnxruntime_problem})"
    facts = [
        ("Python", machine.python),
        ("system", machine.system),
        ("CPU", f"{machine.cpu}, {machine.cores} cores"),
        ("instruction sets", ", ".join(machine.flags) or "none of the relevant ones"),
        ("RAM", ram),
        ("huge pages", _HUGE_PAGES.get(machine.huge_pages, "none")),
        ("NVIDIA GPU", "; ".join(machine.gpus) or "no"),
        ("ONNX Runtime providers", providers),
    ]
    to.print(facts_table(facts))
    to.print()
    rows = [
        (
            extra.name,
            "yes" if extra.complete else "no",
            _lacking(extra.dependencies),
            "" if extra.complete else extra.pip,
        )
        for extra in found.extras
    ]
    to.print(Table("Extras", ("extra", "complete", "lacking (needed, found)", "to install"), rows))
    to.print()
    dependencies = {(d.name, d.needed): d for extra in found.extras for d in extra.dependencies}.values()
    listed = ((d.name, d.needed, d.found or "-", "yes" if d.ok else "no") for d in dependencies)
    to.print(Table("Packages", ("package", "needed", "found", "ok"), listed))
    to.print()
    parts = (
        (part.name, part.purpose, part.needed, part.found or part.problem or "-", "yes" if part.ok else "no",
         "" if part.ok else part.remedy)
        for part in found.gpu
    )  # fmt: skip
    to.print(Table("GPU", ("part", "for", "needed", "found", "ok", "to install"), parts))
    if found.bundle is not None:
        check = found.bundle
        to.print()
        to.print(f"Bundle {check.path}: {'opens here' if check.ok else 'CANNOT be used here'}")
        for line in check.problems:
            to.print(f"  - {line}")
        for runtime in check.runtimes:
            to.print(f"  - {runtime.name}: needs {runtime.needed}, found {runtime.found or 'none'}")
        for line in _engine_lines(check.engines):
            to.print(line)


def _engine_lines(engines: "Iterable[EngineCheck]") -> Iterator[str]:
    """A line for each set of engines in a bundle, with the reasons if it does not fit."""
    for engine in engines:
        device = engine.device or "no GPU"
        fits = "fits" + (", and is used" if engine.used else "") if not engine.mismatches else "does not fit"
        yield f"  - engines {engine.engines} (head {engine.head}) on {device}: {fits}"
        yield from (f"      {mismatch}" for mismatch in engine.mismatches)


def _lacking(dependencies: Iterable[Any]) -> str:
    return ", ".join(f"{d.name} ({d.needed}, {d.found or 'none'})" for d in dependencies if not d.ok)
