"""Exports that tests share: nine tenths of the suite's time are torch's exporter, of the same few tiny graphs over and over.

What an export depends on is its key: the modules' classes, settings, weights and buffers, and the code of the package's exporter
as it stands when it is called, patches of a test included. A graph that cannot be described so is exported.
"""

import fcntl
import hashlib
import importlib
import json
import pkgutil
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

_PACKAGES = ("llm2slm_export.authoring.graphs", "llm2slm_export.authoring.exporters", "llm2slm_export.authoring.models")


# Of a module's attributes: what has lines of its own, the directory that a model came from, and how its weights were named there.
_ELSEWHERE = ("_parameters", "_buffers", "_modules", "training", "name_or_path", "_weight_conversions")


class NotDescribed(Exception):
    """A module holds what a key cannot say."""


def cached(export: Callable[..., Any], directory: Path) -> Callable[..., Any]:
    """`export_graph` that looks into `directory` first. Processes may share it; one exports while the others wait.

    Args:
        export: the exporter's own.
    """
    import onnx_ir as ir

    def export_graph(graph: Any, *, contrib: bool = True) -> Any:
        try:
            key = hashlib.sha256("\n".join(_described(graph, contrib)).encode()).hexdigest()
        except NotDescribed:
            return export(graph, contrib=contrib)
        directory.mkdir(parents=True, exist_ok=True)
        entry = directory / key
        with (directory / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not entry.is_dir():
                model = export(graph, contrib=contrib)
                written = directory / f"{key}.partial"
                shutil.rmtree(written, ignore_errors=True)
                written.mkdir()
                ir.save(model, written / "graph.onnx", external_data="graph.data", size_threshold_bytes=0)
                written.rename(entry)
        model = ir.load(entry / "graph.onnx")
        for value in model.graph.initializers.values():
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
        return model

    return export_graph


def _described(graph: Any, contrib: bool) -> Iterator[str]:
    """Lines that say what `graph` computes."""
    yield f"contrib {contrib}"
    yield from (f"{package} {version(package)}" for package in ("torch", "transformers", "onnxscript", "onnx_ir"))
    yield from _code()
    names = {module: name for name, module in graph.named_modules()}
    for module, name in names.items():
        kind = type(module)
        yield f"{name}: {kind.__module__}.{kind.__qualname__}, {module.training}"
        for key, value in sorted(vars(module).items()):
            if key not in _ELSEWHERE and not _is_hook(key, value):
                yield f"  {key} = {_said(value, names)}"
    for name, tensor in [*graph.named_parameters(), *graph.named_buffers()]:
        yield f"{name} {_numbers(tensor)}"


def _numbers(tensor: Any) -> str:
    values = tensor.detach().contiguous().reshape(-1).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(values).hexdigest()}"


def _is_hook(key: str, value: Any) -> bool:
    """Whether an attribute is a table of hooks without any that changes what a module computes."""
    if not key.startswith(("_backward", "_forward", "_state_dict", "_load_state_dict", "_non_persistent", "_is_full")):
        return False
    hooks = value.values() if isinstance(value, dict) else []
    return not value or all(hook.__module__ == "transformers.utils.output_capturing" for hook in hooks)


def _said(value: Any, names: Mapping[Any, str]) -> str:
    """A module's attribute, where it can be said.

    Args:
        names: of the graph's modules.
    """
    said = partial(_said, names=names)
    from torch import Tensor, nn
    from transformers import GenerationConfig, PretrainedConfig

    if isinstance(value, PretrainedConfig):
        settings = {k: v for k, v in value.to_dict().items() if k != "_name_or_path"}
        return json.dumps(settings, sort_keys=True, default=str) + str(value._attn_implementation)
    if isinstance(value, nn.Module) and value in names:
        return f"module {names[value]!r}"
    if isinstance(value, Tensor):
        return _numbers(value)
    if isinstance(value, GenerationConfig):
        return "options"  # `generate`'s, which no graph calls
    if value is None or isinstance(value, str | int | float | bool):
        return repr(value)
    if isinstance(value, list | tuple | set | frozenset):
        parts = [said(v) for v in value]
        return f"{type(value).__name__}({', '.join(sorted(parts) if isinstance(value, set | frozenset) else parts)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{said(k)}: {said(v)}" for k, v in value.items()) + "}"
    if isinstance(value, type | FunctionType):
        return f"{value.__module__}.{value.__qualname__}" + _code_of(value)
    if isinstance(value, partial):
        return f"partial {said(value.func)} {said(value.args)} {said(value.keywords)}"
    if isinstance(value, BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__.startswith("llm2slm_export"):
        return f"{said(type(value))} {said(vars(value))}"
    raise NotDescribed(f"{type(value)}")


def _code() -> Iterator[str]:
    """The package's code that takes part in an export, as it is now."""
    for module in _modules():
        for name, value in sorted(vars(module).items()):
            if isinstance(value, type | FunctionType):
                yield f"{module.__name__}.{name} {_code_of(value)}"
            elif not name.startswith("__") and isinstance(
                value, str | int | float | bool | tuple | dict | frozenset | set
            ):
                yield f"{module.__name__}.{name} {_literal(value)}"


def _literal(value: Any) -> str:
    """As `repr`, and the same in every process: sets are sorted, and what has an address is its type."""
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_literal, value)))}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_literal, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
    if isinstance(value, type | FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    said = repr(value)
    return type(value).__qualname__ if " at 0x" in said else said


def _modules() -> Iterator[ModuleType]:
    for name in _PACKAGES:
        package = importlib.import_module(name)
        yield package
        for info in pkgutil.iter_modules(getattr(package, "__path__", []), f"{name}."):
            yield importlib.import_module(info.name)


def _code_of(value: Any) -> str:
    """A function's bytecode; a class's functions'."""
    if isinstance(value, type):
        if not value.__module__.startswith("llm2slm_export"):
            return value.__qualname__
        functions = [getattr(v, "__func__", v) for _, v in sorted(vars(value).items())]
        return " ".join(_code_of(f) for f in functions if isinstance(f, FunctionType))
    return hashlib.sha256("".join(_constants(value.__code__)).encode()).hexdigest()[:16]


def _constants(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex() + repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _constants(constant)
        else:
            yield _literal(constant)
