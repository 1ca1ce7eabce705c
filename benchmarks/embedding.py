"""The decoder's time per token in the C++ library, against Python's on the same bundle and the same ONNX Runtime.

Both have the bundle open and answer in turns; ms of all decoder calls over all tokens, each round's ratio, medians.

Usage: python benchmarks/embedding.py DRIVER BUNDLE PROMPTS.txt [--threads 1] [--rounds 5] [--json FILE]

DRIVER: tests/llm2slm_driver of a build of cpp/ with -DLLM2SLM_BUILD_TESTS=ON.
"""

import argparse
import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime

import llm2slm_export
from llm2slm_export.environment.hardware import processor

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy, one prompt at a time": (1, {}),
    "greedy, batches of 16": (16, {}),
    "4 beams, one prompt at a time": (1, {"num_beams": 4}),
    "4 beams, batches of 16": (16, {"num_beams": 4}),
}


class Driver:
    """The library's process."""

    def __init__(self, path: Path, bundle: Path, threads: int) -> None:
        library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
        environment = os.environ | {"LLM2SLM_ORT_LIBRARY": str(library)}
        self._process = subprocess.Popen(
            [path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._ask(do="open", bundle=str(bundle), threads=threads)

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise SystemExit(answer["error"])
        return answer["result"]

    def decode(self, prompts: list[str], batch: int, options: dict[str, Any]) -> tuple[float, int]:
        """ms of decoder calls, and tokens."""
        answers = self._ask(do="generate", prompts=prompts, batch_size=batch, options=options)
        return _sum([(a["batch"], a["timings_ms"]["decode"], len(a["token_ids"])) for a in answers])


def _sum(answers: list[tuple[int, float, int]]) -> tuple[float, int]:
    """A batch's time is that of each of its answers: it counts once."""
    return sum({batch: ms for batch, ms, _ in answers}.values()), sum(tokens for *_, tokens in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("driver", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompts", type=Path, help="one a line")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    prompts = given.prompts.read_text(encoding="utf-8").splitlines()
    driver = Driver(given.driver, given.bundle, given.threads)
    figures = {}
    with llm2slm_export.load(given.bundle, threads=given.threads) as pair:
        for name, (batch, options) in CASES.items():
            rounds = []
            for _ in range(given.rounds + 1):
                cpp, tokens = driver.decode(prompts, batch, options)
                answers = pair.generate(prompts, batch_size=batch, **options)
                python, same = _sum([(a.batch, a.timings_ms["decode"], len(a.token_ids)) for a in answers])
                if same != tokens:
                    raise SystemExit(f"{name}: {tokens} tokens in C++, {same} in Python")
                rounds.append((cpp / tokens, python / tokens))
            figures[name] = rounds[1:]  # the first allocates
    print(
        f"{processor()}, {given.threads} threads, {len(prompts)} prompts, onnxruntime {onnxruntime.__version__}, median of "
        f"{given.rounds}, {datetime.now(UTC).date()}\n\n| ms per token | C++ | Python | C++ / Python |\n|---|---|---|---|"
    )
    for name, rounds in figures.items():
        cpp, python, ratio = (median(values) for values in zip(*((c, p, c / p) for c, p in rounds), strict=True))
        print(f"| {name} | {cpp:.3f} | {python:.3f} | {ratio:.2f} |")
    if given.json:
        given.json.write_text(
            json.dumps({"bundle": str(given.bundle), "ms": figures}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
