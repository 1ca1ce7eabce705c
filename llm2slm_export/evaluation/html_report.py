"""The evaluation report as one offline HTML file, with tables and inline SVG plots."""

import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llm2slm_export.evaluation.metrics import LOWER_IS_BETTER
from llm2slm_export.evaluation.report import EvaluationReport, SystemEntry
from llm2slm_export.files.output_target import Kind

TEMPLATE = "page.html.j2"
_MARK = '<meta name="generator" content="llm2slm-export">'  # in the template's first 1000 bytes
TITLES = {
    "bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
    "exact_match": "exact match, %", "loss": "loss, nats/token",
}  # fmt: skip
# Distinguishable without color (shape) and with red-green color blindness (Okabe and Ito's palette).
_STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]
_CONTROL = ("#888888", "x")
_LENGTHS = 200  # maximum response length of the latency plot, in tokens


def _foreign(path: Path) -> list[str]:
    with path.open("rb") as file:
        ours = _MARK.encode() in file.read(1000)
    return [] if ours else ["it is not a page of `eval`"]


PAGE = Kind("a page of `eval`", _foreign, is_file=True)


def page(report: EvaluationReport) -> str:
    """The HTML of a report."""
    text = resources.files("llm2slm_export.evaluation").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=select_autoescape(default_for_string=True), undefined=StrictUndefined)
    environment.filters["title"] = lambda metric: TITLES[metric]
    environment.filters["p"] = _p
    timed = [system for system in report.systems if system.speed is not None]
    plots = [_plot(_by_length, report, report.systems)] if report.systems[0].buckets else []
    if timed:
        plots = [_plot(_quality_latency, report, timed), _plot(_latency_length, report, timed), *plots]
    return environment.from_string(text).render(report=report, timed=timed, plots=plots)


def _p(value: float | None) -> str:
    """Format a p value."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _plot(draw: Any, report: EvaluationReport, systems: Sequence[SystemEntry]) -> Markup:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, report, systems)
    axes.grid(visible=True, color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    # No date, and ids derived from the plot, so that equal reports give equal pages.
    with matplotlib.rc_context({"svg.hashsalt": draw.__name__}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    return Markup(svg[svg.index("<svg") :])


def _style(report: EvaluationReport, system: SystemEntry) -> tuple[str, str]:
    others = [s.name for s in report.systems if s.kind != "control"]
    return _CONTROL if system.kind == "control" else _STYLES[others.index(system.name) % len(_STYLES)]


def _quality_latency(axes: Axes, report: EvaluationReport, systems: Sequence[SystemEntry]) -> None:
    metric = report.main_metric
    for system in systems:
        assert system.speed is not None
        color, marker = _style(report, system)
        found, at = system.scores[metric], system.speed.total_ms["p50"]
        bars = [[max(0.0, found.value - found.low)], [max(0.0, found.high - found.value)]]
        axes.errorbar(
            [at], [found.value], yerr=bars, fmt=marker, color=color, capsize=4, markersize=8, label=system.name
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("end to end, ms (median, one prompt at a time)")
    axes.set_ylabel(f"{TITLES[metric]} ({'lower' if metric in LOWER_IS_BETTER else 'higher'} is better)")
    axes.set_title("Quality against latency (bars: 95 % interval)", loc="left", fontsize=11)
    axes.legend(frameon=False)


def _latency_length(axes: Axes, report: EvaluationReport, systems: Sequence[SystemEntry]) -> None:
    for system in systems:
        assert system.speed is not None
        color, marker = _style(report, system)
        longest = min(_LENGTHS, int(str(report.settings["max_new_tokens"])))
        axes.plot(
            [1, longest], [system.speed.total_at(1), system.speed.total_at(longest)], color=color, label=system.name
        )
        axes.plot(
            *zip(*system.speed.points, strict=True), marker, color=color, markersize=4, alpha=0.6, linestyle="none"
        )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("response length, tokens")
    axes.set_ylabel("end to end, ms")
    axes.set_title("Latency against response length (dots: measured responses)", loc="left", fontsize=11)
    axes.legend(frameon=False)


def _by_length(axes: Axes, report: EvaluationReport, systems: Sequence[SystemEntry]) -> None:
    metric = report.main_metric if report.main_metric in report.pair.buckets[0].scores else None
    for system in systems:
        color, marker = _style(report, system)
        values = [bucket.scores[metric] if metric else bucket.length_ratio for bucket in system.buckets]
        dashed = "--" if system.kind == "control" else "-"
        axes.plot(range(len(values)), values, marker=marker, color=color, label=system.name, linestyle=dashed)
    names = [
        f"{b.shortest}{f'–{b.longest}' if b.longest != b.shortest else ''}\n{b.examples} prompts"
        for b in systems[0].buckets
    ]
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("words in the reference")
    axes.set_ylabel(TITLES[metric] if metric else "words per word of the reference")
    axes.set_title("Quality by response length", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
