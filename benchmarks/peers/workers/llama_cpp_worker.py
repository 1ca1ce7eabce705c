"""llama.cpp through llama-cpp-python's C interface: compiled for this machine, a loop of our own around it.

Without a tokenizer: the GGUF file says how many tokens there are, and no more. Quantized by llama.cpp itself.
"""

import ctypes
from pathlib import Path

import gguf
import llama_cpp as native
import numpy as np
from protocol import Task, Tell, Write, main
from safetensors.numpy import load_file

FILE_TYPES = {"q8_0": native.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": native.LLAMA_FTYPE_MOSTLY_Q4_0}
ARCHITECTURES = {"t5": gguf.MODEL_ARCH.T5, "gpt2": gguf.MODEL_ARCH.GPT2, "llama": gguf.MODEL_ARCH.LLAMA}
CONTEXT = 1024


def prepare(task: Task) -> None:
    """Write the weights as GGUF, fp32, and quantize that file."""
    whole = task.prepared / "fp32.gguf"
    _convert(task, whole)
    settings = native.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[task.precision]
    quantized = str(task.prepared / "model.gguf").encode()
    if native.llama_model_quantize(str(whole).encode(), quantized, ctypes.byref(settings)):
        raise SystemExit(f"llama_model_quantize refused {task.precision}")
    whole.unlink()


def load(task: Task) -> Write:
    native.llama_backend_init()
    path = str(task.prepared / "model.gguf").encode()
    model = native.llama_model_load_from_file(path, native.llama_model_default_params())
    settings = native.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
    settings.n_threads = settings.n_threads_batch = task.threads
    context = native.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit("llama_init_from_model gave no context")
    vocabulary = int(task.config["vocab_size"])

    def run(call: "native._pyCFunctionType", ids: list[int]) -> None:
        tokens = (native.llama_token * len(ids))(*ids)
        if status := call(context, native.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"{call.__name__} gave {status}")

    def write(new: int, tell: Tell) -> None:
        native.llama_memory_clear(native.llama_get_memory(context), True)
        ids = task.ids
        if task.seq2seq:
            run(native.llama_encode, ids)
            ids = [native.llama_model_decoder_start_token(model)]
        for _ in range(new):
            run(native.llama_decode, ids)
            logits = np.ctypeslib.as_array(native.llama_get_logits_ith(context, -1), (vocabulary,))
            logits[task.eos] = -np.inf
            ids = [int(logits.argmax())]
            tell(ids[0])

    return write


def _convert(task: Task, path: Path) -> None:
    """transformers' weights under llama.cpp's names and in its layouts."""
    config = task.config
    kind = config["model_type"]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    {"t5": _describe_t5, "gpt2": _describe_gpt2, "llama": _describe_llama}[kind](writer, config)
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], max(config.get("num_layers", 0), _layers(config)))
    for name, tensor in load_file(task.model / "model.safetensors").items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and kind == "t5":
            continue  # the shared table again
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise SystemExit(f"llama.cpp has no name for {name}")
        if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if name.endswith("q_proj.weight") else "num_key_value_heads"]
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(new, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _layers(config: dict[str, int]) -> int:
    return next(config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config)


def _describe_t5(writer: gguf.GGUFWriter, config: dict[str, int]) -> None:
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(config["d_ff"])
    writer.add_block_count(config["num_layers"])
    writer.add_decoder_block_count(config["num_decoder_layers"])
    writer.add_head_count(config["num_heads"])
    writer.add_key_length(config["d_kv"])
    writer.add_value_length(config["d_kv"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_relative_attn_buckets_count(config["relative_attention_num_buckets"])
    writer.add_decoder_start_token_id(config["decoder_start_token_id"])


def _describe_gpt2(writer: gguf.GGUFWriter, config: dict[str, int]) -> None:
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _describe_llama(writer: gguf.GGUFWriter, config: dict[str, int]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])


if __name__ == "__main__":
    main(prepare, load, ["llama-cpp-python", "gguf"])
