"""Log-probabilities of given responses are those of teacher forcing in the unmodified models, whatever shares their calls."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

import llm2slm_export
from llm2slm_export.bundle.manifest import EngineLimits, SpecialIds
from llm2slm_export.errors import BundleError, EncodingError, PromptError, ResponseError, UsageError
from llm2slm_export.inference import scoring
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.outputs import Score
from tests.support.oracle import Oracle
from tests.support.tiers import tiered
from tests.support.toy_pair import ALPHABET, EOS, SHAPE, Toy, ids_of, make_pair, toy_of

PROMPTS = ["the cat", "a much longer prompt than that one", "dogs"]
RESPONSES = ["x y z", "", "w", "some words here", "a longer response than all of the others, in two sentences. Really."]


@pytest.fixture(scope="module", params=tiered(["t5", "llama", "gpt2"], fast=["t5", "llama"], slow=["gpt2"]))
def composed(
    request: pytest.FixtureRequest, bundles: Callable[..., tuple[Path, Path]]
) -> Iterator[tuple[Oracle, Orchestrator]]:
    composition, bundle = bundles(request.param)
    with llm2slm_export.load(bundle, threads=1) as pair:
        yield Oracle(composition), pair


@torch.no_grad()
def teacher_forced(oracle: Oracle, prompt: str, text: str, *, add_eos: bool = True) -> tuple[list[int], np.ndarray]:
    """The ids of a response, and the log-probabilities [tokens, vocab_size] at their positions, of one prompt by itself."""
    ids = [*oracle.tokenizer(text, add_special_tokens=False).input_ids, *([1] if add_eos else [])]
    memory, fed = oracle.memory(prompt), torch.tensor([ids[:-1]], dtype=torch.int64)
    if oracle.encoder_decoder:
        start = torch.full((1, 1), oracle.slm.config.decoder_start_token_id)
        logits = oracle.slm(
            encoder_outputs=BaseModelOutput(last_hidden_state=oracle.slm.get_encoder()(inputs_embeds=memory)[0]),
            decoder_input_ids=torch.cat([start, fed], dim=1),
        ).logits
    else:
        embeddings = torch.cat([memory, oracle.slm.get_input_embeddings()(fed)], dim=1)
        logits = oracle.slm(inputs_embeds=embeddings).logits[:, memory.shape[1] - 1 :]
    return ids, torch.log_softmax(logits[0].double(), dim=-1).numpy()


def check(score: Score, oracle: Oracle, prompt: str, text: str, *, add_eos: bool = True) -> None:
    ids, expected = teacher_forced(oracle, prompt, text, add_eos=add_eos)
    assert (score.text, score.token_ids) == (text, tuple(ids))
    np.testing.assert_allclose(score.token_logprobs, expected[np.arange(len(ids)), ids], atol=2e-5)
    assert score.logprob == pytest.approx(sum(score.token_logprobs), abs=1e-12)
    known = expected[:, : len(oracle.tokenizer)]
    assert score.is_greedy == bool((known.argmax(axis=1) == ids).all())


def test_one_prompt_and_a_list_of_texts(composed: tuple[Oracle, Orchestrator]) -> None:
    oracle, pair = composed
    encoding = pair.encode(PROMPTS[:1])
    found = pair.score(encoding, RESPONSES)
    assert len(found) == len(RESPONSES)
    for score, text in zip(found, RESPONSES, strict=True):
        check(score, oracle, PROMPTS[0], text)
    assert found[1].token_ids == (1,)
    texts = [text for text in RESPONSES if text]
    for score, text in zip(pair.score(encoding, texts, add_eos=False), texts, strict=True):
        check(score, oracle, PROMPTS[0], text, add_eos=False)
    assert pair.score(encoding, [texts]) == pair.score(encoding, tuple(texts))


def test_several_prompts_in_rounds_and_chunks(
    composed: tuple[Oracle, Orchestrator], monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle, pair = composed
    given = [RESPONSES * 2, RESPONSES[:1], [*RESPONSES[3:], "", "ab"]]
    encoding = pair.encode(PROMPTS)
    whole = pair.score(encoding, given)
    monkeypatch.setattr(scoring, "MOST_ROWS", 4)
    monkeypatch.setattr(
        scoring, "MOST_LOGITS_BYTES", 4 * 5 * 4 * pair.manifest.shape.vocab_size
    )  # 5 positions of 4 rows
    cut = pair.score(encoding, given)
    flat = [(prompt, text) for prompt, texts in zip(PROMPTS, given, strict=True) for text in texts]
    for scores in (whole, cut):
        assert len(scores) == len(flat)
        for score, (prompt, text) in zip(scores, flat, strict=True):
            check(score, oracle, prompt, text)


def test_batches_are_the_prompts_in_order(composed: tuple[Oracle, Orchestrator]) -> None:
    oracle, pair = composed
    for size in (1, 2, None):
        scored = list(pair.score_batches(PROMPTS, [RESPONSES[:2]] * 3, batch_size=size))
        for prompt, entry in zip(PROMPTS, scored, strict=True):
            assert (entry.prompt_tokens, entry.dropped_tokens) == (len(oracle.llm_tokenizer(prompt).input_ids), 0)
            for score, text in zip(entry.scores, RESPONSES[:2], strict=True):
                check(score, oracle, prompt, text)


def test_greedy_responses_are_greedy_and_have_the_log_probabilities_of_generation(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "alpha</s>", "b": "be</s>"})
    for prompt in ("a", "b"):
        (generation,) = pair.generate([prompt], output_scores=True)
        encoding = pair.encode([prompt])
        (score, other, longer) = pair.score(encoding, [generation.text, generation.text[:-1] + "z", "alphabet"])
        assert score.token_ids == generation.token_ids
        assert (score.is_greedy, other.is_greedy, longer.is_greedy) == (True, False, False)
        (beginning,) = pair.score(encoding, [generation.text[:-1]], add_eos=False)
        assert beginning.is_greedy
        # Generation's are over the tokenizer's ids, and these over the whole vocabulary.
        assert score.logprob < sum(generation.token_logprobs or ())


class Beyond(Toy):
    """Prefers an id that the tokenizer does not have."""

    def _logits(self, state: Any, tokens: int) -> Any:
        logits = super()._logits(state, tokens)
        logits[:, :, 265] = 12
        return logits


def test_greedy_search_never_chooses_ids_without_a_token_but_they_have_probability(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "alpha</s>"}, toy=Beyond)
    (generation,) = pair.generate(["a"])
    (score,) = pair.score(pair.encode(["a"]), [generation.text])
    assert (score.text, score.is_greedy) == ("alpha", True)
    assert max(score.token_logprobs) < math.log(0.05)


class Counted(Toy):
    """Remembers the shape of every decoder call, and what it was set back to."""

    def __init__(self, scripts: dict[int, list[int]]) -> None:
        super().__init__(scripts)
        self.shapes: list[tuple[int, int]] = []

    def step(self, state: Any, input_ids: Any) -> Any:
        self.shapes.append(input_ids.shape)
        return super().step(state, input_ids)


def counted(pair: Orchestrator) -> Counted:
    toy = toy_of(pair)
    assert isinstance(toy, Counted)
    return toy


def test_candidates_share_calls_and_one_prompt_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, {"a": "abcdefgh</s>", "b": "b</s>"}, toy=Counted)
    toy = counted(pair)
    encoding = pair.encode(["a"])
    toy.calls.clear()
    texts = ["abc", "a", "abcdefgh", *"defghijklmnopqrstuvwxyzabcdefghijk"]
    assert len(texts) > scoring.MOST_ROWS
    assert [score.text for score in pair.score(encoding, texts)] == texts
    assert toy.calls.count("prefill") == 1
    # Longest first: eight characters, then the others of one character and EOS.
    assert toy.shapes == [(32, 8), (len(texts) - 32, 1)]
    toy.shapes.clear()
    assert len(pair.score(encoding, list("abcdef"), add_eos=False)) == 6
    assert toy.shapes == [], "one token needs the prompt pass only"
    # Rows of a prompt without further responses leave, and the others' copies take their place.
    monkeypatch.setattr(scoring, "MOST_ROWS", 6)
    pair.score(pair.encode(["a", "b"]), [[*"abcdefghi"], ["b"]])
    assert toy.shapes == [(4, 1), (6, 1)]
    toy.shapes.clear()
    monkeypatch.setattr(scoring, "MOST_LOGITS_BYTES", 1)
    pair.score(encoding, ["abcdefgh"])
    assert toy.shapes == [(1, 1)] * 8


def test_rows_stay_within_the_engines(tmp_path: Path) -> None:
    toy = type("Limited", (Counted,), {"limits": EngineLimits(batch=2, prompt=8, new=4, capacity=12)})
    pair = make_pair(tmp_path, {"a": "abc</s>", "b": "b</s>"}, toy=toy)
    assert len(pair.score(pair.encode(["a"]), ["ab", "ac", "ad", "abc"])) == 4
    assert counted(pair).shapes == [(2, 3), (2, 2)]
    with pytest.raises(ResponseError, match="response 0: 5 tokens, at most 4"):
        pair.score(pair.encode(["a"]), ["abcd"])
    encoding = pair.encode(["a", "b"])
    assert len(pair.score(encoding, [["a"], ["b"]])) == 2
    with pytest.raises(UsageError, match="A batch of 3 rows"):
        pair.score(pair.encode(["a", "b", "a"]), [["a"], ["b"], ["c"]])
    assert len(list(pair.score_batches(["a", "b", "a"], [["a"], ["b"], ["c"]], batch_size=None))) == 3


class Positions(Counted):
    """Fails beyond the decoder's last position, as a table of position embeddings does."""

    last = 0

    def prefill(self, conditioning: Any) -> tuple[Any, Any]:
        state, logits = super().prefill(conditioning)
        state["lengths"] = conditioning.attention_mask.sum(axis=1)
        return state, logits

    def step(self, state: Any, input_ids: Any) -> Any:
        assert (state["lengths"] + input_ids.shape[1]).max() <= self.last
        return super().step(state, input_ids)


