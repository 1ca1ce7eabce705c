"""Every name of TensorRT and TensorRT-RTX that the compiler uses, looked up in the real bindings, with its arguments."""

from pathlib import Path

import pytest

from llm2slm_export.authoring.exporters.tensorrt import builder
from tests.support.bindings import BINDINGS, check, used_names

pytestmark = pytest.mark.slow

OBJECTS = {
    "engine.create_engine_inspector()": "EngineInspector", "self.trt.Runtime(self.logger)": "Runtime",
    "config.get_timing_cache()": "ITimingCache", "self.trt": "", "trt": "", "builder": "Builder",
    "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "layer.attention": "IAttention", "layer.get_output(0)": "ITensor",
    "layer.get_input(0)": "ITensor", "layer": "IAttentionInputLayer", "error": "ParserError", "engine": "ICudaEngine",
}  # fmt: skip
RTX_ALONE = {"IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"}
NAMES = used_names([Path(str(builder.__file__))], OBJECTS)


@pytest.mark.parametrize("which", BINDINGS)
def test_every_name_and_argument_exists(which: str) -> None:
    assert {"Builder.build_serialized_network", "IAttention.decomposable", "OnnxParser.parse_from_file"} <= NAMES.keys()
    assert NAMES.keys() >= RTX_ALONE
    assert NAMES["IOptimizationProfile.set_shape"] == {4}
    check(which, NAMES, RTX_ALONE)
