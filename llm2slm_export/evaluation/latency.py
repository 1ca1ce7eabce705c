"""Latency of a bundle on this machine: stages, time per token, and a step's fraction of the memory bandwidth.

Prompts are synthetic, of exact lengths in LLM tokens, and responses have a forced length; the text is meaningless.
`eval` times real prompts at their responses' own lengths.
"""

import os
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from typing import Annotated, Any, Literal

import numpy as np
from tokenizers import Tokenizer

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.contract import GraphName, Runtime
from llm2slm_export.environment.hardware import probe, processor
from llm2slm_export.errors import UsageError
from llm2slm_export.evaluation.report import BreakEven, break_even
from llm2slm_export.files.strict_model import WHOLE_NUMBER, StrictModel
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.tokenization import PromptTokenizer, open_tokenizer

READ = ("tokenize", "encode", "project", "prefill")
STAGES = (*READ, "first_token", "per_token", "total")


@dataclass(frozen=True)
class BenchSettings:
    """What to time: every prompt length with every batch size, in each round once for every system.

    Args:
        prompt_tokens: prompt lengths in the LLM's tokens, special tokens and template included. All systems get the
            same texts.
        new_tokens: length of every response.
        batch_sizes: rows per batch.
        rounds: timed rounds, after one untimed round, which allocates.
        seed: of the synthetic prompts.
    """

    prompt_tokens: tuple[int, ...] = (64,)
    new_tokens: int = 128
    batch_sizes: tuple[int, ...] = (1,)
    rounds: int = 10
    seed: int = 0


class Times(StrictModel):
    """Times in ms over the rounds, by percentile."""

    p50: float
    p90: float
    p99: float


class CaseEntry(StrictModel):
    """One system at one prompt length and batch size.

    Args:
        prompt_tokens: the requested length, or the closest possible one.
        stages_ms: times of the batch by `STAGES`: `first_token` is the time to the first token, `per_token` the time of
            each later step.
        tokens_per_second: of all rows, without the first token.
        step_bytes: bytes that a step reads (weights, keys and values); None if the manifest has no `bytes_read`.
        bandwidth_share: `step_bytes` per step time, as a fraction of the memory bandwidth; None if unknown.
    """

    system: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    stages_ms: dict[str, Times]
    tokens_per_second: float
    step_bytes: int | None
    bandwidth_share: float | None

    @property
    def read_ms(self) -> float:
        """Median time to the first token, in ms."""
        return self.stages_ms["first_token"].p50

    @property
    def ms_per_token(self) -> float:
        """Median time per later token, in ms."""
        return self.stages_ms["per_token"].p50


class BenchReport(StrictModel):
    """All results of `bench`. `break_even`: of the first case, against each baseline."""

    format: Literal["llm2slm-bench"] = "llm2slm-bench"
    version: Annotated[Literal[1], WHOLE_NUMBER] = 1
    bundle: str
    precision: dict[str, str]
    device: str
    runtimes: dict[GraphName, Runtime]
    threads: int | None
    rounds: int
    cases: tuple[CaseEntry, ...]
    break_even: tuple[BreakEven, ...]
    bandwidth: float | None
    hardware: dict[str, str | int]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()


def bench(
    bundle: Bundle,
    systems: Mapping[str, Orchestrator],
    settings: BenchSettings,
    *,
    threads: int | None = None,
    bandwidth: float | None = None,
    advance: Callable[[int], None] = lambda _: None,
    notes: Sequence[str] = (),
) -> BenchReport:
    """Time systems alternately, so that other load on the machine affects all of them.

    Args:
        bundle: the bundle; its tokenizer measures the synthetic prompts.
        systems: the bundle first, then the baselines.
        settings: what to time.
        threads: of the systems, for the report.
        bandwidth: of the memory with the weights, in bytes/s; None: measured here for the CPU, unknown for other
            devices.
        advance: called with 1 after each batch, `batches(len(systems), settings)` times.
        notes: remarks on the systems, for the report.

    Raises:
        UsageError: lengths that are invalid or too long for the bundle; the message lists all.
        PromptError: prompts that are too long for another system.
    """
    import onnxruntime  # loading the systems has checked that it is installed

    _check(bundle.manifest, settings)
    cases = list(product(settings.prompt_tokens, settings.batch_sizes))
    texts = {case: random_prompts(bundle, *case, seed=settings.seed) for case in cases}
    length: dict[str, Any] = {"min_new_tokens": settings.new_tokens, "max_new_tokens": settings.new_tokens}
    plainly: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    answered: dict[tuple[tuple[int, int], str], list[Generation]] = {key: [] for key in product(cases, systems)}
    for number in range(settings.rounds + 1):
        for (case, system), runs in answered.items():
            first, *_ = systems[system].generate(texts[case], batch_size=len(texts[case]), **length, **plainly)
            advance(1)
            if number:  # the first round allocates and fills caches
                runs.append(first)
    own_system = next(iter(systems.values()))
    if bandwidth is None and own_system.device == "cpu":
        bandwidth = probe().bandwidth
    entries = [
        _entry(system, systems[system].manifest, rows, runs, bandwidth)
        for ((_, rows), system), runs in answered.items()
    ]
    own, *others = entries[: len(systems)]
    return BenchReport(
        bundle=str(bundle.directory),
        precision={graph: entry.precision for graph, entry in bundle.manifest.graphs.items()},
        device=own_system.device,
        runtimes=dict(own_system.runtimes),
        threads=threads,
        rounds=settings.rounds,
        cases=tuple(entries),
        break_even=tuple(break_even(other.system, own, other) for other in others),
        bandwidth=bandwidth,
        hardware={"machine": platform.machine(), "processor": processor(), "cores": os.cpu_count() or 0},
        versions={"llm2slm-export": version("llm2slm-export"), "onnxruntime": onnxruntime.__version__},
        notes=tuple(notes),
    )


