"""Speed of systems on one prompt at a time. Systems alternate, so that other load affects all of them."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from llm2slm_export.evaluation.report import SpeedEntry
from llm2slm_export.inference.orchestrator import Orchestrator

STAGES = ("tokenize", "encode", "project", "prefill")


def measure_speed(
    systems: Mapping[str, Orchestrator],
    prompts: Sequence[str],
    *,
    new_tokens: int,
    max_new_tokens: int,
    num_beams: int,
    rounds: int,
    truncate: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, SpeedEntry]:
    """Time every system: stages and ms per token at a forced response length, end to end at the responses' own lengths.

    Args:
        systems: by name.
        prompts: each is timed in every round.
        new_tokens: the forced length.
        max_new_tokens: maximum length of other responses.
        num_beams: 1 for greedy search.
        rounds: number of timed rounds; medians are over rounds and prompts.
        truncate: truncate prompts that are too long instead of refusing them.
        advance: called with 1 after each prompt of each system.
    """
    options: dict[str, Any] = {
        "do_sample": False,
        "num_beams": num_beams,
        "num_return_sequences": 1,
        "truncate": truncate,
    }
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    steps: dict[str, list[float]] = {name: [] for name in systems}
    totals: dict[str, list[list[float]]] = {name: [[] for _ in prompts] for name in systems}
    lengths = {name: [0] * len(prompts) for name in systems}
    for number in range(rounds + 1):
        warm = number == 0  # the first round allocates and fills caches; it is not timed
        for index, prompt in enumerate(prompts):
            for name, pair in systems.items():
                (forced,) = pair.generate([prompt], min_new_tokens=new_tokens, max_new_tokens=new_tokens, **options)
                (free,) = pair.generate([prompt], max_new_tokens=max_new_tokens, **options)
                advance(1)
                if warm:
                    continue
                stages[name].append({stage: forced.timings_ms[stage] for stage in STAGES})
                steps[name].append(forced.timings_ms["decode"] / (forced.new_tokens - 1))
                totals[name][index].append(free.timings_ms["total"])
                lengths[name][index] = free.new_tokens
    return {name: _entry(stages[name], steps[name], totals[name], lengths[name]) for name in systems}


def _entry(
    stages: Sequence[Mapping[str, float]],
    steps: Sequence[float],
    totals: Sequence[Sequence[float]],
    lengths: Sequence[int],
) -> SpeedEntry:
    typical = [median(times) for times in totals]
    return SpeedEntry(
        stages_ms={stage: median(row[stage] for row in stages) for stage in STAGES},
        read_ms=median(sum(row.values()) for row in stages),
        ms_per_token=median(steps),
        total_ms={f"p{q}": float(np.percentile([t for times in totals for t in times], q)) for q in (50, 90, 99)},
        new_tokens=median(lengths),
        points=tuple(zip(lengths, typical, strict=True)),
    )
