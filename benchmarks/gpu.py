"""Pairs, their LLM by itself and transformers, on one GPU: parity with the CPU, time per stage, and what bandwidth allows.

    python benchmarks/gpu.py BUNDLES OUT.json [--device cuda] [--cases REGEX] [--prompt-tokens 64 512] [--new-tokens 128]
                             [--batch-sizes 1 8 32] [--rounds 5] [--budget SECONDS] [--list]

BUNDLES holds bundles, or skeletons of bundles (`benchmarks/skeleton.py`), which are filled beside them first. A name says
what one is: `LLM+SLM.PRECISION` a pair, `LLM.PRECISION` an LLM by itself (the pair of it with itself, fusion cross_attention,
projector identity). Each case is written to OUT.json as soon as it is done and not run again: a run that ends early, by
--budget or otherwise, goes on where it was. Cases are in the order of what they say most about. docs/cuda.md says how to
take it to a machine that has nothing but torch and transformers.

Systems: `pair` and `LLM alone` are bundles on ONNX Runtime, with CUDA graphs and, `launched`, without; `transformers eager`
and `transformers compiled` (static cache, torch.compile, mode reduce-overhead) are the writer by itself, and the LLM by
itself, in the bundle's precision.
"""

import argparse
import importlib.util
import json
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch  # before onnxruntime: its CUDA libraries are the ones that are loaded

from llm2slm_export.authoring.models.aliases import architecture
from llm2slm_export.bundle.bundle import Bundle, open_bundle
from llm2slm_export.bundle.manifest_file import read_manifest
from llm2slm_export.environment.hardware import processor
from llm2slm_export.evaluation.latency import BenchSettings, CaseEntry, bench
from llm2slm_export.files.atomic import cached_file
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.runtime.onnxruntime.cuda_backend import open_ort
from llm2slm_export.inference.runtime.onnxruntime.cuda_sessions import CudaOptions

