"""Our encoder, on each of its runtimes: the backend that `load` opens, without tokenizer and cache."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from protocol import Encode, Task, main_encoder

CALIBRATION, LENGTH = 40, 160  # prompts that inputs are measured on, and their characters


def prepare(task: Task) -> None:
    """Build a bundle: the model reads, a tiny T5 writes."""
    _, precision = task.precision.split("-")
    command = [
        sys.executable, "-m", "llm2slm_export", "build", "--llm", str(task.model), "--slm", str(task.model / "reader"),
        "--precision", f"encoder={precision}", "--out", str(task.prepared / "bundle"),
    ]  # fmt: skip
    with TemporaryDirectory() as directory:
        if precision == "w8a8":
            # The weights are random, and so may the text be.
            drawn = np.random.default_rng(1).integers(ord("!"), ord("~") + 1, (CALIBRATION, LENGTH))
            prompts = Path(directory) / "prompts.txt"
            prompts.write_text("".join("".join(map(chr, row)) + "\n" for row in drawn), encoding="utf-8")
            command += ["--calibrate", str(prompts)]
        subprocess.run(command, check=True)


def load(task: Task) -> Encode:
    from llm2slm_export.bundle.bundle import open_bundle
    from llm2slm_export.inference.runtime.backend import hidden_array
    from llm2slm_export.inference.runtime.selection import open_backend

    runtime, _ = task.precision.split("-")
    bundle = open_bundle(task.prepared / "bundle")
    backend = open_backend(bundle, threads=task.threads, graphs=("encoder",), runtime=f"encoder={runtime}")
    return lambda ids: hidden_array(backend, backend.encode(ids, np.ones_like(ids)))


if __name__ == "__main__":
    main_encoder(prepare, load, ["llm2slm-export", "onnxruntime", "openvino"])
