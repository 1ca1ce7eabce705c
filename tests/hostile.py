"""Seeded mutations of files that a stranger may have written: bytes, and fields of JSON.

`LLM2SLM_HOSTILE_CASES` says how many cases each property is tried on.
"""

import copy
import os
import random
from typing import Any

CASES = int(os.environ.get("LLM2SLM_HOSTILE_CASES", "200"))

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**53, 2**62, 2**63 - 1, -(2**63), 0.5, -1.5, 1e308, "", "x",
    "0", "../../etc/passwd", "/etc/passwd", "encoder.onnx", "\x1b]0;x\x07", "\ud800", "\u202e", "é", "a" * 10_000, "\0",
    [], [[]], [0], ["x"], [1, 2, 3], {}, {"x": 1}, {"": None}, "batch", "capacity", "float32", "never",
)  # fmt: skip


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Other bytes than these: flipped, cut, put in, taken out, moved, zeroed."""
    while True:
        changed = bytearray(content)
        at, length = rng.randrange(len(content)), rng.randrange(1, 64)
        match rng.randrange(7):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                changed[at:at] = rng.randbytes(length)
            case 3:
                del changed[at : at + length]
            case 4:
                changed[at : at + length] = bytes(len(changed[at : at + length]))
            case 5:
                changed += rng.randbytes(length)
            case _:
                other = rng.randrange(len(content))
                changed[at], changed[other] = changed[other], changed[at]
        if changed != content:
            return bytes(changed)


def mutated_json(value: Any, rng: random.Random) -> tuple[str, Any]:
    """JSON with one place in it changed, and the place's name: another value, nothing, twice, or something more."""
    changed = copy.deepcopy(value)
    places = list(_places(changed, ""))
    name, holder, key = rng.choice(places)
    match rng.randrange(6):
        case 0 | 1 | 2:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        case 3:
            del holder[key]
        case 4:
            _, other, own = rng.choice(places)
            holder[key] = copy.deepcopy(other[own])
        case _:
            old = holder[key]
            holder[key] = old + rng.choice((-1, 1, 1000)) if type(old) is int else [old, old]
    return name, changed


def _places(value: Any, at: str) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        name = f"{at}.{key}" if at else str(key)
        yield name, value, key
        yield from _places(item, name)
