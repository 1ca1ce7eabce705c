"""The loop, with a toy backend whose logits are known."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel

from llm2slm_export.bundle import (
    Bundle,
    CacheEntry,
    GenerationDefaults,
    Manifest,
    ParityReport,
    SpecialIds,
    TokenizerEntry,
)
from llm2slm_export.contract import PairShape, state
from llm2slm_export.errors import BundleError, PromptError, UsageError
from llm2slm_export.orchestrator import Generation, Orchestrator, load
from llm2slm_export.runtime.backend import Conditioning

PAD, EOS, OTHER_EOS, VOCAB = 0, 1, 2, 270
ALPHABET = {char: 3 + index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
SHAPE = PairShape(slm_kind="encoder-decoder", fusion="add", d_llm=4, d_slm=4, layers=1, heads=1, d_head=4, vocab=VOCAB)


class Toy:
    """Writes the script of each prompt, whose first id is the script's key."""

    device = "toy"

    def __init__(self, scripts: dict[int, list[int]]) -> None:
        self.scripts, self.calls, self.fed = scripts, [], []

    def encode(self, input_ids: Any, attention_mask: Any) -> Any:
        self.calls.append("encode")
        self.attention_mask = attention_mask
        return input_ids

    def project(self, hidden: Any, input_ids: Any, attention_mask: Any) -> Conditioning:
        self.calls.append("project")
        assert hidden is input_ids
        return Conditioning({"keys": input_ids[:, 0]}, attention_mask)

    def prefill(self, conditioning: Conditioning) -> tuple[Any, Any]:
        self.calls.append("prefill")
        state = {"keys": conditioning.tensors["keys"], "position": 0}
        return state, self._logits(state)

    def step(self, state: Any, input_ids: Any) -> Any:
        self.calls.append("step")
        self.fed.append(input_ids[:, 0].tolist())
        state["position"] += 1
        return self._logits(state)

    def _logits(self, state: Any) -> Any:
        logits = np.zeros((len(state["keys"]), VOCAB), np.float32)
        for row, key in enumerate(state["keys"]):
            script = self.scripts[int(key)]
            position = min(state["position"], len(script) - 1)
            logits[row, script[position]] = 9
            logits[row, ALPHABET["z"]] = 8  # the second choice everywhere
        return logits

    def close(self) -> None:
        self.calls.append("close")


def ids_of(text: str) -> list[int]:
    return _tokenizer().encode(text, add_special_tokens=False).ids


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"<pad>": PAD, "</s>": EOS, "<end>": OTHER_EOS, **ALPHABET}, merges=[]))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<end>"])
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return tokenizer


@pytest.fixture
def pair(tmp_path: Path) -> Orchestrator:
    """Prompts that begin with a, b, c, … have scripts; see each test."""
    return make_pair(tmp_path, {"a": "alpha</s>", "b": "be</s>", "c": "ciao<end>"})


def make_pair(directory: Path, scripts: dict[str, str], **changes: Any) -> Orchestrator:
    tokenizer = _tokenizer()
    tokenizer.enable_padding(length=99)  # as a training run may leave it
    tokenizer.enable_truncation(3)
    tokenizer.save(str(directory / "tokenizer.json"))
    manifest = Manifest.model_construct(
        **{
            "name": "toy",
            "sources": {},
            "trained": True,
            "shape": SHAPE,
            "fusion": "add",
            "prompt_template": "{prompt}",
            "max_prompt_tokens": 12,
            "tokenizer": TokenizerEntry(
                strategy="shared", llm="tokenizer.json", slm="tokenizer.json", slm_size=3 + len(ALPHABET)
            ),
            "special_ids": SpecialIds(prompt_pad=PAD, pad=PAD, eos=(EOS, OTHER_EOS), decoder_start=PAD),
            "generation": GenerationDefaults(max_new_tokens=32),
            "graphs": {},
            "cache": CacheEntry(state=state(SHAPE)),
            "parity": ParityReport(rows=()),
            "tool_versions": {},
            "files": (),
            **changes,
        }
    )
    toy = Toy({ids_of(key)[0]: ids_of(script) for key, script in scripts.items()})
    return Orchestrator(Bundle(directory, manifest), toy)


