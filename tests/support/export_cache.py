"""Traces that tests share: nine tenths of the suite's time are torch's exporter, on the same few tiny graphs over and over.

A trace depends on the modules' classes, settings, shapes and buffers, and on the code of graphs and models as it stands when it is
called, patches of a test included: that is its key. Weights are not part of it, nor are tables made of them: the exporter refers to
them, and a trace that is read again refers to the graph's own. A graph that cannot be described so is traced.
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

_PACKAGES = ("llm2slm_export.authoring.graphs", "llm2slm_export.authoring.models")
_EXPORTER = "llm2slm_export.authoring.exporters.onnx.export"

# Of a module's attributes: what has lines of its own, the directory that a model came from, and how its weights were named there.
_ELSEWHERE = ("_parameters", "_buffers", "_modules", "training", "name_or_path", "_weight_conversions")

# Of a configuration's settings: the directory that it came from, and how weights are drawn.
_ELSEWHERE_IN_CONFIG = ("_name_or_path", "initializer_factor", "initializer_range")

# Types of the constants of a module. Not their subclasses: transformers' mappings of all its models are dicts, which load them.
_LITERALS = (str, int, float, bool, tuple, dict, frozenset, set)


class NotDescribed(Exception):
    """A module holds what a key cannot say."""


def cached(trace: Callable[..., Any], directory: Path) -> Callable[..., Any]:
    """`trace` that looks into `directory` first. Processes may share it; one traces while the others wait.

    Args:
        trace: the exporter's own.
    """

    def looked_up(graph: Any) -> Any:
        try:
            key = hashlib.sha256("\n".join(_described(graph)).encode()).hexdigest()
        except NotDescribed:
            return trace(graph)
        directory.mkdir(parents=True, exist_ok=True)
        entry = directory / key
        with (directory / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not entry.is_dir():
                model = trace(graph)
                names = _weights_of(model, graph)
                if names is None:
                    return model
                written = directory / f"{key}.partial"
                shutil.rmtree(written, ignore_errors=True)
                written.mkdir()
                _write(model, names, written)
                written.rename(entry)
        return _read(entry, graph)

    looked_up.uncached = trace  # type: ignore[attr-defined]
    return looked_up


def _weights_of(model: Any, graph: Any) -> dict[str, str] | None:
    """The weight that each initializer is, by the initializer's name; None where a large one is no weight as it is."""
    weights = {(weight.data_ptr(), weight.shape): name for name, weight in _named_weights(graph).items()}
    names: dict[str, str] = {}
    for name, value in model.graph.initializers.items():
        tensor = getattr(value.const_value, "raw", None)
        place = (tensor.data_ptr(), tensor.shape) if hasattr(tensor, "data_ptr") else None
        if place in weights:
            names[name] = weights[place]
        elif value.const_value.size > 64 and name not in dict(graph.named_buffers()):
            return None  # computed from weights, perhaps
    return names


def _named_weights(graph: Any) -> dict[str, Any]:
    """A graph's parameters, and the tables that the decoder's attention makes of some, by name."""
    tables = vars(graph.attention)["_bias_tables"].values() if hasattr(graph, "attention") else ()
    return dict(graph.named_parameters()) | {f"table {number}": table for number, table in enumerate(tables)}


def _write(model: Any, names: Mapping[str, str], directory: Path) -> None:
    """Save a traced model without its weights."""
    import numpy as np
    import onnx_ir as ir

    for name in names:
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(np.zeros(0, np.float32), name=name)
    ir.save(model, directory / "graph.onnx")
    (directory / "weights.json").write_text(json.dumps(names), encoding="utf-8")


def _read(directory: Path, graph: Any) -> Any:
    """A saved trace, with the weights of `graph` as its initializers."""
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    model = ir.load(directory / "graph.onnx")
    weights = _named_weights(graph)
    for name, weight in json.loads((directory / "weights.json").read_text(encoding="utf-8")).items():
        value = model.graph.initializers[name]
        value.const_value = TorchTensor(weights[weight], name=name)
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    return model


