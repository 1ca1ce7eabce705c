"""Parity: a bundle against the unpatched composition, on shapes other than those it was exported with.

The reference is transformers' own forward pass and `generate`; nothing of the exported graphs' code computes it.
At fp32 tensors must agree and greedy token ids must be equal; at a reduced precision tensors must be close, and the
next token must be the same almost always, given the reference's own tokens.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, PreTrainedTokenizerFast

from llm2slm_export import contract
from llm2slm_export.bundle import Bundle, GenerationDefaults, ParityReport, ParityRow, SpecialIds, open_bundle
from llm2slm_export.contract import GraphName, PairShape, Precision
from llm2slm_export.errors import CompositionError
from llm2slm_export.models.pairing import LoadedPair, load_composition, positions_known, prompt_pad
from llm2slm_export.models.reference import Reference, conditioned_on, is_encoder_decoder, response_logits
from llm2slm_export.models.special_ids import writer_special_ids
from llm2slm_export.orchestrator import Orchestrator
from llm2slm_export.responses import Generation
from llm2slm_export.runtime.ort import OrtBackend

Array = npt.NDArray[Any]

# Prompts for pairs that bring none of their own: English, French, German, code, one word, a long one.
PROMPTS = (
    "How are you?", "She is reading a book.", "Where is the station?", "I don't know what you mean.", "Yes",
    "Translate English to German: The house is wonderful.", "Je ne sais pas où il habite.", "Das Wetter ist heute schön.",
    "summarize: The three graphs of a pair are the encoder, which reads the prompt once, the projector, which turns what "
    "was read into what the small model is conditioned on, and the decoder, which writes one token at a time.",
    "for i in range(10): print(i)", "What time is it now in New York, and what will it be in three hours?", "1 + 1 = 2",
)  # fmt: skip
GATE_TOKENS = 24  # tokens generated per prompt


# The largest error a tensor may show: over the largest reference value at fp32; root mean square over root mean square
# at a reduced precision, where a single outlier says little.
_TENSORS: dict[Precision, float] = {"fp32": 1e-4, "int8": 0.10}
# The share of next tokens that may differ from the reference's, given the reference's tokens so far.
_TOKENS: dict[Precision, float] = {"fp32": 0.0, "int8": 0.05}

_SPARE = 3  # positions of the cache that stay unused

Feed = dict[str, Any]  # input name → Tensor or Array
MEMORY_MASK = "memory_mask"  # beside the conditioning: [batch, memory]


@dataclass(frozen=True)
class Case:
    """A batch of prompts with what the reference makes of it; padding on the right.

    `input_ids`, `attention_mask` [batch, prompt]; `hidden_states` [batch, prompt, d_llm]; `generated` [batch, response]
    greedy ids, pads after a row's end; `prompts` the text, empty where the ids were cut by hand.
    """

    name: str
    prompts: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    hidden_states: Tensor
    generated: Tensor


def verify(directory: Path, composition: Path | None, head: str | None = None) -> ParityReport | None:
    """Check a bundle's hashes and, with the composition of one of its heads at hand, that head's numbers.

    Args:
        head: which of the bundle's heads; None: its first.

    Returns:
        the comparison; None when only the hashes were checked.

    Raises:
        BundleError: files are missing or altered.
        UsageError: no head has that name.
        CompositionError: the head was not built from that composition.
    """
    bundle = open_bundle(directory)
    bundle = bundle.select(head or bundle.manifest.head)
    if composition is None:
        return None
    pair = load_composition(composition)
    _require_same_pair(bundle, pair, composition)
    cases = reference_cases(pair, bundle.manifest.special_ids)
    return compare(bundle, pair.reference, cases)


def _require_same_pair(bundle: Bundle, pair: LoadedPair, composition: Path) -> None:
    """Refuse a composition that the head cannot have been built from, before its tensors are compared."""
    manifest = bundle.manifest
    ours = {**asdict(manifest.shape), "llm_layer": manifest.llm_layer, "tokenizer": manifest.tokenizer.strategy}
    theirs = {**asdict(pair.reference.shape), "llm_layer": pair.file.llm.layer, "tokenizer": pair.file.tokenizer}
    differing = [
        f"{name}: the bundle's is {ours[name]}, the composition's {theirs[name]}"
        for name in ours
        if ours[name] != theirs[name]
    ]
    if differing:
        raise CompositionError(
            f"{composition} is not what the head {manifest.head!r} of {bundle.directory} was built from.",
            *differing,
            remedy="give the head's own composition; --head says which head is meant",
        )


def compare(bundle: Bundle, reference: Reference, cases: Sequence[Case]) -> ParityReport:
    """Every graph by itself, fed with the reference's tensors, and the three chained.

    The reference's LLM is not used: what it made of the prompts is in the cases, so that a caller short of memory can
    let go of it first.
    """
    check = _Check(bundle, reference)
    rows = [*check.encoder(cases), *check.writer(cases), *check.tokens(cases)]
    return ParityReport(rows=tuple(rows))


def special_ids(reference: Reference, llm_tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
    """The ids that the loop needs. The pair has been checked to have them."""
    ids, pad = writer_special_ids(reference.slm), prompt_pad(llm_tokenizer)
    assert pad is not None
    assert ids.pad is not None
    return SpecialIds(prompt_pad=pad, pad=ids.pad, eos=ids.eos, decoder_start=ids.decoder_start)


def reference_cases(pair: LoadedPair, ids: SpecialIds) -> list[Case]:
    """What the unpatched models make of the prompts: one alone, one token alone, and all in padded batches of five."""
    kept = _tokenized(pair)
    first = kept[0]
    groups: list[tuple[str, list[tuple[str, list[int]]]]] = [
        ("batch 1", [first]),
        ("batch 1, prompt 1", [("", first[1][:1])]),
    ]
    groups += [(f"batch {len(kept[i : i + 5])}, from prompt {i + 1}", kept[i : i + 5]) for i in range(0, len(kept), 5)]
    options = _greedy(pair, ids)
    cases = []
    for name, group in groups:
        rows = [row for _, row in group]
        width = max(map(len, rows))
        input_ids = torch.tensor([[*r, *[ids.prompt_pad] * (width - len(r))] for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        with torch.no_grad():
            hidden = pair.reference.hidden_states(input_ids, mask)
            generated = pair.reference.generate(input_ids, mask, hidden, generation_config=options)
        if ids.decoder_start is not None:
            generated = generated[:, 1:].contiguous()
        texts = tuple(text for text, _ in group if text)
        cases.append(Case(name, texts, input_ids, mask, hidden, generated))
    return cases


def _tokenized(pair: LoadedPair) -> list[tuple[str, list[int]]]:
    """The gate's prompts with their ids, without those the pair would refuse for their length."""
    prompts = pair.prompts or PROMPTS
    ids = pair.llm_tokenizer([pair.file.prompt_template.replace("{prompt}", p) for p in prompts]).input_ids
    most, fact = pair.file.max_prompt_tokens, f"max_prompt_tokens is {pair.file.max_prompt_tokens}"
    known = positions_known(pair.reference.slm)
    if known is not None and not is_encoder_decoder(pair.reference.slm):
        # Its positions hold the prompt and the response.
        room = (known - GATE_TOKENS) // contract.memory_per_prompt(pair.file.fusion)
        if room < most:
            most, fact = room, f"the SLM knows {known} positions, of which {GATE_TOKENS} are for the response"
    kept = [(p, row) for p, row in zip(prompts, ids, strict=True) if len(row) <= most]
    if not kept:
        raise CompositionError(
            f"None of the {len(prompts)} prompts of the parity gate fits the pair.",
            f"{fact}, the shortest prompt has {min(map(len, ids))} tokens",
            remedy="raise max_prompt_tokens in composition.json, or choose an SLM that knows more positions",
        )
    return kept


