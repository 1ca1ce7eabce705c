"""`run` writes exactly what Hugging Face alone computes from a composition."""

from collections.abc import Callable
from pathlib import Path

import pytest

import llm2slm_export
from tests.oracle import Oracle

REPOSITORY = Path(__file__).parent.parent
DEMO = REPOSITORY / "compositions" / "tatoeba-en-fr"
HELD_OUT = Path(__file__).parent / "data" / "held_out.tsv"

Bundles = Callable[..., tuple[Path, Path]]


def prompts() -> list[str]:
    """200 English sentences of the demo's test split: none is in a training row."""
    return [line.split("\t")[0] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()][:200]


def assert_same(composition: Path, bundle: Path, texts: list[str], batch_sizes: tuple[int, ...], tokens: int) -> None:
    oracle = Oracle(composition)
    with llm2slm_export.load(bundle) as pair:
        for size in batch_sizes:
            for start in range(0, len(texts), size):
                batch = texts[start : start + size]
                expected = oracle.generate(batch, tokens)
                got = [g.token_ids for g in pair.generate(batch, max_new_tokens=tokens, do_sample=False)]
                assert got == expected, f"batch of {size} from {start}"


@pytest.mark.parametrize("fusion", ["add", "replace"])
@pytest.mark.parametrize("writer", ["t5", "llama", "gpt2"])
def test_random_pairs_match_transformers(bundles: Bundles, writer: str, fusion: str) -> None:
    assert_same(*bundles(writer, fusion), prompts()[:24], (1, 7, 24), tokens=12)


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["llama"])
def test_a_decoder_only_pair_matches_transformers_on_200_prompts(bundles: Bundles, writer: str) -> None:
    assert_same(*bundles(writer), prompts(), (1, 7, 32), tokens=20)


@pytest.mark.slow
def test_the_demo_matches_transformers_on_200_held_out_prompts(tmp_path: Path) -> None:
    from llm2slm_export.build import build
    from llm2slm_export.models.loading import load_composition

    build(load_composition(DEMO), tmp_path / "demo", precision={}, force=False)
    assert_same(DEMO, tmp_path / "demo", prompts(), (1, 7, 32), tokens=48)
