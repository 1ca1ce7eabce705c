"""Fetch Debian's English package descriptions, long description → synopsis, and split them by source package.

Writes into OUT: train.jsonl, validation.jsonl, test.jsonl, each row with the keys `prompt` (the long description, its
paragraphs joined with a space), `response` (the synopsis) and `source` (the source package).

The texts come from apt's Translation-en list of one suite, read with an apt state of its own: nothing of this machine's
is touched. They are free in Debian's sense, each under its package's licence: fetch them where they are used, do not
redistribute them. A point release of the suite changes them; what was read is printed.

Kept: bodies of 20 to 200 words with synopses of 3 to 15, in NFKC with single spaces. Binary packages of one source
package say much the same, so whole source packages are held out. A body (letters and digits alone, case folded) is
there once; a synopsis that is held out is in no other split. Source packages copy from each other too (versions of one
compiler, modules of one project): a held-out body that has half of its runs of five words in common with one training
body is dropped.

Usage: python demo/get_debian.py OUT [--suite bookworm] [--mirror URI]
"""

import argparse
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from get_data import clean, key

SEED = 20240226
TEST, VALIDATION = 3_000, 1_000  # rows before near-duplicates are dropped; a source package is never divided
BODY_WORDS, SYNOPSIS_WORDS = range(20, 201), range(3, 16)
SHINGLE, ALIKE = 5, 0.5  # words; Jaccard similarity of two bodies' shingles from which they are near-duplicates

SOURCES = pathlib.Path("/etc/apt/sources.list.d/debian.sources")  # Debian's own default place
KEYRING = pathlib.Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_CONF = """\
Dir::Etc "{root}/etc"; Dir::Etc::sourcelist "{root}/etc/sources.list"; Dir::Etc::sourceparts "-";
Dir::Etc::parts "{root}/etc/apt.conf.d"; Dir::State "{root}"; Dir::State::lists "{root}/lists";
Dir::State::status "{root}/status"; Dir::Cache "{root}/cache"; Debug::NoLocking "true";
APT::Architecture "amd64"; APT::Sandbox::User "root"; APT::Update::Error-Mode "any";
Acquire::Languages {{ "en"; }}; Acquire::GzipIndexes "false";
Acquire::Check-Valid-Until "false"; Acquire::Check-Date "false";
"""


class Row(NamedTuple):
    source: str
    prompt: str
    response: str


def default_mirror() -> str:
    lines = SOURCES.read_text(encoding="utf-8").splitlines() if SOURCES.is_file() else []
    uris = [line.split()[1] for line in lines if line.startswith("URIs:")]
    if not uris:
        sys.exit(f"{SOURCES} names no mirror: give one with --mirror URI")
    return uris[0]


def fetch(root: pathlib.Path, mirror: str, suite: str) -> pathlib.Path:
    """The directory of the suite's package lists, fetched with an apt state under `root`."""
    if not shutil.which("apt-get"):
        sys.exit("apt-get is not here: run this on Debian or one of its derivatives")
    for name in ("lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d", "etc/trusted.gpg.d"):
        (root / name).mkdir(parents=True)
    (root / "status").touch()
    (root / "etc/sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n", encoding="utf-8")
    (root / "apt.conf").write_text(APT_CONF.format(root=root), encoding="utf-8")
    command = ["env", f"APT_CONFIG={root}/apt.conf", "apt-get", "update", "-qq"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"apt-get could not read the package lists of {suite}:\n{result.stderr.strip()}")
    return root / "lists"


def stanzas(directory: pathlib.Path, pattern: str) -> Iterator[dict[str, list[str]]]:
    """The paragraphs of a control file: the lines of each field, the first without its name."""
    (path,) = directory.glob(pattern)
    for text in path.read_text(encoding="utf-8").split("\n\n"):
        fields: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in text.strip("\n").split("\n"):
            if line.startswith(" "):
                lines.append(line)
            else:
                name, _, value = line.partition(":")
                lines = fields[name] = [value.strip()]
        if "Package" in fields:
            yield fields


