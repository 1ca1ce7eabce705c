"""transformers' own models and its `generate`."""

import torch
from generate import writer
from protocol import Task, Write, main
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare(task: Task) -> None:
    """Nothing to convert."""


def load(task: Task) -> Write:
    torch.set_num_threads(task.threads)
    kind = AutoModelForSeq2SeqLM if task.seq2seq else AutoModelForCausalLM
    return writer(kind.from_pretrained(task.model, dtype=DTYPES[task.precision]).eval(), task)


if __name__ == "__main__":
    main(prepare, load, ["transformers", "torch"])