def toy_of(pair: Orchestrator) -> Toy:
    backend = pair._backend
    assert isinstance(backend, Toy)
    return backend


def said(generations: Sequence[Generation]) -> list[tuple[str, str]]:
    return [(generation.text, generation.finish_reason) for generation in generations]


def test_greedy_until_any_eos_with_rows_finishing_at_different_times(pair: Orchestrator) -> None:
    generations = pair.generate(["a", "b!", "c"])
    assert said(generations) == [("alpha", "stop"), ("be", "stop"), ("ciao", "stop")]
    assert generations[0].token_ids == (*ids_of("alpha"), EOS)
    assert generations[2].token_ids == (*ids_of("ciao"), OTHER_EOS)
    assert [generation.new_tokens for generation in generations] == [6, 3, 5]
    assert [generation.prompt_tokens for generation in generations] == [2, 3, 2]
    assert {generation.device for generation in generations} == {"toy"}
    assert [fed[1] for fed in toy_of(pair).fed] == [*ids_of("be"), EOS, PAD, PAD]
    np.testing.assert_array_equal(toy_of(pair).attention_mask, [[1, 1, 0], [1, 1, 1], [1, 1, 0]])


def test_the_llm_is_read_once_and_an_encoding_is_reusable(pair: Orchestrator) -> None:
    steps = list(pair.stream("a"))
    assert toy_of(pair).calls == ["encode", "project", "prefill", *["step"] * (len(steps) - 1)]
    toy_of(pair).calls.clear()
    encoding = pair.encode(["a", "b"])
    assert said(pair.generate_from(encoding)) == said(pair.generate_from(encoding)) == said(pair.generate(["a", "b"]))
    assert toy_of(pair).calls.count("encode") == toy_of(pair).calls.count("project") == 2
    assert len(encoding) == 2
    assert encoding.attention_mask.shape == encoding.input_ids.shape == (2, 2)


def test_stream_is_generate(pair: Orchestrator) -> None:
    for options in ({}, {"max_new_tokens": 3}, {"stop": "ph"}, {"do_sample": True, "seed": 3, "temperature": 9.0}):
        (generation,) = pair.generate(["a"], **options)
        steps = list(pair.stream("a", **options))
        assert "".join(step.text for step in steps) == generation.text
        assert tuple(step.token_id for step in steps) == generation.token_ids
        assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + [generation.finish_reason]
        assert [step.generation for step in steps[:-1]] == [None] * (len(steps) - 1)
        whole = steps[-1].generation
        assert whole is not None
        assert replace(whole, timings_ms={}) == replace(generation, timings_ms={})


def test_batch_borders_change_nothing_even_when_sampling(pair: Orchestrator) -> None:
    prompts = ["a", "bb", "c", "ab"]
    options = {"do_sample": True, "temperature": 5.0, "seed": 1}
    together = pair.generate(prompts, **options)
    for size in (1, 2, 3):
        split = pair.generate(prompts, batch_size=size, **options)
        assert [g.token_ids for g in split] == [g.token_ids for g in together]


def test_max_new_tokens(pair: Orchestrator) -> None:
    generations = pair.generate(["a", "b"], max_new_tokens=3)
    assert said(generations) == [("alp", "length"), ("be", "stop")]  # EOS as the last token is still a stop
    assert toy_of(pair).calls.count("step") == 2
    assert said(pair.generate(["a"], max_new_tokens=1)) == [("a", "length")]


def test_min_new_tokens_puts_off_every_eos(pair: Orchestrator) -> None:
    assert said(pair.generate(["b", "c"], min_new_tokens=6, max_new_tokens=8)) == [
        ("bezzzz", "stop"),
        ("ciaozz", "stop"),
    ]


def test_ids_of_no_token_are_never_written(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "x"})
    key = ids_of("a")[0]
    toy_of(pair).scripts[key] = [VOCAB - 1]
    assert said(pair.generate(["a"], max_new_tokens=3)) == [("zzz", "length")]


