"""Refusals of graphs that do not match the reference: the failed comparisons, and what to change."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from llm2slm_export.bundle.parity_report import ParityError, ParityReport, ParityRow
from llm2slm_export.contract import EnginePrecision, GraphName, Precision

_P = TypeVar("_P", bound=str)
_SHOWN = 5  # failed comparisons in a message


def require_parity(report: ParityReport, precision: Mapping[GraphName, Precision]) -> None:
    """Refuse a bundle with failed comparisons.

    Args:
        report: the comparisons.
        precision: of every graph.

    Raises:
        ParityError: comparisons failed, or there are none; the error holds the report.
    """
    if report.passed:
        return
    failed = _failed(report)
    raise ParityError(
        f"The bundle does not match the composition: {_counted(failed, report)}.",
        *(
            f"{_described(row)}"
            + (f", transformers' own float32 {row.float32_error:.1e}" if row.float32_error is not None else "")
            for row in failed[:_SHOWN]
        ),
        remedy=f"nothing was written; {_remedy(failed, precision)}",
        report=report,
    )


def require_engine_parity(report: ParityReport, precision: Mapping[GraphName, EnginePrecision]) -> None:
    """Refuse graphs of engines with failed comparisons, before anything is compiled.

    Args:
        report: the comparisons.
        precision: of every engine.

    Raises:
        ParityError: comparisons failed, or there are none; the error holds the report.
    """
    if report.passed:
        return
    failed = _failed(report)
    raise ParityError(
        f"The engines would not match the composition: {_counted(failed, report)}.",
        *(_described(row, f" at {precision[row.graph] if row.graph != 'pair' else 'all'}") for row in failed[:_SHOWN]),
        remedy=f"nothing was compiled; {_engine_remedy(failed, precision)}",
        report=report,
    )


def _failed(report: ParityReport) -> list[ParityRow]:
    return [row for row in report.rows if not row.passed]


def _counted(failed: Sequence[ParityRow], report: ParityReport) -> str:
    return f"{len(failed)} of {len(report.rows)} comparisons failed" if report.rows else "nothing was compared"


def _described(row: ParityRow, precision: str = "") -> str:
    return f"{row.graph}{precision}, {row.case}, {row.tensor}: {row.measure} {row.value:.2e}, tolerance {row.tolerance:.1e}"


def _remedy(failed: Sequence[ParityRow], precision: Mapping[GraphName, Precision]) -> str:
    """The remedy for failed comparisons; at fp32, or without any, there is none but a report."""
    if not failed:
        return "report this pair"
    reduced = _reduced(failed, precision)
    remedies = []
    if reduced:
        options = ",".join(f"{name}=fp32" for name in reduced)
        used = ", ".join(f"{name} is at {used}" for name, used in reduced.items())
        remedies.append(f"raise the precision ({used}); the highest is --precision {options}")
    if any(row.of_gate for row in failed):
        remedies.append("raise --max-differing")
    remedies.append("report this pair: the graphs and transformers disagree" if not remedies else "report this pair")
    return ", or ".join(remedies)


def _engine_remedy(failed: Sequence[ParityRow], precision: Mapping[GraphName, EnginePrecision]) -> str:
    if not failed:
        return "report this pair"
    reduced = _reduced(failed, precision)
    if not reduced:
        return "report this pair: the graphs and transformers disagree"
    others = set(reduced.values()) - {"bf16"}
    return f"use --engine-precision {'bf16 or fp32' if others else 'fp32'} for {', '.join(reduced)}"


def _reduced(failed: Sequence[ParityRow], precision: Mapping[GraphName, _P]) -> dict[GraphName, _P]:
    """The graphs of a reduced precision that the failed comparisons are about, all of them if the pair failed."""
    graphs = {row.graph for row in failed}
    return {name: used for name, used in precision.items() if used != "fp32" and ("pair" in graphs or name in graphs)}
