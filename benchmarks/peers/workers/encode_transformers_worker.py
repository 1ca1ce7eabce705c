"""transformers: the encoder of its own model, eager."""

import torch
from protocol import Encode, Task, main_encoder
from transformers import T5EncoderModel

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(task: Task) -> Encode:
    torch.set_num_threads(task.threads)
    model = T5EncoderModel.from_pretrained(task.model, dtype=TYPES[task.precision]).eval()

    @torch.inference_mode()
    def encode(ids: object) -> object:
        return model(input_ids=torch.as_tensor(ids)).last_hidden_state.float().numpy()

    return encode


if __name__ == "__main__":
    main_encoder(lambda _: None, load, ["transformers", "torch"])
