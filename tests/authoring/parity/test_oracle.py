"""`run` writes exactly what Hugging Face alone computes from a composition."""

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import llm2slm_export
from llm2slm_export.bundle.manifest_file import read_manifest
from tests.support.held_out import prompts
from tests.support.oracle import Oracle
from tests.support.paths import DEMO_COMPOSITION
from tests.support.tiers import tiered

Bundles = Callable[..., tuple[Path, Path]]


def assert_same(
    composition: Path, bundle: Path, texts: list[str], batch_sizes: tuple[int, ...], tokens: int, **options: Any
) -> None:
    """The bundle's ids in batches of several sizes against those of each prompt by itself."""
    expected = Oracle(composition).generate(texts, tokens, **options)
    with llm2slm_export.load(bundle) as pair:
        for size in batch_sizes:
            got = pair.generate(texts, batch_size=size, max_new_tokens=tokens, do_sample=False, **options)
            differing = [i for i, ids in enumerate(expected) if got[i].token_ids != ids]
            assert differing == [], f"batches of {size}: {[texts[i] for i in differing[:5]]}"


@pytest.mark.parametrize("slm_type", ["t5", "llama"])
def test_random_pairs_match_transformers(bundles: Bundles, slm_type: str) -> None:
    assert_same(*bundles(slm_type), prompts()[:24], (1, 7, 24), tokens=12)


@pytest.mark.parametrize(
    ("slm_type", "beams"), tiered(product(["t5", "llama"], [1, 3]), fast=[("t5", 1), ("llama", 1)], slow=[("t5", 3)])
)
def test_responses_longer_than_the_first_caches_match_transformers(bundles: Bundles, slm_type: str, beams: int) -> None:
    assert_same(*bundles(slm_type), prompts()[:5], (1, 5), tokens=140, min_new_tokens=140, num_beams=beams)


@pytest.mark.nightly
def test_a_decoder_only_pair_matches_transformers_on_held_out_prompts(bundles: Bundles) -> None:
    assert_same(*bundles("llama"), prompts()[:200], (1, 7, 32), tokens=20)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's fp32 bundle; LLM2SLM_TEST_DEMO names the one that the README's command has built of this tree."""
    from llm2slm_export.authoring.build import build
    from llm2slm_export.authoring.models.pairing import load_composition

    if built := os.environ.get("LLM2SLM_TEST_DEMO"):
        assert {graph.precision for graph in read_manifest(Path(built)).graphs.values()} == {"fp32"}
        return Path(built)
    directory = tmp_path_factory.mktemp("demo") / "bundle"
    build(load_composition(DEMO_COMPOSITION), directory)
    return directory


@pytest.mark.parametrize("count", tiered([60, 200], slow=[60]))
def test_the_demo_matches_transformers_on_held_out_prompts(demo: Path, count: int) -> None:
    assert_same(DEMO_COMPOSITION, demo, prompts()[:count], (1, 7, 32), tokens=48)


_SEARCHES = {
    "plain": {"num_beams": 4},
    "constrained": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never", "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize(
    ("search", "count"),
    tiered([("constrained", 20), ("constrained", 500), ("plain", 500)], slow=[("constrained", 20)]),
)
def test_beams_on_the_demo_match_transformers_on_held_out_prompts(demo: Path, search: str, count: int) -> None:
    assert_same(DEMO_COMPOSITION, demo, prompts()[:count], (32,), tokens=48, **_SEARCHES[search])
