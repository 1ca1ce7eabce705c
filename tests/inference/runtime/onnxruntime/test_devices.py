"""The names of devices, and those that this installation does not support."""

import onnxruntime
import pytest

from llm2slm_export.errors import DeviceError, MissingExtraError, UsageError
from llm2slm_export.inference.runtime.onnxruntime.devices import ExecutionDevice, find_device


def test_cpu() -> None:
    assert find_device("cpu") == ExecutionDevice("cpu", 0, "CPUExecutionProvider")
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
    assert find_device("cuda:3") == ExecutionDevice("cuda", 3, "CUDAExecutionProvider")


@pytest.mark.parametrize("device", ["banana", "", "CPU", "cuda:", "cuda:x", "cpu:1"])
def test_other_names_are_wrong_usage(device: str) -> None:
    with pytest.raises(UsageError, match="cpu, cuda, cuda:n") as error:
        find_device(device)
    assert repr(device) in error.value.fact


def test_without_onnxruntime_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llm2slm-export\[cpu\]'"):
        find_device("cpu")
