"""What the command line prints: tables and progress. Knows rich, and nothing of how results come about."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text

from llm2slm_export.bundle.manifest import EngineSet, GraphEntry, Manifest
from llm2slm_export.bundle.parity_report import ParityRow
from llm2slm_export.cli.terminal import is_unicode
from llm2slm_export.contract import GraphName, TensorSpec
from llm2slm_export.errors import printable

if TYPE_CHECKING:
    from llm2slm_export.authoring.plan import Plan
    from llm2slm_export.doctor import Diagnosis, EngineCheck
    from llm2slm_export.evaluation.latency import BenchReport
    from llm2slm_export.evaluation.report import EvaluationReport


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr, as wide as the terminal; without one no line is wrapped and nothing is padded."""
    stream = sys.stderr if stderr else sys.stdout
    terminal = stream.isatty()
    return Console(
        stderr=stderr, highlight=False, markup=False, force_terminal=terminal, soft_wrap=not terminal,
        width=_width(stream) if terminal else None, height=25 if terminal else None,  # with one alone it does not keep it
    )  # fmt: skip


def _width(terminal: TextIO) -> int:
    """As `shutil.get_terminal_size`, of any of the standard streams. rich takes 80 where TERM is dumb or unknown."""
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    try:
        return os.get_terminal_size(terminal.fileno()).columns or 80
    except OSError:
        return 80


