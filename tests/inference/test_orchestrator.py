"""The loop, with a toy backend whose logits are known."""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2slm_export.bundle.manifest import GenerationDefaults
from llm2slm_export.errors import BundleError, PromptError, UsageError
from llm2slm_export.inference.batching import batches
from llm2slm_export.inference.orchestrator import Orchestrator, load
from llm2slm_export.inference.outputs import Generation
from tests.support.toy_pair import ALPHABET, EOS, OTHER_EOS, SHAPE, VOCAB, Toy, ids_of, make_pair, toy_of


@pytest.fixture
def pair(tmp_path: Path) -> Orchestrator:
    """Prompts that begin with a, b, c, … have scripts; see each test."""
    return make_pair(tmp_path, {"a": "alpha</s>", "b": "be</s>", "c": "ciao<end>"})


def texts_and_reasons(generations: Sequence[Generation]) -> list[tuple[str, str]]:
    return [(generation.text, generation.finish_reason) for generation in generations]


def test_greedy_until_any_eos_with_rows_finishing_at_different_times(pair: Orchestrator) -> None:
    generations = pair.generate(["a", "b!", "c"])
    assert texts_and_reasons(generations) == [("alpha", "stop"), ("be", "stop"), ("ciao", "stop")]
    assert generations[0].token_ids == (*ids_of("alpha"), EOS)
    assert generations[2].token_ids == (*ids_of("ciao"), OTHER_EOS)
    assert [generation.new_tokens for generation in generations] == [6, 3, 5]
    assert [generation.prompt_tokens for generation in generations] == [2, 3, 2]
    assert {generation.device for generation in generations} == {"toy"}
    # A finished row leaves: alpha goes on alone.
    assert [len(fed) for fed in toy_of(pair).fed] == [3, 3, 2, 2, 1]
    assert [fed[0] for fed in toy_of(pair).fed] == ids_of("alpha")
    np.testing.assert_array_equal(toy_of(pair).attention_mask, [[1, 1, 0], [1, 1, 1], [1, 1, 0]])


def test_the_llm_is_read_once_and_an_encoding_is_reusable(pair: Orchestrator) -> None:
    steps = list(pair.stream("a"))
    assert toy_of(pair).calls == ["encode", "project", "prefill", *["step"] * (len(steps) - 1)]
    toy_of(pair).calls.clear()
    encoding = pair.encode(["a", "b"])
    assert (
        texts_and_reasons(pair.generate_from(encoding))
        == texts_and_reasons(pair.generate_from(encoding))
        == texts_and_reasons(pair.generate(["a", "b"]))
    )
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


def test_sequences_of_a_prompt_follow_it_and_its_prompt_pass_is_made_once(pair: Orchestrator) -> None:
    options = {"do_sample": True, "temperature": 5.0, "seed": 1, "max_new_tokens": 6}
    generations = pair.generate(["a", "b"], num_return_sequences=3, **options)
    assert [g.sequence for g in generations] == [0, 1, 2, 0, 1, 2]
    assert [g.text[:2] for g in generations[::3]] != [g.text[:2] for g in generations[1::3]]
    assert toy_of(pair).calls.count("prefill") == toy_of(pair).calls.count("encode") == 1
    assert len(toy_of(pair).fed[0]) <= 6
    # The first sequence is what one alone would be, whatever else is in the batch.
    alone = pair.generate(["a", "b"], **options)
    assert [g.token_ids for g in alone] == [g.token_ids for g in generations if g.sequence == 0]


def test_token_logprobs_are_told_when_asked_for(pair: Orchestrator) -> None:
    (quiet,), (scored,) = pair.generate(["a"]), pair.generate(["a"], output_scores=True)
    assert quiet.token_logprobs is None
    assert scored.token_logprobs is not None
    # 9 for the script's token, 8 for z, 0 for the others that the tokenizer knows.
    expected = 9 - np.log(np.exp(9) + np.exp(8) + len(ALPHABET) + 3 - 2)
    np.testing.assert_allclose(scored.token_logprobs, [expected] * 6, rtol=1e-5)
    assert [step.logprob for step in pair.stream("a", output_scores=True)] == list(scored.token_logprobs)