def batches(systems: int, settings: BenchSettings) -> int:
    """The total number of batches that `bench` runs."""
    return systems * len(settings.prompt_tokens) * len(settings.batch_sizes) * (settings.rounds + 1)


def _check(manifest: Manifest, settings: BenchSettings) -> None:
    most = manifest.max_prompt_tokens
    problems = [
        f"{n} prompt tokens: the maximum of {manifest.name!r} is {most}" for n in settings.prompt_tokens if n > most
    ]
    if settings.new_tokens < 2:
        problems.append(f"{settings.new_tokens} new tokens: a time per token needs at least 2")
    if problems:
        raise UsageError("These lengths are not valid.", *problems, remedy="change --prompt-tokens or --new-tokens")


def random_prompts(bundle: Bundle, tokens: int, count: int, *, seed: int) -> list[str]:
    """Synthetic prompts of `tokens` tokens each, or the closest length below, from words of one token each."""
    tokenizer = PromptTokenizer(bundle)
    words = _words(open_tokenizer(bundle.path(bundle.manifest.tokenizer.llm)))
    draw = random.Random(seed)
    return [_prompt(tokenizer, words, tokens, draw) for _ in range(count)]


def _prompt(tokenizer: PromptTokenizer, words: Sequence[str], tokens: int, draw: random.Random) -> str:
    chosen = draw.choices(words, k=tokens)

    def length(count: int) -> int:
        (row,) = tokenizer.read([" ".join(chosen[:count])], truncate=True)
        return len(row.ids) + row.dropped

    low, high = 1, tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(middle) <= tokens else (low, middle - 1)
    return " ".join(chosen[:low])


def _words(tokenizer: Tokenizer) -> list[str]:
    ids = sorted(tokenizer.get_vocab(with_added_tokens=False).values())
    pieces = {tokenizer.decode([token]).strip() for token in random.Random(0).sample(ids, min(2_000, len(ids)))}
    words = sorted(piece for piece in pieces if piece.isascii() and piece.isalpha())
    whole = [word for word in words if len(tokenizer.encode(f"{words[0]} {word}", add_special_tokens=False).ids) == 2]
    return whole or words or ["a"]


def _entry(
    system: str, manifest: Manifest, rows: int, runs: Sequence[Generation], bandwidth: float | None
) -> CaseEntry:
    steps = runs[0].new_tokens - 1
    read = [sum(run.timings_ms[stage] for stage in READ) for run in runs]
    step = [run.timings_ms["decode"] / steps for run in runs]
    total = [run.timings_ms["total"] for run in runs]
    stages = {stage: [run.timings_ms[stage] for run in runs] for stage in READ}
    times = {
        stage: _times(ms) for stage, ms in {**stages, "first_token": read, "per_token": step, "total": total}.items()
    }
    step_bytes = _step_bytes(manifest, rows, runs[0].prompt_tokens, steps)
    per_token = times["per_token"].p50 / 1e3
    return CaseEntry(
        system=system, prompt_tokens=runs[0].prompt_tokens, new_tokens=runs[0].new_tokens, batch_size=rows, stages_ms=times,
        tokens_per_second=rows / per_token, step_bytes=step_bytes,
        bandwidth_share=None if step_bytes is None or bandwidth is None else step_bytes / per_token / bandwidth,
    )  # fmt: skip


def _times(ms: Sequence[float]) -> Times:
    return Times(**{f"p{q}": float(np.percentile(ms, q)) for q in (50, 90, 99)})


def _step_bytes(manifest: Manifest, rows: int, prompt_tokens: int, steps: int) -> int | None:
    """Bytes that a decoder step reads in the middle of a response: weights once, keys and values of every row."""
    weights, shape = manifest.graphs["decoder"].bytes_read, manifest.shape
    if weights is None:
        return None
    positions = prompt_tokens * shape.context_per_token + steps // 2
    return (
        weights
        + rows
        * positions
        * 2
        * shape.num_hidden_layers
        * shape.num_key_value_heads
        * shape.head_dim
        * manifest.cache.bytes_each
    )
