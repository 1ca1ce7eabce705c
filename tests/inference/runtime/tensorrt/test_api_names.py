"""Every name of TensorRT, TensorRT-RTX and CUDA that the runtime uses, looked up in the real bindings.

TensorRT's bindings load without TensorRT on libraries that export the ten functions they link to, and do nothing. cuda-bindings
needs no driver to say which arguments it takes: a call that it accepts fails for want of one, and not before.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llm2slm_export
from llm2slm_export.errors import EngineError
from llm2slm_export.inference.runtime.tensorrt.library import EngineLibrary
from tests.support import fake_tensorrt
from tests.support.bindings import BINDINGS, check, look_up, overloads, pip, used_names

pytestmark = pytest.mark.slow

RUNTIME = Path(llm2slm_export.__file__).parent / "inference" / "runtime" / "tensorrt"
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
NAMES = used_names([RUNTIME / "engine.py", RUNTIME / "library.py"], OBJECTS)


@pytest.mark.parametrize("which", BINDINGS)
def test_every_name_and_argument_exists(which: str) -> None:
    assert {"Runtime.deserialize_cuda_engine", "IExecutionContext.execute_async_v3", "DataType.BF16"} <= NAMES.keys()
    assert NAMES.keys() >= RTX_ALONE
    check(which, NAMES, RTX_ALONE)


@pytest.mark.parametrize("which", ["tensorrt 11.4", "tensorrt-rtx"])
def test_the_fakes_promise_nothing_else(which: str) -> None:
    """A fake with a method or a parameter of another name would test something that does not exist."""
    fakes = {"ICudaEngine": fake_tensorrt.FakeEngine, "IExecutionContext": fake_tensorrt.FakeContext}
    promised = {
        f"{real}.{name}": [*inspect.signature(method).parameters][1:]
        for real, fake in fakes.items()
        for name, method in inspect.getmembers(fake, inspect.isfunction)
        if f"{real}.{name}" in NAMES
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
from llm2slm_export.inference.runtime.tensorrt.cuda_device import CudaDevice

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
        with pytest.raises(EngineError, match="cannot load") as error:
            library.deserialize(tmp_path / "a.engine")
        assert "magicTag" in error.value.evidence[0]
        assert len(error.value.evidence) <= 2
