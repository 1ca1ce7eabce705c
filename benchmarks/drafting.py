"""What drafting costs and gains: a bundle's LLM head with the pair as its drafter, beside both of them alone.

Takes a bundle with an LLM head (`build --llm-head`). One prompt at a time, greedy. In every round each variant answers all
prompts, in turns, whose order changes; each turn is a process, which answers a few prompts uncounted. What calls cost is kept
from one turn to the next, in a directory of this run; acceptance is not. ms per token are all calls of both decoders (the
prompt passes too, without encoder and projectors) over the new tokens, and the whole response's time over them. Speed-ups are
the median of the rounds' ratios to the LLM head alone. Acceptance is the share of the verified drafts that were accepted. Then
the cost of one call by its number of tokens: of each decoder after its own calls, and of the LLM head's behind the pair's calls
that would draft them.

Quality has 95 % bootstrap intervals, and p values against the LLM head alone. It needs the `eval` extra, and rows with
references; a .txt file has none.

Usage: python benchmarks/drafting.py BUNDLE [--data FILE] [--prompts 200] [--rounds 5] [--json FILE] [--plot FILE.svg|.png]
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import llm2slm_export
from llm2slm_export.bundle.bundle import Bundle, open_bundle
from llm2slm_export.environment.hardware import probe, processor
from llm2slm_export.evaluation.examples import Example, read_examples
from llm2slm_export.evaluation.metrics import MetricName, SystemResponses, parse_metrics, score
from llm2slm_export.files.data_files import spelled_field
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.runtime.backend import Backend, DecoderState
from llm2slm_export.inference.runtime.selection import open_backend

HELD_OUT = Path(__file__).parent.parent / "tests/data/held_out.tsv"
DRAFTS = (1, 2, 3, 4, 6, 8)
DEFER = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)
TOKENS = (1, 2, 4, 8, 16)  # of one call
PAST = 8  # tokens before the call
TURNS, CALLS, WARM_UP = 5, 40, 5  # of each kind of call: turns, calls per turn, uncounted calls at its start
PAUSE = 0.1  # seconds, until the threads of the calls before have stopped
UNCOUNTED = 8  # prompts at the start of a variant's turn
LLM, PAIR = "LLM head alone", "pair alone"


@dataclass(frozen=True)
class Variant:
    """A way to answer.

    Args:
        name: its name in the tables.
        head: the head that answers; None: the first.
        options: of `generate`.
        defer: the limit, if it defers.
    """

    name: str
    head: str | None
    options: Mapping[str, Any]
    defer: float | None = None


@dataclass(frozen=True)
class Turn:
    """A variant's answers in one round.

    Args:
        answers: one per prompt.
        decoding_ms, whole_ms: of all answers: without tokenizer, encoder and projectors, and with them.
    """

    answers: list[Generation]
    decoding_ms: float
    whole_ms: float

    @property
    def tokens(self) -> int:
        """The number of new tokens."""
        return sum(answer.new_tokens for answer in self.answers)


def variants(verifier: str, drafts: Sequence[int], defer: Sequence[float]) -> list[Variant]:
    """Everything that is compared."""
    return [
        Variant(LLM, verifier, {}),
        Variant(PAIR, None, {}),
        Variant("pair, n-gram drafts", None, {"drafter": "ngram"}),
        Variant("LLM head, n-gram drafts", verifier, {"drafter": "ngram"}),
        *(
            Variant(f"drafts of the pair, {count}", None, {"verifier": verifier, "num_draft_tokens": count})
            for count in drafts
        ),
        Variant("drafts of the pair, adapted", None, {"verifier": verifier}),
        *(
            Variant(
                f"n-gram drafts, then {count} of the pair",
                None,
                {"drafter": "ngram", "verifier": verifier, "num_draft_tokens": count},
            )
            for count in drafts
        ),
        Variant("n-gram drafts, then the pair's, adapted", None, {"drafter": "ngram", "verifier": verifier}),
        *(Variant(f"defer {limit:g}", None, {"verifier": verifier, "defer": limit}, limit) for limit in defer),
    ]


def answered(bundle: Path, variant: Variant, prompts: Sequence[str], threads: int, length: Mapping[str, int]) -> Turn:
    """A variant's turn."""
    options = {"do_sample": False, "num_beams": 1, **length, **variant.options}
    answers, decoding, whole = [], 0.0, 0.0
    with llm2slm_export.load(bundle, threads=threads) as loaded:
        pair = loaded.head(variant.head) if variant.head is not None else loaded
        for number, prompt in enumerate([*prompts[:UNCOUNTED], *prompts]):
            started = time.perf_counter()
            (answer,) = pair.generate([prompt], truncate=True, **options)
            taken = (time.perf_counter() - started) * 1e3
            if number >= min(UNCOUNTED, len(prompts)):
                answers.append(answer)
                whole += taken
                decoding += taken - sum(answer.timings_ms[stage] for stage in ("tokenize", "encode", "project"))
    return Turn(answers, decoding, whole)


