"""Every name of TensorRT, TensorRT-RTX and CUDA that the runtime uses, looked up in the real bindings.

TensorRT's bindings load without TensorRT on libraries that export the ten functions they link to, and do nothing. cuda-bindings
needs no driver to say which arguments it takes: a call that it accepts fails for want of one, and not before.
"""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest

import llm2slm_export
from llm2slm_export.errors import EngineError
from llm2slm_export.runtime.engine_library import EngineLibrary

pytestmark = pytest.mark.slow

RUNTIME = Path(llm2slm_export.__file__).parent / "runtime"
# What the runtime calls things, and what they are.
OBJECTS = {
    "trt": "", "self.trt": "", "self._library.trt": "", "self._runtime": "Runtime", "engine": "ICudaEngine",
    "self._engine": "ICudaEngine", "context": "IExecutionContext", "self._context": "IExecutionContext",
    "config": "IRuntimeConfig",
}  # fmt: skip
RTX_ALONE = {
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IExecutionContext.is_stream_capturable",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
}
STUB = "\n".join(
    f"void *{name}() {{ return 0; }}"
    for name in (
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
        "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins", "getInferLibVersion",
    )
)  # fmt: skip
# Prints, for dotted names, the docstring of each that there is: pybind11 writes signatures into them.
LOOK_UP = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
found = {}
for path in json.loads(sys.argv[2]):
    value = module
    try:
        for part in path.split("."):
            value = getattr(value, part)
    except AttributeError:
        continue
    found[path] = value.__doc__ or "" if callable(value) else ""
print(json.dumps({"version": module.__version__, "found": found}))
"""
BINDINGS = {"tensorrt 11.4": "11.4.0.106", "tensorrt 10.16": "10.16.1.11", "tensorrt-rtx": "1.7.1.116"}


def used_names() -> dict[str, set[int]]:
    """Dotted names below the module, and with how many arguments each is called; empty: it is not."""
    names: dict[str, set[int]] = {}
    for file in ("engine.py", "engine_library.py"):
        tree = ast.parse((RUNTIME / file).read_text(encoding="utf-8"))
        calls = {id(node.func): len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            path, above = ast.unparse(node.value), node.attr
            root = next((name for name in OBJECTS if path == name or path.startswith(f"{name}.")), None)
            if root is None or (root in ("trt", "self.trt", "self._library.trt") and above.startswith("__")):
                continue
            full = ".".join(part for part in (OBJECTS[root], path[len(root) :].strip("."), above) if part)
            names.setdefault(full, set())
            if id(node) in calls:
                names[full].add(calls[id(node)])
    return names


@pytest.fixture(scope="module")
def look_up(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """look_up(which, names) → the docstrings of those that there are."""

    def look(which: str, names: Any) -> dict[str, str]:
        directory = tmp_path_factory.mktemp("bindings")
        version, environment = BINDINGS[which], dict(os.environ)
        if which == "tensorrt-rtx":
            pip("install", "--target", str(directory), f"tensorrt-rtx-cu12=={version}")
            module = "tensorrt_rtx"
        else:
            pip("download", "--no-deps", "--dest", str(directory), f"tensorrt-cu13-bindings=={version}")
            (wheel,) = directory.glob("*.whl")
            zipfile.ZipFile(wheel).extractall(directory)
            environment["LD_LIBRARY_PATH"] = str(stubs(directory, version.split(".")[0]))
            module = "tensorrt_bindings"
        environment["PYTHONPATH"] = str(directory)
        done = subprocess.run(
            [sys.executable, "-c", LOOK_UP, module, json.dumps(sorted(names))],
            capture_output=True, text=True, check=True, timeout=120, env=environment,
        )  # fmt: skip
        found = json.loads(done.stdout)
        assert found["version"] == version
        return found["found"]  # type: ignore[no-any-return]

    return look


def pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"pip cannot {arguments[0]} {arguments[-1]}: {done.stderr.strip().splitlines()[-1:]}")


def stubs(directory: Path, major: str) -> Path:
    """TensorRT's libraries, by name."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stub libraries")
    source = directory / "stub.c"
    source.write_text(STUB, encoding="utf-8")
    out = directory / "stubs"
    out.mkdir()
    for name in ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin"):
        file = f"{name}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(out / file), str(source)]
        subprocess.run(command, check=True)
    return out


def overloads(doc: str, name: str) -> list[list[str]]:
    """The parameters of each signature in a docstring, `self` left out."""
    own = name.rpartition(".")[2]
    found = []
    for match in re.finditer(rf"\b{own}\((?P<all>[^\n]*)\) ->", doc):
        if match["all"].startswith("*args"):
            continue
        # Types may have commas in brackets.
        text = re.sub(r"\[[^\]]*\]", "", match["all"])
        found.append([part.strip() for part in text.split(",")][1:])
    return found


def takes(signature: list[str], count: int) -> bool:
    return len([part for part in signature if "=" not in part]) <= count <= len(signature)


