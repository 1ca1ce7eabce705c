"""Libraries with which onnxruntime-gpu's CUDA provider works on a machine without a GPU (`cuda_stub.c`).

    LLM2SLM_ORT_GPU=DIR   where onnxruntime-gpu is: pip install --no-deps --target DIR onnxruntime-gpu

What is real: the provider, where it puts each node, what can be captured, how tensors are bound, what its arena says when
memory does not do. What is not: every number.
"""

import os
import re
import subprocess
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
_IMPLEMENTED = re.compile(r"^(?:int|const char \*)\s*\*?(cu\w+)\(", re.MULTILINE)


def onnxruntime_gpu() -> Path | None:
    """The directory of onnxruntime-gpu; None where none was named."""
    directory_name = os.environ.get("LLM2SLM_ORT_GPU")
    return Path(directory_name) if directory_name else None


def build(directory: Path, gpu: Path) -> Path:
    """Write every library that the provider in `gpu` needs of CUDA, with every function of it: the path to search."""
    provider = gpu / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
    names = subprocess.run(
        ["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True
    ).stdout
    functions: dict[str, list[str]] = defaultdict(list)
    for symbol in re.findall(r"U (_*cu\S+)", names):
        name, _, library = symbol.partition("@")
        functions[library or "libcuda.so.1"].append(name)
    implemented = set(_IMPLEMENTED.findall(SOURCE.read_text(encoding="utf-8")))
    for library in (*functions, "libcurand.so.10"):
        own = [name for name in functions[library] if not (library.startswith("libcudart") and name in implemented)]
        source, versions = directory / "stub.c", directory / "stub.map"
        source.write_text("static long handle[512];\n" + "".join(map(_empty, own)), encoding="utf-8")
        versions.write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
        command = ["cc", "-shared", "-fPIC", "-w", "-o", directory / library, source, f"-Wl,-soname,{library}"]
        if library.startswith("libcudart"):
            command.append(SOURCE)
        if library != "libcuda.so.1":
            command.append(f"-Wl,--version-script,{versions}")
        subprocess.run(command, check=True)
    return directory


def _empty(name: str) -> str:
    """A function that says it has succeeded."""
    if name == "__cudaRegisterFatBinary":
        return f"void *{name}(void *binary) {{ return handle; }}\n"
    if re.fullmatch(r"cublas\w*Create\w*", name):
        return f"int {name}(void **to) {{ *to = handle; return 0; }}\n"
    if "GetStatus" in name:
        return f'const char *{name}() {{ return "stub"; }}\n'
    return f"int {name}() {{ return {15 if name == 'cublasLtMatmulAlgoGetHeuristic' else 0}; }}\n"  # 15: not supported
