"""CTranslate2: its converter, its loop in C++, told token by token through its callback."""

import json
from typing import Any

import ctranslate2
from protocol import Task, Tell, Write, main

COMPUTE = {"fp32": "float32", "int8": "int8"}


def prepare(task: Task) -> None:
    """Convert; the precision is chosen at load."""
    converter = ctranslate2.converters.TransformersConverter(str(task.model))
    converter.convert(str(task.prepared), quantization=COMPUTE[task.precision], force=True)
    # A token that the tokenizer lacks is null there, which is then refused at load; none of them is written.
    path = task.prepared / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    missing = {name: config["eos_token"] for name, value in config.items() if name.endswith("_token") and value is None}
    path.write_text(json.dumps(config | missing), encoding="utf-8")


def load(task: Task) -> Write:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(task.model).convert_ids_to_tokens(task.ids)
    settings: dict[str, Any] = {
        "compute_type": COMPUTE[task.precision], "intra_threads": task.threads, "inter_threads": 1,
    }  # fmt: skip
    if task.seq2seq:
        translator = ctranslate2.Translator(str(task.prepared), **settings)

        def translate(new: int, tell: Tell) -> None:
            translator.translate_batch(
                [tokens], beam_size=1, min_decoding_length=new, max_decoding_length=new,
                callback=lambda step: _told(tell, step),
            )  # fmt: skip

        return translate
    generator = ctranslate2.Generator(str(task.prepared), **settings)

    def generate(new: int, tell: Tell) -> None:
        generator.generate_batch(
            [tokens], beam_size=1, min_length=new, max_length=new, include_prompt_in_result=False,
            callback=lambda step: _told(tell, step),
        )  # fmt: skip

    return generate


def _told(tell: Tell, step: Any) -> bool:
    """False: go on."""
    tell(step.token_id)
    return False


if __name__ == "__main__":
    main(prepare, load, ["ctranslate2"])