@pytest.mark.parametrize("which", BINDINGS)
def test_every_name_and_argument_exists(look_up: Any, which: str) -> None:
    names = used_names()
    assert {"Runtime.deserialize_cuda_engine", "IExecutionContext.execute_async_v3", "DataType.BF16"} <= names.keys()
    wanted = names.keys() if which == "tensorrt-rtx" else names.keys() - RTX_ALONE
    assert names.keys() >= RTX_ALONE
    found = look_up(which, wanted)
    assert sorted(wanted - found.keys()) == []
    methods = {name: counts for name, counts in names.items() if counts and name in found and "." in name}
    assert len(methods) > 10
    for name, counts in methods.items():
        signatures = overloads(found[name], name)
        assert signatures, f"{name}: no signature in {found[name]!r}"
        for count in counts:
            assert any(takes(signature, count) for signature in signatures), (
                f"{name} with {count} arguments: {signatures}"
            )


@pytest.mark.parametrize("which", ["tensorrt 11.4", "tensorrt-rtx"])
def test_the_fakes_promise_nothing_else(look_up: Any, which: str) -> None:
    """A fake with a method or a parameter of another name would test something that does not exist."""
    fakes = {"ICudaEngine": fake_tensorrt.FakeEngine, "IExecutionContext": fake_tensorrt.FakeContext}
    used = used_names()
    promised = {
        f"{real}.{name}": [*inspect.signature(method).parameters][1:]
        for real, fake in fakes.items()
        for name, method in inspect.getmembers(fake, inspect.isfunction)
        if f"{real}.{name}" in used
    }
    if which != "tensorrt-rtx":
        promised = {name: parameters for name, parameters in promised.items() if name not in RTX_ALONE}
    found = look_up(which, promised)
    for name, parameters in promised.items():
        if name == "ICudaEngine.create_execution_context":  # two overloads, one parameter each
            continue
        real = {part.partition(":")[0].strip() for signature in overloads(found[name], name) for part in signature}
        assert set(parameters) <= real, f"{name}: {parameters}, really {real}"


CUDA_CALLS = """
import numpy as np
from cuda.bindings import runtime
from llm2slm_export.errors import DeviceError
from llm2slm_export.runtime.cuda_device import CudaDevice

try:
    CudaDevice(0, cuda=runtime)
except DeviceError as error:
    print("open:", error)
device = object.__new__(CudaDevice)
device._cuda, device._index = runtime, 0
array = np.zeros(8, np.uint8)
calls = {
    "free_bytes": (), "make_current": (), "allocate": (8,), "free": (256,), "allocate_host": (8,), "free_host": (array,),
    "create_stream": (), "destroy_stream": (1,), "synchronize": (1,), "copy_in": (256, array, 1),
    "copy_out": (array, 256, 1), "fill": (256, 0, 8, 1), "begin_capture": (1,), "end_capture": (1,), "launch": (1, 1),
    "destroy_graph": (1,),
}
blocks = {"width": 4, "count": 2, "to_pitch": 4, "from_pitch": 8, "stream": 1}
for name, arguments in calls.items():
    try:
        getattr(device, name)(*arguments)
    except DeviceError as error:
        print(name, error.evidence[0])
for pitch in (4, 8):
    try:
        device.copy_blocks(256, 512, **{**blocks, "from_pitch": pitch})
    except DeviceError as error:
        print("copy_blocks", pitch, error.evidence[0])
print("fields", [hasattr(runtime.cudaDeviceProp(), name) for name in ("name", "major", "minor", "totalGlobalMem")])
"""


@pytest.mark.parametrize("version", ["12.9.*", "13.*"])
def test_cuda_takes_what_it_is_given(tmp_path: Path, version: str) -> None:
    """On a machine without a driver, or with its GPUs hidden, every call gets as far as that."""
    pip("install", "--target", str(tmp_path), f"cuda-bindings=={version}")
    environment = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(llm2slm_export.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", CUDA_CALLS], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "fields [True, True, True, True]" in lines
    refused = {line.split()[0]: line for line in lines if "cudaError" in line}
    without = re.compile("cudaErrorInsufficientDriver|cudaErrorNoDevice")
    assert len(refused) >= 16, done.stdout
    assert all(without.search(line) for line in refused.values()), done.stdout


def test_the_real_librarys_words_reach_the_error(tmp_path: Path) -> None:
    """TensorRT-RTX itself, where it is installed: it starts without a GPU, and says what is wrong with a file."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX", exc_type=ImportError)
    (tmp_path / "a.engine").write_bytes(b"no engine" * 100)
    library = EngineLibrary("tensorrt-rtx", trt)
    for _ in range(2):  # the second time too: what it said before is not said again
        with pytest.raises(EngineError, match="does not load") as error:
            library.deserialize(tmp_path / "a.engine")
        assert "magicTag" in error.value.evidence[0]
        assert len(error.value.evidence) <= 2
