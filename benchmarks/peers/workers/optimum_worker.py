"""optimum-onnx: its export, its model classes, transformers' `generate`."""

import onnxruntime
from generate import writer
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM
from protocol import Task, Write, main


def prepare(task: Task) -> None:
    """Export with past keys and values, fp32."""
    kind = ORTModelForSeq2SeqLM if task.seq2seq else ORTModelForCausalLM
    kind.from_pretrained(task.model, export=True).save_pretrained(task.prepared)


def load(task: Task) -> Write:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    kind = ORTModelForSeq2SeqLM if task.seq2seq else ORTModelForCausalLM
    return writer(kind.from_pretrained(task.prepared, session_options=options), task)


if __name__ == "__main__":
    main(prepare, load, ["optimum-onnx", "onnxruntime", "transformers", "torch"])