def _described(graph: Any) -> Iterator[str]:
    """Lines that say what `graph` computes, but for its weights' values."""
    yield from (f"{package} {version(package)}" for package in ("torch", "transformers", "onnxscript", "onnx_ir"))
    yield from _code(type(graph))
    names = {module: name for name, module in graph.named_modules()}
    for module, name in names.items():
        kind = type(module)
        yield f"{name}: {kind.__module__}.{kind.__qualname__}, {module.training}"
        for key, value in sorted(vars(module).items()):
            if key not in _ELSEWHERE and not _is_hook(key, value):
                yield f"  {key} = {_text_of(value, names)}"
    first: dict[int, str] = {}
    for name, parameter in graph.named_parameters(remove_duplicate=False):
        yield f"{name} {parameter.dtype} {list(parameter.shape)} {first.setdefault(parameter.data_ptr(), name)}"
    yield from (f"{name} {_numbers(buffer)}" for name, buffer in graph.named_buffers())


def _numbers(tensor: Any) -> str:
    values = tensor.detach().contiguous().reshape(-1).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(values).hexdigest()}"


def _is_hook(key: str, value: Any) -> bool:
    """Whether an attribute is a table of hooks without any that changes what a module computes."""
    if not key.startswith(("_backward", "_forward", "_state_dict", "_load_state_dict", "_non_persistent", "_is_full")):
        return False
    hooks = value.values() if isinstance(value, dict) else []
    return not value or all(hook.__module__ == "transformers.utils.output_capturing" for hook in hooks)


def _text_of(value: Any, names: Mapping[Any, str]) -> str:
    """A module's attribute, where it can be said.

    Args:
        names: of the graph's modules.
    """
    text = partial(_text_of, names=names)
    from torch import Tensor, nn
    from transformers import GenerationConfig, PretrainedConfig

    from llm2slm_export.authoring.graphs.attention import FusedAttention

    if isinstance(value, FusedAttention):
        shapes = {names[module]: (table.dtype, list(table.shape)) for module, table in value._bias_tables.items()}
        return f"{text(type(value))} {shapes}"
    if isinstance(value, PretrainedConfig):
        settings = {k: v for k, v in value.to_dict().items() if k not in _ELSEWHERE_IN_CONFIG}
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
        parts = [text(v) for v in value]
        return f"{type(value).__name__}({', '.join(sorted(parts) if isinstance(value, set | frozenset) else parts)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{text(k)}: {text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, type | FunctionType):
        return f"{value.__module__}.{value.__qualname__}" + _code_of(value)
    if isinstance(value, partial):
        return f"partial {text(value.func)} {text(value.args)} {text(value.keywords)}"
    if isinstance(value, BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__.startswith("llm2slm_export"):
        return f"{text(type(value))} {text(vars(value))}"
    raise NotDescribed(f"{type(value)}")


def _code(kind: type) -> Iterator[str]:
    """The package's code that takes part in a trace of this class of graph, as it is now."""
    from llm2slm_export.authoring.graphs.graph import Graph

    exporter = importlib.import_module(_EXPORTER)
    yield f"opset {exporter.OPSET}"
    for module in _modules():
        for name, value in sorted(vars(module).items()):
            if isinstance(value, type) and issubclass(value, Graph) and not issubclass(kind, value):
                continue  # another graph's
            if isinstance(value, type | FunctionType):
                yield f"{module.__name__}.{name} {_code_of(value)}"
            elif not name.startswith("__") and type(value) in _LITERALS:
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
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


def _modules() -> Iterator[ModuleType]:
    for name in _PACKAGES:
        package = importlib.import_module(name)
        yield package
        for info in pkgutil.walk_packages(package.__path__, f"{name}."):
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
