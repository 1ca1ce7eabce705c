"""The SLM decoder's attention as one ONNX node per layer, in every family's own modelling code.

transformers calls attention and mask functions by name (its AttentionInterface); here they emit ONNX `Attention` in place
of the eight or so operators that eager attention is. A step of a small SLM is mostly operators, not arithmetic. Keys and
values of the whole capacity go in as the cache has them (`kv_cache.py`): heads first, which is how they are read
fastest (`benchmarks/attention.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask

IMPLEMENTATION = "llm2slm_export"


class _Call:
    """One call of the decoder, and what its layers share.

    Args:
        cross: keys and values of the cross-attention.
        biased: the position bias hides keys that are yet to come; no mask has to.
    """

    def __init__(self, cross: DynamicCache | None, *, biased: bool) -> None:
        self.cross, self.biased = cross, biased
        # By the tensors it is made of, which the entry keeps alive: an id alone may be given out again.
        self._sums: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def added(self, mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
        """What is added to the scores: one sum for all layers that share it."""
        if mask is None or position_bias is None:
            return position_bias if mask is None else mask
        key = id(mask), id(position_bias)
        if key not in self._sums:
            self._sums[key] = mask, position_bias, mask + position_bias
        return self._sums[key][2]


_call: ContextVar[_Call] = ContextVar("call")


class FusedAttention:
    """The attention of an SLM's decoder, as a graph has it.

    Args:
        slm: its own attention is untouched outside `call`.
    """

    def __init__(self, slm: nn.Module) -> None:
        self._slm: Any = slm
        biased: list[Any] = [
            m for m in slm.modules() if getattr(m, "has_relative_attention_bias", False) and m.is_decoder
        ]
        # Before anything is traced, or the graph would hold how the tables are made.
        self._bias_tables = {module: _bias_by_distance(module) for module in biased}

    @contextmanager
    def call(self, cross: DynamicCache | None = None) -> Iterator[None]:
        """Inside, the SLM calls the functions here, if it is being exported: torch cannot compute what they emit.

        Args:
            cross: keys and values that stay.
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
    """A T5's relative position bias [heads, 1 + distances], as its own code makes it for the last of so many positions.

    Looked up by distance, it takes a handful of operators instead of the two dozen that compute a bucket. From
    max_distance on, every distance has the same bucket (T5's `_relative_position_bucket`). The first entry hides keys
    that are yet to come.
    """
    most = module.relative_attention_max_distance
    bias: Tensor = module.compute_bias(1, most + 1, past_seen_tokens=most)  # [1, heads, 1, keys]
    return torch.nn.functional.pad(bias[0, :, 0].flip(1), (1, 0), value=torch.finfo(bias.dtype).min)


def _looked_up_bias(table: Tensor, query_length: Any, key_length: Any, past_seen_tokens: Any = 0, **_: Any) -> Tensor:
    """The bias [1, heads, new, keys] of a table [heads, 1 + distances]; lengths and past in tokens."""
    query = torch.arange(query_length, device=table.device)[:, None] + (past_seen_tokens + 1)
    entry = (query - torch.arange(key_length, device=table.device)[None, :]).clamp(min=0, max=table.shape[1] - 1)
    if not torch.onnx.is_in_onnx_export():
        return table[:, entry][None]
    # Written as indexing it would be a GatherND between two transposes.
    bias = torch.onnx.ops.symbolic(
        "Gather", (table, entry), {"axis": 1}, dtype=table.dtype, shape=(table.shape[0], *entry.shape)
    )
    return bias[None]


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
    """Query [batch, heads, sequence_length, head_dim], key and value [batch, kv heads, keys, head_dim] → [batch, sequence_length, heads, head_dim]."""
    call = _call.get()
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    crossed = call.cross is not None and key is call.cross.layers[module.layer_idx].keys
    # The position bias of a cross-attention, where a family has the argument, is zeros.
    bias = attention_mask if crossed else call.added(attention_mask, position_bias)
    if softcap is not None:
        return _softcapped(query, key, value, bias, scale=scale, softcap=softcap), None
    # The operator would multiply the keys too, each time all of them, by the root of another scale than 1.
    scaled = query if scale == 1 else query * scale
    attended = torch.onnx.ops.symbolic(
        "Attention", (scaled, key, value, bias), {"scale": 1.0}, dtype=query.dtype, shape=query.shape
    )
    return attended.transpose(1, 2), None


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float, softcap: float
) -> Tensor:
    """Attention whose scores are bounded (Gemma 2), in plain operators. Query [batch, heads, sequence_length, head_dim], key and value
    [batch, kv heads, keys, head_dim] → [batch, sequence_length, heads, head_dim].

    ONNX Runtime's releases disagree on `softcap` of `Attention`: 1.25 adds the mask before it bounds the scores, so that
    a hidden key is not hidden, 1.32 after. A bundle must be right on both.
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
    **others: Any,
) -> Tensor | None:
    """What hides keys, added to the scores: [batch or 1, 1, new, keys]; None where nothing does.

    Windows and the like: as eager attention has them, which takes twice the operators.
    """
    if mask_function is causal_mask_function and not (_call.get().biased and attention_mask is None):
        query = torch.arange(q_length, device=device)[:, None] + q_offset
        seen = (torch.arange(kv_length, device=device)[None, :] <= query)[None, None]
        seen = seen if attention_mask is None else seen & attention_mask.bool()[:, None, None, :]
    elif mask_function in (causal_mask_function, bidirectional_mask_function):
        if attention_mask is None:
            return None
        # ONNX Runtime wants every query's row of it.
        seen = attention_mask.bool()[:, None, None, :].expand(-1, -1, q_length, -1)
    else:
        windowed: Tensor = eager_mask(
            q_length=q_length, kv_length=kv_length, q_offset=q_offset, mask_function=mask_function,
            attention_mask=attention_mask, dtype=dtype, device=device, **others,
        )  # fmt: skip
        return windowed
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
