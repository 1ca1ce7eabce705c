"""What a worker and the driver say to each other.

`prepare` converts a model once and exits. `serve` loads what was prepared, says so in one line of JSON, and then answers
each line {"new": N} with {"ms": [N], "ids": [N]}: when each token was known, in ms since the call began, and which it was.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """What every worker is given.

    Args:
        model: a directory that transformers' `save_pretrained` wrote, with a tokenizer and `task.json`.
        prepared: what `prepare` made of it; an empty directory there.
        threads: inside one operator.
    """

    model: Path
    prepared: Path
    precision: str
    threads: int

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return self._json("config.json")

    @property
    def seq2seq(self) -> bool:
        """Whether the model has an encoder of its own."""
        return bool(self.config.get("is_encoder_decoder"))

    @property
    def text(self) -> str:
        """The prompt."""
        return str(self._json("task.json")["text"])

    @property
    def ids(self) -> list[int]:
        """The prompt's token ids, with what the tokenizer puts around them."""
        return list(self._json("task.json")["ids"])

    @property
    def eos(self) -> int:
        """The token that must not be written."""
        return int(self._json("task.json")["eos"])

    def _json(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.model / name).read_text(encoding="utf-8"))
        return found


Tell = Callable[[int], object]
Write = Callable[[int, Tell], object]  # `write(new, tell)`: tells each of `new` tokens as soon as it is known
Encode = Callable[[Any], Any]  # ids [1, prompt] → hidden states [1, prompt, width], arrays of numpy
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def main(prepare: Callable[[Task], object], load: Callable[[Task], Write], packages: Iterable[str]) -> None:
    """Run a worker that writes.

    Args:
        packages: whose versions go with its figures.
    """
    _serve(prepare, lambda task: partial(_written, load(task)), packages)


def main_encoder(prepare: Callable[[Task], object], load: Callable[[Task], Encode], packages: Iterable[str]) -> None:
    """Run a worker that encodes. It answers {"tokens": N, "calls": C, "out": PATH} with {"ms": [C]}, and saves what it
    made of the prompt, the same for all, as [N, width] in PATH where that is not null."""
    _serve(prepare, lambda task: partial(_encoded, load(task)), packages)


def _serve(prepare: Callable[[Task], object], load: Callable[[Task], Answer], packages: Iterable[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["prepare", "serve"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = vars(parser.parse_args())
    command, task = given.pop("command"), Task(**given)
    # What libraries print, from C++ too, goes to stderr: stdout is the protocol's.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if command == "prepare":
        prepare(task)
        return

    def answer(said: dict[str, Any]) -> None:
        print(json.dumps(said), file=answers, flush=True)

    loaded = load(task)
    answer({"versions": {package: importlib.metadata.version(package) for package in packages}})
    for line in sys.stdin:
        answer(loaded(json.loads(line)))


def _written(write: Write, asked: dict[str, Any]) -> dict[str, Any]:
    ids: list[int] = []
    ms: list[float] = []

    def tell(token: int) -> None:
        ms.append(time.perf_counter() * 1e3)
        ids.append(int(token))

    started = time.perf_counter() * 1e3
    write(int(asked["new"]), tell)
    return {"ms": [round(at - started, 4) for at in ms], "ids": ids}


def _encoded(encode: Encode, asked: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    ids = np.random.default_rng(0).integers(10, 30_000, (1, int(asked["tokens"])))
    ms = []
    for _ in range(int(asked["calls"])):
        started = time.perf_counter() * 1e3
        hidden = encode(ids)
        ms.append(round(time.perf_counter() * 1e3 - started, 4))
    if asked["out"]:
        np.save(asked["out"], np.asarray(hidden, np.float32)[0])
    return {"ms": ms}
