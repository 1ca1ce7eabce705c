"""What the ONNX Runtime backend refuses, and how. The graphs themselves are tested with the exporter."""

import sys

import numpy as np
import onnxruntime
import pytest

from llm2slm_export.errors import DeviceError, MissingExtraError, UsageError
from llm2slm_export.runtime.ort import Device, _numbers, find_device, left_padded


def test_cpu() -> None:
    assert find_device("cpu") == Device("cpu", 0, "CPUExecutionProvider")
    assert str(find_device("cpu")) == "cpu"


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this one has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_its_provider_is_refused_with_what_was_found(device: str) -> None:
    with pytest.raises(DeviceError) as error:
        find_device(device)
    assert repr(device) in error.value.fact
    assert onnxruntime.__version__ in str(error.value)
    assert "CPUExecutionProvider" in str(error.value)
    assert "pip install 'llm2slm-export[gpu]'" in error.value.remedy


def test_cuda_device_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert str(find_device("cuda")) == "cuda:0"
    assert find_device("cuda:3") == Device("cuda", 3, "CUDAExecutionProvider")


def test_tensorrt_is_refused_as_not_in_this_release() -> None:
    with pytest.raises(DeviceError, match="builds no TensorRT engines"):
        find_device("tensorrt")


@pytest.mark.parametrize("device", ["banana", "", "CPU", "cuda:", "cuda:x", "cpu:1"])
def test_other_names_are_wrong_usage(device: str) -> None:
    with pytest.raises(UsageError, match="cpu, cuda, cuda:n") as error:
        find_device(device)
    assert repr(device) in error.value.fact


def test_without_onnxruntime_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llm2slm-export\[cpu\]'"):
        find_device("cpu")


def test_versions_compare_as_numbers() -> None:
    assert _numbers("1.9.0") < _numbers("1.24") < _numbers("1.24.1rc2")


def test_a_mask_is_moved_to_the_left() -> None:
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(left_padded(mask), [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])


def test_the_module_imports_no_runtime() -> None:
    import subprocess

    code = (
        "import sys, llm2slm_export.runtime.ort; "
        "print([m for m in ('onnxruntime', 'torch', 'transformers', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
