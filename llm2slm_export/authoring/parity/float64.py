"""Float64: what unmodified models compute where nothing is rounded to float32 on the way.

Models are not converted, since transformers casts to float32 inside its norms, softmaxes and rotations, and a large model's
weights would take twice their memory again. A dispatch mode computes every operator in float64 instead, and converts
weights where they are used, one operator at a time.
"""

import warnings
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_aten = torch.ops.aten
# Their float32 input stays as it is: the next operator converts what it needs of it.
_VIEWS = {_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.view.default, _aten.detach.default}
_TOGETHER = 2**26  # numbers of a weight that are converted at a time: half a GiB


class Double(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, operators take float32 as float64, and give float64 where they are asked for float32.

    Weights keep their float32 values; only what is computed from them is exact. Gradients are not recorded.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> Self:
        self._warnings.__enter__()
        # torch's RMS norm has no fused code for float64 states and a float32 weight; none is wanted here.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._warnings.__exit__(*error)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _VIEWS:
            return func(*args, **kwargs)
        if func is _aten.embedding.default:
            rows: Tensor = func(*args, **kwargs)
            return _wide(rows)
        if func._schema.is_mutable and isinstance(args[0], Tensor) and args[0].dtype == torch.float32:
            return func(*args, **kwargs)  # the caller keeps its own tensor
        if func is _aten.mm.default:
            return _product(*args)
        if func is _aten.addmm.default and not kwargs:
            return _wide(args[0]) + _product(*args[1:])
        return func(*tree_map(_wide, args), **tree_map(_wide, kwargs))


def _wide(value: Any) -> Any:
    """A float32 tensor in float64, float64 for the type float32, and anything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return torch.float64 if value is torch.float32 else value


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[m, k] · [k, n], the weight converted some columns at a time: an output layer's may be a model's largest."""
    columns = max(1, _TOGETHER // max(1, right.shape[0]))
    parts = [_wide(left) @ _wide(part) for part in torch.split(right, columns, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