def test_the_padding_of_short_responses_stays_within_the_positions(tmp_path: Path) -> None:
    shape = replace(SHAPE, slm_kind="decoder-only")
    toy = type("Ten", (Positions,), {"last": 10})
    pair = make_pair(tmp_path, {"a": "abc</s>", "b": "b</s>"}, toy=toy, shape=shape, max_total_tokens=10)
    prompts = ["a", "a234567", "b", "b23456"]  # 2, 8, 2 and 7 tokens
    found = pair.score(pair.encode(prompts), [["abcdefgh"], ["ab"], ["b", "bbbb"], ["a", "aaa"]])
    assert [score.text for score in found] == ["abcdefgh", "ab", "b", "bbbb", "a", "aaa"]
    assert toy_of(pair).calls.count("prefill") > 1
    alone = [
        score
        for prompt, texts in zip(prompts, [["abcdefgh"], ["ab"], ["b", "bbbb"], ["a", "aaa"]], strict=True)
        for score in pair.score(pair.encode([prompt]), texts)
    ]
    assert [score.token_ids for score in found] == [score.token_ids for score in alone]
    with pytest.raises(ResponseError) as error:
        pair.score(pair.encode(prompts[:2]), [["abcdefghi", "a"], ["ab", "abc"]])
    assert "prompt 0, response 0: 10 tokens, at most 9" in str(error.value)
    assert "prompt 1, response 1: 4 tokens, at most 3" in str(error.value)
    assert list(error.value.responses) == [(0, 0), (1, 1)]


