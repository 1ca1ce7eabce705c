"""Drafting in C++: the tokens, draws, counts and refusals of the Python package."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm2slm_export
from llm2slm_export.contract import LLM_HEAD
from llm2slm_export.errors import Llm2SlmError, UsageError
from llm2slm_export.inference.generation.call_costs import CallCosts
from llm2slm_export.inference.generation.draft_length import DraftLength
from llm2slm_export.inference.generation.drafting import DraftToken, NgramDrafter, verified
from llm2slm_export.inference.generation.logits_processors import softmax
from llm2slm_export.inference.orchestrator import Orchestrator
from tests.support.cpp_library import USAGE, Program, check_same, edit, evidence_of, refusal
from tests.support.paths import DEMO

pytestmark = pytest.mark.slow
PROMPTS = [
    "the cat sat on a mat and on a mat", "Where is the station?", "a", "one two three one two", "x y",
    "my father made me a delicious lunch",
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 24},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "processors": {"max_new_tokens": 20, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 5},
    "seeded": {"max_new_tokens": 20, "do_sample": True, "seed": 3, "temperature": 0.7},
    "scores": {"max_new_tokens": 12, "output_scores": True},
    "cool": {"max_new_tokens": 16, "do_sample": True, "seed": 2**40 + 5, "temperature": 0.5, "top_k": 8, "output_scores": True},
}  # fmt: skip
NGRAM, VERIFIER = {"drafter": "ngram"}, {"verifier": LLM_HEAD}


@pytest.fixture(scope="module", params=["t5", "llama"])
def pair(
    request: pytest.FixtureRequest, driver: Program, bundles: Callable[..., tuple[Path, Path]]
) -> Iterator[Orchestrator]:
    """A pair without a verifier; in the driver it is pair 0."""
    driver("open", bundle=str(bundles(request.param)[1]), threads=1)
    with llm2slm_export.load(bundles(request.param)[1], threads=1) as pair:
        yield pair


@pytest.fixture(scope="module")
def with_llm(driver: Program, llm_head_bundle: tuple[Path, Path, Path]) -> Iterator[Orchestrator]:
    """A pair with the LLM as another head; in the driver it is pair 1."""
    driver("open", bundle=str(llm_head_bundle[2]), pair=1, threads=1)
    with llm2slm_export.load(llm_head_bundle[2], threads=1) as pair:
        yield pair


def check_drafted(expected: Any, got: Any, *, counted: bool = True) -> None:
    """Compare responses, and with `counted` their numbers of drafts, which follow the clock where their length is adapted."""
    check_same(expected, got)
    for name in ("drafted_tokens", "accepted_tokens"):
        ours, theirs = [getattr(g, name) for g in expected], [g[name] for g in got]
        assert ours == theirs if counted else [n is None for n in ours] == [n is None for n in theirs], name


def check_stream(driver: Program, number: int, prompt: str, options: dict[str, Any], drafts: dict[str, Any]) -> None:
    """Compare a stream with the response to the same prompt."""
    request = {"pair": number, "prompts": [prompt], "options": options, "drafts": drafts}
    (whole,), steps = driver("generate", **request), driver("stream", **request)
    assert [step["token_id"] for step in steps] == whole["token_ids"]
    assert "".join(step["text"] for step in steps) == whole["text"]
    assert [step["finish_reason"] for step in steps] == [None] * (len(steps) - 1) + [whole["finish_reason"]]
    assert [step["generation"] is None for step in steps] == [True] * (len(steps) - 1) + [False]
    for name in ("text", "token_ids", "finish_reason", "token_logprobs"):
        assert steps[-1]["generation"][name] == whole[name], name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_prompt_lookup_gives_the_tokens_and_counts_of_python(
    driver: Program, pair: Orchestrator, options: dict[str, Any]
) -> None:
    plain = driver("generate", prompts=PROMPTS, batch_size=1, options=options)
    for count, size in ((1, 1), (4, 2), (9, 1), (None, 1)):
        drafts = NGRAM if count is None else NGRAM | {"num_draft_tokens": count}
        expected = pair.generate(PROMPTS, batch_size=size, **drafts, **options)
        got = driver("generate", prompts=PROMPTS, batch_size=size, options=options, drafts=drafts)
        check_drafted(expected, got, counted=count is not None)
        assert [g["token_ids"] for g in got] == [g["token_ids"] for g in plain]
    check_stream(driver, 0, PROMPTS[0], options, NGRAM | {"num_draft_tokens": 3})


def test_three_rows_are_not_drafted_and_encodings_are(driver: Program, pair: Orchestrator, tmp_path: Path) -> None:
    options = OPTIONS["greedy"]
    # Prompts of other lengths would be batches of their own.
    three = driver("generate", prompts=PROMPTS[:1] * 3, batch_size=3, options=options, drafts=NGRAM)
    check_drafted(pair.generate(PROMPTS[:1] * 3, batch_size=3, **NGRAM, **options), three)
    assert [g["drafted_tokens"] for g in three] == [None] * 3
    drafts = NGRAM | {"num_draft_tokens": 2}
    pair.save_encoding(pair.encode(PROMPTS[:2]), tmp_path / "encoding")
    driver("load", path=str(tmp_path / "encoding"), encoding=0)
    check_drafted(
        pair.generate_from(pair.encode(PROMPTS[:2]), **drafts, **options),
        driver("generate_from", encoding=0, options=options, drafts=drafts),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_verifier_gives_the_tokens_and_counts_of_python(
    driver: Program, with_llm: Orchestrator, options: dict[str, Any]
) -> None:
    found = []
    for count, size in ((1, 1), (4, 2), (9, 1), (None, 1), (2, 3)):
        drafts = VERIFIER if count is None else VERIFIER | {"num_draft_tokens": count}
        expected = with_llm.generate(PROMPTS, batch_size=size, **drafts, **options)
        got = driver("generate", pair=1, prompts=PROMPTS, batch_size=size, options=options, drafts=drafts)
        check_drafted(expected, got, counted=count is not None)
        found.append([g["token_ids"] for g in got])
    assert all(ids == found[0] for ids in found)
    if not options.get("do_sample"):
        (alone,) = {tuple(g.token_ids for g in with_llm.head(LLM_HEAD).generate(PROMPTS, batch_size=1, **options))}
        assert [tuple(ids) for ids in found[0]] == list(alone)
    check_stream(driver, 1, PROMPTS[1], options, VERIFIER | {"num_draft_tokens": 5})


@pytest.mark.usefixtures("with_llm")
def test_some_drafts_are_accepted_and_some_are_not(driver: Program) -> None:
    drafts = VERIFIER | {"num_draft_tokens": 4}
    for options in (OPTIONS["greedy"], OPTIONS["seeded"]):
        got = driver("generate", pair=1, prompts=PROMPTS, options=options, drafts=drafts)
        drafted, accepted = (sum(g[name] for g in got) for name in ("drafted_tokens", "accepted_tokens"))
        assert 0 < accepted < drafted
    ends = [
        g["finish_reason"]
        for g in driver("generate", pair=1, prompts=PROMPTS, options={"max_new_tokens": 60}, drafts=drafts)
    ]
    assert "stop" in ends


@pytest.mark.parametrize("defer", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize(
    "options", [OPTIONS["greedy"], OPTIONS["seeded"], {"max_new_tokens": 60}], ids=["greedy", "seeded", "long"]
)
def test_deferred_tokens_are_those_of_python(
    driver: Program, with_llm: Orchestrator, defer: float, options: dict[str, Any]
) -> None:
    for count, size in ((1, 1), (3, 2), (None, 1)):
        drafts = VERIFIER | {"defer": defer} | ({} if count is None else {"num_draft_tokens": count})
        expected = with_llm.generate(PROMPTS, batch_size=size, **drafts, **options)
        got = driver("generate", pair=1, prompts=PROMPTS, batch_size=size, options=options, drafts=drafts)
        check_drafted(expected, got, counted=count is not None)
    check_stream(driver, 1, PROMPTS[0], options, VERIFIER | {"defer": defer, "num_draft_tokens": 3})


def test_responses_end_inside_a_block_where_they_do_in_python(driver: Program, with_llm: Orchestrator) -> None:
    drafts = VERIFIER | {"num_draft_tokens": 6}
    (whole,) = with_llm.generate(PROMPTS[:1], max_new_tokens=24, verifier=LLM_HEAD)
    stops = {whole.text[at : at + width] for at in range(0, len(whole.text) - 3, 3) for width in (1, 3)}
    ends = [{"stop": [stop], "max_new_tokens": 24} for stop in sorted(stops)]
    ends += [{"max_new_tokens": most} for most in range(1, 11)]
    for options in ends:
        for given in (drafts, drafts | {"defer": 0.5}):
            expected = with_llm.generate(PROMPTS[:1], **given, **options)
            got = driver("generate", pair=1, prompts=PROMPTS[:1], options=options, drafts=given)
            check_drafted(expected, got)
            check_stream(driver, 1, PROMPTS[0], options, given)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "beams": (NGRAM, {"num_beams": 3}),
    "sequences": (NGRAM, {"num_return_sequences": 2, "do_sample": True}),
    "beams and sequences": (NGRAM, {"num_beams": 3, "num_return_sequences": 2}),
    "defer": ({"verifier": "es", "defer": 1.5}, {}),
    "defer alone": ({"defer": 0.5}, {}),
    "defer with prompt lookup": (NGRAM | {"defer": 0.5}, {}),
    "all at once": (NGRAM | {"num_draft_tokens": 65, "defer": -0.5}, {}),
    "tokens": (NGRAM | {"num_draft_tokens": 0}, {}),
    "tokens alone": ({"num_draft_tokens": 3}, {}),
    "scores": ({"verifier": "es", "defer": 0.5}, {"output_scores": True}),
    "no head": ({"verifier": "llm"}, {}),
    "itself": ({"verifier": "main"}, {}),
    "another tokenizer": ({"verifier": "de"}, {}),
    "generation options first": ({"verifier": "es", "defer": 0.5}, {"output_scores": True, "max_new_tokens": 0}),
}  # fmt: skip


def with_heads(bundle: Path, copy: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    """A copy of a bundle with two more heads, which are its own: `de`, whose tokenizer has fewer tokens, and `es`."""
    shutil.copytree(bundle, copy)

    def add(manifest: dict[str, Any]) -> None:
        text = json.dumps({name: value for name, value in manifest.items() if name not in ("digest", "heads")})
        de, es = ({**json.loads(text), "head": name, "files": []} for name in ("de", "es"))
        de["tokenizer"]["slm_size"] -= 1
        manifest["heads"] = {"de": de, "es": es}
        change(manifest)

    edit(copy, add)
    return copy


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_heads(DEMO, tmp_path_factory.mktemp("drafting") / "heads")


@pytest.mark.parametrize(("drafts", "options"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_drafted_is_refused_in_the_words_of_python(
    driver: Program, heads: Path, drafts: dict[str, Any], options: dict[str, Any]
) -> None:
    driver("open", bundle=str(heads), pair=2, threads=1)
    with llm2slm_export.load(heads, threads=1) as pair, pytest.raises(UsageError) as caught:
        pair.generate(["a"], **drafts, **options)
    for do in ("generate", "stream"):
        failure = refusal(driver, do, pair=2, prompts=["a"], options=options, drafts=drafts)
        assert failure.code == USAGE
        assert failure.message.splitlines()[0] == str(caught.value).splitlines()[0]
        assert evidence_of(failure) == list(caught.value.evidence)


def test_prompt_lookup_with_a_verifier_is_pythons_alone(driver: Program, heads: Path) -> None:
    driver("open", bundle=str(heads), pair=2, threads=1)
    failure = refusal(driver, "generate", pair=2, prompts=["a"], options={}, drafts=NGRAM | {"verifier": "es"})
    assert failure.code == USAGE
    assert evidence_of(failure) == ["drafter and verifier: with a verifier the pair itself drafts"]


def test_an_encoding_cannot_be_verified(driver: Program, heads: Path) -> None:
    driver("open", bundle=str(heads), pair=2, threads=1)
    driver("encode", pair=2, encoding=2, prompts=["How are you?"])
    failure = refusal(driver, "generate_from", pair=2, encoding=2, drafts={"verifier": "es"})
    assert failure.code == USAGE
    assert "does not have that head's conditioning" in failure.message


@pytest.mark.parametrize("fusion", ["add", "prefix"])
@pytest.mark.parametrize(
    "options", [OPTIONS["greedy"], OPTIONS["seeded"], OPTIONS["processors"]], ids=["greedy", "seeded", "processors"]
)
def test_a_decoder_only_head_drafts_as_in_python(
    driver: Program, bundles: Callable[..., tuple[Path, Path]], tmp_path: Path, fusion: str, options: dict[str, Any]
) -> None:
    bundle = with_heads(bundles("llama", fusion)[1], tmp_path / "heads")
    driver("open", bundle=str(bundle), pair=3, threads=1)
    with llm2slm_export.load(bundle, threads=1) as pair:
        for count, size, defer in ((3, 1, None), (5, 2, None), (None, 1, None), (3, 2, 0.05), (4, 1, 0.0)):
            drafts = {"verifier": "es", "num_draft_tokens": count, "defer": defer}
            drafts = {name: value for name, value in drafts.items() if value is not None}
            expected = pair.generate(PROMPTS, batch_size=size, **drafts, **options)
            got = driver("generate", pair=3, prompts=PROMPTS, batch_size=size, options=options, drafts=drafts)
            check_drafted(expected, got, counted=count is not None)
            if defer is None and count is not None:
                assert all(g["drafted_tokens"] == g["accepted_tokens"] > 0 for g in got)


@pytest.mark.parametrize("slm", ["llama", "t5"])
def test_a_drafting_head_with_few_positions_stops_drafting(
    driver: Program, bundles: Callable[..., tuple[Path, Path]], tmp_path: Path, slm: str
) -> None:
    most = {"llama": 30, "t5": 8}[slm]
    bundle = with_heads(bundles(slm)[1], tmp_path / "heads", lambda manifest: manifest.update(max_total_tokens=most))
    driver("open", bundle=str(bundle), pair=3, threads=1)
    options, drafts = {"max_new_tokens": 40, "min_new_tokens": 40}, {"verifier": "es", "num_draft_tokens": 3}
    with llm2slm_export.load(bundle, threads=1) as pair:
        expected = pair.generate(PROMPTS[1:2], **drafts, **options)
        with pytest.raises(Llm2SlmError) as caught:
            pair.generate(PROMPTS[1:2], **options)
    got = driver("generate", pair=3, prompts=PROMPTS[1:2], options=options, drafts=drafts)
    check_drafted(expected, got)
    assert 0 < got[0]["drafted_tokens"] < most
    assert evidence_of(refusal(driver, "generate", pair=3, prompts=PROMPTS[1:2], options=options)) == list(
        caught.value.evidence
    )


def test_the_length_of_drafts_is_chosen_as_in_python(inside: Program) -> None:
    chance, choices = np.random.default_rng(5), set()
    for case in range(60):
        costs, events, expected = CallCosts(), list[tuple[Any, ...]](), list[int]()
        share, dear, least = chance.random(), chance.random() * 3, case % 2
        for _ in range(20):
            row = DraftLength(costs, costs.head, fixed=None, least=least)
            events.append(("row",))
            for _ in range(int(chance.integers(1, 60))):
                events.append(("choose",))
                expected.append(count := row.choose())
                if count:
                    events.append(("draft", count, ms := count * (0.3 + 0.1 * chance.random())))
                    costs.head.add_draft(count, ms)
                events.append(("call", count + 1, ms := 5 + dear * count + chance.random()))
                costs.add_call(count + 1, ms)
                wrong = np.flatnonzero(chance.random(count) > share)
                events.append(("add", count, accepted := int(wrong[0]) if len(wrong) else count))
                row.add(count, accepted)
            events.append(("finish", tokens := int(chance.integers(1, 30)), ms := tokens * chance.uniform(1, 2 + dear)))
            row.finish(tokens, ms)
        assert inside.ask({"do": "draft_lengths", "events": events, "least": least}) == expected
        choices |= set(expected)
    assert {0, 1, 3, 16} <= choices


def test_prompt_lookup_is_pythons(inside: Program) -> None:
    chance = np.random.default_rng(6)
    for _ in range(300):
        prompt, ids = (chance.integers(0, 4, size=chance.integers(0, 9)).tolist() for _ in range(2))
        most = int(chance.integers(1, 6))
        expected = [token.token_id for token in NgramDrafter(prompt).draft(ids, most)]
        assert inside.ask({"do": "ngram", "prompt": prompt, "ids": ids, "most": most}) == expected


def test_drawn_drafts_are_verified_as_in_python(inside: Program) -> None:
    chance, accepted = np.random.default_rng(7), 0
    for case in range(400):
        scores, other = (chance.normal(0, 1.5, 12).astype(np.float32) for _ in range(2))
        scores[: case % 4] = np.float32(-80)
        distribution = softmax((scores if case % 5 == 0 else other)[None])[0]
        draft = int(chance.integers(0, 12))
        accept, redraw = chance.random(2).tolist()
        expected = verified(scores, DraftToken(draft, distribution, 0.5), accept=accept, redraw=redraw)
        accepted += expected == draft
        got = inside.ask(
            {
                "do": "verified",
                "scores": scores.tolist(),
                "id": draft,
                "distribution": distribution.tolist(),
                "accept": accept,
                "redraw": redraw,
            }
        )
        assert got == expected
    assert 0 < accepted < 400
