"""optimum-onnx: its export of the encoder, or that with ONNX Runtime's dynamic int8 quantization, per channel."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
from protocol import Encode, Task, main_encoder

FILE = "encoder.onnx"


def prepare(task: Task) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from optimum.exporters.onnx import main_export

    with TemporaryDirectory(dir=task.prepared) as directory:
        main_export(str(task.model), output=directory, task="text2text-generation")
        exported = onnx.load(Path(directory) / "encoder_model.onnx")
    target = task.prepared / FILE
    if task.precision == "int8":
        quantize_dynamic(exported, target, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=True)
    else:
        onnx.save(exported, target, save_as_external_data=True, location=f"{FILE}.data")


def load(task: Task) -> Encode:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    session = onnxruntime.InferenceSession(task.prepared / FILE, options, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]


if __name__ == "__main__":
    main_encoder(prepare, load, ["onnxruntime", "optimum-onnx"])