def test_all_bad_texts_are_refused_at_once(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "abc</s>"}, max_total_tokens=6)
    encoding = pair.encode(["a"])
    toy_of(pair).calls.clear()
    with pytest.raises(ResponseError) as error:
        pair.score(encoding, ["ok", 3, "abcdef", "\ud800", None, ""], add_eos=True)
    assert "4 of 6 responses cannot be scored by 'toy'" in str(error.value)
    assert error.value.responses == {
        (0, 1): "int, not a string",
        (0, 2): "7 tokens, at most 6",
        (0, 3): "not Unicode text: '\\ud800' at character 0",
        (0, 4): "NoneType, not a string",
    }
    with pytest.raises(ResponseError, match="response 0: no tokens, and the end-of-sequence token is not scored"):
        pair.score(encoding, [""], add_eos=False)
    small = make_pair(tmp_path, {"a": "abc</s>"}, shape=replace(SHAPE, vocab_size=100))
    with pytest.raises(ResponseError, match="the SLM's table has 100 rows"):
        small.score(encoding, ["é"])
    assert toy_of(pair).calls == []


WRONG: dict[str, tuple[int, Any, str]] = {
    "a text": (1, "abc", "got: str"),
    "a generator": (1, iter(["a"]), "got: list_iterator"),
    "nothing": (1, [], r"got: \[\]"),
    "empty lists": (2, [[], []], "no responses"),
    "a mixture": (1, ["a", ["b"]], "texts and lists of texts"),
    "texts for two prompts": (2, ["a", "b"], "prompts: 2; got: a list of texts"),
    "too few lists": (2, [["a"]], "prompts: 2; lists of responses: 1"),
    "too many lists": (1, [["a"], ["b"]], "prompts: 1; lists of responses: 2"),
}


