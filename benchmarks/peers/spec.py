"""Which peers there are, what each needs and runs, and which models those that write are given."""

from dataclasses import dataclass

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """Something that decodes, or encodes.

    Args:
        worker: a script in `workers/`.
        requirements: what its environment holds; none: the environment that the driver runs in.
        without: what those bring along, is not needed, and does not load beside a CPU build of torch.
    """

    name: str
    worker: str
    requirements: tuple[str, ...]
    precisions: tuple[str, ...]
    without: tuple[str, ...] = ()
    encodes: bool = False


PEERS = (
    Peer("llm2slm-export", "llm2slm_worker.py", (), ("fp32", "int8", "int8-256", "int4", "int4-128", "int4-128-all")),
    Peer("transformers", "transformers_worker.py", (TORCH, "transformers==5.24.0"), ("fp32", "bf16")),
    Peer(
        "optimum-onnx",
        "optimum_worker.py",
        (TORCH, "optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6"),
        ("fp32",),
    ),
    Peer(
        "ctranslate2",
        "ctranslate2_worker.py",
        (TORCH, "ctranslate2==4.8.5", "transformers==4.57.6"),
        ("fp32", "int8"),
    ),
    Peer(
        "llama.cpp",
        "llama_cpp_worker.py",
        ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors"),
        ("q8_0", "q4_0"),
    ),
    Peer(
        "openvino",
        "openvino_worker.py",
        (TORCH, "openvino==2026.4.1", "nncf==3.4.0", "optimum-intel==2.2.0"),
        ("fp32", "bf16", "int8", "int4"),
        without=("torchvision",),
    ),
    Peer(
        "onnxruntime-genai",
        "genai_worker.py",
        (TORCH, "onnxruntime-genai==0.18.0", "transformers==5.24.0", "onnx", "onnx-ir"),
        ("int8", "int4"),
    ),
)

ENCODERS = (
    Peer(
        "llm2slm-export",
        "encode_llm2slm_worker.py",
        (),
        (
            "onnxruntime-fp32",
            "onnxruntime-int8",
            "onnxruntime-w8a8",
            "openvino-fp32",
            "openvino-bf16",
            "openvino-int8",
            "openvino-w8a8",
        ),
        encodes=True,
    ),
    Peer(
        "transformers",
        "encode_transformers_worker.py",
        (TORCH, "transformers==5.24.0"),
        ("fp32", "bf16"),
        encodes=True,
    ),
    Peer(
        "openvino",
        "encode_openvino_worker.py",
        (TORCH, "openvino==2026.4.1", "nncf==3.4.0", "optimum-intel==2.2.0"),
        ("fp32", "bf16", "int8", "w8a8"),
        without=("torchvision",),
        encodes=True,
    ),
    Peer(
        "optimum-onnx",
        "encode_optimum_worker.py",
        (TORCH, "optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6"),
        ("fp32", "int8"),
        encodes=True,
    ),
)

SLM = "t5-small"  # of our pair, and alone
PAIR = Peer("llm2slm-export", "pair_llm2slm_worker.py", (), (f"int8-{SLM}",))

OURS = PEERS[0].name
REFERENCE = ("transformers", "fp32")  # whose tokens the others' are compared with

MODELS = ("t5-small", "smollm2-135m", "gpt2")  # names in llm2slm_export's catalog