class Table:
    """A title, and rows of cells: columns that fit a terminal's width, or, without a terminal, tabs between the cells.

    Args:
        columns: their names; None: the rows are names and values.
        right: the numbers of the columns that are aligned there.
    """

    def __init__(
        self,
        title: str | None,
        columns: Sequence[str] | None,
        rows: Iterable[Sequence[object]],
        *,
        right: Sequence[int] = (),
    ) -> None:
        self._title, self._columns, self._right = title, columns, right
        self._rows = [[printable(str(cell)) for cell in row] for row in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines, as rich asks for them."""
        title = [] if self._title is None else [printable(self._title)]
        if options.is_terminal:
            yield from (Text(line, style="bold") for line in title)
            yield self._columned()
            return
        named = [] if self._columns is None else [self._columns]
        escapes = str.maketrans({"\t": "\\t", "\n": "\\n"})
        for line in (*title, *("\t".join(cell.translate(escapes) for cell in row) for row in (*named, *self._rows))):
            yield Segment(f"{line}\n")

    def _columned(self) -> RichTable:
        made = RichTable(box=None, pad_edge=False, show_header=self._columns is not None)
        for number in range(max(map(len, [*self._rows, self._columns or ()]), default=0)):
            name = self._columns[number] if self._columns is not None else ""
            made.add_column(name, justify="right" if number in self._right else "left", overflow="fold")
        for row in self._rows:
            made.add_row(*map(Text, row))
        return made


def size(count: float) -> str:
    """Bytes as people read them, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def print_json(value: Any) -> None:
    """One JSON value on one line of stdout, with \\u escapes where its encoding needs them."""
    print(json.dumps(value, ensure_ascii=not is_unicode(sys.stdout)), flush=True)


class StageLog:
    """One line per stage as it completes, with time and size; a spinner meanwhile where there is a terminal."""

    def __init__(self, to: Console) -> None:
        self._console = to
        self._status = to.status("") if to.is_terminal else None
        self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._task = self._bar.add_task("", total=None)
        self.stages: list[dict[str, Any]] = []

    def start(self, name: str) -> None:
        if self._status is not None:
            self._status.update(f"{name} …")
            self._status.start()

    def step(self, phase: str, done: int, of: int) -> None:
        """How far a compiler is with a phase of the stage at hand."""
        if self._status is not None:
            self._bar.update(self._task, description=phase, completed=done, total=of or None)
            self._status.update(self._bar)

    def done(self, name: str, seconds: float, count: int | None) -> None:
        self.stop()
        self.stages.append({"name": name, "seconds": round(seconds, 3), "bytes": count})
        took, made = f"{seconds:.1f} s", size(count) if count is not None else ""
        if self._console.is_terminal:
            self._console.print(f"{name:<32}{took:>10}{made:>12}".rstrip())
        else:
            self._console.print(Table(None, None, [(name, took, made) if made else (name, took)]))

    def stop(self) -> None:
        if self._status is not None:
            self._status.stop()


class WorkLog:
    """A line for everything that begins, and a bar while it lasts where there is a terminal."""

    def __init__(self, to: Console) -> None:
        self._console = to
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=to,
            transient=True, disable=not to.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, what: str, total: int | None = None) -> None:
        """Something begins, of so many steps where that is known."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=total)
        self._console.print(f"{what} …")

    def advance(self, count: int) -> None:
        """So many more of them are done."""
        if self._task is not None:
            self._bar.advance(self._task, count)


def parity_table(rows: Iterable[ParityRow]) -> Table:
    """What was compared with the reference, and how far off it is allowed to be."""
    return Table(
        "Parity with the composition",
        ("graph", "case", "tensor", "measure", "value", "tolerance", "ok"),
        ((r.graph, r.case, r.tensor, r.measure, f"{r.value:.3g}", f"{r.tolerance:.3g}", "yes" if r.passed else "NO") for r in rows),
        right=(4, 5),
    )  # fmt: skip


def profile_table(rows: Sequence[tuple[str, float, int]]) -> Table:
    """Stages with their time in ms and the tokens they went over."""

    def cells(stage: str, ms: float, tokens: int) -> tuple[object, ...]:
        per_token = f"{ms / tokens:.3f}" if tokens else "-"
        return stage, f"{ms:.2f}", tokens, per_token, f"{1000 * tokens / ms:.0f}" if ms else "-"

    return Table(
        "Profile", ("stage", "ms", "tokens", "ms/token", "tokens/s"), (cells(*row) for row in rows), right=(1, 2, 3, 4)
    )


def print_manifest(to: Console, manifest: Manifest, sizes: Mapping[str, int], total: int) -> None:
    """Everything `inspect` tells about a bundle.

    Args:
        sizes: bytes of each graph with the weights written beside it, by the graph's file.
        total: of the whole bundle.
    """
    heads = manifest.by_head
    whole = [
        ("written by", ", ".join(f"{key} {value}" for key, value in manifest.tool_versions.items())),
        ("total size", size(total)),
    ]
    if len(heads) == 1:
        to.print(_facts([("name", manifest.name), *_head_facts(manifest), *whole]))
    else:
        names = f"{', '.join(heads)} ({manifest.head} where none is named)"
        to.print(_facts([("name", manifest.name), ("heads", names), *whole]))
        to.print()
        to.print(_heads(heads, sizes))
    to.print()
    to.print(_sources(heads))
    _print_graph(to, "encoder", manifest.graphs["encoder"], sizes)
    for name, head in heads.items():
        if len(heads) > 1:
            to.print()
            to.print(Text(f"Head {name}", style="bold"))
            to.print(_facts(_head_facts(head)))
        _print_graph(to, "projector", head.graphs["projector"], sizes)
        _print_graph(to, "decoder", head.graphs["decoder"], sizes)
        for key, engines in head.engines.items():
            to.print()
            to.print(_engines(key, engines, sizes))


def print_evaluation(to: Console, report: "EvaluationReport") -> None:
    """Everything `eval` found, in tables."""
    systems = (
        (
            system.name, system.description, f"{system.parameters / 1e6:.1f} M", f"{system.length_ratio:.2f}",
            f"{100 * system.unfinished:.1f} %", system.truncated,
        )
        for system in report.systems
    )  # fmt: skip
    columns = ("system", "what it is", "parameters", "length", "cut at the limit", "prompts cut")
    to.print(Table(f"{report.data.examples} prompts", columns, systems, right=(2, 3, 4, 5)))
    for metric in report.pair.scores:
        scores = (
            (system.name, f"{found.value:.2f}", f"{found.low:.2f} – {found.high:.2f}", _p(found.p))
            for system in report.systems
            for found in [system.scores[metric]]
        )
        to.print()
        to.print(Table(metric, ("system", "value", "95 % interval", "p against the pair"), scores, right=(1, 2, 3)))
    for metric, share in report.gap_recovered.items():
        to.print(f"{metric}: the pair covers {100 * share:.0f} % of the way from the SLM alone to the LLM alone.")
    if report.data.tasks:
        tasks = report.data.tasks
        for metric in report.pair.tasks[next(iter(tasks))]:
            by_task = ((s.name, *(f"{s.tasks[task][metric]:.2f}" for task in tasks)) for s in report.systems)
            to.print()
            to.print(Table(f"{metric} by task", ("system", *tasks), by_task, right=range(1, len(tasks) + 1)))
    timed = [system for system in report.systems if system.speed is not None]
    if timed:
        to.print()
        to.print(_speed_table(timed))
    for entry in report.break_even:
        to.print(
            f"Against {entry.against}: {entry.speed_up_per_token:.2f} times its speed per token; {_faster(entry)}."
        )
    for note in report.notes:
        to.print(f"Note: {note}.")


def _speed_table(timed: Sequence[Any]) -> Table:
    rows = (
        (
            system.name, *(f"{ms:.2f}" for ms in system.speed.stages_ms.values()), f"{system.speed.ms_per_token:.3f}",
            *(f"{ms:.1f}" for ms in system.speed.total_ms.values()), f"{system.speed.new_tokens:.0f}",
            f"{system.decoder_mb:.1f}",
        )
        for system in timed
    )  # fmt: skip
    columns = (
        "system", "tokenize", "encode", "project", "prefill", "ms/token", "p50 ms", "p90 ms", "p99 ms", "tokens", "decoder MB",
    )  # fmt: skip
    return Table("Speed: one prompt at a time, medians in ms", columns, rows, right=range(1, len(columns)))


def _faster(entry: Any) -> str:
    if entry.never:
        return "slower end to end at every response length"
    if entry.last is not None:
        return f"faster end to end up to {entry.last} tokens"
    return (
        "faster end to end at every response length"
        if entry.first == 1
        else f"faster end to end from {entry.first} tokens on"
    )


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def print_bench(to: Console, report: "BenchReport") -> None:
    """What `bench` measured: the first case in full, one line for every case."""
    threads = "the runtime's choice of threads" if report.threads is None else f"--threads {report.threads}"
    precision = ", ".join(f"{graph} {precision}" for graph, precision in report.precision.items())
    runtimes = ", ".join(f"{graph} {runtime}" for graph, runtime in report.runtimes.items())
    to.print(f"{report.bundle} ({precision}) on {report.device}, {threads}, {report.rounds} rounds")
    to.print(f"Runtimes: {runtimes}.")
    first = report.cases[0]
    stages = (
        (stage.replace("_", " "), *(f"{ms:.3f}" for ms in (times.p50, times.p90, times.p99)))
        for stage, times in first.stages_ms.items()
    )
    title = (
        f"{first.system}: {first.prompt_tokens} prompt tokens, {first.new_tokens} new tokens, batch {first.batch_size}"
    )
    to.print()
    to.print(Table(title, ("stage", "p50 ms", "p90 ms", "p99 ms"), stages, right=(1, 2, 3)))
    rows = (
        (
            case.system, case.prompt_tokens, case.batch_size, f"{case.read_ms:.2f}", f"{case.ms_per_token:.3f}",
            f"{case.stages_ms['total'].p50:.1f}", f"{case.tokens_per_second:.0f}",
            "-" if case.step_bytes is None else f"{case.step_bytes / 1e6:.1f}",
            "-" if case.bandwidth_share is None else f"{100 * case.bandwidth_share:.0f} %",
        )
        for case in report.cases
    )  # fmt: skip
    columns = (
        "system", "prompt", "batch", "first token ms", "ms/token", "total ms", "tokens/s", "MB a step", "bandwidth",
    )  # fmt: skip
    to.print()
    to.print(Table("Medians", columns, rows, right=range(1, len(columns))))
    if report.bandwidth is not None:
        to.print(f"100 % of the bandwidth: {report.bandwidth / 1e9:.1f} GB/s, measured here on all cores.")
    if any(case.step_bytes is None for case in report.cases):
        to.print("A bundle of an earlier version does not say what a step reads: build it again to see that.")
    for entry in report.break_even:
        to.print(
            f"Against {entry.against}: {entry.speed_up_per_token:.2f} times its speed per token; {_faster(entry)}."
        )
    for note in report.notes:
        to.print(f"Note: {note}.")


def untrained_effect(manifest: Manifest) -> str:
    """What it means for a head that it has not been trained."""
    if manifest.fusion == "add" and manifest.tokenizer.strategy == "shared":
        return "the LLM adds nothing until `train` has run"
    return "its projector's weights are as they were drawn"


def _head_facts(manifest: Manifest) -> list[tuple[str, object]]:
    """What holds for one head, and for a bundle of one head altogether."""
    tokenizer, parity, state = manifest.tokenizer, manifest.parity, manifest.cache.state
    misses = sum(not row.passed for row in parity.rows)
    positions = manifest.max_total_tokens
    # What a bundle leaves at the class's defaults changes nothing.
    generation = manifest.generation.model_dump(exclude_defaults=True)
    return [
        ("trained", "yes" if manifest.trained else f"no: {untrained_effect(manifest)}"),
        ("SLM kind", manifest.shape.slm_kind),
        ("fusion", _fusion(manifest)),
        ("prompt template", manifest.prompt_template.replace("\n", "\\n")),
        ("prompt limit", f"{manifest.max_prompt_tokens} tokens"),
        ("SLM's positions", "no limit known" if positions is None else positions),
        ("tokenizer", tokenizer.strategy + (" (byte-level stand-in)" if tokenizer.stand_in else "")),
        ("special ids", _named(manifest.special_ids.model_dump())),
        ("generation", _named(generation)),
        (
            "cache",
            f"{len(state)} tensors" + (f" like {_tensor(state[0].past)}" if state else ""),
        ),
        ("parity", f"{len(parity.rows) - misses} of {len(parity.rows)} comparisons within tolerance"),
    ]


def _fusion(manifest: Manifest) -> str:
    layer = manifest.llm_layer
    if isinstance(layer, int):
        return manifest.fusion + (f" (LLM layer {layer})" if layer != -1 else "")
    return f"{manifest.fusion} (LLM layers {', '.join(map(str, layer))})"


def _heads(heads: Mapping[str, Manifest], sizes: Mapping[str, int]) -> Table:
    rows = (
        (
            name, head.sources["slm"].model, _fusion(head), head.tokenizer.strategy, "yes" if head.trained else "no",
            *(size(sizes[head.graphs[graph].file]) for graph in ("projector", "decoder")),
        )
        for name, head in heads.items()
    )  # fmt: skip
    columns = ("head", "SLM", "fusion", "tokenizer", "trained", "projector", "decoder")
    return Table("Heads", columns, rows, right=(5, 6))


def _print_graph(to: Console, name: GraphName, graph: GraphEntry, sizes: Mapping[str, int]) -> None:
    runtime = ", ".join(f"{key} ≥ {value}" for key, value in graph.minimum_runtime.items())
    blocks = f" in blocks of {graph.block_size}" if graph.block_size else ""
    blocks += ", output layer included" if graph.quantize_lm_head else ""
    title = (
        f"{name}: {graph.file}, {graph.precision}{blocks}, {size(sizes[graph.file])}, opset {graph.opset}, {runtime}"
    )
    if graph.data:
        title += f", weights in {', '.join(graph.data)}"
    rows = [("in", t) for t in graph.inputs] + [("out", t) for t in graph.outputs]
    to.print()
    to.print(Table(title, ("", "tensor", "type", "axes"), ((way, t.name, t.dtype, _axes(t)) for way, t in rows)))


def _engines(key: str, engines: EngineSet, sizes: Mapping[str, int]) -> Table:
    """A set of engines: what for, how far it goes, and how large it is."""
    devices, limits = ", ".join(engines.compute_capabilities) or engines.device, engines.limits
    title = (
        f"engines {key}: {engines.variant} {engines.version} for {devices}, driver ≥ {engines.driver}; up to {limits.batch} "
        f"rows, {limits.prompt} prompt and {limits.new} new tokens, in a cache of {limits.capacity}"
    )
    rows = (
        (name, graph.file, graph.precision, len(graph.profiles), size(sizes[graph.file]))
        for name, graph in engines.graphs.items()
    )
    return Table(title, ("graph", "file", "precision", "profiles", "size"), rows, right=(3, 4))


def _sources(heads: Mapping[str, Manifest]) -> Table:
    """The models: the LLM, which the heads share, and each one's SLM."""
    llm = next(iter(heads.values())).sources["llm"]
    slms = ((f"SLM of {name}" if len(heads) > 1 else "SLM", head.sources["slm"]) for name, head in heads.items())
    rows = (
        (
            part,
            source.model,
            source.model_type,
            f"{source.parameters / 1e6:.1f} M",
            source.weights if source.seed is None else f"{source.weights} (seed {source.seed})",
            source.revision or "-",
        )
        for part, source in (("LLM", llm), *slms)
    )
    return Table("Models", ("", "source", "type", "parameters", "weights", "revision"), rows, right=(3,))