sys.path.insert(0, str(Path(__file__).parent))
from skeleton import LAYOUT, fill

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
PARITY_PROMPTS = (
    "How are you?",
    "The weather is fine today, and I would like to go out.",
    "No",
    "I have a dog and two cats.",
)
PARITY_TOKENS = 64
COLUMNS = (
    "case", "first token ms", "ms/token", "total ms", "tokens/s", "MB a step", "floor ms", "of the bandwidth",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measurement. `bundle`: a directory's name; `system`: what runs; the others are 0 for parity."""

    bundle: str
    system: str
    prompt: int = 0
    batch: int = 0

    def __str__(self) -> str:
        size = f"/p{self.prompt}/b{self.batch}" if self.batch else ""
        return f"{self.bundle}/{self.system}{size}"


def cases(names: list[str], prompts: list[int], batches: list[int], *, compiled: bool) -> Iterator[Case]:
    """All, the most telling first: parity, then batch 1 of the longest prompt, pairs before LLMs."""
    for name in names:
        if name.endswith(".fp32"):
            yield Case(name, "parity")
    for batch, prompt in product(batches, reversed(prompts)):
        for name in sorted(names, key=lambda name: ("+" not in name, ".fp16" not in name)):
            systems = ["pair"] if "+" in name else ["LLM alone"]
            systems += [
                f"{systems[0]}, launched",
                "transformers eager",
                *(["transformers compiled"] if compiled else []),
            ]
            for system in systems:
                yield Case(name, system, prompt, batch)


class Bench:
    """What is measured with.

    Args:
        directory: of the bundles.
        device: `cuda`, `cuda:n` or `cpu`; the last for trying this program out.
        new: tokens of every response.
    """

    def __init__(self, directory: Path, device: str, new: int, rounds: int) -> None:
        self.directory, self.device, self.new, self.rounds = directory, device, new, rounds
        self.bandwidth = bandwidth(device)
        self._opened: tuple[tuple[str, str], Orchestrator] | None = None
        self._model: tuple[tuple[str, torch.dtype, bool], Any] | None = None

    def run(self, case: Case) -> dict[str, Any]:
        """A case's figures."""
        if case.system == "parity":
            return self._parity(case.bundle)
        if case.system.startswith("transformers"):
            return self._transformers(case)
        return self._bundle(case)

    def let_go(self) -> None:
        """Close what is open: one system's weights are in memory at a time."""
        if self._opened is not None:
            self._opened[1].close()
        self._opened = self._model = None
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def _pair(self, name: str, system: str) -> Orchestrator:
        if self._opened is None or self._opened[0] != (name, system):
            self.let_go()
            bundle, launched = open_bundle(self.directory / name), system.endswith("launched")
            options = CudaOptions(cuda_graphs=not launched) if self.device != "cpu" else None
            backend = open_ort(bundle, device=self.device, threads=None, cuda=options)
            self._opened = (name, system), Orchestrator(bundle, backend)
        return self._opened[1]

    def _bundle(self, case: Case) -> dict[str, Any]:
        pair = self._pair(case.bundle, case.system)
        bundle = Bundle(self.directory / case.bundle, pair.manifest)
        settings = BenchSettings((case.prompt,), self.new, (case.batch,), self.rounds)
        report = bench(bundle, {case.system: pair}, settings, bandwidth=self.bandwidth)
        (entry,) = report.cases
        warnings = pair.generate(["a"], max_new_tokens=2, min_new_tokens=2)[0].warnings
        return {**_figures(entry, self.bandwidth), "device": report.device, "warnings": list(warnings)}

    def _parity(self, name: str) -> dict[str, Any]:
        """Ids on the device against those on the CPU, of the same bundle and prompts."""
        bundle, told = open_bundle(self.directory / name), {}
        limits = {"max_new_tokens": PARITY_TOKENS, "min_new_tokens": PARITY_TOKENS}
        ways: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 4}}
        ids: dict[str, dict[str, list[tuple[int, ...]]]] = {}
        self.let_go()
        for device in ("cpu", self.device):
            with Orchestrator(bundle, open_ort(bundle, device=device, threads=None)) as pair:
                ids[device] = {
                    way: [g.token_ids for g in pair.generate(PARITY_PROMPTS, batch_size=4, **limits, **options)]
                    for way, options in ways.items()
                }
        for way in ways:
            rows = list(zip(ids["cpu"][way], ids[self.device][way], strict=True))
            told[way] = {
                "prompts": len(rows), "the same": sum(one == other for one, other in rows),
                "first difference at": [_first_difference(one, other) for one, other in rows if one != other],
            }  # fmt: skip
        return {"passed": all(way["the same"] == way["prompts"] for way in told.values()), **told}

    def _transformers(self, case: Case) -> dict[str, Any]:
        manifest = read_manifest(self.directory / case.bundle)
        dtype = DTYPES[manifest.graphs["decoder"].precision]
        compiled = case.system.endswith("compiled")
        model = self._loaded(manifest.sources["slm"].model, dtype, compiled=compiled)
        ids = torch.randint(
            5, model.config.get_text_config().vocab_size - 5, (case.batch, case.prompt), device=self.device
        )
        mask = torch.ones_like(ids)
        encoder = model.get_encoder() if model.config.is_encoder_decoder else None

        def read() -> Any:
            return encoder(input_ids=ids, attention_mask=mask) if encoder is not None else None

        def write(count: int) -> None:
            given = {"input_ids": ids} if encoder is None else {"encoder_outputs": states}
            model.generate(
                **given, attention_mask=mask, min_new_tokens=count, max_new_tokens=count, do_sample=False, num_beams=1,
                pad_token_id=0, **({"cache_implementation": "static", "disable_compile": True} if compiled else {}),
            )  # fmt: skip

        with torch.inference_mode():
            states = read()
            encode = self._ms(read)
            few, all_tokens = self._ms(lambda: write(2)), self._ms(lambda: write(self.new))
        per_token = (all_tokens - few) / (self.new - 2)
        return {
            "model": manifest.sources["slm"].model, "dtype": str(dtype), "attention": model.config._attn_implementation,
            "encode_ms": encode, "first_token_ms": encode + few - per_token, "ms_per_token": per_token,
            "total_ms": encode + all_tokens, "tokens_per_second": case.batch / per_token * 1e3,
        }  # fmt: skip

    def _loaded(self, name: str, dtype: torch.dtype, *, compiled: bool) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        key = name, dtype, compiled
        if self._model is None or self._model[0] != key:
            self.let_go()
            fields = None if Path(name).is_dir() else architecture(name)
            config = AutoConfig.from_pretrained(name) if fields is None else AutoConfig.for_model(**fields)
            torch.manual_seed(0)
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            with torch.device(self.device):
                model = kind.from_config(config, dtype=dtype).eval()
            if compiled:
                model.forward = torch.compile(model.forward, mode="reduce-overhead")
            self._model = key, model
        return self._model[1]

    def _ms(self, work: Callable[[], object]) -> float:
        """The median of as many rounds as asked for, after two that compile, allocate and cache."""
        times = []
        for number in range(self.rounds + 2):
            _wait(self.device)
            started = time.perf_counter()
            work()
            _wait(self.device)
            if number >= 2:
                times.append((time.perf_counter() - started) * 1e3)
        return median(times)


