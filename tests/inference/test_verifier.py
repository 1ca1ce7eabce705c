"""A pair that drafts for the LLM head: the text is the LLM's own, as transformers generates it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm2slm_export
from llm2slm_export.contract import LLM_HEAD, MAIN
from llm2slm_export.environment import cores
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.encodings.cache import EncodingCache
from llm2slm_export.inference.orchestrator import Orchestrator
from tests.support.chi_square import p_value
from tests.support.held_out import prompts as held_out_prompts
from tests.support.tiers import tiered

PROMPTS = ["hello", "Where is the station?", "a", "one two three", "x y", "my father made me a delicious lunch"]
NEW_TOKENS = 16


@dataclass(frozen=True)
class Models:
    """The unmodified LLM, and the pair's SLM, which reads the LLM's hidden states as they are."""

    llm: Any
    slm: Any
    tokenizer: Any

    def generate(self, prompt: str, **options: Any) -> tuple[int, ...]:
        """The ids of transformers' `generate` of the LLM alone."""
        import torch

        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        given = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "max_length": None, **options}
        with torch.no_grad():
            written = self.llm.generate(ids, suppress_tokens=self.beyond, **given)[0, 1:].tolist()
        return self.ended(written)

    def ended(self, written: list[int]) -> tuple[int, ...]:
        ends = [at for at, token_id in enumerate(written) if token_id in self.llm.generation_config.eos_token_id]
        return tuple(written[: ends[0] + 1] if ends else written)

    @property
    def beyond(self) -> list[int]:
        return list(range(len(self.tokenizer), self.llm.config.vocab_size))

    def next_logits(self, model: Any, prompt: str, written: list[int]) -> Any:
        """Logits [num_tokens] of a model's next token, without a cache."""
        import torch

        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            memory = self.llm.get_encoder()(ids)
            decoder_ids = torch.tensor([[0, *written]])
            logits = model(encoder_outputs=memory, decoder_input_ids=decoder_ids).logits[0, -1]
        return logits[: len(self.tokenizer)].double()


@dataclass(frozen=True)
class Case:
    models: Models
    bundle: Path


@pytest.fixture(scope="module")
def case(llm_head_bundle: tuple[Path, Path, Path]) -> Case:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    llm, composition, bundle = llm_head_bundle
    load = partial(AutoModelForSeq2SeqLM.from_pretrained, dtype=torch.float32)
    return Case(Models(load(llm).eval(), load(composition / "slm").eval(), AutoTokenizer.from_pretrained(llm)), bundle)


@pytest.fixture(scope="module")
def pair(case: Case) -> Iterator[Orchestrator]:
    with llm2slm_export.load(case.bundle, threads=1) as pair:
        yield pair


DRAFTS = [(None, None), (1, None), (4, None), (9, None), (None, "ngram"), (3, "ngram")]


@pytest.mark.parametrize(("num_draft_tokens", "drafter"), tiered(DRAFTS, slow=[(None, None), (4, None), (3, "ngram")]))
def test_the_text_is_the_llms(
    case: Case, pair: Orchestrator, num_draft_tokens: int | None, drafter: str | None
) -> None:
    options = {
        "max_new_tokens": NEW_TOKENS, "verifier": LLM_HEAD, "num_draft_tokens": num_draft_tokens, "drafter": drafter
    }  # fmt: skip
    expected = [case.models.generate(prompt) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    found = pair.generate(PROMPTS, **options)
    assert [g.token_ids for g in found] == expected
    # Two rows draft together; more are decoded without drafts, which their warnings say.
    together = pair.generate([PROMPTS[0], PROMPTS[2], PROMPTS[4]] * 2, batch_size=2, **options)
    assert [g.token_ids for g in together] == [expected[at] for at in (0, 2, 4, 0, 2, 4)]
    many = pair.generate(PROMPTS, batch_size=6, **options)
    assert [g.token_ids for g in many] == expected
    drafted, accepted = (sum(getattr(g, name) for g in found) for name in ("drafted_tokens", "accepted_tokens"))
    if num_draft_tokens is not None:
        assert 0 < accepted < drafted
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        assert tuple(step.token_id for step in pair.stream(prompt, **options)) == ids


@pytest.mark.slow
def test_processors_work_on_what_is_verified(case: Case, pair: Orchestrator) -> None:
    options = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 6}
    expected = [case.models.generate(prompt, **options) for prompt in PROMPTS]
    found = pair.generate(PROMPTS, max_new_tokens=NEW_TOKENS, verifier=LLM_HEAD, num_draft_tokens=4, **options)
    assert [g.token_ids for g in found] == expected


