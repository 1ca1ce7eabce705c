"""Every kind of pair against transformers alone: hidden states, logits, greedy and beam ids, on padded batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llm2slm_export
from llm2slm_export.authoring.build import build
from llm2slm_export.authoring.models.pairing import load_composition
from llm2slm_export.inference.encodings.encoding import prompt_mask
from tests.families.combinations import COMBINATIONS, Combination
from tests.families.compositions import TEMPLATE, write_composition
from tests.support.oracle import Oracle
from tests.support.tiers import tiered

# One byte; shorter and longer than a sliding window of 5; characters of several bytes; the longest by far.
PROMPTS = ["a", "Où?", "a few words", "0123456789" * 6, "tab\tand\nline", "x y"]
NEW_TOKENS = 12
TOLERANCE = 1e-4  # of the largest reference value
# Each takes half a minute or more. A decoder-only LLM with a BART, and `prefix` with an encoder-decoder SLM, run nightly.
IN_CI = {"bert@1+-1-mistral-add-shared"}


@pytest.mark.parametrize("combination", tiered({str(c): c for c in COMBINATIONS}, slow=IN_CI))
def test_a_bundle_is_transformers(combination: Combination, tmp_path: Path) -> None:
    composition = write_composition(tmp_path, combination)
    build(load_composition(composition), tmp_path / "bundle")
    oracle = Oracle(composition)
    templated = [TEMPLATE.replace("{prompt}", prompt) for prompt in PROMPTS]
    beams = {"num_beams": 4, "length_penalty": 0.7, "early_stopping": True}
    with llm2slm_export.load(tmp_path / "bundle") as pair:
        hidden = _hidden_states_error(pair, oracle, templated)
        logits = _logits_error(pair, oracle, templated)
        greedy = [g.token_ids for g in pair.generate(PROMPTS, max_new_tokens=NEW_TOKENS)]
        searched = [g.token_ids for g in pair.generate(PROMPTS, max_new_tokens=NEW_TOKENS, **beams)]
    print(f"| {combination} | {hidden:.0e} | {logits:.0e} | {sorted(map(len, greedy))} |")
    assert hidden <= TOLERANCE
    assert logits <= TOLERANCE
    assert greedy == oracle.generate(templated, NEW_TOKENS)
    assert searched == oracle.generate(templated, NEW_TOKENS, **beams)


def _hidden_states_error(pair: Any, oracle: Oracle, prompts: list[str]) -> float:
    """The encoder graph, on all prompts padded to the longest, against each prompt by itself."""
    rows = [oracle.llm_tokenizer(prompt).input_ids for prompt in prompts]
    lengths = [len(row) for row in rows]
    ids = np.full((len(rows), max(lengths)), oracle.llm_tokenizer.pad_token_id, np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    got = pair._backend.encode(ids, prompt_mask(lengths)).numpy()
    expected = [oracle.hidden_states(torch.tensor([row]))[0].numpy() for row in rows]
    return _error([got[i, :n] for i, n in enumerate(lengths)], expected)


def _logits_error(pair: Any, oracle: Oracle, prompts: list[str]) -> float:
    """Projector and decoder, on one padded batch that writes what `generate` wrote, against its logits."""
    runs = [oracle.run(p, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True) for p in prompts]
    expected = [torch.cat(one.logits).numpy() for one in runs]  # each [tokens, vocab]
    written = [one.sequences[0, -len(one.logits) :].tolist() for one in runs]
    encoding = pair.encode(PROMPTS)
    state, logits = pair._backend.prefill(encoding.conditioning)
    got = [logits.copy()]
    for step in range(max(map(len, expected)) - 1):
        # A row that has ended is fed anything: its logits are not looked at.
        fed = [row[min(step, len(row) - 1)] for row in written]
        got.append(pair._backend.step(state, np.array(fed)[:, None])[:, -1].copy())
    batch = np.stack(got, axis=1)  # [batch, tokens, vocab]
    return _error([batch[i, : len(row)] for i, row in enumerate(expected)], expected)


def _error(got: list[np.ndarray[Any, Any]], expected: list[np.ndarray[Any, Any]]) -> float:
    """The largest error over the largest reference value."""
    worst = max(float(np.abs(g - e).max()) for g, e in zip(got, expected, strict=True))
    return worst / max(float(np.abs(e).max()) for e in expected)
