"""Our bundles: the loop that users run, text and all. Of `int4-128-all`, the parts after the precision are the block size
and whether the output layer has four bits too."""

import subprocess
import sys

from protocol import Task, Tell, Write, main


def prepare(task: Task) -> None:
    """Build a bundle: a tiny reader, and the model as the SLM. What reads runs once and is not in the times."""
    bundle = str(task.prepared / "bundle")
    precision, *rounding = task.precision.split("-")
    options = ["--quantize-lm-head" if part == "all" else f"--block-size={part}" for part in rounding]
    built = subprocess.run(
        [
            sys.executable, "-m", "llm2slm_export", "build", "--llm", str(task.model / "reader"), "--slm", str(task.model),
            "--precision", f"decoder={precision}", *options, "--out", bundle,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if built.returncode:
        said = [line.strip() for line in built.stderr.splitlines() if line.strip()]
        # A refusal is fact, evidence and remedy; a bug's traceback ends with what matters.
        raise SystemExit(said[-1] if "Traceback" in built.stderr else " ".join(said[-4:]))


def load(task: Task) -> Write:
    import llm2slm_export

    pair = llm2slm_export.load(task.prepared / "bundle", threads=task.threads)

    def write(new: int, tell: Tell) -> None:
        for step in pair.stream(task.text, max_new_tokens=new, min_new_tokens=new):
            tell(step.token_id)

    return write


if __name__ == "__main__":
    main(prepare, load, ["llm2slm-export", "onnxruntime"])