def _facts(facts: Iterable[tuple[str, object]]) -> Table:
    return Table(None, None, facts)


def _named(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items())


def _plain(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple | list) else "-" if value is None else str(value)


def _axes(tensor: TensorSpec) -> str:
    return f"[{', '.join(map(str, tensor.axes))}]"


def _tensor(tensor: TensorSpec) -> str:
    return f"{tensor.name} {_axes(tensor)}"


def print_plan(to: Console, plan: "Plan") -> None:
    """The sizes and predicted times of a pair."""
    p, cache, machine = plan.parameters, plan.cache, plan.machine
    parts = (("LLM", p.llm), ("LLM encoder", p.llm_encoder), ("projector", p.projector), ("SLM", p.slm),
             ("read per SLM step", p.slm_step), ("read per LLM step", p.llm_step))  # fmt: skip
    to.print(f"{plan.llm} → {plan.slm} ({plan.shape.slm_kind}, {plan.fusion})")
    to.print()
    to.print(
        Table(
            "Parameters",
            ("part", "count"),
            ((name, f"{count / 1e6:,.1f} M") for name, count in parts if count is not None),
            right=(1,),
        )
    )
    to.print()
    rows: list[tuple[str, ...]] = [
        (g.graph, g.precision, f"{g.parameters / 1e6:,.1f} M", size(g.bytes)) for g in plan.graphs
    ]
    rows.append(("bundle", "", "", size(plan.bundle_bytes)))
    to.print(Table("Graphs", ("graph", "precision", "weights", "size"), rows, right=(2, 3)))
    to.print()
    lengths = f"{plan.prompt_tokens} prompt tokens, {plan.new_tokens} new tokens"
    memory = [
        ("keys and values", f"{size(cache.total)} a row at {lengths}"),
        ("", f"{size(cache.self_per_token)} a token" + (
            f" and {size(cache.cross_per_prompt_token)} a prompt token" if cache.cross_per_prompt_token else "")),
        ("to build (estimate)", size(plan.build_ram_bytes)),
        ("to run (estimate)", size(plan.run_ram_bytes)),
    ]  # fmt: skip
    to.print("Memory")
    to.print(_facts(memory))
    to.print()
    times = [(s.stage, f"{s.ms:.2f}", s.bound) for s in plan.stages]
    to.print(Table(f"Predicted time, one row, {lengths}", ("stage", "ms", "bound by"), times, right=(1,)))
    to.print(
        f"A prediction from this machine's {machine.bandwidth / 1e9:.1f} GB/s and {machine.flops / 1e9:.0f} GFLOP/s "
        f"(probed in {machine.seconds:.2f} s), not a measurement."
    )


