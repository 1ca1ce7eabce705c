"""The SLM decoder's attention as one ONNX `Attention` node per layer, within each family's own modelling code.

transformers' AttentionInterface calls attention and mask functions by name. The functions here emit ONNX `Attention`,
which replaces the eight or so operators of eager attention: a step of a small SLM spends most of its time on operator
overhead. Keys and values are passed at full capacity, in the layout of the cache (`kv_cache.py`). That layout is heads
first, the fastest to read (`benchmarks/attention.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

IMPLEMENTATION = "llm2slm_export"


class _Call:
    """State that the layers of one decoder call share.

    Args:
        cross: keys and values of the cross-attention.
        biased: the position bias already hides future keys, so that no causal mask is needed.
    """

    def __init__(self, cross: DynamicCache | None, *, biased: bool) -> None:
        self.cross, self.biased = cross, biased
        # Keyed by the ids of both tensors. The entry keeps them alive, because Python reuses the ids of freed objects.
        self._sums: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def added(self, mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
        """The additive bias of the scores. Layers with the same mask and position bias share one sum."""
        if mask is None or position_bias is None:
            return position_bias if mask is None else mask
        key = id(mask), id(position_bias)
        if key not in self._sums:
            self._sums[key] = mask, position_bias, mask + position_bias
        return self._sums[key][2]


_call: ContextVar[_Call] = ContextVar("call")


class FusedAttention:
    """Attention of an SLM's decoder for export.

    Args:
        slm: the SLM; its own attention is restored after each `call`.
    """

    def __init__(self, slm: nn.Module) -> None:
        self._slm: Any = slm
        biased: list[Any] = [
            m for m in slm.modules() if getattr(m, "has_relative_attention_bias", False) and m.is_decoder
        ]
        # Computed before tracing: a traced computation would become part of the graph.
        self._bias_tables = {module: _bias_by_distance(module) for module in biased}

    @contextmanager
    def call(self, cross: DynamicCache | None = None) -> Iterator[None]:
        """Replace the SLM's attention within the block, during export only: torch cannot compute the emitted operators.

        Args:
            cross: the cross-attention's keys and values.
        """
        if not torch.onnx.is_in_onnx_export():
            yield
            return
        before = self._slm.config._attn_implementation
        self._slm.set_attn_implementation(IMPLEMENTATION)
        token = _call.set(_Call(cross, biased=bool(self._bias_tables)))
        for module, table in self._bias_tables.items():
            module.compute_bias = partial(_looked_up_bias, table)
        try:
            yield
        finally:
            for module in self._bias_tables:
                del module.compute_bias
            _call.reset(token)
            self._slm.set_attn_implementation(before)


@torch.no_grad()
def _bias_by_distance(module: Any) -> Tensor:
    """A T5's relative position bias by distance, [heads, 1 + distances], from its own `compute_bias`.

    Looking up a distance takes a handful of operators, computing its bucket two dozen. All distances from max_distance
    on share one bucket (T5's `_relative_position_bucket`). The first entry hides future keys.
    """
    most = module.relative_attention_max_distance
    bias: Tensor = module.compute_bias(1, most + 1, past_seen_tokens=most)  # [1, heads, 1, keys]
    return torch.nn.functional.pad(bias[0, :, 0].flip(1), (1, 0), value=torch.finfo(bias.dtype).min)


def _looked_up_bias(table: Tensor, query_length: Any, key_length: Any, past_seen_tokens: Tensor, **_: Any) -> Tensor:
    """The position bias [batch, heads, sequence_length, keys] from a table [heads, 1 + distances].

    Args:
        query_length, key_length: in tokens.
        past_seen_tokens: [batch, 1], each row's tokens before the call.
    """
    query = (torch.arange(query_length, device=table.device) + (past_seen_tokens + 1))[:, :, None]
    entry = (query - torch.arange(key_length, device=table.device)).clamp(min=0, max=table.shape[1] - 1)
    if not torch.onnx.is_in_onnx_export():
        return table[:, entry].transpose(0, 1)
    # Indexing would export as a GatherND between two transposes.
    bias = torch.onnx.ops.symbolic(
        "Gather", (table, entry), {"axis": 1}, dtype=table.dtype, shape=(table.shape[0], *entry.shape)
    )
    return bias.transpose(0, 1)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' AttentionInterface.

    Args:
        query: [batch, heads, sequence_length, head_dim]
        key, value: [batch, num_key_value_heads, keys, head_dim]

    Returns:
        [batch, sequence_length, heads, head_dim]
    """
    call = _call.get()
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    crossed = call.cross is not None and key is call.cross.layers[module.layer_idx].keys
    # Families that pass a position bias to cross-attention pass zeros.
    bias = attention_mask if crossed else call.added(attention_mask, position_bias)
    if softcap is not None:
        return _softcapped(query, key, value, bias, scale=scale, softcap=softcap), None
    # With a scale other than 1, the operator multiplies the query and, in each call, all keys by its square root.
    scaled = query if scale == 1 else query * scale
    attended = torch.onnx.ops.symbolic(
        "Attention", (scaled, key, value, bias), {"scale": 1.0}, dtype=query.dtype, shape=query.shape
    )
    return attended.transpose(1, 2), None


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float, softcap: float
) -> Tensor:
    """Attention with bounded scores (Gemma 2), in basic operators; shapes as `_attention`.

    The `softcap` attribute of `Attention` is not used, because ONNX Runtime's releases disagree on it: 1.25 adds the
    mask before it bounds the scores, which unhides masked keys; 1.32 adds it afterwards. A bundle must be right on
    both.
    """
    batch, kv_heads, keys, head_dim = key.shape
    heads = query.shape[1]

    def repeated(states: Tensor) -> Tensor:
        grouped = states[:, :, None].expand(-1, -1, heads // kv_heads, -1, -1)
        return grouped.reshape(batch, heads, keys, head_dim)

    scores = softcap * torch.tanh(query @ repeated(key).transpose(2, 3) * (scale / softcap))
    weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    return (weights @ repeated(value)).transpose(1, 2)


def _mask(
    *,
    q_length: Any,
    kv_length: Any,
    q_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The additive mask [batch, 1, sequence_length, keys]; None if no key is hidden.

    The decoder's own positions are hidden by each row's length alone (`q_offset` [batch, 1]): `attention_mask` counts for
    the cross-attention only.
    """
    if mask_function is bidirectional_mask_function:
        if attention_mask is None:
            return None
        # ONNX Runtime requires one mask row per query.
        seen = attention_mask.bool()[:, None, None, :].expand(-1, -1, q_length, -1)
    elif mask_function is causal_mask_function and _call.get().biased:
        return None
    else:
        query = (torch.arange(q_length, device=device) + q_offset)[:, None, :, None]
        key = torch.arange(kv_length, device=device)[None, None, None, :]
        # Sliding windows and other mask functions take indices of the row and the head too, and read neither.
        unread = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
        seen = key <= query if mask_function is causal_mask_function else mask_function(unread, unread, query, key)
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
