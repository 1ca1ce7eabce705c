"""Mix three tasks that only their instruction tells apart: English to French, English to Spanish, and summaries.

Writes into OUT: train.jsonl, validation.jsonl, test.jsonl, each row with the keys `prompt`, `response` and `task`
(`translate-fr`, `translate-es`, `summarise`).

The data is what demo/get_data.py (both languages) and demo/get_debian.py wrote. Licences are theirs: Tatoeba's sentences
are CC-BY 2.0 FR, their authors in the third column there; Debian's descriptions are not to be redistributed.

The splits are theirs too. English sentences are picked by one order for both languages, and half of a language's
training rows are of sentences that both have: the same English then has two answers, and the instruction decides. A
sentence gives a second row only once every sentence has given one. The test split has all references of a sentence, as
rows with the same prompt.

Usage: python demo/make_instructions.py TATOEBA_FR_DIR TATOEBA_ES_DIR DEBIAN_DIR OUT [--train-rows N]
"""

import argparse
import hashlib
import json
import pathlib
import random
import sys

from get_data import key

SEED = 20240226
SPLITS = ("train", "validation", "test")
TRANSLATIONS = ("translate-fr", "translate-es")
INSTRUCTIONS = {
    "translate-fr": "Translate to French: {}",
    "translate-es": "Translate to Spanish: {}",
    "summarise": "Summarise: {}",
}
TRAIN = {"translate-fr": 40_000, "translate-es": 40_000, "summarise": 30_000}  # rows
VALIDATION, TEST = 600, 1_000  # rows, prompts; of each task

Row = tuple[str, str]  # what follows the instruction, and the response


def digest(text: str) -> str:
    return hashlib.sha256(f"{SEED} {text}".encode()).hexdigest()


def read(directory: pathlib.Path, split: str) -> list[Row]:
    """The distinct rows of one split, TSV or JSONL, in an order that has nothing to do with what they say."""
    path = next((p for p in (directory / f"{split}.tsv", directory / f"{split}.jsonl") if p.is_file()), None)
    if path is None:
        sys.exit(f"{directory} has neither {split}.tsv nor {split}.jsonl: run demo/get_data.py and demo/get_debian.py")
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if path.suffix == ".tsv":
        rows = {(line.split("\t")[0], line.split("\t")[1]) for line in lines}
    else:
        rows = {(row["prompt"], row["response"]) for row in map(json.loads, lines)}
    return sorted(rows, key=lambda row: digest("\t".join(row)))


def keys(rows: list[Row]) -> set[str]:
    return {key(text) for text, _ in rows}


def pick(rows: list[Row], count: int, shared: set[str]) -> list[Row]:
    """`count` rows, half of them of shared sentences, no sentence twice before every sentence once."""
    times: dict[str, int] = {}
    ranked = []
    for text, response in rows:
        sentence = key(text)
        times[sentence] = times.get(sentence, 0) + 1
        ranked.append((times[sentence], sentence in shared, digest(sentence), (text, response)))
    ranked.sort()
    both = [row for _, is_shared, _, row in ranked if is_shared][: count // 2]
    taken = set(both)
    rest = [row for *_, row in ranked if row not in taken]
    return both + rest[: count - len(both)]


def test_rows(rows: list[Row]) -> list[Row]:
    """All rows of the first TEST sentences, each in one spelling."""
    references: dict[str, list[Row]] = {}
    for row in sorted(rows):
        same = references.setdefault(key(row[0]), [])
        if not same or same[0][0] == row[0]:
            same.append(row)
    return [row for sentence in sorted(references, key=digest)[:TEST] for row in references[sentence]]


def choose(data: dict[str, dict[str, list[Row]]], limit: int | None) -> dict[str, dict[str, list[Row]]]:
    """The rows of each split and task, out of the rows of each task and split."""
    chosen: dict[str, dict[str, list[Row]]] = {split: {} for split in SPLITS}
    for task, splits in data.items():
        others = [data[name] for name in TRANSLATIONS if name != task and task in TRANSLATIONS]
        for split, count in (("train", limit or TRAIN[task]), ("validation", VALIDATION)):
            shared = set().union(*(keys(other[split]) for other in others))
            chosen[split][task] = pick(splits[split], count, shared)
        chosen["test"][task] = test_rows(splits["test"])
    return chosen


def check(data: dict[str, dict[str, list[Row]]], chosen: dict[str, dict[str, list[Row]]]) -> None:
    """No text that any task holds out, chosen or not, is trained on, and none is held out twice."""
    held = {split: set().union(*(keys(splits[split]) for splits in data.values())) for split in SPLITS[1:]}
    train = set().union(*(keys(rows) for rows in chosen["train"].values()))
    assert not train & held["test"], "a test text is trained on"
    assert not train & held["validation"], "a validation text is trained on"
    assert not held["test"] & held["validation"], "a test text is in the validation rows"


def report(split: str, tasks: dict[str, list[Row]]) -> None:
    for task, rows in tasks.items():
        print(f"{split}, {task}: {len(rows)} rows, {len({text for text, _ in rows})} prompts")
    both = set.intersection(*(keys(tasks[task]) for task in TRANSLATIONS))
    print(f"{split}: {len(both)} English sentences with both instructions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tatoeba_fr_dir", "tatoeba_es_dir", "debian_dir", "out"):
        parser.add_argument(name, type=pathlib.Path)
    parser.add_argument("--train-rows", type=int, metavar="N", help=f"of each task; where it is not given: {TRAIN}")
    arguments = parser.parse_args()
    if arguments.train_rows is not None and arguments.train_rows < 1:
        sys.exit("--train-rows must be at least 1")
    directories = (arguments.tatoeba_fr_dir, arguments.tatoeba_es_dir, arguments.debian_dir)
    data = {
        task: {split: read(directory, split) for split in SPLITS}
        for task, directory in zip(INSTRUCTIONS, directories, strict=True)
    }
    chosen = choose(data, arguments.train_rows)
    check(data, chosen)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, tasks in chosen.items():
        rows = [
            {"prompt": INSTRUCTIONS[task].format(text), "response": response, "task": task}
            for task, pairs in tasks.items()
            for text, response in pairs
        ]
        if split != "test":  # there the rows of one prompt stay together
            random.Random(SEED).shuffle(rows)
        path = arguments.out / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        report(split, tasks)


if __name__ == "__main__":
    main()
