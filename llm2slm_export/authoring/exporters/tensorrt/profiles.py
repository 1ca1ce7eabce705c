"""Optimization profiles: the minimum, optimum and maximum shapes of an engine's inputs."""

from collections.abc import Mapping
from itertools import pairwise

from llm2slm_export.bundle.manifest import Bounds, EngineLimits
from llm2slm_export.contract import GraphName, PairShape, TensorSpec

# Optimum lengths, as far as the limits allow.
_USUAL_BATCH = 1
_USUAL_PROMPT = 64
_USUAL_CALL = 8  # ids of a decoder call with several tokens

# The most tokens of a decoder call, as far as the cache's capacity allows.
CALL_TOKENS = 16

LengthRange = tuple[int, int, int]  # minimum, optimum, maximum
_NONE: LengthRange = (0, 0, 0)
_ONE: LengthRange = (1, 1, 1)


def engine_limits(
    shape: PairShape,
    *,
    batch: int,
    prompt: int,
    new: int,
    prompt_buckets: tuple[int, ...] = (),
    positions: int | None = None,
) -> EngineLimits:
    """The limits of a pair's engines.

    Args:
        shape: the pair's sizes.
        batch: maximum batch size.
        prompt, new: maximum prompt and response length in tokens.
        prompt_buckets: prompt lengths with a profile each.
        positions: the SLM decoder's positions, which bound the cache's capacity; None: unlimited.
    """
    needed = new + (prompt * shape.context_per_token if shape.slm_kind == "decoder-only" else 0)
    capacity = min(needed, positions or needed)
    return EngineLimits(batch=batch, prompt=prompt, new=new, capacity=capacity, prompt_buckets=prompt_buckets)


def fixed_axes(name: GraphName, limits: EngineLimits) -> dict[str, int]:
    """Axes of one size: the cache has a fixed capacity."""
    return {"capacity": limits.capacity} if name == "decoder" else {}


def profiles(
    name: GraphName,
    shape: PairShape,
    inputs: tuple[TensorSpec, ...],
    limits: EngineLimits,
    *,
    call_tokens: int = CALL_TOKENS,
) -> tuple[dict[str, Bounds], ...]:
    """The profiles of a graph's engine: bounds of each input.

    Encoder and projector have one profile per prompt bucket. The decoder of an encoder-decoder SLM has two per bucket: for
    calls of several tokens and for calls of one token. That of a decoder-only SLM has one per bucket for the prompt pass, and
    one for each kind of call on tokens, which do not depend on the bucket. A call of several tokens returns the logits of each
    of them, the prompt pass of one position of each row. A cache of one position has no calls of several tokens.

    Args:
        call_tokens: the most tokens of a decoder call; the cache's capacity, if that is less.
    """
    batch, lengths = _up_to(_USUAL_BATCH, limits.batch), _lengths(limits)
    each = shape.context_per_token
    contexts = [((low - 1) * each + 1, usual * each, most * each) for low, usual, most in lengths]
    most = min(call_tokens, limits.capacity)
    several = (2, min(_USUAL_CALL, most), most)
    tokens: list[LengthRange] = [several, _ONE] if most > 1 else [_ONE]
    calls: list[Mapping[str, LengthRange]]
    if name != "decoder":
        calls = [{"prompt": length, "context": context} for length, context in zip(lengths, contexts, strict=True)]
    elif shape.slm_kind == "encoder-decoder":
        calls = [{"sequence_length": new, "context": context} for context in contexts for new in tokens]
    else:
        calls = [{"sequence_length": _NONE, "embeds_length": context, "num_logits": _ONE} for context in contexts]
        calls += [{"sequence_length": new, "embeds_length": _NONE, "num_logits": new} for new in tokens]
    return tuple(_bounds(inputs, {"batch": batch, **call}) for call in calls)


def _lengths(limits: EngineLimits) -> list[LengthRange]:
    """Prompt lengths, one range per bucket."""
    if not limits.prompt_buckets:
        return [_up_to(_USUAL_PROMPT, limits.prompt)]
    return [(low + 1, high, high) for low, high in pairwise((0, *limits.prompt_buckets, limits.prompt))]


def _up_to(usual: int, most: int) -> LengthRange:
    return 1, min(usual, most), most


def _bounds(inputs: tuple[TensorSpec, ...], ranges: Mapping[str, LengthRange]) -> dict[str, Bounds]:
    def shape(spec: TensorSpec, which: int) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else ranges[axis][which] for axis in spec.axes)

    return {
        spec.name: Bounds(minimum=shape(spec, 0), optimum=shape(spec, 1), maximum=shape(spec, 2)) for spec in inputs
    }