def _greedy(pair: LoadedPair, ids: SpecialIds) -> GenerationConfig:
    model: Any = pair.reference.slm
    beyond = list(range(len(pair.slm_tokenizer), model.config.vocab_size))
    return GenerationConfig(
        max_new_tokens=GATE_TOKENS,
        do_sample=False,
        eos_token_id=list(ids.eos),
        pad_token_id=ids.pad,
        decoder_start_token_id=ids.decoder_start,
        suppress_tokens=beyond or None,  # ids the tokenizer cannot produce are never written
    )


class _Check:
    """One bundle's sessions, and the reference's SLM."""

    def __init__(self, bundle: Bundle, reference: Reference) -> None:
        self.bundle, self.reference = bundle, reference
        self.manifest = bundle.manifest
        self.shape: PairShape = bundle.manifest.shape
        self.precision = {name: graph.precision for name, graph in self.manifest.graphs.items()}

    def encoder(self, cases: Sequence[Case]) -> Iterator[ParityRow]:
        """hidden_states of every case, at the positions that are not padding."""
        session = self._session("encoder")
        for case in cases:
            real = case.attention_mask.bool()
            got = _run(session, _prompt_feed(case))[contract.HIDDEN_STATES][real.numpy()]
            yield self._row("encoder", case.name, contract.HIDDEN_STATES, got, case.hidden_states[real])

    def writer(self, cases: Sequence[Case]) -> Iterator[ParityRow]:
        """The projector's outputs and the decoder's logits of every case."""
        projector, decoder = self._session("projector"), self._session("decoder")
        for case in cases:
            with torch.no_grad():
                memory, mask = self.reference.fuse(case.hidden_states, case.input_ids, case.attention_mask)
                expected = self._reference_conditioning(memory, mask)
                logits = response_logits(self.reference.slm, memory, mask, case.generated, self.reference.fusion)
            got = _run(projector, _prompt_feed(case) | {contract.HIDDEN_STATES: case.hidden_states})
            for name, tensor in expected.items():
                real = _real(mask, tensor)
                yield self._row("projector", case.name, name, got[name][real.numpy()], tensor[real])
            for name, calls in _calls(case.generated.shape[1]).items():
                out = self._forced(decoder, case, expected | {MEMORY_MASK: mask}, calls)
                yield self._row("decoder", f"{case.name}, {name}", contract.LOGITS, out, logits)

    def tokens(self, cases: Sequence[Case]) -> Iterator[ParityRow]:
        """The three graphs chained: next tokens given the reference's, and at fp32 what `run` itself writes."""
        limit = max(_TOKENS[p] for p in self.precision.values())
        # In a function of its own: its sessions are closed before `run`'s are opened, or the encoder is held twice.
        yield self._next_tokens_row(cases, limit)
        if limit == 0.0:
            yield from self._generated_rows(cases)

    def _next_tokens_row(self, cases: Sequence[Case], limit: float) -> ParityRow:
        encoder, projector, decoder = (self._session(name) for name in contract.GRAPHS)
        differing = compared = 0
        tokens: set[int] = set()
        for case in cases:
            hidden = _run(encoder, _prompt_feed(case))
            conditioning = _run(projector, _prompt_feed(case) | hidden) | {MEMORY_MASK: self._memory_mask(case)}
            logits = self._forced(decoder, case, conditioning, (1,) * case.generated.shape[1])
            chosen = logits[:, :, : self.manifest.tokenizer.slm_size].argmax(axis=2)
            written = self._written(case)
            differing += int((chosen != case.generated.numpy())[written].sum())
            compared += int(written.sum())
            tokens.update(case.generated.numpy()[written].tolist())
        if limit > 0.0:
            # An untrained SLM writes a few tokens over and over: one near-tie decides on all occurrences of one.
            limit = max(limit, 1 / len(tokens))
        # Over all prompts: a batch's few dozen tokens are too few for a share.
        share = differing / compared
        return _parity_row("pair", f"{compared} tokens", "next tokens", "share that differs", share, limit)

    def _generated_rows(self, cases: Sequence[Case]) -> Iterator[ParityRow]:
        """What `run` writes: greedy on every case, and with the SLM's own generation_config where that says more."""
        own, plain = self.manifest.generation, GenerationDefaults(max_new_tokens=GATE_TOKENS)
        backend = OrtBackend(self.bundle, device="cpu", threads=None)
        with Orchestrator(self._generating(plain), backend) as pair:
            for case in cases:
                if case.prompts:
                    got = pair.generate(case.prompts)
                    written = [row[real] for row, real in zip(case.generated.numpy(), self._written(case), strict=True)]
                    yield _ids_row(case.name, "greedy token ids", got, written)
            limits = {"max_new_tokens": max(GATE_TOKENS, own.min_new_tokens), "num_return_sequences": 1}
            gate = own.model_copy(update=limits)
            if own.do_sample or gate == plain:
                return
            searching = Orchestrator(self._generating(gate), backend)
            for case in cases:
                # Alone: in a padded batch transformers exempts some tokens of a decoder-only row from the repetition penalty.
                if len(case.prompts) == 1:
                    written = [self._reference_ids(case, gate)]
                    yield _ids_row(case.name, "default token ids", searching.generate(case.prompts), written)

    def _generating(self, defaults: GenerationDefaults) -> Bundle:
        """The bundle with other generation defaults."""
        return Bundle(self.bundle.directory, self.manifest.model_copy(update={"generation": defaults}))

    def _reference_ids(self, case: Case, defaults: GenerationDefaults) -> Array:
        """The ids that the unpatched SLM writes to a case of one prompt with its own generation_config."""
        model: Any = self.reference.slm
        options = copy.deepcopy(model.generation_config)
        beyond = range(self.manifest.tokenizer.slm_size, self.shape.vocab)
        options.update(
            max_new_tokens=defaults.max_new_tokens, max_length=None, min_new_tokens=defaults.min_new_tokens, min_length=0,
            num_return_sequences=1,
            suppress_tokens=list(beyond) or None, pad_token_id=self.manifest.special_ids.pad,
        )  # fmt: skip
        ids = self.reference.generate(
            case.input_ids, case.attention_mask, case.hidden_states, generation_config=options
        )
        written = ids[0, 1:] if self.shape.slm_kind == "encoder-decoder" else ids[0]
        is_eos = np.isin(written.numpy(), self.manifest.special_ids.eos)
        return written.numpy()[is_eos.cumsum() - is_eos == 0]  # type: ignore[no-any-return]

    def _written(self, case: Case) -> Array:
        """[batch, response]: True up to and including a row's first EOS."""
        is_eos = np.isin(case.generated.numpy(), self.manifest.special_ids.eos)
        return is_eos.cumsum(axis=1) - is_eos == 0  # type: ignore[no-any-return]

    def _reference_conditioning(self, memory: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What conditions the decoder, computed by the unpatched SLM."""
        model: Any = self.reference.slm
        if not is_encoder_decoder(model):
            return {contract.PROMPT_EMBEDS: memory}
        ids = self.manifest.special_ids.decoder_start or 0
        start = torch.full((memory.shape[0], 1), ids)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        model(
            **conditioned_on(memory, self.reference.fusion), attention_mask=mask, decoder_input_ids=start,
            cache=cache, use_cache=True,
        )  # fmt: skip
        flat = [t for layer in cache.cross_attention_cache.layers for t in (layer.keys, layer.values)]
        return {spec.name: t for spec, t in zip(contract.cross_attention(self.shape), flat, strict=True)}

    def _memory_mask(self, case: Case) -> Tensor:
        """[batch, memory], padded on the side the decoder wants."""
        count = self.shape.memory_per_prompt
        mask = case.attention_mask.repeat_interleave(count, dim=1)
        return mask if self.shape.slm_kind == "encoder-decoder" else mask.flip(1)

    def _forced(self, session: Any, case: Case, conditioning: Feed, calls: tuple[int, ...]) -> Array:
        """Logits [batch, response, vocab] given the reference's tokens, cut into calls of so many with past in between."""
        shape, batch = self.shape, case.generated.shape[0]
        memory = conditioning[MEMORY_MASK].shape[1] if shape.slm_kind == "decoder-only" else 0
        capacity = memory + sum(calls) + _SPARE
        # What is not written yet must not count, whatever it is.
        unwritten = np.full((batch, shape.heads, capacity, shape.d_head), 100.0, np.float32)
        past: Feed = {s.past.name: unwritten for s in contract.state(shape)}
        length = 0
        feeds = self._encoder_decoder_feeds if shape.slm_kind == "encoder-decoder" else self._decoder_only_feeds
        outputs = []
        for feed in feeds(case, conditioning, calls):
            got = _run(session, feed | past | {contract.PAST_LENGTH: np.array([length])})
            length += sum(feed[name].shape[1] for name in (contract.INPUT_IDS, contract.PROMPT_EMBEDS) if name in feed)
            outputs.append(got[contract.LOGITS])
            past = {s.past.name: got[s.present.name] for s in contract.state(shape)}
        return np.concatenate(outputs, axis=1)

    def _encoder_decoder_feeds(self, case: Case, conditioning: Feed, calls: tuple[int, ...]) -> Iterator[Feed]:
        start = np.full((case.generated.shape[0], 1), self.manifest.special_ids.decoder_start)
        tokens = np.concatenate([start, case.generated[:, :-1].numpy()], axis=1)
        position = 0
        for count in calls:
            ids = tokens[:, position : position + count]
            position += count
            yield {contract.INPUT_IDS: ids, contract.ENCODER_ATTENTION_MASK: conditioning[MEMORY_MASK]} | conditioning

    def _decoder_only_feeds(self, case: Case, conditioning: Feed, calls: tuple[int, ...]) -> Iterator[Feed]:
        """The first call holds the prompt embeddings and all but one of its tokens; the last one's logits come from them."""
        embeds = np.asarray(conditioning[contract.PROMPT_EMBEDS])
        memory, tokens = embeds.shape[1], case.generated[:, :-1].numpy()
        mask, position = np.asarray(conditioning[MEMORY_MASK]), 0
        # Of the whole cache: what is yet to be written is no padding.
        mask = np.concatenate([mask, np.ones((len(mask), sum(calls) + _SPARE), np.int64)], axis=1)
        for index, count in enumerate(calls):
            first = index == 0
            ids = tokens[:, position : position + count - first]
            position += ids.shape[1]
            yield {
                contract.INPUT_IDS: ids,
                contract.PROMPT_EMBEDS: embeds if first else embeds[:, :0],
                contract.ATTENTION_MASK: mask,
                contract.LOGITS_TO_KEEP: np.arange(count) + (memory - 1 if first else 0),
            }

    def _session(self, name: GraphName) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self.precision[name] == "fp32":
            # Weights are read from the mapped file, not repacked into a second copy: slower, and half the memory. At a
            # reduced precision the kernels that `run` uses are what is measured, and they need their packed form.
            options.add_session_config_entry("session.disable_prepacking", "1")
        path = self.bundle.path(self.manifest.graphs[name].file)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def _row(self, graph: GraphName, case: str, tensor: str, got: Array, reference: Tensor) -> ParityRow:
        expected = reference.numpy()
        precision = self.precision[graph]
        if precision == "fp32":
            measure, error, size = "max |error| / max |reference|", np.abs(got - expected).max(), np.abs(expected).max()
        else:
            measure = "rms error / rms reference"
            error, size = np.sqrt(np.square(got - expected).mean()), np.sqrt(np.square(expected).mean())
        return _parity_row(graph, case, tensor, measure, _relative(float(error), float(size)), _TENSORS[precision])


def _relative(error: float, size: float) -> float:
    """`error` / `size`. Of a reference that is all zeros, as what a projector that starts at zero leads to, no error is none."""
    if size == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / size


def _ids_row(case: str, what: str, got: Sequence[Generation], expected: Sequence[Array]) -> ParityRow:
    wrong = sum(row.token_ids != tuple(ids.tolist()) for row, ids in zip(got, expected, strict=True))
    return _parity_row("pair", case, what, "prompts that differ", float(wrong), 0.0)


def _parity_row(
    graph: GraphName | Literal["pair"], case: str, tensor: str, measure: str, value: float, tolerance: float
) -> ParityRow:
    # A value that is not a number is not within any tolerance.
    return ParityRow(
        graph=graph, case=case, tensor=tensor, measure=measure, value=value, tolerance=tolerance,
        passed=value <= tolerance,
    )  # fmt: skip


def _real(mask: Tensor, tensor: Tensor) -> Tensor:
    """Where a conditioning tensor is not padding: [batch, heads, memory] or, prompt embeddings, [batch, memory]."""
    return mask.bool()[:, None, :].expand(tensor.shape[:3]) if tensor.ndim == 4 else mask.bool()


def _calls(length: int) -> dict[str, tuple[int, ...]]:
    """Ways to cut a response into decoder calls: one token each (past 0, 1, 2, …), and several at a time."""
    ways = {"token by token": (1,) * length}
    if length > 4:
        ways[f"calls of 3, 1, {length - 4} tokens"] = (3, 1, length - 4)
    return ways


def _prompt_feed(case: Case) -> Feed:
    return {contract.INPUT_IDS: case.input_ids, contract.ATTENTION_MASK: case.attention_mask}


def _run(session: Any, feed: Feed) -> dict[str, Array]:
    """Outputs by name; tensors the graph does not take are left out of the feed."""
    wanted = {i.name for i in session.get_inputs()}
    arrays = {name: np.ascontiguousarray(value) for name, value in feed.items() if name in wanted}
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, arrays), strict=True))
