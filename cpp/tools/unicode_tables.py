"""Write src/tokenizer/unicode_tables.inc: what Python's `tokenizers` knows of every code point.

The library is made of crates that follow different versions of Unicode (9 to 17), so no one table gives its ids. The
tables are therefore read from the library itself: each property is probed with the component that uses it. What cannot be
probed one code point at a time (grapheme cluster breaks) comes from the `regex` package and is checked with what can be.

    pip install tokenizers==0.23.3 regex && python cpp/tools/unicode_tables.py
"""

import struct
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import regex
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

TARGET = Path(__file__).resolve().parent.parent / "src" / "tokenizer" / "unicode_tables.inc"
# Every code point that text can hold: surrogates cannot be in it.
POINTS = [point for point in range(0x110000) if not 0xD800 <= point <= 0xDFFF]

CATEGORIES = [
    "Cn",
    "Lu",
    "Ll",
    "Lt",
    "Lm",
    "Lo",
    "Mn",
    "Mc",
    "Me",
    "Nd",
    "Nl",
    "No",
    "Pc",
    "Pd",
    "Ps",
    "Pe",
    "Pi",
    "Pf",
    "Po",
    "Sm",
    "Sc",
    "Sk",
    "So",
    "Zs",
    "Zl",
    "Zp",
    "Cc",
    "Cf",
    "Cs",
    "Co",
]
SCRIPTS = [
    "Han",
    "Hiragana",
    "Katakana",
    "Hangul",
    "Latin",
    "Greek",
    "Cyrillic",
    "Arabic",
    "Hebrew",
    "Thai",
    "Devanagari",
]
# Grapheme_Cluster_Break with Indic_Conjunct_Break and Extended_Pictographic folded in: what the rules tell apart.
BREAKS = [
    "Other",
    "CR",
    "LF",
    "Control",
    "Extend",
    "Conjunct_Extend",
    "Conjunct_Linker",
    "ZWJ",
    "Regional_Indicator",
    "Prepend",
    "SpacingMark",
    "L",
    "V",
    "T",
    "LV",
    "LVT",
    "Conjunct_Consonant",
    "Extended_Pictographic",
]


