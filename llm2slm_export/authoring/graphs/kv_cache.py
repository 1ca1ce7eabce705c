"""transformers' caches: filled from a graph's inputs, flattened into its outputs."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class FirstUpdate(DynamicLayer):
    """A layer that holds the keys and values of its first update.

    `DynamicLayer` would append them to an empty tensor of rank 1, which has no ONNX equivalent.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Hold the call's keys and values, and return them."""
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class ScatteredLayer(DynamicLayer):
    """A layer with spare capacity, like transformers' `StaticLayer`.

    A call's keys and values are written behind the earlier ones, with ONNX TensorScatter, which runtimes run in place.

    Args:
        key, value: each [batch, num_key_value_heads, capacity, head_dim].
        length: [batch], each row's number of positions taken.
    """

    def __init__(self, key: Tensor, value: Tensor, length: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = key.dtype, key.device, True
        self.keys, self.values, self._length = key, value, length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole capacity, including the call's."""
        self.keys, self.values = self._with(self.keys, key_states), self._with(self.values, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Each row's number of positions before the call, [batch, 1]: a term of transformers' position ids.

        Outside of an export it is a scalar tensor like `StaticLayer`'s, of the first row.
        """
        return self._length[:, None] if torch.onnx.is_in_onnx_export() else self._length[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """The mask's length and offset: the whole capacity, from position 0."""
        return self.keys.shape[2], 0

    def _with(self, held: Tensor, new: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return held.index_copy(2, self._length[:1] + torch.arange(new.shape[2], device=new.device), new)
        written: Tensor = torch.onnx.ops.symbolic(
            "TensorScatter",
            (held, new, self._length),
            {"axis": 2, "mode": "linear"},
            dtype=held.dtype,
            shape=held.shape,
        )
        return written


def empty_cache(layers: int) -> DynamicCache:
    """A cache that holds the keys and values of one call."""
    cache = DynamicCache()
    cache.layers.extend(FirstUpdate() for _ in range(layers))
    return cache


def filled_cache(flat: list[Tensor]) -> DynamicCache:
    """A cache with the given keys and values.

    Fields of the layers are set directly, because `DynamicLayer` appends (see `FirstUpdate`). No layer slides: in a
    model with a sliding window, the mask selects the window from the whole past.

    Args:
        flat: [key 0, value 0, key 1, …], each [batch, num_key_value_heads, length, head_dim].
    """
    cache = DynamicCache()
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        layer: Any = DynamicLayer()
        layer.dtype, layer.device, layer.keys, layer.values = key.dtype, key.device, key, value
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def scattered_cache(flat: list[Tensor], length: Tensor) -> DynamicCache:
    """A decoder's cache before a call: `flat` as for `filled_cache`, with `length` [batch] positions taken."""
    cache = DynamicCache()
    cache.layers.extend(ScatteredLayer(key, value, length) for key, value in zip(flat[::2], flat[1::2], strict=True))
    return cache


def flat_cache(cache: Any) -> list[Tensor]:
    """The cache's tensors: [key 0, value 0, key 1, …]."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
