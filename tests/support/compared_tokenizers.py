"""A tokenizer in Python and in the C++ library's test program: the same ids and the same text for each text."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.support.tokenizer_cases import Json

NUL = "\u2400\u2400"


def outcome_here(path: Path, texts: list[str], *, split: bool = False, plain: bool = False) -> list[Any]:
    """What Python gives for each text: ids, whether the last was added, and the text again; None where it fails.

    Args:
        split: take special tokens for text.
        plain: add none.
    """
    ours = Tokenizer.from_file(str(path))
    ours.encode_special_tokens = split
    ours.no_padding()
    ours.no_truncation()
    found: list[Any] = []
    for text in texts:
        try:
            encoding = ours.encode(text, add_special_tokens=not plain)
            decoded = ours.decode(encoding.ids, skip_special_tokens=True)
        except BaseException as error:  # a panic of Rust is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            found.append(None)
            continue
        special = bool(encoding.ids) and encoding.special_tokens_mask[-1] == 1
        found.append((encoding.ids, special, decoded))
    return found


def outcome_there(
    program: Path, path: Path, texts: list[str], *, split: bool = False, plain: bool = False
) -> list[Any]:
    """The same of the C++ program."""
    data = "".join(text.replace("\0", NUL) + "\0" for text in texts).encode()
    flags = ["--time", *(["--split"] if split else []), *(["--plain"] if plain else [])]
    done = subprocess.run([program, path, *flags], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    size = Tokenizer.from_file(str(path)).get_vocab_size(with_added_tokens=True)
    assert json.loads(done.stderr.decode().splitlines()[-1])["size"] == size
    lines = [json.loads(line) for line in done.stdout.decode().split("\n") if line]
    return [None if "error" in line else (line["ids"], line["special"], line["text"]) for line in lines]


def compare(program: Path, path: Path, texts: list[str], **flags: bool) -> None:
    here, there = outcome_here(path, texts, **flags), outcome_there(program, path, texts, **flags)
    assert len(there) == len(texts)
    different = [(text, a, b) for text, a, b in zip(texts, here, there, strict=True) if a != b]
    assert not different, f"{len(different)} of {len(texts)} differ, the first: {ascii(different[0])[:2000]}"


def written(tmp_path: Path, description: Json) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
    return path
