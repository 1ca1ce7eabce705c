"""transformers' caches, filled from a graph's inputs and read into its outputs."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class FirstUpdate(DynamicLayer):
    """A layer that holds what it is first given: `DynamicLayer` would append it to a rank-1 empty tensor, which has no
    ONNX equivalent."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class PastLayer(DynamicLayer):
    """A layer's past and what a call adds to it, apart: the operator joins them.

    Args:
        key, value: the past, each [batch, heads, past, d_head].
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = key.dtype, key.device, True
        self.keys, self.values = key, value
        self.past, self.new = (key, value), (key, value)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Key and value of past and call, joined: of these, a model's code reads shapes alone."""
        self.new = (key_states, value_states)
        joined: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        return joined


def empty_cache(layers: int) -> DynamicCache:
    """A cache that keeps what one call computes."""
    cache = DynamicCache()
    cache.layers.extend(FirstUpdate() for _ in range(layers))
    return cache


def filled_cache(flat: list[Tensor]) -> DynamicCache:
    """A cache that holds key and value of every layer: [key 0, value 0, key 1, …], each [batch, heads, past, d_head].

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


def past_cache(flat: list[Tensor]) -> DynamicCache:
    """A decoder's cache before a call: `flat` as for `filled_cache`, what the call adds kept apart."""
    cache = DynamicCache()
    cache.layers.extend(PastLayer(key, value) for key, value in zip(flat[::2], flat[1::2], strict=True))
    return cache


def flat_cache(cache: Any) -> list[Tensor]:
    """[key 0, value 0, key 1, …] of every layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
