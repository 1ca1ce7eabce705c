"""The real bindings of TensorRT and TensorRT-RTX, to look names up in: which of them a source uses, and what they take.

TensorRT's bindings load without TensorRT on libraries that export the ten functions they link to, and do nothing.
"""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

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


def used_names(files: Sequence[Path], objects: Mapping[str, str]) -> dict[str, set[int]]:
    """Dotted names below the module, and with how many arguments each is called; empty: it is not.

    Args:
        objects: what the sources call things, and what they are; a name that begins with another comes before it.
    """
    names: dict[str, set[int]] = {}
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = {id(node.func): len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            path, above = ast.unparse(node.value), node.attr
            root = next((name for name in objects if path == name or path.startswith(f"{name}.")), None)
            if root is None or above in ("__name__", "__version__", "__class__"):
                continue
            full = ".".join(part for part in (objects[root], path[len(root) :].strip("."), above) if part)
            names.setdefault(full, set())
            if id(node) in calls:
                names[full].add(calls[id(node)] - (above == "__init__"))  # which is given itself
    return names


def look_up(which: str, names: Iterable[str]) -> dict[str, str]:
    """The docstrings of the names that some bindings have."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        version, environment = BINDINGS[which], dict(os.environ)
        if which == "tensorrt-rtx" and _installed("tensorrt-rtx-cu12") == version:
            module = "tensorrt_rtx"
        elif which == "tensorrt-rtx":
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
        docstrings: dict[str, str] = found["found"]
        return docstrings


def _installed(package: str) -> str | None:
    """The version of a package in this environment."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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


def check(which: str, names: Mapping[str, set[int]], rtx_alone: set[str]) -> None:
    """Every name is there, and takes as many arguments as it is given."""
    wanted = names.keys() if which == "tensorrt-rtx" else names.keys() - rtx_alone
    found = look_up(which, wanted)
    assert sorted(wanted - found.keys()) == []
    checked = 0
    for name in wanted:
        signatures = overloads(found[name], name)
        for count in names[name] if signatures else ():
            assert any(takes(signature, count) for signature in signatures), (
                f"{name} with {count} arguments: {signatures}"
            )
            checked += 1
    assert checked >= 10, "signatures must be found to be compared"
