"""What a response costs as the work grows: the prompt, the response, the batch and the threads, one at a time.

Each point is a process of its own, so that its memory is its own: it loads the bundle, answers once uncounted, and then
`--rounds` times. Times are medians; memory is the most that was resident (VmHWM, Linux).

Usage: python benchmarks/growth.py NAME=BUNDLE … [--prompt 64 256 512] [--new 128 512 1000 2000] [--batch 1 2 4 8 16 32]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.bundle.manifest_file import read_manifest
from llm2slm_export.environment.hardware import probe, processor

WINDOW = 64  # tokens at the end of a response, whose mean is the time per token there
AXES = {"prompt": [64, 256, 512], "new": [128, 512, 1000, 2000], "batch": [1, 2, 4, 8, 16, 32], "threads": [1, 2]}
BASE = {"prompt": 64, "new": 128, "batch": 1, "threads": 2}


def main() -> None:
    if sys.argv[1:2] == ["--point"]:
        print(json.dumps(_point(**json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE")
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", type=int, nargs="*", default=values)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    bundles = dict(text.partition("=")[::2] for text in given.bundles)
    points = []
    for name, directory in bundles.items():
        for axis in AXES:
            for value in getattr(given, axis):
                point = {**BASE, axis: value}
                print(f"{name}: {axis} {value} …", file=sys.stderr, flush=True)
                points.append({"bundle": name, "axis": axis, **point, **_measured(directory, point, given.rounds)})
    bandwidth = probe().bandwidth
    print(_markdown(points, bundles, bandwidth, given.rounds))
    if given.json:
        report = {
            "date": datetime.now(UTC).date().isoformat(), "processor": processor(), "cpus": os.cpu_count(),
            "rounds": given.rounds, "bandwidth": bandwidth, "points": points,
        }  # fmt: skip
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _measured(directory: str, point: dict[str, int], rounds: int) -> dict[str, Any]:
    """A point's figures, or the reason why there are none."""
    told = json.dumps({"directory": directory, "rounds": rounds, **point})
    done = subprocess.run([sys.executable, __file__, "--point", told], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"refused": (done.stderr.strip().splitlines() or ["it said nothing"])[-1]}
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _point(directory: str, rounds: int, prompt: int, new: int, batch: int, threads: int) -> dict[str, float]:
    """`first`: ms until the first token is known; `step`, `late`: ms of a step, in all and at the end; `mib`."""
    import llm2slm_export
    from llm2slm_export.errors import Llm2SlmError
    from llm2slm_export.evaluation.latency import random_prompts

    bundle = open_bundle(Path(directory))
    texts = random_prompts(bundle, prompt, batch, seed=0)
    length: dict[str, Any] = {"min_new_tokens": new, "max_new_tokens": new}
    try:
        pair = llm2slm_export.load(directory, threads=threads)
        runs = [_times(pair, texts, length) for _ in range(rounds + 1)][1:]  # the first allocates
    except Llm2SlmError as error:
        raise SystemExit(str(error).replace("\n", " ")) from error
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {**{name: median(run[name] for run in runs) for name in ("first", "step", "late")}, "mib": peak / 1024}


def _times(pair: Any, texts: list[str], length: dict[str, Any]) -> dict[str, float]:
    if len(texts) > 1:
        one, *_ = pair.generate(texts, batch_size=len(texts), do_sample=False, num_beams=1, **length)
        step = one.timings_ms["decode"] / (one.new_tokens - 1)
        first = sum(one.timings_ms[stage] for stage in ("tokenize", "encode", "project", "prefill"))
        return {"first": first, "step": step, "late": step}
    started = time.perf_counter()
    at = [1e3 * (time.perf_counter() - started) for _ in pair.stream(texts[0], do_sample=False, **length)]
    window = min(WINDOW, len(at) - 1)
    return {
        "first": at[0],
        "step": (at[-1] - at[0]) / (len(at) - 1),
        "late": (at[-1] - at[-1 - window]) / window,
    }


def _markdown(points: list[dict[str, Any]], bundles: dict[str, str], bandwidth: float, rounds: int) -> str:
    base = ", ".join(f"{axis} {value}" for axis, value in BASE.items())
    lines = [
        f"{processor()}, {datetime.now(UTC).date()}, median of {rounds}, greedy; memory {bandwidth / 1e9:.0f} GB/s. "
        f"What is not said: {base}.",
        "",
        f"| | | first token, ms | a step, ms | the last {WINDOW}, ms | tokens/s | MiB | KV cache, MiB |",
        "|---" * 8 + "|",
    ]
    for point in points:
        label = f"| {point['bundle']} | {point['axis']} {point[point['axis']]} |"
        if "refused" in point:
            lines.append(f"{label} {point['refused']} | | | | | |")
            continue
        shape = read_manifest(Path(bundles[point["bundle"]])).shape
        positions = point["new"] + point["prompt"] * shape.context_per_token  # its own, and those it is conditioned on
        cache = (
            point["batch"]
            * positions
            * 2
            * shape.num_hidden_layers
            * shape.num_key_value_heads
            * shape.head_dim
            * 4
            / 2**20
        )
        rate = point["batch"] / point["step"] * 1e3
        lines.append(
            f"{label} {point['first']:.1f} | {point['step']:.2f} | {point['late']:.2f} | {rate:.0f} | {point['mib']:.0f} | {cache:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