def test_beams(pair: Orchestrator) -> None:
    generations = pair.generate(["a", "b", "c"], num_beams=3, num_return_sequences=2, output_scores=True)
    assert [g.text for g in generations[::2]] == ["alpha", "be", "ciao"]
    assert all(first.score > second.score for first, second in zip(generations[::2], generations[1::2], strict=True))
    assert all(len(g.token_logprobs) == g.new_tokens == len(g.token_ids) for g in generations)
    assert generations[0].score == pytest.approx(sum(generations[0].token_logprobs) / 6)
    assert toy_of(pair).calls.count("prefill") == 1
    # Rows of finished prompts leave.
    assert len(toy_of(pair).fed[0]) == 9
    assert len(toy_of(pair).fed[-1]) < 9
    assert pair.generate(["a"])[0].score is None


def test_a_beam_is_cut_before_the_first_stop_string(pair: Orchestrator) -> None:
    (generation,) = pair.generate(["a"], num_beams=2, stop=["pha", "ph"])
    assert (generation.text, generation.finish_reason) == ("al", "stop")
    assert generation.token_ids == tuple(ids_of("alph"))


class Spoiled(Toy):
    """Its decoder goes wrong: from some call on, one logit, or every one, of one prompt is no number to choose by."""

    spoilt: float = math.nan
    columns: int | slice = 5

    def _logits(self, state: Any, tokens: int) -> Any:
        logits = super()._logits(state, tokens)
        logits[(state["keys"] == ALPHABET["b"]) & (state["lengths"] >= 3), :, self.columns] = self.spoilt
        return logits


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, processed": {"repetition_penalty": 1.1, "output_scores": True},
    "samples": {"do_sample": True, "seed": 1, "num_return_sequences": 2, "top_k": 2},
    "samples with every warper": {"do_sample": True, "seed": 1, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9},
    "beams": {"num_beams": 3},
    "beams that are drawn": {"num_beams": 2, "do_sample": True, "seed": 1},
}


@pytest.mark.parametrize(
    ("spoilt", "columns", "named"),
    [(math.nan, 5, "NaN"), (math.nan, slice(None), "NaN"), (math.inf, 5, "inf"), (-math.inf, slice(None), "-inf")],
)
@pytest.mark.parametrize("way", WAYS)
def test_logits_that_are_not_finite_are_an_error(
    tmp_path: Path, way: str, spoilt: float, columns: int | slice, named: str
) -> None:
    pair = make_pair(tmp_path, {"a": "alphabet</s>", "b": "better</s>", "c": "</s>"}, toy=Spoiled)
    toy = toy_of(pair)
    toy.spoilt, toy.columns = spoilt, columns  # type: ignore[attr-defined]
    with pytest.raises(BundleError, match=r"^The decoder of 'toy' returns .* for new token 3\.") as error:
        pair.generate(["c", "aa", "bb", "a"], batch_size=4, **WAYS[way])
    assert error.value.evidence == (
        f"prompt 2: the highest is {named}; the projector's output is finite",
        "precision: encoder fp32, projector fp32, decoder fp32; device: toy",
    )
    assert "--precision bf16 or fp32" in error.value.remedy
    # What is minus infinity in places, as some models have it for ids of no token, is fine.
    toy.spoilt, toy.columns = -math.inf, 5  # type: ignore[attr-defined]
    assert pair.generate(["c", "aa", "bb", "a"], max_new_tokens=4, **WAYS[way])


def test_a_stream_ends_where_logits_are_not_finite(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"b": "better</s>"}, toy=Spoiled)
    steps = pair.stream("b")
    assert next(steps).text + next(steps).text == "be"
    with pytest.raises(BundleError, match="new token 3"):
        next(steps)


def test_an_encoding_that_is_not_finite_is_named_as_where_it_began(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"b": "better</s>"}, toy=Spoiled)
    encoding = pair.encode(["bb"])
    for kv in encoding.conditioning.tensors.values():
        kv[:, :, :, 2] = math.inf
    with pytest.raises(BundleError, match="the projector's output is not finite"):
        pair.generate_from(encoding)