_HUGE_PAGES: dict[str | None, str] = {
    "always": "always", "madvise": "for those who ask, as a decoder's session does",
    "never": "never: a token takes 2 to 6 % longer than with madvise in /sys/kernel/mm/transparent_hugepage/enabled",
}  # fmt: skip


def print_diagnosis(to: Console, found: "Diagnosis") -> None:
    """What `doctor` found."""
    machine = found.machine
    ram = size(machine.ram_bytes) if machine.ram_bytes is not None else "unknown"
    providers = ", ".join(found.onnxruntime_providers) or f"none ({found.onnxruntime_problem})"
    facts = [
        ("Python", machine.python),
        ("system", machine.system),
        ("CPU", f"{machine.cpu}, {machine.cores} cores"),
        ("instruction sets", ", ".join(machine.flags) or "none of those that matter"),
        ("RAM", ram),
        ("huge pages", _HUGE_PAGES.get(machine.huge_pages, "none")),
        ("NVIDIA GPU", "; ".join(machine.gpus) or "no"),
        ("ONNX Runtime providers", providers),
    ]
    to.print(_facts(facts))
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
        (part.name, part.purpose, part.needed, _nothing(part.found, part.problem), "yes" if part.ok else "no",
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


def _nothing(found: str | None, problem: str | None) -> str:
    return found or problem or "-"


def _engine_lines(engines: "Iterable[EngineCheck]") -> Iterator[str]:
    """A bundle's engines, and why those that do not fit do not."""
    for engine in engines:
        device = engine.device or "no GPU"
        fits = "fits" + (", and is used" if engine.used else "") if not engine.mismatches else "does not fit"
        yield f"  - engines {engine.engines} (head {engine.head}) on {device}: {fits}"
        yield from (f"      {mismatch}" for mismatch in engine.mismatches)


def _lacking(dependencies: Iterable[Any]) -> str:
    return ", ".join(f"{d.name} ({d.needed}, {d.found or 'none'})" for d in dependencies if not d.ok)
