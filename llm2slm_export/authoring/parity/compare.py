"""Parity: a bundle against the unpatched composition, on shapes other than those it was exported with.

The reference is transformers' own forward pass and `generate`; nothing of the exported graphs' code computes it.
At fp32 tensors must be as close to the reference in float64 as its own float32 is, up to a factor (`tolerances.py`), and
greedy token ids must be equal wherever that rounding cannot decide between two tokens; at a reduced precision tensors must
be close, and the next token must be the same almost always, given the reference's own tokens; how often is measured on many
prompts where they are given (the gate).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from llm2slm_export import contract
from llm2slm_export.authoring.exporters.quantization.half_precision import emulate_half
from llm2slm_export.authoring.models.generation_config import own_options
from llm2slm_export.authoring.models.pairing import LoadedPair, load_composition
from llm2slm_export.authoring.models.reference import Reference, response_logits
from llm2slm_export.authoring.parity.float64 import Double
from llm2slm_export.authoring.parity.reference_outputs import (
    GATE_TOKENS,
    ReferenceBatch,
    gate_batches,
    reference_batches,
)
from llm2slm_export.authoring.parity.teacher_forcing import CONTEXT_MASK, Feed, conditioning, empty_cache, feeds
from llm2slm_export.authoring.parity.tolerances import MARGIN, Measurements, relative, size
from llm2slm_export.bundle.bundle import Bundle, open_bundle
from llm2slm_export.bundle.manifest import GenerationDefaults
from llm2slm_export.bundle.parity_report import ParityReport, ParityRow
from llm2slm_export.contract import EnginePrecision, GraphName, PairShape, Precision
from llm2slm_export.errors import CompositionError
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.runtime.openvino import OpenVinoGraph
from llm2slm_export.inference.runtime.selection import chosen_runtimes, open_backend

Array = npt.NDArray[Any]
_Graph = Callable[[Feed], dict[str, Array]]

# The largest error a tensor may show at a reduced precision, root mean square over root mean square: a single outlier says
# little. At fp32 the limit is `rounding.Measurements`'.
_TENSORS: dict[Precision | EnginePrecision, float] = {
    "fp16": 0.02, "bf16": 0.05, "int8": 0.10, "int4": 0.50, "w8a8": 0.15,
}  # fmt: skip
_NOISY_SEARCHES = 8  # of the reference with noise, to tell whether rounding decides what a search writes
# The share of next tokens that may differ from the reference's, given the reference's tokens so far: of the few dozen
# prompts that every pair is checked with; and, for each graph, of those of a gate.
_TOKENS: dict[Precision | EnginePrecision, float] = {
    "fp32": 0.0, "fp16": 0.05, "bf16": 0.05, "int8": 0.05, "int4": 0.25, "w8a8": 0.05,
}  # fmt: skip
_GATE: dict[Precision | EnginePrecision, float] = {
    "fp32": 0.0, "fp16": 0.005, "bf16": 0.005, "int8": 0.005, "int4": 0.02, "w8a8": 0.005,
}  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """Held-out prompts on which a bundle of a reduced precision has to write what the reference writes.

    Args:
        prompts: as a user would give them; those that are too long for the pair are left out.
        differing: the share of next tokens that may differ; None: 0.5 % for each graph at fp16, bf16 or int8, 2 % for each
            at int4.
    """

    prompts: tuple[str, ...]
    differing: float | None = None


def verify(
    directory: Path,
    composition: Path | None,
    head: str | None = None,
    *,
    gate: Gate | None = None,
    runtime: str = "onnxruntime",
) -> ParityReport | None:
    """Check a bundle's hashes and, with the composition of one of its heads at hand, that head's numbers.

    Args:
        head: which of the bundle's heads; None: its first.
        gate: more prompts to compare on.
        runtime: what runs the graphs (`runtime.choice.parse_runtime`).

    Returns:
        the comparison; None when only the hashes were checked.

    Raises:
        BundleError: files are missing or altered.
        UsageError: no head has that name, or a runtime that means nothing.
        MissingExtraError: the runtime is not installed.
        CompositionError: the head was not built from that composition.
    """
    bundle = open_bundle(directory)
    bundle = bundle.select(head or bundle.manifest.head)
    if composition is None:
        return None
    pair = load_composition(composition)
    _require_same_pair(bundle, pair, composition)
    ids = bundle.manifest.special_ids
    held_out = gate_batches(pair, ids, gate.prompts) if gate else ()
    exact = bundle.manifest.graphs["encoder"].precision == "fp32"
    return compare(bundle, pair.reference, reference_batches(pair, ids, exact=exact), gate, held_out, runtime=runtime)


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


def compare(
    bundle: Bundle,
    reference: Reference,
    cases: Sequence[ReferenceBatch],
    gate: Gate | None = None,
    held_out: Sequence[ReferenceBatch] = (),
    *,
    runtime: str = "onnxruntime",
) -> ParityReport:
    """Every graph by itself, fed with the reference's tensors, and the three chained.

    The reference's LLM is not used: what it made of the prompts is in the cases, so that a caller short of memory can
    let go of it first.

    Args:
        cases: with `exact` where the encoder is at fp32.
        held_out: of the gate's prompts.
        runtime: what runs the graphs (`runtime.choice.parse_runtime`).
    """
    check = _Check(bundle, reference, runtime)
    rows = [*check.encoder(cases), *check.projector_and_decoder(cases), *check.tokens(cases)]
    if gate:
        rows += check.gate(gate, held_out)
    return ParityReport(rows=tuple(rows))


def compare_engine_graphs(
    bundle: Bundle,
    reference: Reference,
    cases: Sequence[ReferenceBatch],
    gate: Gate | None = None,
    held_out: Sequence[ReferenceBatch] = (),
) -> ParityReport:
    """The same of graphs that engines are made of, with their roundings: every graph by itself, and next tokens given the
    reference's of the three chained.

    Args:
        bundle: the graphs' directory, and their entries in place of the bundle's.
    """
    check = _Check(bundle, reference, "onnxruntime", engines=True)
    rows = [*check.encoder(cases), *check.projector_and_decoder(cases), *check.next_tokens(cases)]
    if gate:
        rows += check.gate_tokens(gate, held_out)
    return ParityReport(rows=tuple(rows))


class _Check:
    """One bundle's graphs, and the reference's SLM.

    Args:
        engines: the graphs are those that engines are made of, which multiply in half at every precision but fp32.
    """

    def __init__(self, bundle: Bundle, reference: Reference, runtime: str, *, engines: bool = False) -> None:
        self.engines = engines
        self.bundle, self.reference, self.runtime = bundle, reference, runtime
        self.runtimes = chosen_runtimes(bundle, runtime)
        self.manifest = bundle.manifest
        self.shape: PairShape = bundle.manifest.shape
        self.precision = {name: graph.precision for name, graph in self.manifest.graphs.items()}
        self.float32 = all(precision == "fp32" for precision in self.precision.values())
        self.chained_tolerance = 0.0  # of the three graphs' logits at fp32, known once `next_tokens` has been run
        # By case, [batch, response, choices]: what float32 may write for the reference's token.
        self.ties: dict[str, Array] = {}

    def encoder(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """hidden_states of every case, at the positions that are not padding."""
        encoder, measured = self._graph("encoder"), Measurements()
        for case in cases:
            real = case.attention_mask.bool()
            got = encoder(_prompt_feed(case))[contract.HIDDEN_STATES][real.numpy()]
            expected, exact = case.hidden_states[real], None if case.exact is None else case.exact[real]
            yield from self._rows(measured, "encoder", case.name, contract.HIDDEN_STATES, got, expected, exact)
        yield from measured.rows()

    def projector_and_decoder(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """The projector's outputs and the decoder's logits of every case."""
        projector, decoder, measured = self._graph("projector"), self._graph("decoder"), Measurements()
        for case in cases:
            given, context = conditioning(self.reference, self.manifest.special_ids, case)
            logits, mask = self._reference_logits(case, context), given[CONTEXT_MASK]
            exact, exact_logits = self._exact(case, context)
            got = projector(_prompt_feed(case) | {contract.HIDDEN_STATES: case.hidden_states})
            for name, tensor in given.items():
                if name != CONTEXT_MASK:
                    real = _real(mask, tensor)
                    yield from self._rows(
                        measured,
                        "projector",
                        case.name,
                        name,
                        got[name][real.numpy()],
                        tensor[real],
                        exact[name][real] if exact else None,
                    )
            for name, calls in _calls(case.generated.shape[1]).items():
                out = self._forced(decoder, case, given, calls)
                yield from self._rows(
                    measured, "decoder", f"{case.name}, {name}", contract.LOGITS, out, logits, exact_logits
                )
        yield from measured.rows()

    def _exact(self, case: ReferenceBatch, context: Tensor) -> tuple[Feed | None, Tensor | None]:
        """What the decoder is conditioned on and its logits in float64, from what the graphs are given; where one of them is
        at fp32."""
        if "fp32" not in (self.precision["projector"], self.precision["decoder"]):
            return None, None
        with Double():
            given, _ = conditioning(self.reference, self.manifest.special_ids, case)
            return given, self._reference_logits(case, context)

    def gate(self, gate: Gate, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """The three graphs chained on many prompts: next tokens and their distribution given the reference's tokens, and the
        responses that `run` writes by itself."""
        yield from self.gate_tokens(gate, cases)
        prompts = sum(len(case.prompts) for case in cases)
        which = f"gate, {prompts} of {len(gate.prompts)} prompts"
        plain, differing = GenerationDefaults(max_new_tokens=GATE_TOKENS), 0
        with Orchestrator(self._generating(plain), open_backend(self.bundle, runtime=self.runtime)) as pair:
            for case in cases:
                written = [row[real] for row, real in zip(case.generated.numpy(), case.written.numpy(), strict=True)]
                differing += _differing(pair.generate(case.prompts), written)
        # Told, not judged: it says how far responses go apart once a token differs.
        yield _parity_row("pair", which, "responses", "share that differs", differing / prompts, 1.0)

    def gate_tokens(self, gate: Gate, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """The first two of `gate`."""
        allowed = sum(_GATE[p] for p in self.precision.values()) if gate.differing is None else gate.differing
        prompts = sum(len(case.prompts) for case in cases)
        yield from self._gate_rows(cases, f"gate, {prompts} of {len(gate.prompts)} prompts", allowed)

    def _gate_rows(self, cases: Sequence[ReferenceBatch], which: str, allowed: float) -> Iterator[ParityRow]:
        # In a function of its own, for the reason `next_tokens` is.
        differing = compared = 0
        divergence = 0.0
        for case, logits in self._chained(cases, lambda length: (length,)):
            got = torch.from_numpy(logits[case.written.numpy()])
            _, context = conditioning(self.reference, self.manifest.special_ids, case)
            expected = self._reference_logits(case, context)[case.written][:, : self.manifest.tokenizer.slm_size]
            differing += self._misses(got.argmax(dim=1), case.generated[case.written], expected)
            compared += len(got)
            told, said = (torch.log_softmax(scores.double(), dim=1) for scores in (expected, got))
            divergence += float((told.exp() * (told - said)).sum())
        which = f"{which}, {compared} tokens"
        yield _parity_row("pair", which, "next tokens", "share that differs", differing / compared, allowed)
        # Told, hardly judged: the share is what is limited, and at one nat a token it would be another model.
        yield _parity_row("pair", which, "next tokens", "KL divergence, nats", divergence / compared, 1.0)

    def _chained(
        self, cases: Sequence[ReferenceBatch], calls: Callable[[int], tuple[int, ...]]
    ) -> Iterator[tuple[ReferenceBatch, Array]]:
        """Each case with the three graphs' logits [batch, response, choices], given the reference's tokens.

        Args:
            calls: how a response of so many tokens is cut into decoder calls.
        """
        encoder, projector, decoder = (self._graph(name) for name in contract.GRAPHS)
        for case in cases:
            hidden = encoder(_prompt_feed(case))
            given = projector(_prompt_feed(case) | hidden) | {CONTEXT_MASK: self._context_mask(case)}
            logits = self._forced(decoder, case, given, calls(case.generated.shape[1]))
            yield case, logits[:, :, : self.manifest.tokenizer.slm_size]

    def _reference_logits(self, case: ReferenceBatch, context: Tensor) -> Tensor:
        """[batch, response, vocab] of the unpatched SLM, conditioned on [batch, context, hidden_size]."""
        mask = self._context_mask(case)
        with torch.no_grad():
            return response_logits(self.reference.slm, context, mask, case.generated, self.reference.fusion)

    def tokens(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """The three graphs chained: next tokens given the reference's, and at fp32 what `run` itself writes."""
        # In a function of its own: its sessions are closed before `run`'s are opened, or the encoder is held twice.
        yield from self.next_tokens(cases)
        if self.float32:
            yield from self._generated_rows(cases)

    def next_tokens(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """The three graphs chained: next tokens given the reference's and, at fp32, their logits."""
        limit = max(_TOKENS[p] for p in self.precision.values())
        differing = compared = 0
        tokens: set[int] = set()
        choices: list[tuple[ReferenceBatch, Array]] = []
        measured, exact = Measurements(), dict[str, Array]()
        for case, logits in self._chained(cases, lambda length: (1,) * length):
            written = case.written.numpy()
            choices.append((case, logits.argmax(axis=2)))
            compared += int(written.sum())
            tokens.update(case.generated.numpy()[written].tolist())
            if self.float32:
                float32, exact[case.name] = self._whole_logits(case)
                measured.add(
                    "pair", case.name, contract.LOGITS, logits[written], float32[written], exact[case.name][written]
                )
        if self.float32:
            yield from measured.rows()
            self._find_ties(cases, measured, exact)
        tied = 0
        for case, chosen in choices:
            written, generated = case.written.numpy(), case.generated.numpy()
            unlike = (chosen != generated) & written
            differing += int(unlike.sum())
            if self.float32:
                allowed = np.take_along_axis(self.ties[case.name], chosen[:, :, None], axis=2)[:, :, 0]
                tied += int((unlike & allowed).sum())
        differing -= tied
        if limit > 0.0:
            # An untrained SLM writes a few tokens over and over: one near-tie decides on all occurrences of one.
            limit = max(limit, 1 / len(tokens))
        # Over all prompts: a batch's few dozen tokens are too few for a share.
        share = differing / compared
        which = f"{compared} tokens" + (f", {tied} tied within float32's rounding" if tied else "")
        yield _parity_row("pair", which, "next tokens", "share that differs", share, limit)

    def _whole_logits(self, case: ReferenceBatch) -> tuple[Array, Array]:
        """[batch, response, choices] of the whole unpatched composition, in float32 and in float64."""
        assert case.exact is not None  # the encoder is at fp32
        both = []
        for states, mode in ((case.hidden_states, nullcontext()), (case.exact, Double())):
            with torch.no_grad(), mode:
                context, _ = self.reference.fuse(states, case.input_ids, case.attention_mask)
                logits = self._reference_logits(case, context)
            both.append(logits[:, :, : self.manifest.tokenizer.slm_size].numpy())
        return both[0], both[1]

    def _find_ties(self, cases: Sequence[ReferenceBatch], measured: Measurements, exact: dict[str, Array]) -> None:
        """Where float64 has two tokens so close that rounding within the logits' tolerance decides between them."""
        ((self.chained_tolerance, _),) = measured.tolerances().values()
        for case in cases:
            logits = exact.pop(case.name)
            # Each of the two logits may be off by the tolerance.
            within = 2 * self.chained_tolerance * size(logits[case.written.numpy()])
            reference = np.take_along_axis(logits, case.generated.numpy()[:, :, None], axis=2)
            self.ties[case.name] = np.abs(logits - reference) <= within

    def _misses(self, chosen: Tensor, written: Tensor, expected: Tensor) -> int:
        """How many of the chosen tokens are other than the reference's, and not tied with them at fp32.

        Args:
            expected: the reference's logits [tokens, choices], in float32.
        """
        unlike = chosen != written
        if self.float32:
            # The reference's own logits are off too.
            within = 2 * (1 + 1 / MARGIN) * self.chained_tolerance * float(expected.abs().max())
            theirs, ours = (expected.gather(1, ids[:, None])[:, 0] for ids in (written, chosen))
            unlike &= (theirs - ours).abs() > within
        return int(unlike.sum())

    def _generated_rows(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """What `run` writes: greedy on every case, and with the SLM's own generation_config where that says more."""
        own, plain = self.manifest.generation, GenerationDefaults(max_new_tokens=GATE_TOKENS)
        backend = open_backend(self.bundle, runtime=self.runtime)
        with Orchestrator(self._generating(plain), backend) as pair:
            for case in cases:
                if case.prompts:
                    got = pair.generate(case.prompts)
                    written = [
                        row[real] for row, real in zip(case.generated.numpy(), case.written.numpy(), strict=True)
                    ]
                    yield self._greedy_row(case, got, written)
            limits = {"max_new_tokens": max(GATE_TOKENS, own.min_new_tokens), "num_return_sequences": 1}
            gate = own.model_copy(update=limits)
            if own.do_sample or gate == plain:
                return
            searching = Orchestrator(self._generating(gate), backend)
            for case in cases:
                # Alone: in a padded batch transformers exempts some tokens of a decoder-only row from the repetition penalty.
                if len(case.prompts) == 1:
                    yield self._default_row(case, gate, searching.generate(case.prompts))

    def _greedy_row(self, case: ReferenceBatch, got: Sequence[Generation], expected: Sequence[Array]) -> ParityRow:
        """Responses against the reference's: the same up to their ends, or up to a tie, behind which nothing can be said."""
        differing = tied = 0
        for row, (response, ids) in enumerate(zip(got, expected, strict=True)):
            ours, theirs = response.token_ids, tuple(ids.tolist())
            if ours == theirs:
                continue
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            if place is not None and self.ties[case.name][row, place, ours[place]]:
                tied += 1
            else:
                differing += 1
        return _ids_row(case.name, "greedy token ids", differing, tied)

    def _default_row(self, case: ReferenceBatch, defaults: GenerationDefaults, got: Sequence[Generation]) -> ParityRow:
        """A response with the SLM's own generation_config against the reference's; one that the logits' tolerance can change
        is not judged."""
        if not _differing(got, [self._reference_ids(case, defaults)]):
            return _ids_row(case.name, "default token ids", 0, 0)
        likely = [self._reference_ids(case, defaults, noise_seed=seed) for seed in range(_NOISY_SEARCHES)]
        unstable = len({tuple(ids.tolist()) for ids in likely}) > 1
        return _ids_row(case.name, "default token ids", int(not unstable), int(unstable))

    def _generating(self, defaults: GenerationDefaults) -> Bundle:
        """The bundle with other generation defaults."""
        return Bundle(self.bundle.directory, self.manifest.model_copy(update={"generation": defaults}))

    def _reference_ids(
        self, case: ReferenceBatch, defaults: GenerationDefaults, noise_seed: int | None = None
    ) -> Array:
        """The ids that the unpatched SLM writes to a case of one prompt with its own generation_config.

        Args:
            noise_seed: of noise on its logits as large as their tolerance; None: no noise.
        """
        options = own_options(self.reference.slm)
        beyond = range(self.manifest.tokenizer.slm_size, self.shape.vocab_size)
        options.update(
            max_new_tokens=defaults.max_new_tokens, max_length=None, min_new_tokens=defaults.min_new_tokens, min_length=0,
            num_return_sequences=1,
            suppress_tokens=list(beyond) or None, pad_token_id=self.manifest.special_ids.pad,
        )  # fmt: skip
        ids = self.reference.generate(
            case.input_ids, case.attention_mask, case.hidden_states, generation_config=options,
            logits_processor=LogitsProcessorList(
                [] if noise_seed is None else [_Noise(self.chained_tolerance, noise_seed)]
            ),
        )  # fmt: skip
        written = ids[0, 1:] if self.shape.slm_kind == "encoder-decoder" else ids[0]
        is_eos = np.isin(written.numpy(), self.manifest.special_ids.eos)
        return written.numpy()[is_eos.cumsum() - is_eos == 0]  # type: ignore[no-any-return]

    def _context_mask(self, case: ReferenceBatch) -> Tensor:
        """[batch, context], padded on the side the decoder wants."""
        count = self.shape.context_per_token
        mask = case.attention_mask.repeat_interleave(count, dim=1)
        return mask if self.shape.slm_kind == "encoder-decoder" else mask.flip(1)

    def _forced(self, decoder: _Graph, case: ReferenceBatch, given: Feed, calls: tuple[int, ...]) -> Array:
        """Logits [batch, response, vocab] given the reference's tokens, cut into calls of so many with past in between."""
        past, outputs = empty_cache(self.shape, case, given), []
        for feed in feeds(self.shape, self.manifest.special_ids, case, given, calls):
            got = decoder(feed | past)
            outputs.append(got[contract.LOGITS])
            past = {s.past.name: got[s.present.name] for s in contract.state(self.shape)}
        return np.concatenate(outputs, axis=1)

    def _graph(self, name: GraphName) -> _Graph:
        if self.runtimes[name] == "openvino":
            return OpenVinoGraph(self.bundle, name, threads=None)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self.precision[name] == "fp32":
            # Weights are read from the mapped file, not repacked into a second copy: slower, and half the memory. At a
            # reduced precision the kernels that `run` uses are what is measured, and they need their packed form.
            options.add_session_config_entry("session.disable_prepacking", "1")
        # Of engines' graphs: ONNX Runtime would round to int8 what is multiplied with dequantised weights, as engines do not.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        path = self.bundle.path(self.manifest.graphs[name].file)
        graph: Path | bytes = path
        if self.precision[name] == "fp16" or (self.engines and self.precision[name] != "fp32"):
            graph = _with_roundings(path)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        return partial(_run, onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]))

    def _rounds(self, graph: GraphName) -> bool:
        """Whether a graph's outputs are in half, for a decoder that wants them so, whatever it computes in itself."""
        return any(tensor.dtype == "float16" for tensor in self.manifest.graphs[graph].outputs)

    def _rows(
        self,
        measured: Measurements,
        graph: GraphName,
        case: str,
        tensor: str,
        got: Array,
        reference: Tensor,
        exact: Tensor | None,
    ) -> Iterator[ParityRow]:
        """A tensor's row at a reduced precision; at fp32 `measured` gets it, to be judged with the other cases'."""
        expected, precision = reference.numpy(), self.precision[graph]
        if precision == "fp32" and self._rounds(graph):
            precision = "fp16"
        if precision == "fp32":
            assert exact is not None  # `compare` wants it of such cases
            measured.add(graph, case, tensor, got, expected, exact.numpy())
            return
        error, whole = (float(np.sqrt(np.square(values).mean())) for values in (got - expected, expected))
        yield _parity_row(graph, case, tensor, "rms error / rms reference", relative(error, whole), _TENSORS[precision])