def test_what_cannot_be_streamed_is_refused_with_the_reason(pair: Orchestrator, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"num_beams is 4: .* known only at the end") as error:
        pair.stream("a", num_beams=4)
    assert "num_beams=1" in error.value.remedy
    with pytest.raises(UsageError, match="num_return_sequences is 2"):
        pair.stream("a", do_sample=True, num_return_sequences=2)
    beams = make_pair(tmp_path, {"a": "x</s>"}, generation=GenerationDefaults(max_new_tokens=4, num_beams=2))
    with pytest.raises(UsageError, match="num_beams is 2"):
        beams.stream("a")
    assert [step.text for step in beams.stream("a", num_beams=1)] == ["x", ""]
    assert toy_of(pair).calls == []


def test_prompts_of_similar_length_run_together_and_answers_keep_their_order(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "alpha</s>", "b": "be</s>"}, max_prompt_tokens=100)
    prompts = ["a", "b" * 40, "b", "a" * 39, "a" * 10]
    generations = pair.generate(prompts)
    assert [g.text for g in generations] == ["alpha", "be", "be", "alpha", "alpha"]
    assert [g.prompt_tokens for g in generations] == [len(prompt) + 1 for prompt in prompts]
    assert [[len(ids) for ids in batch] for batch in toy_of(pair).read] == [[2, 2], [41, 40], [11]]
    assert [g.batch for g in generations] == [0, 1, 0, 1, 2]
    assert generations[0].timings_ms == generations[2].timings_ms


def test_answers_come_as_soon_as_the_next_ones_are_known(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "x</s>"}, max_prompt_tokens=100)
    prompts = ["a" * 50, "a", "a" * 60, "aa", "a"]
    parts = pair.generate_batches(prompts, batch_size=2, max_new_tokens=2)
    seen = [([g.prompt_tokens for g in part], toy_of(pair).calls.count("encode")) for part in parts]
    # The second batch (a, a) answers prompts 1 and 4; 4 waits for 3.
    assert seen == [([51], 1), ([2, 61], 2), ([3, 2], 3)]


@pytest.mark.parametrize("size", [1, 3, 8, None])
def test_padding_is_bounded_and_no_prompt_is_lost(size: int | None) -> None:
    lengths = np.random.default_rng(0).geometric(0.02, 500).tolist()
    made = list(batches(lengths, size=size))
    assert sorted(index for batch in made for index in batch) == list(range(500))
    for batch in made:
        tokens = [lengths[index] for index in batch]
        assert len(batch) * max(tokens) <= 2 * sum(tokens)
        assert size is None or len(batch) <= size
        # No further than a window: 16 full batches.
        assert size is None or max(batch) // (16 * size) == min(batch) // (16 * size)
    assert size != 1 or made == [[index] for index in range(500)]


def test_batch_borders_change_nothing_even_when_sampling(pair: Orchestrator) -> None:
    prompts = ["a", "bbbbbbb", "c", "ab"]
    options = {"do_sample": True, "temperature": 5.0, "seed": 1}
    for more in ({}, {"num_return_sequences": 2}, {"num_beams": 2}):
        together = pair.generate(prompts, **options, **more)
        for size in (1, 2, 3):
            split = pair.generate(prompts, batch_size=size, **options, **more)
            assert [g.token_ids for g in split] == [g.token_ids for g in together]


def test_max_new_tokens(pair: Orchestrator) -> None:
    generations = pair.generate(["a", "b"], max_new_tokens=3)
    assert texts_and_reasons(generations) == [
        ("alp", "length"),
        ("be", "stop"),
    ]  # EOS as the last token is still a stop
    assert toy_of(pair).calls.count("step") == 2
    assert texts_and_reasons(pair.generate(["a"], max_new_tokens=1)) == [("a", "length")]


def test_min_new_tokens_puts_off_every_eos(pair: Orchestrator) -> None:
    assert texts_and_reasons(pair.generate(["b", "c"], min_new_tokens=6, max_new_tokens=8)) == [
        ("bezzzz", "stop"),
        ("ciaozz", "stop"),
    ]


def test_ids_of_no_token_are_never_written(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "x"})
    key = ids_of("a")[0]
    toy_of(pair).scripts[key] = [VOCAB - 1]
    assert texts_and_reasons(pair.generate(["a"], max_new_tokens=3)) == [("zzz", "length")]


def test_a_stop_string_across_tokens_ends_the_row_before_it(pair: Orchestrator) -> None:
    generations = pair.generate(["a", "c"], stop=["ph", "never"])
    assert texts_and_reasons(generations) == [("al", "stop"), ("ciao", "stop")]
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
        (["a", "b\ud800"], PromptError, r"prompt 1: '\ud800' at character 1"),
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


