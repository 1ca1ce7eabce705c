"""Every name of TensorRT and TensorRT-RTX that the compiler uses, looked up in the real bindings, with its arguments.

TensorRT's bindings load without TensorRT, on libraries that export the functions they link to, and do nothing.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from llm2slm_export.exporters import tensorrt

pytestmark = pytest.mark.slow

# What the compiler calls things, and what they are; the longest first.
OBJECTS = {
    "engine.create_engine_inspector()": "EngineInspector", "self.trt.Runtime(self.logger)": "Runtime",
    "config.get_timing_cache()": "ITimingCache", "self.trt": "", "trt": "", "builder": "Builder",
    "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "layer.attention": "IAttention", "layer.get_output(0)": "ITensor",
    "layer.get_input(0)": "ITensor", "layer": "IAttentionInputLayer", "error": "ParserError", "engine": "ICudaEngine",
}  # fmt: skip
NOT_OURS = {"__name__", "__version__", "__class__"}
RTX_ALONE = {"IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"}
EXPORTED = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins", "getInferLibVersion",
)  # fmt: skip
LOOK_UP = """
import importlib, json, sys
module, found = importlib.import_module(sys.argv[1]), {}
for path in json.loads(sys.argv[2]):
    value = module
    for part in path.split("."):
        value = getattr(value, part, None)
    if value is not None:
        found[path] = value.__doc__ or ""
print(json.dumps([module.__version__, found]))
"""


def used_names() -> dict[str, set[int]]:
    """Dotted names below the module, and with how many arguments each is called."""
    tree = ast.parse(Path(str(tensorrt.__file__)).read_text(encoding="utf-8"))
    calls = {id(node.func): len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names: dict[str, set[int]] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr in NOT_OURS:
            continue
        path = ast.unparse(node.value)
        root = next((name for name in OBJECTS if path == name or path.startswith(f"{name}.")), None)
        if root is None:
            continue
        full = ".".join(part for part in (OBJECTS[root], path[len(root) :].strip("."), node.attr) if part)
        counts = names.setdefault(full, set())
        if id(node) in calls:
            counts.add(calls[id(node)] - (node.attr == "__init__"))  # which is given itself
    return names


def look_up(module: str, names: set[str], environment: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The bindings' version, and the docstrings of the names that there are."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK_UP, module, json.dumps(sorted(names))],
        capture_output=True, text=True, check=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip
    version, found = json.loads(done.stdout)
    return version, found


def check(found: dict[str, str], wanted: set[str]) -> None:
    assert sorted(wanted - found.keys()) == []
    checked = 0
    for name, counts in used_names().items():
        # pybind11 writes signatures into docstrings: name(self: …, a: int, b: int = 0) -> …
        own = name.rpartition(".")[2]
        signatures = [
            re.sub(r"\[[^\]]*\]", "", all_) for all_ in re.findall(rf"\b{own}\(([^\n]*)\) ->", found.get(name, ""))
        ]
        parameters = [
            [p for p in s.split(",") if not p.strip().startswith("self")] for s in signatures if "*args" not in s
        ]
        for count in counts if parameters else ():
            assert any(sum("=" not in p for p in one) <= count <= len(one) for one in parameters), (
                f"{name}: {signatures}"
            )
            checked += 1
    assert checked >= 10, "signatures must be found to be compared"


def test_names_are_found_in_the_source() -> None:
    names = used_names()
    assert {"Builder.build_serialized_network", "IAttention.decomposable", "OnnxParser.parse_from_file"} <= names.keys()
    assert names.keys() >= RTX_ALONE
    assert names["IOptimizationProfile.set_shape"] == {4}


@pytest.mark.parametrize("version", ["11.4.0.106", "10.16.1.11"])
def test_tensorrt_has_every_name_and_argument(version: str, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stub libraries")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    done = subprocess.run([*command, f"tensorrt-cu13-bindings=={version}"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot download tensorrt-cu13-bindings {version}: {done.stderr.strip()[-200:]}")
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    source = tmp_path / "stub.c"
    source.write_text("\n".join(f"void *{name}() {{ return 0; }}" for name in EXPORTED), encoding="utf-8")
    for library in ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin"):
        file = f"{library}.so.{version.split('.')[0]}"
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(tmp_path / file), str(source)], check=True
        )
    wanted = used_names().keys() - RTX_ALONE
    found_version, found = look_up(
        "tensorrt_bindings", set(wanted), {"PYTHONPATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    )
    assert found_version == version
    check(found, set(wanted))


@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install 'llm2slm-export[tensorrt-rtx]'"
)
def test_tensorrt_rtx_has_every_name_and_argument() -> None:
    wanted = set(used_names())
    check(look_up("tensorrt_rtx", wanted, {})[1], wanted)