class _Noise(LogitsProcessor):
    """Uniform noise on logits, up to `share` of the largest."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.generator = share, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        largest = scores[scores.isfinite()].abs().max()
        return scores + (2 * torch.rand(scores.shape, generator=self.generator) - 1) * self.share * largest


def _ids_row(case: str, what: str, differing: int, tied: int) -> ParityRow:
    """Of responses: those that differ, and, told only, those that do from where float32's rounding decides."""
    which = case + (f", {tied} decided by float32's rounding" if tied else "")
    return _parity_row("pair", which, what, "prompts that differ", float(differing), 0.0)


def _differing(got: Sequence[Generation], expected: Sequence[Array]) -> int:
    """How many responses are other ids than the reference's."""
    return sum(row.token_ids != tuple(ids.tolist()) for row, ids in zip(got, expected, strict=True))


def _parity_row(
    graph: GraphName | Literal["pair"], case: str, tensor: str, measure: str, value: float, tolerance: float
) -> ParityRow:
    # A value that is not a number is not within any tolerance.
    return ParityRow(
        graph=graph, case=case, tensor=tensor, measure=measure, value=value, tolerance=tolerance,
        passed=value <= tolerance,
    )  # fmt: skip


def _real(mask: Tensor, tensor: Tensor) -> Tensor:
    """Where a conditioning tensor is not padding: [batch, heads, context] or, prompt embeddings, [batch, context]."""
    return mask.bool()[:, None, :].expand(tensor.shape[:3]) if tensor.ndim == 4 else mask.bool()


def _calls(length: int) -> dict[str, tuple[int, ...]]:
    """Ways to cut a response into decoder calls: one token each (past 0, 1, 2, …), and several at a time."""
    ways = {"token by token": (1,) * length}
    if length > 4:
        ways[f"calls of 3, 1, {length - 4} tokens"] = (3, 1, length - 4)
    return ways


def _prompt_feed(case: ReferenceBatch) -> Feed:
    return {contract.INPUT_IDS: case.input_ids, contract.ATTENTION_MASK: case.attention_mask}


def _with_roundings(path: Path) -> bytes:
    """A graph that multiplies in half, with its roundings as the CPU keeps them: see `emulate_half`."""
    model = ir.load(path)
    emulate_half(model)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _run(session: Any, feed: Feed) -> dict[str, Array]:
    """Outputs by name, in float32; tensors the graph does not take are left out of the feed."""
    wanted = {i.name for i in session.get_inputs()}
    arrays = {name: np.ascontiguousarray(value) for name, value in feed.items() if name in wanted}
    outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, arrays), strict=True))
    return {name: value.astype(np.float32, copy=False) for name, value in outputs.items()}
