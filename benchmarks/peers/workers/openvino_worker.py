"""OpenVINO: optimum-intel's export, with its cache as the model's state; NNCF's weight compression; a loop of our own.

The loop is shorter than optimum-intel's `generate`: what is timed is OpenVINO. fp32 and bf16 are computed in what they are
called; compressed weights in what OpenVINO chooses on the machine.
"""

from typing import Any

import numpy as np
import openvino
from protocol import Task, Tell, Write, main

BITS = {"int8": 8, "int4": 4}
HINTS = {"fp32": "f32", "bf16": "bf16"}


def prepare(task: Task) -> None:
    """Export; compress the weights to 8 bits, or to 4 in groups of 128 or fewer."""
    from optimum.intel import OVModelForCausalLM, OVModelForSeq2SeqLM, OVWeightQuantizationConfig

    kind = OVModelForSeq2SeqLM if task.seq2seq else OVModelForCausalLM
    compressed: dict[str, Any] = {"load_in_8bit": False}
    if task.precision in BITS:
        bits = BITS[task.precision]
        group = 128 if _width(task.config) % 128 == 0 else 64
        compressed = {
            "quantization_config": OVWeightQuantizationConfig(bits=bits, **({"group_size": group} if bits == 4 else {}))
        }
    kind.from_pretrained(task.model, export=True, compile=False, **compressed).save_pretrained(task.prepared)


def _width(config: dict[str, int]) -> int:
    return next(config[name] for name in ("hidden_size", "d_model", "n_embd") if name in config)


def load(task: Task) -> Write:
    core = openvino.Core()
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": task.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if task.precision in HINTS:
        settings["INFERENCE_PRECISION_HINT"] = HINTS[task.precision]
    name = "openvino_decoder_model.xml" if task.seq2seq else "openvino_model.xml"
    decoder = core.compile_model(task.prepared / name, "CPU", settings)
    inputs = {name for port in decoder.inputs for name in port.names}
    request = decoder.create_infer_request()
    encoder = (
        core.compile_model(task.prepared / "openvino_encoder_model.xml", "CPU", settings) if task.seq2seq else None
    )
    prompt: Any = np.array([task.ids])
    ones: Any = np.ones((1, 4096), np.int64)

    def feeds(ids: np.ndarray, past: int) -> dict[str, Any]:
        total = past + ids.shape[1]
        known = {
            "input_ids": ids, "decoder_input_ids": ids, "attention_mask": ones[:, :total],
            "position_ids": np.arange(past, total)[None], "beam_idx": np.zeros(1, np.int32),
        }  # fmt: skip
        return {name: value for name, value in known.items() if name in inputs}

    def write(new: int, tell: Tell) -> None:
        request.reset_state()
        fixed: dict[str, Any] = {}
        ids = prompt
        if encoder is not None:
            mask = ones[:, : prompt.shape[1]]
            hidden = encoder({"input_ids": prompt, "attention_mask": mask})[0]
            fixed = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
            fixed = {name: value for name, value in fixed.items() if name in inputs}
            ids = np.array([[task.config["decoder_start_token_id"]]])
        past = 0
        for _ in range(new):
            logits = request.infer({**feeds(ids, past), **fixed}, share_inputs=True)["logits"][0, -1]
            logits[task.eos] = -np.inf
            past += ids.shape[1]
            ids = np.array([[logits.argmax()]])
            tell(int(ids[0, 0]))

    return write


if __name__ == "__main__":
    main(prepare, load, ["openvino", "nncf", "optimum-intel"])
