"""One evaluation: responses, scores and speed of all systems, and the pair's position among them."""

import os
import platform
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from llm2slm_export.authoring.progress import SILENT, Progress
from llm2slm_export.bundle.files import sha256
from llm2slm_export.environment.hardware import processor
from llm2slm_export.errors import UsageError
from llm2slm_export.evaluation.compared_systems import (
    LLM_ALONE,
    SLM_ALONE,
    Comparison,
    EvaluationRequest,
    compared_systems,
)
from llm2slm_export.evaluation.examples import Example, read_examples
from llm2slm_export.evaluation.metrics import (
    LOWER_IS_BETTER,
    MetricName,
    Score,
    SystemResponses,
    plain_scores,
    score,
    signatures,
)
from llm2slm_export.evaluation.report import (
    BreakEven,
    DataEntry,
    EvaluationReport,
    LengthBucket,
    ScoreEntry,
    SpeedEntry,
    SystemEntry,
    break_even,
    gap_recovered,
)
from llm2slm_export.evaluation.result_cache import JsonlCache, cached_array, fingerprint
from llm2slm_export.evaluation.speed import measure_speed
from llm2slm_export.evaluation.systems import System
from llm2slm_export.inference.outputs import Generation

_BUCKETS = 4
_VERSIONS = ("llm2slm-export", "tokenizers", "numpy", "sacrebleu", "rouge-score")


@dataclass(frozen=True)
class EvaluationSettings:
    """Data, metrics and generation options of an evaluation.

    Args:
        data: the held-out examples.
        prompt_field, response_field, task_field: keys or columns of the data (`data_files`).
        origin: origin of the fields, for messages; empty if the user gave them.
        rows: maximum number of examples; None: all.
        metrics: what to compute.
        num_beams: 1 for greedy search.
        max_new_tokens: maximum response length; None: the bundle's default.
        batch_size: prompts per batch.
        truncate: truncate prompts that are too long instead of refusing them.
        speed_prompts: number of prompts for speed; 0: speed is not measured.
        speed_tokens: forced response length for ms per token.
        speed_rounds: timed rounds.
        seed: of significance tests and of the order of speed prompts.
    """

    data: Path
    prompt_field: str | int
    response_field: str | int
    task_field: str | int | None = None
    origin: str = ""
    rows: int | None = None
    metrics: tuple[MetricName, ...] = ("bleu", "chrf")
    num_beams: int = 1
    max_new_tokens: int | None = None
    batch_size: int = 32
    truncate: bool = False
    speed_prompts: int = 16
    speed_tokens: int = 64
    speed_rounds: int = 5
    seed: int = 0


def evaluate(request: EvaluationRequest, settings: EvaluationSettings, progress: Progress = SILENT) -> EvaluationReport:
    """Score and time a bundle and the systems it is compared with.

    Raises:
        DataError: unusable data, or held-out prompts in the training data.
        UsageError, BundleError, CompositionError: as `compared_systems`.
        PromptError: prompts that are too long.
    """
    started = time.monotonic()
    examples = read_examples(
        settings.data, settings.prompt_field, settings.response_field, settings.task_field, settings.rows,
        origin=settings.origin,
    )  # fmt: skip
    prompts = [example.prompt for example in examples]
    comparison = compared_systems(request, prompts, truncate=settings.truncate, progress=progress)
    try:
        if comparison.training_rows is None:
            comparison.notes.append(
                "overlap with the training prompts was not checked: the training data is not available"
            )
        for system in comparison.systems:
            _refuse_lengths(system, examples, settings)
        limit = settings.max_new_tokens or comparison.systems[0].bundle.manifest.generation.max_new_tokens
        answered = {s.name: _answers(s, examples, settings, limit, request.work, progress) for s in comparison.systems}
        speed = _speed(comparison, prompts, settings, limit, progress)
        return _report(request, settings, examples, comparison, answered, speed, limit, time.monotonic() - started)
    finally:
        comparison.close()


def _refuse_lengths(system: System, examples: Sequence[Example], settings: EvaluationSettings) -> None:
    """Refuse lengths that a system does not support, before any system runs."""
    prompts = [example.prompt for example in examples]
    system.refuse_long_prompts(prompts, truncate=settings.truncate)
    if "loss" in settings.metrics:
        system.refuse_long_responses(prompts, [example.references[0] for example in examples])
    known = system.bundle.manifest.max_total_tokens
    if settings.speed_prompts and system.kind != "control" and known is not None and settings.speed_tokens > known:
        raise UsageError(
            f"{system.name} has {known} positions, and speed_tokens is {settings.speed_tokens}.",
            remedy=f"lower it (--speed-tokens) to {known} or less",
        )


@dataclass(frozen=True)
class _Answered:
    """A system's responses to all examples, and its loss on the references."""

    texts: tuple[str, ...]
    unfinished: float
    truncated: int
    loss: Any