def test_positions_the_decoder_does_not_know(tmp_path: Path) -> None:
    # The last token is never given to the decoder; an encoder-decoder SLM's start token is, and its prompt is elsewhere.
    pair = make_pair(tmp_path, {"a": "alpha</s>"}, max_total_tokens=6)
    assert texts_and_reasons(pair.generate(["a" * 10], max_new_tokens=6)) == [("alpha", "stop")]
    with pytest.raises(UsageError, match="has 6 positions, and max_new_tokens is 7"):
        pair.generate(["a"], max_new_tokens=7)
    with pytest.raises(UsageError, match="max_new_tokens is 7"):
        pair.generate_from(pair.encode(["a"]), max_new_tokens=7)
    shape = replace(SHAPE, slm_kind="decoder-only", fusion="prefix")
    limited = make_pair(tmp_path, {"a": "x</s>"}, max_total_tokens=9, shape=shape)
    with pytest.raises(PromptError) as error:
        limited.generate(["a", "aa"], max_new_tokens=5)
    assert error.value.evidence == ("prompt 1: 6 positions and 5 new tokens",)
    assert "--truncate" in error.value.remedy
    cut = limited.generate(["a", "aa"], max_new_tokens=5, truncate=True)
    assert [(g.text, g.prompt_tokens, g.dropped_tokens) for g in cut] == [("x", 2, 0), ("x", 2, 1)]
    (*_, last) = limited.stream("aa", max_new_tokens=5, truncate=True)
    assert last.generation is not None
    assert last.generation.dropped_tokens == 1
    with pytest.raises(PromptError, match="too little room"):
        limited.generate(["a"], max_new_tokens=10, truncate=True)
    limited._check_total([2], limited.options(max_new_tokens=6))


def test_bad_words_are_spelled_both_ways(pair: Orchestrator) -> None:
    assert pair.bad_words_ids(["al", "e"]) == tuple(tuple(ids_of(word)) for word in ("al", " al", "e", " e"))
    assert texts_and_reasons(pair.generate(["b"], bad_words_ids=pair.bad_words_ids(["e"]), max_new_tokens=3)) == [
        ("bz", "stop")
    ]


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


# --- on ONNX Runtime -----------------------------------------------------------------------------------------------

PROMPTS = [
    "Hi",
    "Where is the station, and when does the last train leave?",
    "She reads a book.",
    "no",
    "What time is it?",
]


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_padded_batches_answer_as_each_prompt_alone(bundles: Callable[..., tuple[Path, Path]], slm: str) -> None:
    with load(bundles(slm)[1], threads=1) as pair:
        for options in (
            {},
            {"num_beams": 3},
            {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
            {"do_sample": True, "seed": 5, "temperature": 1.5, "num_return_sequences": 2},
            {"do_sample": True, "seed": 5, "num_beams": 2},
        ):
            alone = pair.generate(PROMPTS, batch_size=1, max_new_tokens=12, **options)
            together = pair.generate_from(pair.encode(PROMPTS), max_new_tokens=12, **options)
            bucketed = pair.generate(PROMPTS, max_new_tokens=12, **options)
            assert len(alone) == len(PROMPTS) * options.get("num_return_sequences", 1)
            for generations in (together, bucketed):
                assert [g.token_ids for g in generations] == [g.token_ids for g in alone]
            if "num_beams" in options:
                np.testing.assert_allclose([g.score for g in together], [g.score for g in alone], rtol=1e-4)


def test_sequences_drawn_for_a_prompt_differ(bundles: Callable[..., tuple[Path, Path]]) -> None:
    with load(bundles("t5")[1], threads=1) as pair:
        generations = pair.generate(
            ["Hi"], do_sample=True, seed=1, temperature=2.0, num_return_sequences=4, max_new_tokens=8
        )
        assert len({g.token_ids for g in generations}) == 4


def test_prompts_may_come_from_an_iterator(pair: Orchestrator) -> None:
    assert texts_and_reasons(pair.generate(iter(["a", "b"]))) == texts_and_reasons(pair.generate(["a", "b"]))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="The prompts are a int"):
        pair.generate(3)  # type: ignore[arg-type]