@pytest.mark.parametrize("count", tiered([6, 500], slow=[6]))
def test_the_text_is_that_of_transformers_assisted_generation(case: Case, pair: Orchestrator, count: int) -> None:
    import torch

    models = case.models
    prompts = held_out_prompts()[:count]
    found = pair.generate(prompts, max_new_tokens=NEW_TOKENS, verifier=LLM_HEAD)
    lookup = pair.head(LLM_HEAD).generate(prompts, max_new_tokens=NEW_TOKENS, drafter="ngram")
    assert [g.token_ids for g in lookup] == [g.token_ids for g in found]
    for prompt, g in zip(prompts, found, strict=True):
        assert g.token_ids == models.generate(prompt)
        assert g.token_ids == models.generate(prompt, prompt_lookup_num_tokens=3)
        ids = models.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            assisted = models.llm.generate(
                ids, assistant_model=models.slm, suppress_tokens=models.beyond, do_sample=False, max_length=None,
                max_new_tokens=NEW_TOKENS,
            )  # fmt: skip
        assert g.token_ids == models.ended(assisted[0, 1:].tolist())


@pytest.mark.slow
def test_a_seed_gives_the_same_tokens_for_every_length_of_drafts(pair: Orchestrator) -> None:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "seed": 7, "temperature": 0.8, "verifier": LLM_HEAD}
    found = [
        [g.token_ids for g in pair.generate(PROMPTS, num_draft_tokens=count, batch_size=size, **options)]
        for count, size in ((None, 1), (1, 1), (2, 2), (5, 1), (12, 2), (3, 6))
    ]
    assert all(ids == found[0] for ids in found)
    other = [g.token_ids for g in pair.generate(PROMPTS, **{**options, "seed": 8})]
    assert other != found[0]


@pytest.mark.parametrize("draws", tiered([600, 20_000], slow=[600]))
def test_sampled_tokens_follow_the_llms_distribution(case: Case, pair: Orchestrator, draws: int) -> None:
    models, prompt, top_k, temperature = case.models, PROMPTS[1], 3, 2.0

    def likely(written: list[int]) -> dict[int, float]:
        logits = models.next_logits(models.llm, prompt, written) / temperature
        values, ids = logits.topk(top_k)
        return dict(zip(ids.tolist(), values.softmax(0).tolist(), strict=True))

    eos = models.llm.generation_config.eos_token_id
    expected: dict[tuple[int, ...], float] = {}
    for first, share in likely([]).items():
        for second, rest in ({} if first in eos else likely([first])).items():
            expected[first, second] = share * rest
        if first in eos:
            expected[first,] = share
    found = pair.generate(
        [prompt] * draws, max_new_tokens=3, do_sample=True, seed=3, top_k=top_k, temperature=temperature,
        verifier=LLM_HEAD, num_draft_tokens=2,
    )  # fmt: skip
    counts = dict.fromkeys(expected, 0)
    for g in found:
        counts[g.token_ids[:2]] += 1  # a pair of tokens that cannot be is a KeyError
    assert p_value(np.array([*counts.values()]), np.array([*expected.values()]) * draws) > 1e-4
    drafted, accepted = (sum(getattr(g, name) for g in found) for name in ("drafted_tokens", "accepted_tokens"))
    assert 0 < accepted < drafted


@pytest.mark.parametrize("defer", tiered([0.0, 0.3, 0.6, 0.9, 1.0], slow=[0.6]))
def test_deferred_tokens_are_the_slms_where_it_is_sure(case: Case, pair: Orchestrator, defer: float) -> None:
    models = case.models
    shares = []
    for prompt in PROMPTS[:2]:
        written: list[int] = []
        sure = 0
        while len(written) < NEW_TOKENS and not (written and written[-1] in models.llm.generation_config.eos_token_id):
            probabilities = models.next_logits(models.slm, prompt, written).softmax(0)
            if float(probabilities.max()) >= defer:
                written.append(int(probabilities.argmax()))
                sure += 1
            else:
                written.append(int(models.next_logits(models.llm, prompt, written).argmax()))
        for count in (None, 1, 3):
            options = {"max_new_tokens": NEW_TOKENS, "verifier": LLM_HEAD, "defer": defer, "num_draft_tokens": count}
            (found,) = pair.generate([prompt], **options)
            assert list(found.token_ids) == written
            assert [step.token_id for step in pair.stream(prompt, **options)] == written
        shares.append(sure / len(written))
    assert (min(shares) == 1) == (defer == 0)
    if defer == 1.0:
        assert max(shares) == 0


