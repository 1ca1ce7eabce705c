"""Every llm kind × slm kind × fusion × tokenizer that makes sense, and every family in at least one of them."""

from dataclasses import dataclass
from itertools import cycle, product

from tests.families.models import CONFIGS

LLMS = {
    "encoder-decoder": (
        "t5", "bart", "t5gemma", "mt5", "longt5-local", "mbart", "t5gemma2", "t5-gated", "umt5", "t5gemma-unbalanced",
    ),
    "encoder-only": ("bert", "modernbert"),
    "decoder-only": ("gpt2", "llama", "gemma2", "qwen3", "opt", "mistral", "gpt_neox", "qwen2", "gemma3_text"),
}  # fmt: skip
SLMS = {
    "encoder-decoder": (
        "t5", "bart", "t5gemma", "t5-deep-decoder", "mbart", "umt5", "t5-gated", "t5gemma-unbalanced", "mt5",
    ),
    "decoder-only": ("gpt2", "gemma2", "llama", "mistral", "qwen3", "opt", "qwen2", "gpt_neox", "gemma3_text"),
}  # fmt: skip
FUSIONS = {
    "encoder-decoder": ("add", "replace", "prefix", "cross_attention"),
    "decoder-only": ("add", "replace", "prefix"),
}
# The output; an inner layer, whose graph holds no later one; several, fused.
LAYERS: tuple[int | tuple[int, ...], ...] = (-1, 1, (1, -1))


@dataclass(frozen=True)
class Combination:
    """One pair to build. `projector`: `identity` where a T5Gemma's own encoder is read with."""

    llm: str
    slm: str
    fusion: str
    tokenizer: str
    layer: int | tuple[int, ...]
    projector: str = "mlp"

    def __str__(self) -> str:
        layer = self.layer if isinstance(self.layer, int) else "+".join(map(str, self.layer))
        return f"{self.llm}@{layer}-{self.slm}-{self.fusion}-{self.tokenizer}"


def _combination(llm: str, slm: str, fusion: str, tokenizer: str, layer: int | tuple[int, ...]) -> Combination:
    if llm == "opt" and not isinstance(layer, int):
        layer = (1, 2)  # its output is narrower than its layers
    return Combination(llm, slm, fusion, tokenizer, layer)


def _combinations() -> list[Combination]:
    llms = {kind: cycle(names) for kind, names in LLMS.items()}
    slms = {kind: cycle(names) for kind, names in SLMS.items()}
    layers = cycle(LAYERS)
    made = [
        _combination(next(llms[llm]), next(slms[slm]), fusion, tokenizer, next(layers))
        for tokenizer in ("shared", "llm")
        for llm, slm in product(LLMS, SLMS)
        for fusion in FUSIONS[slm]
    ]
    # More families of the same kinds.
    made += [
        Combination("marian", "smollm3", "add", "shared", -1),
        Combination("pegasus", "marian", "add", "shared", 1),
        Combination("distilbert", "pegasus", "prefix", "shared", (1, -1)),
        Combination("smollm3", "phi3", "replace", "shared", 1),
        Combination("phi3", "olmo2", "add", "llm", -1),
        Combination("olmo2", "granite", "prefix", "llm", (1, -1)),
        Combination("granite", "marian", "cross_attention", "llm", 1),
    ]
    # The 9B-2B shape by itself: its encoder reads, its decoder writes, and its own cross-attention is the projector.
    made.append(Combination("t5gemma-unbalanced", "t5gemma-unbalanced", "cross_attention", "shared", -1, "identity"))
    return made


COMBINATIONS = _combinations()
assert {c.llm for c in COMBINATIONS} | {c.slm for c in COMBINATIONS} == set(CONFIGS)
