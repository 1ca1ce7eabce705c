"""transformers' caches, filled from a graph's inputs and read into its outputs."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class FirstUpdate(DynamicLayer):
    """A layer that holds what it is first given: `DynamicLayer` would append it to a rank-1 empty tensor, which has no
    ONNX equivalent."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class ScatteredLayer(DynamicLayer):
    """A layer with room for more positions than it holds, as transformers' `StaticLayer`: a call's are written behind
    those before (ONNX TensorScatter, which runtimes run in place).

    Args:
        key, value: each [batch, heads, capacity, head_dim].
        length: [1] how many positions they hold.
    """

    def __init__(self, key: Tensor, value: Tensor, length: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = key.dtype, key.device, True
        self.keys, self.values, self._length = key, value, length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Key and value of the whole capacity, the call's positions among them."""
        self.keys, self.values = self._with(self.keys, key_states), self._with(self.values, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """As a tensor, [], like `StaticLayer`'s; of the positions before the call."""
        return self._length[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """The whole capacity, from its first position on."""
        return self.keys.shape[2], 0

    def _with(self, held: Tensor, new: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return held.index_copy(2, self._length + torch.arange(new.shape[2], device=new.device), new)
        indices = self._length.expand(new.shape[0])
        written: Tensor = torch.onnx.ops.symbolic(
            "TensorScatter", (held, new, indices), {"axis": 2, "mode": "linear"}, dtype=held.dtype, shape=held.shape
        )
        return written


def empty_cache(layers: int) -> DynamicCache:
    """A cache that keeps what one call computes."""
    cache = DynamicCache()
    cache.layers.extend(FirstUpdate() for _ in range(layers))
    return cache


def filled_cache(flat: list[Tensor]) -> DynamicCache:
    """A cache that holds key and value of every layer: [key 0, value 0, key 1, …], each [batch, heads, length, head_dim].

    The layers' fields are set, not appended to, for the reason `FirstUpdate` exists. No layer slides: where a model
    has a window, its mask cuts it out of the whole past.
    """
    cache = DynamicCache()
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        layer: Any = DynamicLayer()
        layer.dtype, layer.device, layer.keys, layer.values = key.dtype, key.device, key, value
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def scattered_cache(flat: list[Tensor], length: Tensor) -> DynamicCache:
    """A decoder's cache before a call: `flat` as for `filled_cache`, of which `length` [1] positions are held."""
    cache = DynamicCache()
    cache.layers.extend(ScatteredLayer(key, value, length) for key, value in zip(flat[::2], flat[1::2], strict=True))
    return cache


def flat_cache(cache: Any) -> list[Tensor]:
    """[key 0, value 0, key 1, …] of every layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
