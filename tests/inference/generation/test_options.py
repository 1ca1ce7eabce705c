"""Options: defaults and overrides, every value that cannot be used, and what does not fit together."""

from typing import Any

import pytest

from llm2slm_export.bundle.manifest import GenerationDefaults
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.generation.options import GenerationOptions

DEFAULTS = GenerationDefaults(max_new_tokens=16)


def options(**overrides: Any) -> GenerationOptions:
    return GenerationOptions.resolve(DEFAULTS, **overrides)


def refusal(defaults: GenerationDefaults = DEFAULTS, **overrides: Any) -> UsageError:
    with pytest.raises(UsageError, match="option") as error:
        GenerationOptions.resolve(defaults, **overrides)
    return error.value


def test_options_come_from_the_bundle_and_the_caller() -> None:
    resolved = options(do_sample=True, top_p=0.5, max_new_tokens=None, stop="x")
    assert (resolved.max_new_tokens, resolved.top_p, resolved.top_k, resolved.stop) == (16, 0.5, 50, ("x",))
    assert options(stop=["a", "b"]).stop == ("a", "b")
    assert options(bad_words_ids=[[1, 2], (3,)]).bad_words_ids == ((1, 2), (3,))
    assert options(num_beams=3, early_stopping="never", length_penalty=-1).early_stopping == "never"


def test_the_defaults_are_the_bundles_and_say_nothing_more() -> None:
    resolved = options()
    assert {name: getattr(resolved, name) for name in DEFAULTS.model_dump()} == DEFAULTS.model_dump()
    assert (resolved.seed, resolved.stop, resolved.output_scores) == (None, (), False)


BAD = {
    "max_new_tokens": [0, 1.0, True],
    "min_new_tokens": [-1, 2.5],
    "do_sample": [1, "yes"],
    "num_beams": [0, 2.0, True],
    "num_return_sequences": [0, -1],
    "length_penalty": [float("inf"), "1", 9],
    "early_stopping": [1, "always", "True"],
    "temperature": [float("nan"), -1, True, 1e-300, 1e300],
    "top_k": [1.5, -1],
    "top_p": [1.1, -0.1],
    "min_p": [-0.1, 2],
    "typical_p": [0, 1.1, float("nan")],
    "repetition_penalty": [0, -1],
    "no_repeat_ngram_size": [-1, 1.0],
    "bad_words_ids": [((),), ((-1,),), (1,), "ab", ((1.0,),)],
    "forced_bos_token_id": [-1, 1.0, "1"],
    "forced_eos_token_id": [-1, (1,)],
    "seed": [-3, 0.5],
    "stop": [("",), (1,)],
    "output_scores": [1],
}


def test_every_option_has_bad_values_in_these_tests() -> None:
    assert set(BAD) == set(GenerationOptions.__dataclass_fields__)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    assert any(
        line.startswith(f"{name}: must be") and repr(value) in line for line in refusal(**{name: value}).evidence
    )


def test_every_bad_option_is_named_at_once() -> None:
    bad = {name: values[0] for name, values in BAD.items()}
    evidence = refusal(**bad).evidence
    for name, value in bad.items():
        assert any(line.startswith(name) and repr(value) in line for line in evidence), name


def test_options_made_without_a_bundle_are_checked_too() -> None:
    values = DEFAULTS.model_dump()
    assert GenerationOptions(**values) == options()
    with pytest.raises(UsageError, match="top_k: must be"):
        GenerationOptions(**{**values, "top_k": -1})
    with pytest.raises(UsageError, match="above max_new_tokens"):
        GenerationOptions(**{**values, "min_new_tokens": 17})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"min_new_tokens": 17}, "min_new_tokens: 17 is above max_new_tokens, 16"),
        ({"do_sample": True, "temperature": 0}, "do_sample=False is greedy"),
        ({"num_return_sequences": 2}, "num_return_sequences: 2 is above num_beams, 1"),
        ({"num_return_sequences": 4, "num_beams": 3}, "num_return_sequences: 4 is above num_beams, 3"),
        ({"num_return_sequences": 4, "num_beams": 3, "do_sample": True}, "4 is above num_beams, 3"),
        ({"temperature": 0.5}, "temperature: has no effect without do_sample=True"),
        ({"top_k": 50}, "top_k: has no effect without do_sample=True"),
        ({"top_p": 0.5, "do_sample": False}, "top_p: has no effect without do_sample=True"),
        ({"min_p": 0.5}, "min_p: has no effect without do_sample=True"),
        ({"typical_p": 0.5}, "typical_p: has no effect without do_sample=True"),
        ({"seed": 1, "num_beams": 2}, "seed: has no effect without do_sample=True"),
        ({"length_penalty": 1.0}, "length_penalty: has no effect without num_beams above 1"),
        ({"early_stopping": False, "do_sample": True}, "early_stopping: has no effect without num_beams above 1"),
        ({"max_new_token": 3, "nonsense": 1}, "max_new_token: did you mean max_new_tokens?"),
        ({"num_beam": 4}, "num_beam: did you mean num_beams?"),
    ],
)
def test_options_that_do_not_fit_together_or_are_unknown(overrides: dict[str, Any], says: str) -> None:
    assert says in str(refusal(**overrides))


def test_contradictions_and_bad_values_are_named_at_once() -> None:
    error = refusal(
        min_new_tokens=20, num_return_sequences=3, top_k=-1, seed=1, early_stopping=True, bad_words_ids=[[]]
    )
    assert [line.split(":")[0] for line in error.evidence] == [
        "top_k", "bad_words_ids", "min_new_tokens", "num_return_sequences", "top_k", "seed", "early_stopping"
    ]  # fmt: skip


def test_what_a_bundle_says_may_have_no_effect() -> None:
    defaults = GenerationDefaults(max_new_tokens=4, temperature=0.7, top_p=0.9, length_penalty=2.0, early_stopping=True)
    assert GenerationOptions.resolve(defaults, output_scores=True).temperature == 0.7
    sampling = GenerationDefaults(max_new_tokens=4, do_sample=True, num_beams=3)
    assert GenerationOptions.resolve(sampling, top_p=0.5, length_penalty=2, num_return_sequences=3).top_p == 0.5
    assert "top_p: has no effect" in str(refusal(sampling, top_p=0.5, do_sample=False))


def test_several_sequences_need_beams_or_sampling() -> None:
    assert options(num_return_sequences=5, do_sample=True).num_return_sequences == 5
    assert options(num_return_sequences=3, num_beams=3).num_return_sequences == 3


def test_ids_of_no_token_are_named() -> None:
    fits = options(bad_words_ids=[[1, 99], [5]], forced_bos_token_id=99, forced_eos_token_id=1)
    fits.check_ids(100)
    options().check_ids(1)
    with pytest.raises(UsageError, match="ids outside the vocabulary") as error:
        options(bad_words_ids=[[1, 99], [98], [5]], forced_bos_token_id=98, forced_eos_token_id=120).check_ids(98)
    assert error.value.evidence == ("bad_words_ids: 98, 99", "forced_bos_token_id: 98", "forced_eos_token_id: 120")