@pytest.mark.slow
def test_deferral_of_nothing_is_the_pair_and_of_everything_the_llm(pair: Orchestrator) -> None:
    options = {"max_new_tokens": NEW_TOKENS}
    eos = set(pair.manifest.special_ids.eos)
    assert eos == set(pair.head(LLM_HEAD).manifest.special_ids.eos)
    for defer, head in ((0.0, MAIN), (1.0, LLM_HEAD)):
        expected = [g.token_ids for g in pair.head(head).generate(PROMPTS, **options)]
        found = pair.generate(PROMPTS, verifier=LLM_HEAD, defer=defer, **options)
        assert [g.token_ids for g in found] == expected


@pytest.mark.slow
def test_prompts_are_encoded_once_for_both_heads(pair: Orchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    for orchestrator in (pair, pair.head(LLM_HEAD)):
        backend = orchestrator._running()
        encode = backend.encode
        monkeypatch.setattr(backend, "encode", lambda ids, mask, run=encode: calls.append(len(ids)) or run(ids, mask))
    found = pair.generate(PROMPTS[:3], verifier=LLM_HEAD, max_new_tokens=4, num_draft_tokens=2)
    assert calls == [1, 1, 1]
    assert all(g.timings_ms["encode"] > 0 for g in found)
    assert any(g.drafted_tokens for g in found)


@pytest.mark.slow
def test_the_cache_serves_both_heads(case: Case) -> None:
    with llm2slm_export.load(case.bundle, threads=1, cache=EncodingCache()) as pair:
        options = {"max_new_tokens": NEW_TOKENS, "verifier": LLM_HEAD}
        first = pair.generate(PROMPTS, **options)
        again = pair.generate(PROMPTS, **options)
    assert not any(g.cached for g in first)
    assert all(g.cached for g in again)
    assert [g.token_ids for g in first] == [g.token_ids for g in again]


@pytest.mark.slow
def test_an_encoding_of_the_pair_cannot_be_verified(pair: Orchestrator) -> None:
    with pytest.raises(UsageError, match="does not have that head's conditioning"):
        pair.generate_from(pair.encode(["a"]), verifier=LLM_HEAD)
    encoding = pair.head(LLM_HEAD).encode(PROMPTS[:1])
    (found,) = pair.head(LLM_HEAD).generate_from(encoding, drafter="ngram", max_new_tokens=NEW_TOKENS)
    (expected,) = pair.head(LLM_HEAD).generate(PROMPTS[:1], max_new_tokens=NEW_TOKENS)
    assert found.token_ids == expected.token_ids


@pytest.mark.slow
def test_a_head_with_another_tokenizer_cannot_verify(pair: Orchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.head(LLM_HEAD), "_num_tokens", 12)
    with pytest.raises(UsageError, match="their tokenizers differ") as error:
        pair.generate(["a"], verifier=LLM_HEAD)
    assert "12 tokens" in str(error.value)


@pytest.mark.slow
def test_tokenizers_and_cores_are_compared_once(pair: Orchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a millisecond or more, which is as much as a decoder call of a small SLM."""
    pair.generate(PROMPTS[:1], verifier=LLM_HEAD)

    class Unreadable:
        def __init__(self, tokenizer: Any) -> None:
            self._tokenizer = tokenizer

        def __getattr__(self, name: str) -> Any:
            assert name != "to_str"
            return getattr(self._tokenizer, name)

    monkeypatch.setattr(pair, "_slm_tokenizer", Unreadable(pair._slm_tokenizer))
    monkeypatch.setattr(cores, "_quota", lambda: pytest.fail("the cores were counted again"))
    assert pair.generate(PROMPTS[:2], verifier=LLM_HEAD)


@pytest.mark.slow
def test_confidence_is_the_models_whatever_the_sampling(pair: Orchestrator) -> None:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "top_k": 1, "seed": 1}
    expected = [g.token_ids for g in pair.head(LLM_HEAD).generate(PROMPTS, **options)]
    assert [g.token_ids for g in pair.generate(PROMPTS, verifier=LLM_HEAD, defer=1, **options)] == expected
    with pytest.raises(UsageError, match="output_scores: with defer"):
        pair.generate(PROMPTS, verifier=LLM_HEAD, defer=0.5, output_scores=True)


@pytest.mark.slow
def test_a_batch_is_read_once_by_its_drafters(pair: Orchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, rows = pair._running(), list[int]()
    prefill = backend.prefill
    monkeypatch.setattr(
        backend, "prefill", lambda conditioning: rows.append(len(conditioning.attention_mask)) or prefill(conditioning)
    )
    pair.generate(PROMPTS[:2] * 4, batch_size=8, do_sample=True, seed=1, verifier=LLM_HEAD, max_new_tokens=3)
    assert set(rows) == {1}