@pytest.mark.parametrize(("prompts", "responses", "fact"), WRONG.values(), ids=WRONG)
def test_wrong_nesting_is_refused(tmp_path: Path, prompts: int, responses: Any, fact: str) -> None:
    pair = make_pair(tmp_path, {"a": "abc</s>"})
    encoding = pair.encode(["a"] * prompts)
    with pytest.raises(UsageError, match=fact):
        pair.score(encoding, responses)
    with pytest.raises(UsageError):
        pair.score_batches(["a"] * prompts, responses, batch_size=1)


def test_deeper_nesting_is_refused(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "abc</s>"})
    with pytest.raises(ResponseError, match="list, not a string"):
        pair.score(pair.encode(["a", "a"]), [[["a"]], ["b"]])


def test_a_prompt_may_have_no_responses(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "abc</s>", "b": "b</s>"})
    assert [score.text for score in pair.score(pair.encode(["a", "b"]), [[], ["b", "bb"]])] == ["b", "bb"]


def test_other_encodings_closed_pairs_and_bad_prompts_are_refused(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "abc</s>"})
    encoding = pair.encode(["a"])
    other = replace(encoding, identity=replace(encoding.identity, projector="0" * 64))
    with pytest.raises(EncodingError, match="belongs to another pair"):
        pair.score(other, ["a"])
    with pytest.raises(PromptError, match="prompt 1"):
        pair.score_batches(["a", " "], [["a"], ["b"]], batch_size=1)
    with pytest.raises(UsageError, match="batch_size is 0"):
        pair.score_batches(["a"], [["a"]], batch_size=0)
    endless = make_pair(tmp_path, {"a": "abc"}, special_ids=SpecialIds(prompt_pad=0, pad=0, eos=(), decoder_start=0))
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        endless.score(encoding, ["a"])
    assert endless.score(encoding, ["a"], add_eos=False)[0].token_ids == tuple(ids_of("a"))
    pair.close()
    with pytest.raises(UsageError, match="closed"):
        pair.score(encoding, ["a"])


class Spoiled(Toy):
    """Logits that are no numbers for one prompt, from some position on."""

    spoilt, since = math.nan, 3

    def _logits(self, state: Any, tokens: int) -> Any:
        logits = super()._logits(state, tokens)
        positions = state["lengths"][:, None] - tokens + np.arange(tokens)
        logits[(state["keys"] == ALPHABET["b"])[:, None] & (positions >= self.since)] = self.spoilt
        return logits


@pytest.mark.parametrize(("spoilt", "named"), [(math.nan, "NaN"), (math.inf, "inf"), (-math.inf, "-inf")])
@pytest.mark.parametrize("since", [0, 3])
def test_logits_that_are_not_finite_are_an_error(tmp_path: Path, spoilt: float, named: str, since: int) -> None:
    toy = type("Spoilt", (Spoiled,), {"spoilt": spoilt, "since": since})
    pair = make_pair(tmp_path, {"a": "abcdef</s>", "b": "b</s>"}, toy=toy)
    encoding = pair.encode(["a", "b"])
    with pytest.raises(BundleError, match=f"non-finite logits for new token {since + 1}") as error:
        pair.score(encoding, [["abcdef"], ["bbbbb", "b"]])
    assert f"prompt 1: the highest is {named}" in str(error.value)
    assert "prompt 0" not in str(error.value)
    # Padding is not looked at.
    if since:
        assert pair.score(encoding, [["abcdef"], ["b"]])[1].token_ids == (*ids_of("b"), EOS)
