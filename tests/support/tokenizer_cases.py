"""Tokenizers of one component each, and texts that tell them apart."""

import base64
import itertools
import random
import struct
import unicodedata
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

# GPT-2's without contractions is ByteLevel's own; these are of Llama 3, Qwen 2, GPT-4o and DeepSeek.
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = (
    LLAMA,
    QWEN,
    GPT4O,
    DEEPSEEK,
    r"[一-龥ࠀ-一가-\u{D7FF}]+".replace(r"\u{D7FF}", "\ud7a3"),
    r"\p{Han}+|\p{Hangul}+|[\p{Hiragana}\p{Katakana}]+|\p{Latin}+|\p{Greek}+|\p{Cyrillic}+|\p{Arabic}+|\p{Thai}+",
    r"\p{^L}|\P{N}{2,}",
    r"\w+|[^\w\s]+",
    r"\W+?\b|\B\d{,3}",
    r"(?<=\p{Lu})\p{Ll}+|(?<!a)b",
    r"(?>a+|ab)c?|(a|b)*?c",
    r"^.|.$|\Ax|y\z|z\Z",
    r"a++b|a*+c|x{2,3}|y{,2}|z{,}|{",
    r"[\x20-\x2f\u00e9-\u00ff\]\-\\]+|[^a-zA-Z\d\s]",
    r"(?i)hello|[sk]x|(?-i:W)orld",
    r"\h{2}|\H\t|\.|\n|\r|\f|\v",
    r"[[a-c]x[^y\S]]",
    r"",
    r"a|",
    "a" * 200 + r"|\p{L}+\p{N}",
)


def byte_tokens() -> dict[str, int]:
    return {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}


# Every piece as its bytes and those of `</w>`: ids show what was done to the text and where it was split.
REVEALING: Json = {
    "type": "BPE",
    "vocab": byte_tokens(),
    "merges": [],
    "unk_token": "<unk>",
    "byte_fallback": True,
    "end_of_word_suffix": "</w>",
    "fuse_unk": True,
}
AS_BYTES: Json = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}


def tokenizer(**fields: Any) -> Json:
    return {"version": "1.0", "model": REVEALING, "decoder": AS_BYTES} | fields


def added(content: str, **fields: Any) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 0, "content": content} | flags | fields


def regex(pattern: str) -> Json:
    return {"Regex": pattern}


def sequence(*parts: Json) -> Json:
    return {"type": "Sequence", "normalizers": list(parts)}


