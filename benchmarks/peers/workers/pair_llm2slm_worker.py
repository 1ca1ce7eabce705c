"""A pair of ours as users run it: the model's encoder reads, the SLM beside it in the work directory writes. The precision
says what runs what reads, the precision of all graphs, and the SLM: `openvino-int8-t5-small`."""

import subprocess
import sys

from protocol import Task, Tell, Write, main


def prepare(task: Task) -> None:
    _, precision, slm = task.precision.split("-", 2)
    subprocess.run(
        [
            sys.executable, "-m", "llm2slm_export", "build", "--llm", str(task.model), "--slm", str(task.model.parent / slm),
            "--precision", precision, "--out", str(task.prepared / "bundle"),
        ],
        check=True,
    )  # fmt: skip


def load(task: Task) -> Write:
    import llm2slm_export

    runtime, *_ = task.precision.split("-")
    pair = llm2slm_export.load(task.prepared / "bundle", threads=task.threads, runtime=runtime)

    def write(new: int, tell: Tell) -> None:
        for step in pair.stream(task.text, max_new_tokens=new, min_new_tokens=new):
            tell(step.token_id)

    return write


if __name__ == "__main__":
    main(prepare, load, ["llm2slm-export", "onnxruntime", "openvino"])