def release(lists: pathlib.Path) -> str:
    (path,) = lists.glob("*InRelease")
    lines = path.read_text(encoding="utf-8").splitlines()
    return ", ".join(line for line in lines if line.startswith(("Codename:", "Version:", "Date:")))


def read(lists: pathlib.Path) -> list[Row]:
    """One row per body: of several packages that share it, the first by source package."""
    sources = {}
    for fields in stanzas(lists, "*_Packages"):
        (package,) = fields["Package"]
        sources[package] = fields.get("Source", [package])[0].partition(" (")[0]
    rows = set()
    for fields in stanzas(lists, "*_Translation-en"):
        synopsis, *body = fields["Description-en"]
        prompt, response = clean(" ".join(line for line in body if line != " .")), clean(synopsis)
        source = sources.get(fields["Package"][0])  # None: a package of another architecture
        if source and len(prompt.split()) in BODY_WORDS and len(response.split()) in SYNOPSIS_WORDS:
            rows.add(Row(source, prompt, response))
    return list({key(row.prompt): row for row in sorted(rows, reverse=True)}.values())


def shingles(row: Row) -> set[tuple[str, ...]]:
    words = [key(word) for word in row.prompt.split()]
    return {tuple(words[start : start + SHINGLE]) for start in range(len(words) - SHINGLE + 1)}


def without_near_duplicates(rows: list[Row], others: list[Row]) -> list[Row]:
    """The rows whose body is not a near-duplicate of one of the others'."""
    own = [shingles(row) for row in rows]
    holders: dict[tuple[str, ...], list[int]] = {}
    for index, held in enumerate(own):
        for shingle in held:
            holders.setdefault(shingle, []).append(index)
    alike = set()
    for other in map(shingles, others):
        common = Counter(index for shingle in other for index in holders.get(shingle, ()))
        alike |= {index for index, n in common.items() if n >= ALIKE * (len(own[index]) + len(other) - n)}
    return [row for index, row in enumerate(rows) if index not in alike]


def split(rows: list[Row]) -> dict[str, list[Row]]:
    packages: dict[str, list[Row]] = {}
    for row in rows:
        packages.setdefault(row.source, []).append(row)
    order = sorted(packages)
    random.Random(SEED).shuffle(order)
    parts: dict[str, list[Row]] = {"test": [], "validation": [], "train": []}
    for source in order:
        name = (
            "test" if len(parts["test"]) < TEST else "validation" if len(parts["validation"]) < VALIDATION else "train"
        )
        parts[name] += packages[source]
    taken: set[str] = set()  # synopses of the splits before this one
    for name, part in parts.items():
        parts[name] = sorted(row for row in part if key(row.response) not in taken)
        taken |= {key(row.response) for row in part}
    for name in ("test", "validation"):
        parts[name] = without_near_duplicates(parts[name], parts["train"])
    return parts


def check(parts: dict[str, list[Row]]) -> None:
    """Nothing of one split is in another, and no body is there twice."""
    splits = list(parts.values())
    for what in (lambda row: row.source, lambda row: key(row.prompt), lambda row: key(row.response)):
        seen = [{what(row) for row in part} for part in splits]
        assert len(set().union(*seen)) == sum(map(len, seen)), "the splits overlap"
    assert len({key(row.prompt) for part in splits for row in part}) == sum(map(len, splits)), "a body is there twice"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--suite", default="bookworm")
    parser.add_argument("--mirror", metavar="URI", help="the first one this machine's apt has, where it is not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        lists = fetch(pathlib.Path(tmp), arguments.mirror or default_mirror(), arguments.suite)
        print(release(lists))
        parts = split(read(lists))
    check(parts)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        path = arguments.out / f"{name}.jsonl"
        lines = [{"prompt": row.prompt, "response": row.response, "source": row.source} for row in rows]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        print(f"{path}: {len(rows)} rows, {len({row.source for row in rows})} source packages")


if __name__ == "__main__":
    main()