def _figures(entry: CaseEntry, bandwidth: float) -> dict[str, Any]:
    floor = None if entry.step_bytes is None else entry.step_bytes / bandwidth * 1e3
    return {
        "stages_ms": {stage: times.model_dump() for stage, times in entry.stages_ms.items()},
        "first_token_ms": entry.read_ms, "ms_per_token": entry.ms_per_token, "total_ms": entry.stages_ms["total"].p50,
        "tokens_per_second": entry.tokens_per_second, "step_bytes": entry.step_bytes, "floor_ms": floor,
        "bandwidth_share": entry.bandwidth_share, "prompt_tokens": entry.prompt_tokens,
    }  # fmt: skip


def _first_difference(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def bandwidth(device: str) -> float:
    """bytes/s of the device's memory: the best of ten copies of half a GiB, read and written."""
    size = 1 << 29 if device != "cpu" else 1 << 26
    source = torch.ones(size // 4, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(10):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = max(best, 2 * size / (time.perf_counter() - started))
    return best


def hardware(device: str) -> dict[str, Any]:
    """What it ran on, and with which versions."""
    import onnxruntime

    told: dict[str, Any] = {
        "processor": processor(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "llm2slm-export"):
        try:
            told[package] = version(package)
        except PackageNotFoundError:  # taken along as a directory
            told[package] = "not installed"
    told["onnxruntime"] = onnxruntime.__version__
    if device != "cpu":
        facts = torch.cuda.get_device_properties(device)
        told |= {
            "gpu": facts.name, "compute capability": f"{facts.major}.{facts.minor}", "memory": facts.total_memory,
            "cuda": torch.version.cuda, "onnxruntime cuda": getattr(onnxruntime, "cuda_version", None),
        }  # fmt: skip
    return told


def prepared(directory: Path) -> list[str]:
    """The bundles' names, once every skeleton has been filled: `NAME` from `NAME.skeleton`."""
    for skeleton in sorted(directory.glob("*.skeleton")):
        target = skeleton.with_suffix("")
        if (skeleton / LAYOUT).is_file() and not target.exists():
            started, partial = time.monotonic(), target.with_name(f".{target.name}")
            fill(skeleton, partial)
            partial.rename(target)
            print(f"{target.name}: filled in {time.monotonic() - started:.0f} s", flush=True)
    return sorted(path.parent.name for path in directory.glob("*/manifest.json") if path.parent.suffix != ".skeleton")


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = []
    for name, found in report["cases"].items():
        if "ms_per_token" not in found:
            continue
        read = found.get("step_bytes")
        rows.append((
            name, f"{found['first_token_ms']:.2f}", f"{found['ms_per_token']:.3f}", f"{found['total_ms']:.1f}",
            f"{found['tokens_per_second']:.0f}", "-" if read is None else f"{read / 1e6:.1f}",
            "-" if read is None else f"{found['floor_ms']:.3f}", "-" if read is None else f"{found['bandwidth_share']:.0%}",
        ))  # fmt: skip
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    about = ", ".join(f"{key} {value}" for key, value in report["hardware"].items())
    said = [
        f"{about}; {report['bandwidth'] / 1e9:.0f} GB/s, {report['new_tokens']} new tokens, medians.",
        "",
        *lines,
        "",
    ]
    for name, found in report["cases"].items():
        if "passed" in found:
            said.append(f"{name}: {'the same ids' if found['passed'] else 'DIFFERENT IDS'}, {json.dumps(found)}")
        if "problem" in found:
            said.append(f"{name}: not measured: {found['problem']}")
        said += [f"{name}: {warning}" for warning in found.get("warnings", [])]
    return "\n".join([*said, *_compared(report["cases"])])


def _compared(found: dict[str, Any]) -> Iterator[str]:
    """What the acceptance asks for: per token against transformers, end to end against the LLM alone."""
    measured = {name: case for name, case in found.items() if "ms_per_token" in case}
    for name, case in measured.items():
        bundle, system, prompt, batch = name.split("/")
        if system != "pair":
            continue
        for other in ("transformers eager", "transformers compiled"):
            if (theirs := measured.get(f"{bundle}/{other}/{prompt}/{batch}")) is not None:
                yield f"{name}: {theirs['ms_per_token'] / case['ms_per_token']:.2f} times the speed of {other}, per token"
        llm, _, rest = bundle.partition("+")
        alone = measured.get(f"{llm}.{rest.rpartition('.')[2]}/LLM alone/{prompt}/{batch}")
        if alone is not None:
            yield f"{name}: {alone['total_ms'] / case['total_ms']:.2f} times the speed of {llm} alone, end to end"


def _write(path: Path, text: str) -> None:
    with cached_file(path, durable=True) as partial:
        partial.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", default="", help="only those whose name this regular expression finds something in")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, help="seconds after which no case is begun")
    parser.add_argument("--list", action="store_true", help="name the cases and run none")
    given = parser.parse_args()
    compiled = given.device != "cpu" or importlib.util.find_spec("torch._inductor") is not None
    names = prepared(given.bundles)
    wanted = [
        case
        for case in cases(names, given.prompt_tokens, given.batch_sizes, compiled=compiled)
        if re.search(given.cases, str(case))
    ]
    if given.list:
        print("\n".join(map(str, wanted)))
        return
    started = time.monotonic()
    report: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"cases": {}}
    what = Bench(given.bundles, given.device, given.new_tokens, given.rounds)
    report |= {
        "format": "llm2slm-gpu", "hardware": hardware(given.device), "bandwidth": what.bandwidth, "device": given.device,
        "new_tokens": given.new_tokens, "rounds": given.rounds,
    }  # fmt: skip
    for case in wanted:
        if str(case) in report["cases"]:
            continue
        if given.budget is not None and time.monotonic() - started > given.budget:
            print(f"{given.budget:.0f} s are over: {case} and those after it were not run", flush=True)
            break
        began = time.monotonic()
        try:
            found = what.run(case)
        except Exception as error:  # noqa: BLE001 - what one system cannot do is told, and the others go on
            traceback.print_exc()
            found = {"problem": f"{type(error).__name__}: {error}"}
            what.let_go()
        report["cases"][str(case)] = found | {"took_s": round(time.monotonic() - began, 1)}
        _write(given.out, json.dumps(report, indent=1) + "\n")
        print(f"{case}: {found.get('ms_per_token', found.get('passed', found.get('problem')))}", flush=True)
    what.let_go()
    text = table(report)
    _write(given.out.with_suffix(".md"), text + "\n")
    print(text)


if __name__ == "__main__":
    main()
