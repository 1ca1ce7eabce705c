"""OpenVINO: optimum-intel's export of the encoder, and NNCF's compression of weights or quantization of both."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
from protocol import Encode, Task, main_encoder

HINTS = {"fp32": "f32", "bf16": "bf16"}
CALIBRATION = 16  # prompts, of the lengths that are timed and others


def prepare(task: Task) -> None:
    """Convert; int8: weights alone, w8a8: activations too, calibrated."""
    import nncf
    from optimum.intel import OVModelForSeq2SeqLM

    with TemporaryDirectory(dir=task.prepared) as directory:
        exported = OVModelForSeq2SeqLM.from_pretrained(task.model, export=True, compile=False, load_in_8bit=False)
        exported.save_pretrained(directory)
        model = openvino.Core().read_model(Path(directory) / "openvino_encoder_model.xml")
        if task.precision == "int8":
            model = nncf.compress_weights(model)
        elif task.precision == "w8a8":
            draw = np.random.default_rng(1)
            prompts = [draw.integers(10, 30_000, (1, 32 * (1 + number))) for number in range(CALIBRATION)]
            data = nncf.Dataset([{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in prompts])
            model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION)
        # While what it was read from is there.
        openvino.save_model(model, task.prepared / "encoder.xml", compress_to_fp16=False)


def load(task: Task) -> Encode:
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": task.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if task.precision in HINTS:
        settings["INFERENCE_PRECISION_HINT"] = HINTS[task.precision]
    request = openvino.Core().compile_model(task.prepared / "encoder.xml", "CPU", settings).create_infer_request()
    return lambda ids: request.infer({"input_ids": ids, "attention_mask": np.ones_like(ids)}, share_inputs=True)[0]


if __name__ == "__main__":
    main_encoder(prepare, load, ["openvino", "nncf"])
