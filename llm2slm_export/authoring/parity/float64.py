"""Float64 reference: unmodified float32 models, computed without rounding to float32.

Models are not converted to float64, because transformers casts to float32 inside norms, softmaxes and rotations, and
because a second copy of a large model's weights needs twice their memory. Instead, a dispatch mode computes every
operator in float64, and converts weights one operator at a time.
"""

import warnings
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_aten = torch.ops.aten
# Views keep their float32 input; the operator that reads the view converts it.
_VIEWS = {_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.view.default, _aten.detach.default}
_TOGETHER = 2**26  # weight elements converted at a time: half a GiB in float64


class Double(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that computes float32 operators in float64, and casts to float32 as casts to float64.

    Weights keep their float32 values; results are in float64. Gradients are not recorded.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> Self:
        self._warnings.__enter__()
        # torch warns that its fused RMSNorm needs one dtype; the unfused one is intended here.
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
            return func(*args, **kwargs)  # in-place operators keep the caller's tensor
        if func is _aten.mm.default:
            return _product(*args)
        if func is _aten.addmm.default and not kwargs:
            return _wide(args[0]) + _product(*args[1:])
        return func(*tree_map(_wide, args), **tree_map(_wide, kwargs))


def _wide(value: Any) -> Any:
    """Convert a float32 tensor to float64, and the dtype float32 to float64; return other values unchanged."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return torch.float64 if value is torch.float32 else value


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[m, k] · [k, n], converting the weight by blocks of columns: an output layer may be a model's largest weight."""
    columns = max(1, _TOGETHER // max(1, right.shape[0]))
    parts = [_wide(left) @ _wide(part) for part in torch.split(right, columns, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