def ranges(points: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted code points as inclusive ranges; those that touch over the surrogates are joined."""
    found: list[tuple[int, int]] = []
    for point in points:
        if found and (found[-1][1] + 1 == point or (found[-1][1], point) == (0xD7FF, 0xE000)):
            found[-1] = (found[-1][0], point)
        else:
            found.append((point, point))
    return found


def runs(values: dict[int, int]) -> list[tuple[int, int]]:
    """(first code point, value) wherever the value changes, from a value for every code point."""
    found: list[tuple[int, int]] = []
    for point in POINTS:
        if not found or found[-1][1] != values[point]:
            found.append((point, values[point]))
    return found


def matched(pattern: str) -> list[int]:
    """The code points that a regular expression of a Split matches one of."""
    # Blocks, so that offsets stay small; a match is a run of code points of the block.
    splitter = pre_tokenizers.Split(Regex(pattern), "removed")
    found = []
    for start in range(0, len(POINTS), 4096):
        block = POINTS[start : start + 4096]
        kept = set()
        for piece, _ in splitter.pre_tokenize_str("".join(map(chr, block))):
            kept.update(map(ord, piece))
        found += [point for point in block if point not in kept]
    return found


def where(test: Callable[[str], bool]) -> list[int]:
    return [point for point in POINTS if test(chr(point))]


def pieces(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Callable[[str], int]:
    return lambda character: len(pre_tokenizer.pre_tokenize_str(f"a{character}a"))


def cluster_probe() -> normalizers.Normalizer:
    """Replaces a grapheme cluster of fewer than 6 bytes by one `X`, a longer one by an `X` for each code point.

    The trie holds every first byte of UTF-8, and the library takes the shortest entry that a cluster begins with.
    """
    units = [0] * 1024
    units[0] = 256 << 10  # the children of the root are at 256 ^ label
    for label in [*range(1, 0x80), *range(0xC2, 0xF5)]:
        node = 256 ^ label
        leaf = node + 512
        units[node] = label | 1 << 8 | (node ^ leaf) << 10
        units[leaf] = 1 << 31
    charsmap = struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + b"X\0"
    return normalizers.Precompiled(charsmap)


def grapheme_breaks() -> dict[int, int]:
    value = dict.fromkeys(POINTS, 0)

    def put(name: str, expression: str) -> None:
        pattern = regex.compile(expression, regex.V1)
        for point in POINTS:
            if pattern.match(chr(point)):
                value[point] = BREAKS.index(name)

    put("Extended_Pictographic", r"\p{Extended_Pictographic}")
    put("Conjunct_Consonant", r"\p{InCB=Consonant}")
    for name in [
        "CR",
        "LF",
        "Control",
        "Extend",
        "ZWJ",
        "Regional_Indicator",
        "Prepend",
        "SpacingMark",
        "L",
        "V",
        "T",
        "LV",
        "LVT",
    ]:
        put(name, rf"\p{{GCB={name}}}")
    put("Conjunct_Extend", r"[\p{InCB=Extend}--\p{GCB=ZWJ}]")
    put("Conjunct_Linker", r"\p{InCB=Linker}")
    # `regex` may follow another version of Unicode: what the library does decides.
    clusters = cluster_probe()
    probes = {
        "Extend": ("a{}", 1, {"Extend", "Conjunct_Extend", "Conjunct_Linker", "ZWJ", "SpacingMark"}),
        "Prepend": ("{}b", 1, {"Prepend"}),
        "Control": ("{}\u0301", 2, {"CR", "LF", "Control"}),
        "Conjunct_Linker": ("\u0915{}\u0915\u0301", 4, {"Conjunct_Linker"}),
        "Conjunct_Consonant": ("\u0915\u094d{}\u0301", 4, {"Conjunct_Consonant"}),
        "Extended_Pictographic": ("\u2764\u200d{}\u0301", 4, {"Extended_Pictographic"}),
    }
    shown: dict[str, set[int]] = {}
    for name, (text, count, _) in probes.items():
        shown[name] = {p for p in POINTS if p and len(clusters.normalize_str(text.format(chr(p)))) == count}
    # What always joins or never does shows nothing of the last three.
    for name in ("Conjunct_Linker", "Conjunct_Consonant", "Extended_Pictographic"):
        shown[name] -= {p for p in POINTS if len(chr(p).encode()) == 4} | shown["Control"] | shown["Prepend"]
        if name != "Conjunct_Linker":
            shown[name] -= shown["Extend"]
    for name, (_, _, breaks) in probes.items():
        for point in POINTS[1:]:
            # With four bytes of its own, the cluster is too long for the probe; and for any entry of a trie.
            if name not in ("Extend", "Prepend") and len(chr(point).encode()) == 4:
                continue
            if (point in shown[name]) != (BREAKS[value[point]] in breaks):
                print(f"U+{point:04X}: {name} is {point in shown[name]}, regex says {BREAKS[value[point]]}")
                found = [other for other in probes if point in shown[other]]
                value[point] = BREAKS.index(found[-1] if found else "Other")
    return value


def combining_classes(canonical: set[int]) -> dict[int, int]:
    """Canonical combining classes as the library has them: those of Unicode, or 0 where it does not move the mark."""
    nfd = normalizers.NFD()
    classes = dict.fromkeys(POINTS, 0)
    for point in POINTS:
        of_unicode = unicodedata.combining(chr(point))
        # Between a mark of the highest class and one of the lowest, a mark moves one way or the other.
        before, after = "\u0345" + chr(point), chr(point) + "\u0334"
        moves = nfd.normalize_str(before) != before or nfd.normalize_str(after) != after
        if point in canonical or 0xAC00 <= point <= 0xD7A3:
            continue
        if of_unicode and moves:
            classes[point] = of_unicode
        elif moves or (point in (0x0334, 0x0345)):
            classes[point] = of_unicode
            if not of_unicode:
                raise SystemExit(f"U+{point:04X} has a combining class that this Python does not know")
    return classes


def compositions() -> list[tuple[int, int, int]]:
    nfc = normalizers.NFC()
    found = []
    for point in POINTS:
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            first, second = (int(part, 16) for part in parts)
            if nfc.normalize_str(chr(first) + chr(second)) == chr(point):
                found.append((first, second, point))
    return sorted(found)


def lowercase() -> list[tuple[int, int, int, int]]:
    """(first, last, step, what to add) of the code points whose lower case is another one; U+0130 alone gives two."""
    lower = normalizers.Lowercase()
    found: list[tuple[int, int, int, int]] = []
    for point in POINTS:
        changed = lower.normalize_str(chr(point))
        if changed == chr(point):
            continue
        if len(changed) != 1:
            assert (point, changed) == (0x130, "i\u0307"), f"U+{point:04X}"
            continue
        delta = ord(changed) - point
        if found:
            first, last, step, of_last = found[-1]
            if delta == of_last and (point - last == step or (first == last and point - last <= 2)):
                found[-1] = (first, point, point - last, delta)
                continue
        found.append((point, point, 1, delta))
    return found


def decomposing(normalizer: normalizers.Normalizer) -> list[int]:
    # Syllables of Hangul follow a formula.
    return where(lambda c: not 0xAC00 <= ord(c) <= 0xD7A3 and normalizer.normalize_str(c) != c)


def written(name: str, kind: str, cells: Iterable[str]) -> str:
    lines, line = [], ""
    for cell in cells:
        if len(line) + len(cell) > 116:
            lines.append(line.rstrip())
            line = ""
        line += cell + ", "
    lines.append(line.rstrip())
    return f"constexpr {kind} {name}[] = {{\n    " + "\n    ".join(lines) + "\n};\n"


def written_ranges(name: str, points: Iterable[int]) -> str:
    return written(name, "Range", (f"{{0x{a:x}, 0x{b:x}}}" for a, b in ranges(points)))


def main() -> None:
    category = dict.fromkeys(POINTS, 0)
    for index, name in enumerate(CATEGORIES):
        if name not in ("Cn", "Cs"):
            for point in matched(rf"\p{{{name}}}"):
                category[point] = index
    bare = {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False}
    cleaned = normalizers.BertNormalizer(**bare | {"clean_text": True})
    accents = normalizers.BertNormalizer(**bare | {"strip_accents": True})
    marks = normalizers.StripAccents()
    words = pieces(pre_tokenizers.Whitespace())
    canonical = decomposing(normalizers.NFD())
    decomposed = set(canonical)
    classes = combining_classes(decomposed)
    parts = [
        "// Written by tools/unicode_tables.py; not to be edited.\n"
        f"// Read from tokenizers {tokenizers.__version__}, with the grapheme cluster breaks of regex {regex.__version__}.\n",
        "// General_Category of the regular expressions of Split, Replace and ByteLevel: first code point << 8 | category.\n"
        + written("kCategories", "std::uint32_t", (f"0x{p << 8 | v:x}" for p, v in runs(category))),
        "// \\w and \\s of the same.\n" + written_ranges("kPatternWord", matched(r"\w")),
        written_ranges("kPatternSpace", matched(r"\s")),
        *(
            f"// \\p{{{name}}} of the same.\n" + written_ranges(f"kScript{name}", matched(rf"\p{{{name}}}"))
            for name in SCRIPTS
        ),
        "// \\w of the pre-tokenizer Whitespace and of added tokens that are single words.\n"
        + written_ranges("kWord", where(lambda c: words(c) == 1)),
        "// White space of WhitespaceSplit, Strip, Whitespace and added tokens.\n"
        + written_ranges("kSpace", where(lambda c: pieces(pre_tokenizers.WhitespaceSplit())(c) == 2)),
        "// Numeric characters of Digits.\n"
        + written_ranges("kNumeric", where(lambda c: pieces(pre_tokenizers.Digits(True))(c) == 3)),
        "// Punctuation of Punctuation and BertPreTokenizer.\n"
        + written_ranges("kPunctuation", where(lambda c: pieces(pre_tokenizers.Punctuation())(c) == 3)),
        "// What BertNormalizer removes as text that is not clean.\n"
        + written_ranges("kUnclean", where(lambda c: cleaned.normalize_str(c) == "")),
        "// Nonspacing marks of BertNormalizer; marks of StripAccents.\n"
        + written_ranges("kNonspacing", where(lambda c: ord(c) not in decomposed and accents.normalize_str(c) == "")),
        written_ranges("kMark", where(lambda c: marks.normalize_str(c) == "")),
        "// Code points that NFD, and those that NFKD decomposes, without the syllables of Hangul.\n"
        + written_ranges("kCanonical", canonical),
        written_ranges("kCompatible", decomposing(normalizers.NFKD())),
        "// Canonical_Combining_Class: first code point << 8 | class.\n"
        + written("kCombining", "std::uint32_t", (f"0x{p << 8 | v:x}" for p, v in runs(classes))),
        "// Primary composites: first, second, composed.\n"
        + written("kCompositions", "Composition", (f"{{0x{a:x}, 0x{b:x}, 0x{c:x}}}" for a, b, c in compositions())),
        "// Lower case: first, last, step, what is added.\n"
        + written("kLower", "Lower", (f"{{0x{a:x}, 0x{b:x}, {s}, {d}}}" for a, b, s, d in lowercase())),
        "// Grapheme cluster breaks: first code point << 8 | Break.\n"
        + written("kBreaks", "std::uint32_t", (f"0x{p << 8 | v:x}" for p, v in runs(grapheme_breaks()))),
    ]
    TARGET.write_text("\n".join(parts), encoding="utf-8")
    print(TARGET, TARGET.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
