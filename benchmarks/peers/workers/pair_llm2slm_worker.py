"""A pair of ours as users run it, with `--runtime auto`: the model's encoder reads, the SLM beside it in the work directory
writes. The precision is that of all graphs, and the SLM: `int8-t5-small`."""

import subprocess
import sys

from protocol import Task, Tell, Write, main


def prepare(task: Task) -> None:
    precision, slm = task.precision.split("-", 1)
    subprocess.run(
        [
            sys.executable, "-m", "llm2slm_export", "build", "--llm", str(task.model), "--slm", str(task.model.parent / slm),
            "--precision", precision, "--out", str(task.prepared / "bundle"),
        ],
        check=True,
    )  # fmt: skip


def load(task: Task) -> Write:
    import llm2slm_export

    pair = llm2slm_export.load(task.prepared / "bundle", threads=task.threads, runtime="auto")

    def write(new: int, tell: Tell) -> None:
        for step in pair.stream(task.text, max_new_tokens=new, min_new_tokens=new):
            tell(step.token_id)

    return write


if __name__ == "__main__":
    main(prepare, load, ["llm2slm-export", "onnxruntime", "openvino"])