def test_a_stop_string_across_tokens_ends_the_row_before_it(pair: Orchestrator) -> None:
    generations = pair.generate(["a", "c"], stop=["ph", "never"])
    assert said(generations) == [("al", "stop"), ("ciao", "stop")]
    assert generations[0].token_ids == tuple(ids_of("alph"))
    assert [step.text for step in pair.stream("a", stop="pz")] == ["a", "l", "", "ph", "a", ""]
    assert [step.text for step in pair.stream("a", stop="az")] == ["", "al", "p", "h", "", "a"]


def test_half_a_character_is_held_back(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "é🤗</s>"})
    assert [step.text for step in pair.stream("a")] == ["", "é", "", "", "", "🤗", ""]
    assert [step.text for step in pair.stream("a", max_new_tokens=3)] == ["", "é", "\N{REPLACEMENT CHARACTER}"]


def test_timings_are_whole(pair: Orchestrator) -> None:
    timings = pair.generate(["a"])[0].timings_ms
    assert list(timings) == ["tokenize", "encode", "project", "prefill", "decode", "total"]
    assert timings["total"] == pytest.approx(sum(timings.values()) - timings["total"])
    assert all(value > 0 for value in timings.values())


def test_a_long_prompt_is_refused_with_its_counts_or_cut_and_reported(pair: Orchestrator) -> None:
    with pytest.raises(PromptError) as error:
        pair.generate(["b", "a" * 12, "a" * 20], batch_size=1)
    assert error.value.evidence == ("prompt 1: 13 tokens, at most 12", "prompt 2: 21 tokens, at most 12")
    assert "--truncate" in error.value.remedy
    assert toy_of(pair).calls == []
    encoding = pair.encode(["a" * 20, "b"], truncate=True)
    assert encoding.dropped_tokens == (9, 0)
    assert encoding.input_ids[0].tolist() == [*ids_of("a" * 11), EOS]
    assert [g.dropped_tokens for g in pair.generate_from(encoding)] == [9, 0]
    assert [g.prompt_tokens for g in pair.generate_from(encoding)] == [12, 2]


def test_the_template_is_applied_and_other_braces_stay(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"{": "x</s>"}, prompt_template="{x} {prompt}")
    assert pair.encode(["{}"]).input_ids.tolist() == [[*ids_of("{x} {}"), EOS]]


@pytest.mark.parametrize(
    ("prompts", "error", "says"),
    [
        ("a", UsageError, "['a']"),
        ([], UsageError, "at least one prompt"),
        (["a", 3], UsageError, "prompt 1: int"),
        (["a", " \n", ""], PromptError, "prompt 2: ''"),
        (["a", "b\ud800"], PromptError, r"prompt 1: 'b\ud800'"),
    ],
)
def test_prompts_that_cannot_be_run(pair: Orchestrator, prompts: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        pair.generate(prompts)
    assert says in str(raised.value)
    assert toy_of(pair).calls == []


def test_wrong_options_are_refused_before_anything_runs(pair: Orchestrator) -> None:
    for call in (
        lambda: pair.stream("a", top_p=2),
        lambda: pair.generate(["a"], top_pp=1),
        lambda: pair.generate(["a"], batch_size=0),
    ):
        with pytest.raises(UsageError):
            call()
    assert toy_of(pair).calls == []


def test_closing(pair: Orchestrator) -> None:
    toy = toy_of(pair)
    with pair:
        pass
    pair.close()
    assert toy.calls == ["close"]
    with pytest.raises(UsageError, match="has been closed"):
        pair.generate(["a"])


def test_load_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        load(tmp_path)
    with pytest.raises(UsageError, match="banana"):
        load(tmp_path, device="banana")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, llm2slm_export as l2s; heavy = ('numpy', 'onnxruntime', 'torch', 'tokenizers', 'pydantic'); "
        "print([m for m in heavy if m in sys.modules], l2s.__all__ == sorted(l2s.__all__), "
        "all(hasattr(l2s, name) for name in l2s.__all__), 'torch' in sys.modules, 'onnxruntime' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "True", "True", "False", "False"]
