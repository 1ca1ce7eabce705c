"""What shapes an engine takes: the axes of the contract, and how long each may be."""

from collections.abc import Mapping

from llm2slm_export.bundle import Bounds, EngineLimits
from llm2slm_export.contract import GraphName, PairShape, TensorSpec

# Lengths that engines are made fastest at, where the limits allow as much.
_USUAL_BATCH = 1
_USUAL_PROMPT = 64
_USUAL_CALL = 8  # ids given to a decoder call of several

Range = tuple[int, int, int]  # minimum, optimum, maximum


def engine_limits(shape: PairShape, *, batch: int, prompt: int, new: int, positions: int | None = None) -> EngineLimits:
    """The limits of a pair's engines.

    Args:
        positions: those that the SLM's decoder knows, where it knows a limited number; the cache has room for no more.
    """
    needed = new + (prompt * shape.memory_per_prompt if shape.slm_kind == "decoder-only" else 0)
    return EngineLimits(batch=batch, prompt=prompt, new=new, capacity=min(needed, positions or needed))


def fixed_axes(name: GraphName, limits: EngineLimits) -> dict[str, int]:
    """Axes that an engine has one size of: TensorRT's cache has a fixed capacity, and a call keeps one position's logits."""
    return {"capacity": limits.capacity, "kept": 1} if name == "decoder" else {}


def profiles(
    name: GraphName, shape: PairShape, inputs: tuple[TensorSpec, ...], limits: EngineLimits
) -> tuple[dict[str, Bounds], ...]:
    """What a graph's engine takes, input by input.

    Encoder and projector have one profile. The decoder has two: 0 for a call of several tokens (decoder-only: the prompt
    pass), 1 for a call of one.
    """
    prompt = _up_to(_USUAL_PROMPT, limits.prompt)
    memory = tuple(size * shape.memory_per_prompt for size in prompt)
    shared: dict[str, Range] = {
        "batch": _up_to(_USUAL_BATCH, limits.batch), "prompt": prompt,
        "memory": (1, memory[1], memory[2]),
    }  # fmt: skip
    if name != "decoder":
        return (_bounds(inputs, shared),)
    if shape.slm_kind == "encoder-decoder":
        calls: list[Mapping[str, Range]] = [{"new": _up_to(_USUAL_CALL, limits.capacity)}, {"new": (1, 1, 1)}]
    else:
        calls = [{"new": (0, 0, 0), "embedded": shared["memory"]}, {"new": (1, 1, 1), "embedded": (0, 0, 0)}]
    return tuple(_bounds(inputs, shared | dict(call)) for call in calls)


def _up_to(usual: int, most: int) -> Range:
    return 1, min(usual, most), most


def _bounds(inputs: tuple[TensorSpec, ...], ranges: Mapping[str, Range]) -> dict[str, Bounds]:
    def shape(spec: TensorSpec, which: int) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else ranges[axis][which] for axis in spec.axes)

    return {
        spec.name: Bounds(minimum=shape(spec, 0), optimum=shape(spec, 1), maximum=shape(spec, 2)) for spec in inputs
    }