def figures(turns: Mapping[str, Sequence[Turn]]) -> dict[str, dict[str, Any]]:
    """The figures of every variant, from its turns."""
    alone, found = turns[LLM], {}
    wanted = [answer.token_ids for answer in alone[0].answers]
    for name, own in turns.items():
        answers = own[0].answers
        drafted = [answer.drafted_tokens for answer in answers if answer.drafted_tokens is not None]
        accepted = [answer.accepted_tokens for answer in answers if answer.accepted_tokens is not None]
        found[name] = {
            "decoding_ms_per_token": median(turn.decoding_ms / turn.tokens for turn in own),
            "whole_ms_per_token": median(turn.whole_ms / turn.tokens for turn in own),
            "decoding_speed_up": median(_ratios([(t.decoding_ms, t.tokens) for t in alone], [(t.decoding_ms, t.tokens) for t in own])),
            "whole_speed_up": median(_ratios([(t.whole_ms, t.tokens) for t in alone], [(t.whole_ms, t.tokens) for t in own])),
            "acceptance": sum(accepted) / sum(drafted) if sum(drafted) else None,
            "accepted_per_token": sum(accepted) / own[0].tokens if drafted else None,
            "new_tokens": own[0].tokens,
            "identical": _share([answer.token_ids == ids for answer, ids in zip(answers, wanted, strict=True)]),
            "same_every_round": _share([
                len({turn.answers[index].token_ids for turn in own}) == 1 for index in range(len(answers))
            ]),
            "rounds": [
                {"decoding_ms_per_token": turn.decoding_ms / turn.tokens, "whole_ms_per_token": turn.whole_ms / turn.tokens}
                for turn in own
            ],
        }  # fmt: skip
    return found


def _ratios(alone: Sequence[tuple[float, int]], own: Sequence[tuple[float, int]]) -> list[float]:
    """In each round, how many times as fast a token was."""
    return [(a_ms / a_tokens) / (ms / tokens) for (a_ms, a_tokens), (ms, tokens) in zip(alone, own, strict=True)]


def _share(true: Sequence[bool]) -> float:
    return sum(true) / len(true)


class Caller:
    """One row of a head, for calls after `PAST` tokens.

    Args:
        backend: the head's.
        pair: the head, for one prompt's conditioning.
    """

    def __init__(self, backend: Backend, pair: Orchestrator, prompt: str) -> None:
        self._backend = backend
        self._state: DecoderState
        self._state, _ = backend.prefill(pair.encode([prompt], truncate=True).conditioning)
        backend.step(self._state, np.ones((1, PAST), np.int64))
        self._lengths = backend.lengths(self._state)

    def call(self, tokens: int) -> float:
        """ms of a call of this many tokens, which are forgotten again."""
        started = time.perf_counter()
        self._backend.step(self._state, np.ones((1, tokens), np.int64))
        taken = (time.perf_counter() - started) * 1e3
        self._backend.rewind(self._state, self._lengths)
        return taken


def call_costs(bundle: Bundle, verifier: str, prompt: str, threads: int) -> dict[str, dict[int, float]]:
    """ms of one call by its number of tokens."""
    backend = open_backend(bundle, threads=threads)
    other = backend.head(bundle.select(verifier))
    pair = Caller(backend, Orchestrator(bundle, backend), prompt)
    llm = Caller(other, Orchestrator(bundle, other, head=verifier), prompt)

    def own(caller: Caller, tokens: int) -> Iterator[float]:
        while True:
            yield caller.call(tokens)

    def behind_drafts(tokens: int) -> Iterator[float]:
        while True:
            for _ in range(tokens - 1):
                pair.call(1)
            yield llm.call(tokens)

    def drafts(tokens: int) -> Iterator[float]:
        while True:
            llm.call(tokens)
            yield sum(pair.call(1) for _ in range(tokens - 1))

    kinds = {
        "pair": lambda tokens: own(pair, tokens),
        "LLM head": lambda tokens: own(llm, tokens),
        "LLM head, behind the drafts": behind_drafts,
        "the drafts": drafts,
    }
    times: dict[str, dict[int, list[float]]] = {kind: {tokens: [] for tokens in TOKENS} for kind in kinds}
    for _ in range(TURNS):
        for kind, calls in kinds.items():
            for tokens in TOKENS:
                time.sleep(PAUSE)
                taken = calls(tokens)
                times[kind][tokens] += [next(taken) for _ in range(WARM_UP + CALLS)][WARM_UP:]
    other.close()
    backend.close()
    return {kind: {tokens: median(taken) for tokens, taken in by.items()} for kind, by in times.items()}