def _answers(
    system: System,
    examples: Sequence[Example],
    settings: EvaluationSettings,
    limit: int,
    work: Path,
    progress: Progress,
) -> _Answered:
    prompts = [example.prompt for example in examples]
    facts = (_identity(system), settings.num_beams, settings.batch_size, settings.truncate, limit, prompts)
    cache = JsonlCache(work / "answers" / f"{_slug(system.name)}-{fingerprint(*facts)}.jsonl")
    rows: dict[int, dict[str, Any]] = {row: value for row, value in cache.read().items() if _is_row(value)}
    progress.start(f"{system.name}: responses", len(prompts))
    progress.advance(len(rows))
    left = [row for row in range(len(prompts)) if row not in rows]
    if left:
        # Batches differ from an uninterrupted run's, which changes results at int8 only.
        numbers = iter(left)
        for generations in system.respond(
            [prompts[row] for row in left], batch_size=settings.batch_size, truncate=settings.truncate,
            num_beams=settings.num_beams, max_new_tokens=limit,
        ):  # fmt: skip
            new = {next(numbers): _row(generation) for generation in generations}
            cache.append(new)
            rows |= new
            progress.advance(len(new))
    loss = None
    if "loss" in settings.metrics:
        references = [example.references[0] for example in examples]

        def measure() -> Any:
            progress.start(f"{system.name}: loss", len(prompts))
            return system.loss(
                prompts,
                references,
                batch_size=settings.batch_size,
                truncate=settings.truncate,
                advance=progress.advance,
            )

        name = f"{_slug(system.name)}-loss-{fingerprint(*facts, references)}.npy"
        loss = cached_array(work / "answers" / name, measure)
    return _Answered(
        tuple(rows[row]["text"] for row in range(len(prompts))),
        sum(row["finish_reason"] == "length" for row in rows.values()) / len(rows),
        sum(row["dropped_tokens"] > 0 for row in rows.values()),
        loss,
    )


def _row(generation: Generation) -> dict[str, Any]:
    return {
        "text": generation.text,
        "new_tokens": generation.new_tokens,
        "finish_reason": generation.finish_reason,
        "dropped_tokens": generation.dropped_tokens,
    }


def _is_row(value: object) -> bool:
    types = {"text": str, "new_tokens": int, "finish_reason": str, "dropped_tokens": int}
    return (
        isinstance(value, dict)
        and value.keys() == types.keys()
        and all(type(value[key]) is wanted for key, wanted in types.items())
    )


def _identity(system: System) -> object:
    """What a system's responses depend on, except prompts and options."""
    manifest = system.bundle.manifest.model_dump_json(exclude={"parity", "heads"})
    return manifest, system.key, system.backend.device, onnxruntime.__version__


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _speed(
    comparison: Comparison, prompts: Sequence[str], settings: EvaluationSettings, limit: int, progress: Progress
) -> dict[str, SpeedEntry]:
    """Speed of the pair and the baselines; controls have the pair's speed."""
    timed = [system for system in comparison.systems if system.kind != "control"]
    if not settings.speed_prompts:
        return {}
    chosen = _of_all_lengths(prompts, settings.speed_prompts)
    random.Random(settings.seed).shuffle(chosen)
    progress.start("speed", len(timed) * len(chosen) * (settings.speed_rounds + 1))
    return measure_speed(
        {system.name: system.orchestrator() for system in timed}, chosen, new_tokens=settings.speed_tokens,
        max_new_tokens=limit, num_beams=settings.num_beams, rounds=settings.speed_rounds, truncate=settings.truncate, advance=progress.advance,
    )  # fmt: skip


