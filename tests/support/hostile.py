"""Seeded mutations of files that a stranger may have written: bytes, and fields of JSON.

`LLM2SLM_HOSTILE_CASES` says how many cases each property is tried on.
"""

import copy
import os
import random
from typing import Any

CASES = int(os.environ.get("LLM2SLM_HOSTILE_CASES", "200"))

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**53, 2**62, 2**63 - 1, -(2**63), 2**70, 0.5, -1.5, 1e308,
    float("inf"), float("-inf"), float("nan"), "", "x",
    "0", "../../etc/passwd", "/etc/passwd", "encoder.onnx", "\x1b]0;x\x07", "\ud800", "\u202e", "é", "a" * 10_000, "\0",
    [], [[]], [0], ["x"], [1, 2, 3], {}, {"x": 1}, {"": None}, "batch", "capacity", "float32", "never",
)  # fmt: skip
DATA_FILES = {
    "x.jsonl": b'{"prompt": "How are you?", "response": "Fine."}\n{"prompt": "\xc3\xa9", "response": "e"}\n' * 4,
    "x.tsv": b"prompt\tresponse\nHow are you?\tFine.\n\xc3\xa9\te\n" * 4,
    "x.csv": b'prompt,response\n"How, are ""you""?","Fine\nthanks."\n\xc3\xa9,e\n' * 4,
    "x.txt": b"How are you?\n\xc3\xa9\n" * 4,
}
PUT_INTO_DATA = [
    b"\x00", b"\x00" * 500, b'"', b"\t", b",", b"\n", b"\r", b"\r\n", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"{", b"[" * 5000,
    b"a" * 140_000, b"9" * 5000, b"\\ud800", b"NaN", b"null", b"\xe2\x80\xa8", b"\x1b]0;x\x07", b"\x85", b"",
]  # fmt: skip
PUT_INTO_YAML = [
    b"{", b"}", b"[", b"]", b": ", b"- ", b"&a ", b"*a", b"!!int ", b"!!float ", b"!!timestamp ", b"!!bool ", b"!!python/name:os ",
    b"!!set ", b"!!omap ", b"!!binary ", b".inf", b".nan", b"-1", b"1e999", b"1" * 5000, b"[" * 2000, b"{a: " * 2000, b"\x00",
    b"\xff", b"\xef\xbb\xbf", b"2001-13-41", b"1:30", b"<<: ", b"? ", b"| ", b"\t", b"'", b'"\\ud800"', b"%YAML 9.9\n", b"---\n",
]  # fmt: skip


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