def quality(
    turns: Mapping[str, Sequence[Turn]], examples: Sequence[Example], wanted: Sequence[MetricName]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Scores of each variant's answers in the first round."""
    answers = {name: SystemResponses(tuple(a.text for a in own[0].answers)) for name, own in turns.items()}
    scored = score(answers, [example.references for example in examples], wanted, seed=0)
    return {
        name: {metric: {"value": s.value, "low": s.low, "high": s.high, "p": s.p} for metric, s in by.items()}
        for name, by in scored.items()
    }


def plot(report: Mapping[str, Any], to: Path) -> None:
    """Draw the first metric against the time of a token, from the pair alone to the LLM head alone."""
    import matplotlib
    from matplotlib.figure import Figure

    systems = report["variants"]
    metric = next(iter(systems[LLM]["quality"]))
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    curve = [system for system in systems.values() if system["defer"] is not None]
    axes.plot(*zip(*(_point(system, metric) for system in curve), strict=True), color="#0072B2", linewidth=1)
    groups = {
        "deferral": (curve, "#0072B2", "o"),
        PAIR: ([systems[PAIR]], "#009E73", "^"),
        "drafts of the pair, adapted": ([systems["drafts of the pair, adapted"]], "#CC79A7", "D"),
        LLM: ([systems[LLM]], "#D55E00", "s"),
    }
    for label, (group, color, marker) in groups.items():
        times, values = zip(*(_point(system, metric) for system in group), strict=True)
        bars = [
            [max(0.0, system["quality"][metric]["value"] - system["quality"][metric]["low"]) for system in group],
            [max(0.0, system["quality"][metric]["high"] - system["quality"][metric]["value"]) for system in group],
        ]
        axes.errorbar(times, values, yerr=bars, fmt=marker, color=color, elinewidth=0.7, capsize=3, label=label)
    for system in curve:
        axes.annotate(
            f"{system['defer']:g}", _point(system, metric), xytext=(5, 5), textcoords="offset points", fontsize=8
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("ms per token, whole response (median, one prompt at a time)")
    axes.set_ylabel(f"{metric} (higher is better; bars: 95 % interval)")
    axes.set_title("Quality against time, by the limit of deferral", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "drafting"}):
        figure.savefig(to, dpi=150, metadata={"Date": None} if to.suffix == ".svg" else None)


def _point(system: Mapping[str, Any], metric: str) -> tuple[float, float]:
    return system["whole_ms_per_token"], system["quality"][metric]["value"]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    precisions = ", ".join(f"{head}: {by}" for head, by in report["precisions"].items())
    metrics = list(report["variants"][LLM].get("quality", {}))
    lines = [
        f"{report['processor']}, {report['cpus']} CPUs, {report['date']}, onnxruntime {report['onnxruntime']}, llm2slm-export "
        f"{report['llm2slm_export']}, {report['threads']} thread(s), memory {report['bandwidth'] / 1e9:.0f} GB/s; load at the "
        f"start {report['load_at_start']:.1f}. {report['prompts']} prompts, median of {report['rounds']} rounds, greedy. "
        f"{precisions}.",
        "",
        "| | decoding, ms/token | speed-up | whole, ms/token | speed-up | acceptance | identical to the LLM's |"
        + "".join(f" {metric} |" for metric in metrics),
        "|---" * (7 + len(metrics)) + "|",
    ]
    for name, one in report["variants"].items():
        acceptance = "" if one["acceptance"] is None else f"{one['acceptance']:.1%}"
        cells = [
            f"{one['decoding_ms_per_token']:.3f}", f"{one['decoding_speed_up']:.2f}", f"{one['whole_ms_per_token']:.3f}",
            f"{one['whole_speed_up']:.2f}", acceptance, f"{one['identical']:.1%}", *(_cell(one["quality"][m]) for m in metrics),
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "", f"ms of one call after {PAST} tokens, by its number of tokens:", "",
        "| | " + " | ".join(map(str, TOKENS)) + " |", "|---" * (1 + len(TOKENS)) + "|",
    ]  # fmt: skip
    for kind, by in report["call_ms"].items():
        lines.append(f"| {kind} | " + " | ".join(f"{by[tokens]:.3f}" if by[tokens] else "" for tokens in TOKENS) + " |")
    return "\n".join(lines)


def _cell(found: Mapping[str, float | None]) -> str:
    p = "" if found["p"] is None else f", p {found['p']:.3f}"
    return f"{found['value']:.2f} ({found['low']:.2f} – {found['high']:.2f}{p})"


def _examples(data: Path, prompt_field: str, response_field: str, count: int) -> tuple[list[str], list[Example]]:
    """The prompts, and the examples; no examples if the file has no references."""
    if data.suffix == ".txt":
        return [line for line in data.read_text(encoding="utf-8").splitlines() if line][:count], []
    fields = spelled_field(prompt_field, data), spelled_field(response_field, data)
    examples = read_examples(data, *fields, None, count)
    return [example.prompt for example in examples], examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--verifier", default="llm", help="the LLM head's name")
    parser.add_argument("--data", type=Path, default=HELD_OUT, help="prompts: .jsonl, .tsv, .csv, or .txt")
    parser.add_argument("--prompt-field", default="0")
    parser.add_argument("--response-field", default="1")
    parser.add_argument("--metrics", type=parse_metrics, default=("bleu", "chrf"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, help="default: the bundle's")
    parser.add_argument("--drafts", type=int, nargs="*", default=DRAFTS)
    parser.add_argument("--defer", type=float, nargs="*", default=DEFER)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, help="draw the deferral curve there (.svg, .png)")
    given = parser.parse_args()
    prompts, examples = _examples(given.data, given.prompt_field, given.response_field, given.prompts)
    bundle, load_at_start = open_bundle(given.bundle), os.getloadavg()[0]
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="drafting-")
    length = {} if given.max_new_tokens is None else {"max_new_tokens": given.max_new_tokens}
    compared = variants(given.verifier, given.drafts, given.defer)
    turns: dict[str, list[Turn]] = {variant.name: [] for variant in compared}
    for number in range(given.rounds):
        first = number * len(compared) // given.rounds
        for variant in (*compared[first:], *compared[:first]):
            print(f"round {number + 1} of {given.rounds}: {variant.name} …", file=sys.stderr, flush=True)
            # A process of its own: in one process, a bundle that is opened later gets slower memory.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                turn = process.submit(answered, given.bundle, variant, prompts, given.threads, length).result()
            turns[variant.name].append(turn)
    found = figures(turns)
    scores = quality(turns, examples, given.metrics) if examples and given.metrics else {}
    for variant in compared:
        found[variant.name] |= {"defer": variant.defer, "quality": scores.get(variant.name, {})}
    heads = {bundle.manifest.head: bundle.manifest, given.verifier: bundle.select(given.verifier).manifest}
    report = {
        "date": datetime.now(UTC).date().isoformat(), "processor": processor(), "cpus": os.cpu_count(),
        "python": platform.python_version(), "onnxruntime": version("onnxruntime"),
        "llm2slm_export": version("llm2slm-export"), "bandwidth": probe().bandwidth, "load_at_start": load_at_start,
        "threads": given.threads, "rounds": given.rounds, "prompts": len(prompts), "data": given.data.name,
        "bundle": given.bundle.name,
        "precisions": {name: _precisions(manifest) for name, manifest in heads.items()},
        "variants": found,
        "call_ms": call_costs(bundle, given.verifier, prompts[0], given.threads),
    }  # fmt: skip
    print(markdown(report))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if given.plot and scores:
        plot(report, given.plot)


def _precisions(manifest: Any) -> str:
    """The precisions of a head's graphs, shortened if they are the same."""
    by_graph = {name: graph.precision for name, graph in manifest.graphs.items()}
    same = set(by_graph.values())
    return same.pop() if len(same) == 1 else ", ".join(f"{name} {precision}" for name, precision in by_graph.items())


if __name__ == "__main__":
    main()