def _of_all_lengths(prompts: Sequence[str], count: int) -> list[str]:
    """Select `count` prompts, evenly distributed over lengths."""
    by_length = sorted(prompts, key=lambda prompt: (len(prompt), prompt))
    count = min(count, len(by_length))
    return [by_length[(2 * index + 1) * len(by_length) // (2 * count)] for index in range(count)]


def _report(
    request: EvaluationRequest,
    settings: EvaluationSettings,
    examples: Sequence[Example],
    comparison: Comparison,
    answered: Mapping[str, _Answered],
    speed: Mapping[str, SpeedEntry],
    limit: int,
    seconds: float,
) -> EvaluationReport:
    references = [example.references for example in examples]
    answers = {name: SystemResponses(found.texts, found.loss) for name, found in answered.items()}
    scores = score(answers, references, settings.metrics, seed=settings.seed)
    if "loss" in settings.metrics:
        scores = _incomparable_losses_apart(comparison, scores)
    manifest = comparison.systems[0].bundle.manifest
    tasks = sorted({example.task for example in examples if example.task is not None})
    return EvaluationReport(
        bundle=str(request.bundle),
        name=manifest.name,
        head=manifest.head,
        precision={name: graph.precision for name, graph in manifest.graphs.items()},
        composition=None if comparison.composition is None else str(comparison.composition),
        data=DataEntry(
            path=str(settings.data), sha256=sha256(settings.data), examples=len(examples),
            references=sum(map(len, references)),
            tasks={task: sum(example.task == task for example in examples) for task in tasks},
            overlap_checked=comparison.training_source,
        ),
        settings={
            "num_beams": settings.num_beams, "max_new_tokens": limit, "batch_size": settings.batch_size, "seed": settings.seed,
            "device": comparison.systems[0].backend.device, "threads": request.threads, "speed_prompts": settings.speed_prompts,
            "speed_tokens": settings.speed_tokens, "speed_rounds": settings.speed_rounds, "rows": settings.rows,
            "truncate": settings.truncate,
        },
        signatures=signatures(settings.metrics, references),
        systems=tuple(
            _entry(system, examples, answered[system.name], scores[system.name], speed.get(system.name), tasks, settings.metrics)
            for system in comparison.systems
        ),
        break_even=_break_even(speed),
        gap_recovered=_gap(scores),
        notes=tuple(comparison.notes),
        hardware={"machine": platform.machine(), "processor": processor(), "cores": os.cpu_count() or 0},
        versions={name: version(name) for name in _VERSIONS} | {"onnxruntime": onnxruntime.__version__},
        seconds=round(seconds, 1),
    )  # fmt: skip


def _entry(
    system: System,
    examples: Sequence[Example],
    answered: _Answered,
    scores: Mapping[str, Score],
    speed: SpeedEntry | None,
    tasks: Sequence[str],
    metrics: Sequence[MetricName],
) -> SystemEntry:
    words = [len(example.references[0].split()) for example in examples]
    graph = system.bundle.manifest.graphs["decoder"]
    weights = graph.bytes_read
    if weights is None:
        held = {graph.file, *graph.data}
        weights = sum(entry.bytes for entry in system.bundle.manifest.files if entry.path in held)

    def part(rows: Sequence[int]) -> dict[str, float]:
        chosen = [examples[row].references for row in rows]
        return plain_scores([answered.texts[row] for row in rows], chosen, metrics)

    buckets = tuple(
        LengthBucket(
            shortest=min(words[row] for row in rows),
            longest=max(words[row] for row in rows),
            examples=len(rows),
            scores=part(rows),
            length_ratio=_ratio(answered.texts, words, rows),
        )
        for rows in _length_buckets(words)
    )
    return SystemEntry(
        name=system.name, kind=system.kind, description=system.description, parameters=system.parameters, decoder_mb=weights / 1e6,
        scores={name: ScoreEntry(value=s.value, low=s.low, high=s.high, p=s.p) for name, s in scores.items()},
        tasks={task: part([row for row, example in enumerate(examples) if example.task == task]) for task in tasks},
        buckets=buckets,
        length_ratio=_ratio(answered.texts, words, range(len(words))),
        unfinished=answered.unfinished,
        truncated=answered.truncated,
        speed=speed,
    )  # fmt: skip


def _length_buckets(words: Sequence[int]) -> list[list[int]]:
    """Group examples by reference length into buckets of similar size; a length is in one bucket only."""
    edges = sorted({int(edge) for edge in np.quantile(words, np.linspace(0, 1, _BUCKETS + 1)[1:-1])} | {max(words)})
    buckets: list[list[int]] = [[] for _ in edges]
    for row, count in enumerate(words):
        buckets[next(i for i, edge in enumerate(edges) if count <= edge)].append(row)
    return [bucket for bucket in buckets if bucket]


def _ratio(texts: Sequence[str], words: Sequence[int], rows: Sequence[int]) -> float:
    return sum(len(texts[row].split()) for row in rows) / max(1, sum(words[row] for row in rows))


def _break_even(speed: Mapping[str, SpeedEntry]) -> tuple[BreakEven, ...]:
    if not speed:
        return ()
    (_, pair), *others = speed.items()
    return tuple(break_even(name, pair, other) for name, other in others)


def _incomparable_losses_apart(
    comparison: Comparison, scores: dict[str, dict[str, Score]]
) -> dict[str, dict[str, Score]]:
    """Drop p values of losses that are per token of another tokenizer than the pair's, and note it."""
    own = comparison.systems[0].responses_tokenizer
    for system in comparison.systems:
        if system.responses_tokenizer != own:
            scores[system.name]["loss"] = replace(scores[system.name]["loss"], p=None)
            comparison.notes.append(f"the loss of {system.name} is per token of another tokenizer and was not compared")
    return scores


def _gap(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, float]:
    if LLM_ALONE not in scores or SLM_ALONE not in scores:
        return {}
    pair = next(iter(scores.values()))
    shares = {
        metric: gap_recovered(
            found.value,
            scores[LLM_ALONE][metric].value,
            scores[SLM_ALONE][metric].value,
            lower_is_better=metric in LOWER_IS_BETTER,
        )
        for metric, found in pair.items()
        if scores[LLM_ALONE][metric].p is not None and scores[SLM_ALONE][metric].p is not None
    }
    return {metric: share for metric, share in shares.items() if share is not None}