def pre_sequence(*parts: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def charsmap(entries: dict[str, str]) -> str:
    """`precompiled_charsmap` of SentencePiece, with a double-array trie of these entries."""
    texts, values = b"", {}
    for key, replacement in sorted(entries.items()):
        values[key.encode()] = len(texts)
        texts += replacement.encode() + b"\0"
    units: dict[int, int] = {0: 0}

    def place(node: int, prefix: bytes) -> None:
        """The children of a node, where units are free for all of them; label 0 is the value of the node itself."""
        labels = sorted({key[len(prefix)] for key in values if key.startswith(prefix) and len(key) > len(prefix)})
        places = [0, *labels] if prefix in values else labels
        base = next(base for base in range(1, 1 << 20) if all(base ^ label not in units for label in places))
        units[node] |= (node ^ base) << 10
        for label in places:
            units[base ^ label] = label
        if prefix in values:
            units[node] |= 1 << 8
            units[base] = values[prefix] | 1 << 31
        for label in labels:
            place(base ^ label, prefix + bytes([label]))

    place(0, b"")
    # What a search may look at is within the block of 256 that holds a child.
    array = [units.get(i, 0) for i in range((max(units) | 255) + 1)]
    return base64.b64encode(struct.pack(f"<I{len(array)}I", 4 * len(array), *array) + texts).decode()


CHARSMAP = charsmap(
    {
        "a": "A",
        "e\u0301": "é",
        "か\u3099": "が",
        "\u0301": "",
        "\u00a0": " ",
        "ﬁ": "fi",
        "㎏": "kg",
        "\u200d": "",
        "\n": " ",
        "क": "k",
        "👍": "up",
        "©": "(c)",
        "ᄀ": "G",
        "\x01": "",
    }
)


def normalizers() -> Iterator[tuple[str, Json]]:
    for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel"):
        yield name, {"type": name}
    for left in (False, True):
        for right in (False, True):
            yield f"Strip {left} {right}", {"type": "Strip", "strip_left": left, "strip_right": right}
    for clean, chinese, accents, lower in (
        (True, True, None, True),
        (True, True, None, False),
        (False, True, True, False),
        (True, False, False, True),
        (False, False, False, False),
    ):
        flags = {"clean_text": clean, "handle_chinese_chars": chinese, "strip_accents": accents, "lowercase": lower}
        yield f"Bert {clean} {chinese} {accents} {lower}", {"type": "BertNormalizer"} | flags
    yield "Prepend", {"type": "Prepend", "prepend": "▁"}
    yield "Replace string", {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    yield "Replace points", {"type": "Replace", "pattern": {"String": ".*"}, "content": "::"}
    for pattern in (" {2,}", r"\s+", r"[\n\t]", r"\p{M}+", r"(?<=a)\S", "''"):
        yield f"Replace {pattern}", {"type": "Replace", "pattern": regex(pattern), "content": "·_"}
    yield "Replace by nothing", {"type": "Replace", "pattern": regex("[aeé]"), "content": ""}
    yield "Precompiled", {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}
    yield (
        "Sequence",
        sequence(
            {"type": "Precompiled", "precompiled_charsmap": CHARSMAP},
            {"type": "NFKC"},
            {"type": "Strip", "strip_left": False, "strip_right": True},
            {"type": "Replace", "pattern": regex(" {2,}"), "content": "▁"},
            {"type": "Prepend", "prepend": "▁"},
        ),
    )
    yield "no Sequence", sequence()


def pre_tokenizers() -> Iterator[tuple[str, Json]]:
    for name in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Punctuation"):
        yield name, {"type": name}
    for individual in (False, True):
        yield f"Digits {individual}", {"type": "Digits", "individual_digits": individual}
    behaviors = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
    for behavior in behaviors:
        yield f"Punctuation {behavior}", {"type": "Punctuation", "behavior": behavior}
        for invert in (False, True):
            yield (
                f"Split {behavior} {invert}",
                {"type": "Split", "pattern": regex(r"\s|[a-f]|\p{M}"), "behavior": behavior, "invert": invert},
            )
        yield (
            f"Split string {behavior}",
            {"type": "Split", "pattern": {"String": "a."}, "behavior": behavior, "invert": False},
        )
    for pattern in PATTERNS:
        for behavior, invert in (("Isolated", False), ("Removed", True), ("MergedWithPrevious", False)):
            yield (
                f"Split {pattern} {behavior} {invert}",
                {"type": "Split", "pattern": regex(pattern), "behavior": behavior, "invert": invert},
            )
    for prefix in (False, True):
        for use in (False, True):
            fields = {"add_prefix_space": prefix, "trim_offsets": True, "use_regex": use}
            yield f"ByteLevel {prefix} {use}", {"type": "ByteLevel"} | fields
    yield "ByteLevel by default", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    for scheme in ("first", "never", "always"):
        for split in (False, True):
            fields = {"replacement": "▁", "prepend_scheme": scheme, "split": split}
            yield f"Metaspace {scheme} {split}", {"type": "Metaspace"} | fields
    yield "Metaspace of old", {"type": "Metaspace", "replacement": "_", "add_prefix_space": True, "str_rep": "_"}
    yield (
        "Metaspace of old without",
        {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False, "prepend_scheme": "never"},
    )
    yield (
        "Sequence",
        pre_sequence(
            {"type": "WhitespaceSplit"},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            {"type": "Digits", "individual_digits": True},
            {"type": "Punctuation"},
        ),
    )
    yield (
        "Sequence of Split and ByteLevel",
        pre_sequence(
            {"type": "Split", "pattern": regex(LLAMA), "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ),
    )


def starts() -> Iterator[tuple[str, Json]]:
    """Where Metaspace finds the beginning of the text behind a normalizer that changes it."""
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    tokens = [added("<s>", special=True), added("fi", normalized=True), added("A", normalized=True, lstrip=True)]
    for name, normalizer in normalizers():
        yield f"first behind {name}", tokenizer(normalizer=normalizer, pre_tokenizer=first, added_tokens=tokens)
        for splitter in (
            {"type": "WhitespaceSplit"},
            {"type": "Split", "pattern": regex(r"[\p{M}\s\n]|a"), "behavior": "Isolated", "invert": False},
        ):
            yield (
                f"first behind {name} and {splitter['type']}",
                tokenizer(normalizer=normalizer, pre_tokenizer=pre_sequence(splitter, first), added_tokens=tokens),
            )
    bytes_first = pre_sequence({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}, first)
    yield "first behind ByteLevel", tokenizer(normalizer={"type": "NFKD"}, pre_tokenizer=bytes_first)


def added_tokens() -> Iterator[tuple[str, Json]]:
    lowered = {"type": "Lowercase"}
    for single in (False, True):
        for left in (False, True):
            for right in (False, True):
                flags = {"single_word": single, "lstrip": left, "rstrip": right}
                tokens = [
                    added("<s>", special=True, **flags),
                    added("</s>", **flags),
                    added("He", normalized=True, **flags),
                    added("hello", normalized=True, **flags),
                    # Lowered, it is no special token any more.
                    added("[SEP]", normalized=True, special=True, **flags),
                    added("lo w", **flags),
                    added(" x", **flags),
                    added("\u0301b", **flags),
                    added("<0x41>", special=True, **flags),
                ]
                yield f"added {single} {left} {right}", tokenizer(added_tokens=tokens)
                yield f"added {single} {left} {right} lowered", tokenizer(added_tokens=tokens, normalizer=lowered)
    yield (
        "added again",
        tokenizer(added_tokens=[added("x"), added("x", special=True), added("y"), added("y"), added("")]),
    )


def post_processors() -> Iterator[tuple[str, Json]]:
    bert = {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 3]}
    roberta = bert | {"type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": True}
    specials = {
        "</s>": {"id": "</s>", "ids": [1, 7], "tokens": ["a", "b"]},
        "<s>": {"id": "<s>", "ids": [5], "tokens": ["c"]},
    }
    text, start, end = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    )

    def template(*pieces: Json) -> Json:
        return {"type": "TemplateProcessing", "single": pieces, "pair": [text, text], "special_tokens": specials}

    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    processors = {
        "Bert": bert,
        "Roberta": roberta,
        "ByteLevel": level,
        "template": template(start, text, end),
        "template before": template(start, text),
        "template of nothing": template(),
        "template twice": template(text, end, text),
        "Sequence": {"type": "Sequence", "processors": [level, template(text, end)]},
        "Sequence and Bert": {"type": "Sequence", "processors": [template(start, text, end), level, bert]},
        "Sequence and Roberta": {"type": "Sequence", "processors": [bert, template(text, text, end), roberta]},
    }
    for name, processor in processors.items():
        yield name, tokenizer(post_processor=processor)


def word_level(tokens: list[str], decoder: Json | None) -> Json:
    vocabulary = {"[UNK]": 0} | {token: index + 1 for index, token in enumerate(tokens)}
    split = {"type": "Split", "pattern": {"String": "|"}, "behavior": "Removed", "invert": False}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    return {"version": "1.0", "model": model, "pre_tokenizer": split, "decoder": decoder}


TOKENS = [
    "▁a",
    "▁",
    "▁▁b",
    "c▁d",
    "##e",
    "##f##",
    "g</w>",
    "</w>h",
    "<0x41>",
    "<0xC3>",
    "<0xA9>",
    "<0xFF>",
    "<0x+F>",
    "<0xé>",
    "<0x0>",
    "Ġi",
    "éj",
    "Ã©",
    "ÃŁ",
    "Ë",
    "ðŁĺĢ",
    "ðŁĺ",
    "k",
    "'",
    "n't",
    "'m",
    "do",
    "not",
    "'s",
    ".",
    ",",
    "!",
    "?",
    "l.",
    "",
    "Ġdo",
    "",
    "--",
    "",
    "aab",
    " ' ",
    " do not",
    "x ",
    " x ",
    "   ",
    "\u00ad",
    "日本",
]


def decoders() -> Iterator[tuple[str, Json]]:
    parts: dict[str, Json | None] = {
        "none": None,
        "ByteLevel": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "ByteFallback": {"type": "ByteFallback"},
        "Fuse": {"type": "Fuse"},
        "Strip": {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        "Strip more": {"type": "Strip", "content": " ", "start": 2, "stop": 1},
        "Strip 日": {"type": "Strip", "content": "日", "start": 2, "stop": 0},
        "Replace": {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        "Replace pattern": {"type": "Replace", "pattern": regex("a*"), "content": "-"},
        "WordPiece": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "WordPiece untidy": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "BPEDecoder": {"type": "BPEDecoder", "suffix": "</w>"},
        "Metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        "Metaspace never": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
    }
    replaced = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    stripped = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    parts["Llama"] = {
        "type": "Sequence",
        "decoders": [replaced, {"type": "ByteFallback"}, {"type": "Fuse"}, stripped],
    }
    for name, decoder in parts.items():
        yield name, word_level(TOKENS, decoder)


def models() -> Iterator[tuple[str, Json]]:
    words = {"type": "WhitespaceSplit"}
    vocabulary = {
        token: i
        for i, token in enumerate(
            [
                "<unk>",
                "a",
                "b",
                "c",
                "ab",
                "bc",
                "abc",
                "ca",
                "cab",
                "d",
                "da",
                "é",
                "日",
                "#b",
                "#c",
                "#ab",
                "##x",
                "b$",
                "c$",
                "abc$",
                "ab$",
            ]
        )
    }
    merges = [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"], ["c", "a"], ["c", "ab"], ["ca", "b"], ["d", "a"]]
    for unknown in (None, "<unk>", "nowhere"):
        for fuse in (False, True):
            model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": unknown, "fuse_unk": fuse}
            yield f"BPE {unknown} {fuse}", tokenizer(model=model, decoder=None)
    legacy = [" ".join(pair) for pair in merges]
    for options in (
        {"dropout": None, "merges": ["#version: 0.2", *legacy]},
        {"dropout": 0.0, "ignore_merges": True, "pre_tokenizer": words},
        {"end_of_word_suffix": "$", "merges": [["a", "b$"], *merges, ["ab", "c$"]]},
        {"continuing_subword_prefix": "#", "merges": [["a", "#b"], ["a", "b"], ["ab", "#c"]]},
        {"byte_fallback": True, "vocab": byte_tokens() | {t: i + 300 for t, i in vocabulary.items()}},
        {
            "byte_fallback": True,
            "vocab": vocabulary | {"<0xC3>": 100, "<0xA8>": 101, "<0xE6>": 102},
            "unk_token": "<unk>",
        },
    ):
        split = options.pop("pre_tokenizer", None)
        model = {"type": "BPE", "vocab": vocabulary, "merges": merges} | options
        yield f"BPE {sorted(options)}", tokenizer(model=model, decoder=None, pre_tokenizer=split)
    untyped = {"vocab": vocabulary, "merges": legacy, "unk_token": "<unk>"}
    yield "BPE without a type", tokenizer(model=untyped, decoder=None)
    for most in (2, 100):
        model = {"type": "WordPiece", "vocab": vocabulary, "unk_token": "<unk>", "continuing_subword_prefix": "#"}
        yield (
            f"WordPiece {most}",
            tokenizer(model=model | {"max_input_chars_per_word": most}, decoder=None, pre_tokenizer=words),
        )
    yield (
        "WordLevel",
        tokenizer(
            model={"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}, decoder=None, pre_tokenizer=words
        ),
    )
    pieces = [
        ["<unk>", 0.0],
        ["a", -1.0],
        ["b", -2],
        ["ab", -2.9],
        ["ab", -3.1],
        ["abc", -40.25],
        ["c", -1.5],
        ["bc", -3.5],
        ["é日", -60.0],
        ["日", -5.0],
    ]
    scored = [[token, -0.1234567890123456789 * i - 1] for i, token in enumerate(vocabulary)]
    for name, model in {
        "plain": {"vocab": pieces, "unk_id": 0},
        "without unknown": {"vocab": pieces, "unk_id": None},
        "fallback": {
            "vocab": [*pieces, *([f"<0x{byte:02X}>", -7.0] for byte in range(256))],
            "unk_id": 0,
            "byte_fallback": True,
        },
        "part of a fallback": {
            "vocab": [*pieces, ["<0xC3>", -7.0], ["<0xA9>", -7.0]],
            "unk_id": 2,
            "byte_fallback": True,
        },
        "many scores": {"vocab": scored, "unk_id": 0},
    }.items():
        yield f"Unigram {name}", tokenizer(model={"type": "Unigram"} | model, decoder=None)
        yield (
            f"Unigram {name} of words",
            tokenizer(model={"type": "Unigram"} | model, decoder=None, pre_tokenizer=words),
        )


def cases() -> dict[str, Json]:
    """All by name."""
    found = {f"normalizer {name}": tokenizer(normalizer=part) for name, part in normalizers()}
    found |= {f"pre-tokenizer {name}": tokenizer(pre_tokenizer=part) for name, part in pre_tokenizers()}
    found |= {f"post-processor {name}": case for name, case in post_processors()}
    found |= {f"decoder {name}": case for name, case in decoders()}
    for more in (starts(), added_tokens(), models()):
        found |= dict(more)
    return found


HOSTILE = (
    "", " ", "  ", "   a", "a   ", " a ", "\n", "\r", "\r\n", "\n\n\n", "\t", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", "a\u00a0b",
    "\u3000x\u3000", "\u200b", "\ufeffx", "x\ufeff", "e\u0301", "\u0301", "\u0301\u0301\u0301abc", "a" + "\u0301" * 50, "\u0344\u0323x",
    "a\u0323\u0307", "a\u0307\u0323", "\u1e9b\u0323", "\u212b", "\ufb01ne \ufb03", "\u0130I\u0131i", "ǅ", "ß ẞ ﬆ ſ", "👨\u200d👩\u200d👧\u200d👦 family",
    "🏳\ufe0f\u200d🌈", "🇫🇷🇩🇪🇪", "👍🏽", "❤\ufe0f\u200d🔥", "#\ufe0f\u20e3", "©\ufe0f", "a\u200db", "\u200d", "שלום עולם", "مرحبا بالعالم",
    "\u202eabc\u202c", "\u05e9\u05c1\u05bc", "ﷺ", "你好，世界。", "日本語テスト ｶﾞｷﾞ ガギ が", "か\u3099", "ｶ\uff9e", "한국어", "\u1112\u1161\u11ab",
    "\u1100\u1161", "\uac00\u11a8", "\u1100\u1100\u1161\u11a8\u11a8", "क्षत्रिय", "क्\u200dष", "बांग्ला", "ไทยภาษา", "\u0e33", "𝒜𝔅ℂ", "ⅷ ½ ² ①",
    "٣٤٥", "१२३", "㎏", "㌀", "\x00", "a\x00b", "\x01\x02\x1f\x7f", "\x80\x9f", "\ufffd", "\ufffe", "\uffff", "\U0001fffe", "\U0010ffff",
    "\ud7ff\ue000", "\ue000", "\U000e0001\U000e0041", "\u0378", "\u0530", "\U00011a3a", "\U0001e030", "'s 'S 'ſ 't'RE \u2019s don't I'LL we've they'd",
    "...!!!???", "a.b,c;d", "1,234.56", "12345678901234", "a1b2c3", "CamelCaseWords", "snake_case_words", "http://x.y/z?a=b&c=d", "<b>html</b>",
    "def f(x):\n    return x\n\n\n", "\t\tindent\n\t\tmore", "trailing space \n", "a \n b", " \n \n ", "\n a", "   \n   \n", "x\r\ny\rz", "\u00ad",
    "\u180e", "\u2060", "\u0600\u0661", "\u06dd1", "\u0d4eക", "<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "[CLS] [SEP] [MASK] [UNK]",
    "hello<s>world</s>", " <s> ", "</s></s>", "<extra_id_0> x <extra_id_99>", "<extra_id_0", "▁", "▁▁a", "a▁b", "<0x0A>", "<0x41><0xFF>", "Ġ",
    "Ġhello", "ĊĊ", "##ing", "##", "a" * 1000, "ab " * 300, "é" * 999, "你" * 500, " " * 1000, "\n" * 500, "\u0301" * 1000,
)  # fmt: skip


def random_texts(count: int, seed: int, alphabet: str = "") -> list[str]:
    """Strings over all of Unicode, with much of what is rare in text: marks, spaces, controls, unassigned code points."""
    draw = random.Random(seed)
    assigned = [c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]
    marks = [c for c in assigned if unicodedata.category(chr(c))[0] == "M"]
    special = "e\u0301 ,'sS\u0130\u200d\ufe0f👩🏽🇫🇷\u0915\u094d\u1100\u1161\u11a8\uac00\u3099か\r\n\t  \u00a0\u2028<>s/[]▁#|ac.\u00e9日"
    tokens = [
        "<s>",
        "</s>",
        "<unk>",
        "<|endoftext|>",
        "[SEP]",
        "<extra_id_3>",
        "hello",
        "He",
        "lo w",
        " x",
        " ",
        "abc",
        "ab",
    ]

    def piece() -> str:
        kind = draw.random()
        if alphabet and kind < 0.9:
            return draw.choice(alphabet)
        if kind < 0.2:
            return chr(draw.randrange(0x20, 0x7F))
        if kind < 0.35:
            return chr(draw.choice(marks))
        if kind < 0.5:
            return draw.choice(special)
        if kind < 0.55:
            return chr(draw.randrange(0xA0, 0x600))
        if kind < 0.65:
            return chr(draw.randrange(0x900, 0x1200))
        if kind < 0.75:
            return chr(draw.choice(assigned))
        if kind < 0.8:
            return chr(draw.randrange(0x1F000, 0x20000))
        if kind < 0.85:
            return draw.choice(tokens)
        point = draw.randrange(0x110000)
        return "x" if 0xD800 <= point <= 0xDFFF else chr(point)

    return ["".join(piece() for _ in range(draw.choice((1, 2, 3, 5, 8, 13, 30)))) for _ in range(count)]


def code_points(*, every: bool) -> list[str]:
    """Texts that hold code points between letters and by themselves.

    Args:
        every: all of Unicode. Otherwise, of more than 256 neighbours with the same properties (ideographs, syllables,
            unassigned), each 61st and the last.
    """
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    if not every:
        runs = [list(run) for _, run in itertools.groupby(points, key=_properties)]
        points = [c for run in runs for c in (run if len(run) <= 256 else [*run[::61], run[-1]])]
    return ["".join(f"a{c}b {c} " for c in points[i : i + 64]) for i in range(0, len(points), 64)]


def _properties(point: str) -> tuple[str, int, bool, bool]:
    decomposes = bool(unicodedata.decomposition(point))
    return unicodedata.category(point), unicodedata.combining(point), decomposes, point.lower() != point


def decoding_texts() -> list[str]:
    """Sequences of the tokens that the decoders are tried with."""
    draw = random.Random(5)
    return ["", *TOKENS, *("|".join(draw.choices(TOKENS, k=draw.randrange(1, 9))) for _ in range(2000))]
