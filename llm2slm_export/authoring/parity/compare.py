"""Parity: a bundle's outputs against those of the unmodified composition, on shapes other than the export's.

The reference is transformers' own forward pass and `generate`; no code of the exported graphs computes it. At fp32, a
tensor's distance from float64 may be a factor above that of transformers' own float32 (`tolerances.py`). Greedy token
ids must be equal, except where rounding of that size decides between two tokens. At a reduced precision, tensors have
an error limit, and teacher-forced next tokens may differ in a small fraction. The gate measures that fraction on
held-out prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
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
from llm2slm_export.authoring.parity.gate import Gate
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

# Maximum error of a tensor at a reduced precision, as root mean square error over root mean square: robust to single
# outliers. At fp32 the limits are those of `tolerances.Measurements`.
_TENSORS: dict[Precision | EnginePrecision, float] = {
    "fp16": 0.02, "bf16": 0.05, "int8": 0.10, "int4": 0.50, "w8a8": 0.15,
}  # fmt: skip
_NOISY_SEARCHES = 8  # reference searches with noise, which show whether rounding decides the result
# Maximum fraction of teacher-forced next tokens that differ. `_TOKENS`: on the few dozen prompts that every pair is
# checked with, for the pair. `_GATE`: on the prompts of a gate, summed over the three graphs.
_TOKENS: dict[Precision | EnginePrecision, float] = {
    "fp32": 0.0, "fp16": 0.05, "bf16": 0.05, "int8": 0.05, "int4": 0.25, "w8a8": 0.05,
}  # fmt: skip
_GATE: dict[Precision | EnginePrecision, float] = {
    "fp32": 0.0, "fp16": 0.005, "bf16": 0.005, "int8": 0.005, "int4": 0.02, "w8a8": 0.005,
}  # fmt: skip


def verify(
    directory: Path,
    composition: Path | None,
    head: str | None = None,
    *,
    gate: Gate | None = None,
    runtime: str = "onnxruntime",
) -> ParityReport | None:
    """Check a bundle's hashes and, if a composition is given, one head's outputs against it.

    Args:
        directory: the bundle.
        composition: the composition of the head; None: check the hashes only.
        head: the head to compare; None: the bundle's first.
        gate: additional prompts to compare on.
        runtime: the graphs' runtime (`inference.runtime.selection.parse_runtime`).

    Returns:
        the comparison; None if only the hashes were checked.

    Raises:
        BundleError: files are missing or altered.
        UsageError: no head has that name, or the runtime is unknown.
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
    """Refuse a composition whose shapes, layer or tokenizer differ from the head's, before tensors are compared."""
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
            f"The head {manifest.head!r} of {bundle.directory} was not built from {composition}.",
            *differing,
            remedy="give the head's own composition, or select another head with --head",
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
    """Compare every graph alone, on the reference's tensors, and the three graphs chained.

    The reference's LLM is not used, because `cases` holds its outputs: a caller may release it first.

    Args:
        bundle: the graphs.
        reference: the unmodified models.
        cases: batches with reference outputs; with `exact` if the encoder is at fp32.
        gate: held-out prompts and their limit.
        held_out: batches of the gate's prompts.
        runtime: the graphs' runtime (`inference.runtime.selection.parse_runtime`).
    """
    check = ParityCheck(bundle, reference, runtime)
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
    """Compare the ONNX graphs of engines, with the engines' roundings: every graph alone, and next tokens of the chain.

    Args:
        bundle: the graphs' directory, with a manifest whose entries are those graphs.
        reference, cases, gate, held_out: as in `compare`.
    """
    check = ParityCheck(bundle, reference, "onnxruntime", engines=True)
    rows = [*check.encoder(cases), *check.projector_and_decoder(cases), *check.next_tokens(cases)]
    if gate:
        rows += check.gate_tokens(gate, held_out)
    return ParityReport(rows=tuple(rows))


class ParityCheck:
    """The comparison of one bundle's graphs with a reference.

    Args:
        bundle, reference, runtime: as in `compare`.
        engines: the graphs are those of engines, which multiply in float16 at every precision but fp32.
    """

    def __init__(self, bundle: Bundle, reference: Reference, runtime: str, *, engines: bool = False) -> None:
        self.engines = engines
        self.bundle, self.reference, self.runtime = bundle, reference, runtime
        self.runtimes = chosen_runtimes(bundle, runtime)
        self.manifest = bundle.manifest
        self.shape: PairShape = bundle.manifest.shape
        self.precision = {name: graph.precision for name, graph in self.manifest.graphs.items()}
        self.float32 = all(precision == "fp32" for precision in self.precision.values())
        self.chained_tolerance = 0.0  # of the chained graphs' logits at fp32; `next_tokens` sets it
        # By case, [batch, response, vocabulary]: tokens that float32 rounding may select instead of the reference's.
        self.ties: dict[str, Array] = {}

    def encoder(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare hidden_states of every case, without padding."""
        encoder, measured = self._graph("encoder"), Measurements()
        for case in cases:
            real = case.attention_mask.bool()
            got = encoder(_prompt_feed(case))[contract.HIDDEN_STATES][real.numpy()]
            expected, exact = case.hidden_states[real], None if case.exact is None else case.exact[real]
            yield from self._rows(measured, "encoder", case.name, contract.HIDDEN_STATES, got, expected, exact)
        yield from measured.rows()

    def projector_and_decoder(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare the projector's outputs and the decoder's logits of every case."""
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
                out = self._teacher_forced_logits(decoder, case, given, calls)
                yield from self._rows(
                    measured, "decoder", f"{case.name}, {name}", contract.LOGITS, out, logits, exact_logits
                )
        yield from measured.rows()

    def _exact(self, case: ReferenceBatch, context: Tensor) -> tuple[Feed | None, Tensor | None]:
        """The decoder's conditioning and logits in float64; None if neither projector nor decoder is at fp32."""
        if "fp32" not in (self.precision["projector"], self.precision["decoder"]):
            return None, None
        with Double():
            given, _ = conditioning(self.reference, self.manifest.special_ids, case)
            return given, self._reference_logits(case, context)

    def gate(self, gate: Gate, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare the chained graphs on the gate's prompts: teacher-forced next tokens and their distribution, and the
        responses of `run`."""
        yield from self.gate_tokens(gate, cases)
        prompts = sum(len(case.prompts) for case in cases)
        which = f"gate, {prompts} of {len(gate.prompts)} prompts"
        plain, differing = GenerationDefaults(max_new_tokens=GATE_TOKENS), 0
        with Orchestrator(self._generating(plain), open_backend(self.bundle, runtime=self.runtime)) as pair:
            for case in cases:
                written = [row[real] for row, real in zip(case.generated.numpy(), case.written.numpy(), strict=True)]
                differing += _differing(pair.generate(case.prompts), written)
        # Reported but not gated: how far responses diverge after the first differing token.
        yield _parity_row("pair", which, "responses", "share that differs", differing / prompts, 1.0)

    def gate_tokens(self, gate: Gate, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare teacher-forced next tokens and their distribution on the gate's prompts."""
        allowed = sum(_GATE[p] for p in self.precision.values()) if gate.differing is None else gate.differing
        prompts = sum(len(case.prompts) for case in cases)
        yield from self._gate_rows(cases, f"gate, {prompts} of {len(gate.prompts)} prompts", allowed)

    def _gate_rows(self, cases: Sequence[ReferenceBatch], which: str, allowed: float) -> Iterator[ParityRow]:
        # A separate function, for the reason given in `tokens`.
        differing = compared = 0
        divergence = 0.0
        for case, logits in self._chained(cases, lambda length: (length,)):
            got = torch.from_numpy(logits[case.written.numpy()])
            _, context = conditioning(self.reference, self.manifest.special_ids, case)
            expected = self._reference_logits(case, context)[case.written][:, : self.manifest.tokenizer.slm_size]
            differing += self._misses(got.argmax(dim=1), case.generated[case.written], expected)
            compared += len(got)
            theirs, ours = (torch.log_softmax(scores.double(), dim=1) for scores in (expected, got))
            divergence += float((theirs.exp() * (theirs - ours)).sum())
        which = f"{which}, {compared} tokens"
        yield _parity_row("pair", which, "next tokens", "share that differs", differing / compared, allowed)
        # The fraction above is the gate. One nat per token rejects only an unrelated distribution.
        yield _parity_row("pair", which, "next tokens", "KL divergence, nats", divergence / compared, 1.0)

    def _chained(
        self, cases: Sequence[ReferenceBatch], calls: Callable[[int], tuple[int, ...]]
    ) -> Iterator[tuple[ReferenceBatch, Array]]:
        """Each case with the teacher-forced logits [batch, response, vocabulary] of the three chained graphs.

        Args:
            calls: splits a response length into the lengths of decoder calls.
        """
        encoder, projector, decoder = (self._graph(name) for name in contract.GRAPHS)
        for case in cases:
            hidden = encoder(_prompt_feed(case))
            given = projector(_prompt_feed(case) | hidden) | {CONTEXT_MASK: self._context_mask(case)}
            logits = self._teacher_forced_logits(decoder, case, given, calls(case.generated.shape[1]))
            yield case, logits[:, :, : self.manifest.tokenizer.slm_size]

    def _reference_logits(self, case: ReferenceBatch, context: Tensor) -> Tensor:
        """Logits [batch, response, vocab_size] of the unmodified SLM for `context` [batch, context, hidden_size]."""
        mask = self._context_mask(case)
        with torch.no_grad():
            return response_logits(self.reference.slm, context, mask, case.generated, self.reference.fusion)

    def tokens(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare the chained graphs: teacher-forced next tokens and, at fp32, the responses of `run`."""
        # A separate function: its sessions are closed before those of `run` open, so that one encoder is loaded at a
        # time.
        yield from self.next_tokens(cases)
        if self.float32:
            yield from self._generated_rows(cases)

    def next_tokens(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare teacher-forced next tokens of the chained graphs and, at fp32, their logits."""
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
            # An untrained SLM repeats a few tokens: one near-tie then decides all occurrences of a token.
            limit = max(limit, 1 / len(tokens))
        # Over all prompts: one batch has too few tokens for a fraction.
        share = differing / compared
        which = f"{compared} tokens" + (f", {tied} tied within float32's rounding" if tied else "")
        yield _parity_row("pair", which, "next tokens", "share that differs", share, limit)

    def _whole_logits(self, case: ReferenceBatch) -> tuple[Array, Array]:
        """Logits [batch, response, vocabulary] of the whole unmodified composition, in float32 and in float64."""
        assert case.exact is not None  # the encoder is at fp32
        both = []
        for states, mode in ((case.hidden_states, nullcontext()), (case.exact, Double())):
            with torch.no_grad(), mode:
                context, _ = self.reference.fuse(states, case.input_ids, case.attention_mask)
                logits = self._reference_logits(case, context)
            both.append(logits[:, :, : self.manifest.tokenizer.slm_size].numpy())
        return both[0], both[1]

    def _find_ties(self, cases: Sequence[ReferenceBatch], measured: Measurements, exact: dict[str, Array]) -> None:
        """Find tokens whose float64 logits differ from the reference token's by less than the tolerance can decide."""
        ((self.chained_tolerance, _),) = measured.tolerances().values()
        for case in cases:
            logits = exact.pop(case.name)
            # Each of the two logits may be off by the tolerance.
            within = 2 * self.chained_tolerance * size(logits[case.written.numpy()])
            reference = np.take_along_axis(logits, case.generated.numpy()[:, :, None], axis=2)
            self.ties[case.name] = np.abs(logits - reference) <= within

    def _misses(self, chosen: Tensor, written: Tensor, expected: Tensor) -> int:
        """Count predicted tokens that differ from the reference's and, at fp32, are not tied with them.

        Args:
            chosen: the bundle's next tokens, [tokens].
            written: the reference's, [tokens].
            expected: the reference's logits [tokens, vocabulary], in float32.
        """
        unlike = chosen != written
        if self.float32:
            # The reference's float32 logits have an error too.
            within = 2 * (1 + 1 / MARGIN) * self.chained_tolerance * float(expected.abs().max())
            theirs, ours = (expected.gather(1, ids[:, None])[:, 0] for ids in (written, chosen))
            unlike &= (theirs - ours).abs() > within
        return int(unlike.sum())

    def _generated_rows(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare the responses of `run`: greedy, and with the SLM's own generation_config if it sets other options."""
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
                # One prompt at a time: in padded batches of decoder-only SLMs, transformers exempts as many tokens of a
                # row from the repetition penalty as the row has padding positions.
                if len(case.prompts) == 1:
                    yield self._default_row(case, gate, searching.generate(case.prompts))

    def _greedy_row(self, case: ReferenceBatch, got: Sequence[Generation], expected: Sequence[Array]) -> ParityRow:
        """Compare responses up to the first tie: the tokens after it depend on rounding."""
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
        """Compare a response with the SLM's own generation_config, unless rounding can change the search."""
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
        """The unmodified SLM's ids for a case of one prompt, with its own generation_config.

        Args:
            noise_seed: seed of logit noise as large as the logits' tolerance; None: no noise.
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
        """The mask [batch, context], padded on the decoder's side."""
        count = self.shape.context_per_token
        mask = case.attention_mask.repeat_interleave(count, dim=1)
        return mask if self.shape.slm_kind == "encoder-decoder" else mask.flip(1)

    def _teacher_forced_logits(
        self, decoder: _Graph, case: ReferenceBatch, given: Feed, calls: tuple[int, ...]
    ) -> Array:
        """Logits [batch, response, vocab_size] given the reference's tokens, in calls of the given lengths."""
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
            # Without prepacking, weights stay in the mapped file: slower, at half the memory. At a reduced precision,
            # prepacking stays on, because the kernels of `run` need it.
            options.add_session_config_entry("session.disable_prepacking", "1")
        # For engines' graphs: ONNX Runtime would quantize activations to int8 before products with dequantized weights.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        path = self.bundle.path(self.manifest.graphs[name].file)
        graph: Path | bytes = path
        if self.precision[name] == "fp16" or (self.engines and self.precision[name] != "fp32"):
            graph = _with_emulated_half(path)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        return partial(_run, onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]))

    def _outputs_half(self, graph: GraphName) -> bool:
        """Whether a graph has float16 outputs, which a float16 decoder requires at any precision of the graph."""
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
        """Compare a tensor at a reduced precision; at fp32, add it to `measured`, whose limits need all cases."""
        expected, precision = reference.numpy(), self.precision[graph]
        if precision == "fp32" and self._outputs_half(graph):
            precision = "fp16"
        if precision == "fp32":
            assert exact is not None  # required by `compare`
            measured.add(graph, case, tensor, got, expected, exact.numpy())
            return
        error, whole = (float(np.sqrt(np.square(values).mean())) for values in (got - expected, expected))
        yield _parity_row(graph, case, tensor, "rms error / rms reference", relative(error, whole), _TENSORS[precision])


class _Noise(LogitsProcessor):
    """Uniform noise on logits, up to `share` of the largest logit."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.generator = share, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        largest = scores[scores.isfinite()].abs().max()
        return scores + (2 * torch.rand(scores.shape, generator=self.generator) - 1) * self.share * largest


def _ids_row(case: str, what: str, differing: int, tied: int) -> ParityRow:
    """A row of differing responses. `tied` responses differ first where rounding decides; they are only reported."""
    which = case + (f", {tied} decided by float32's rounding" if tied else "")
    return _parity_row("pair", which, what, "prompts that differ", float(differing), 0.0)


def _differing(got: Sequence[Generation], expected: Sequence[Array]) -> int:
    """The number of responses whose ids differ from the reference's."""
    return sum(row.token_ids != tuple(ids.tolist()) for row, ids in zip(got, expected, strict=True))


def _parity_row(
    graph: GraphName | Literal["pair"], case: str, tensor: str, measure: str, value: float, tolerance: float
) -> ParityRow:
    # NaN fails: it is not within any tolerance.
    return ParityRow(
        graph=graph, case=case, tensor=tensor, measure=measure, value=value, tolerance=tolerance,
        passed=value <= tolerance,
    )  # fmt: skip


def _real(mask: Tensor, tensor: Tensor) -> Tensor:
    """The real positions of a conditioning tensor: [batch, heads, context], or [batch, context] for embeddings."""
    return mask.bool()[:, None, :].expand(tensor.shape[:3]) if tensor.ndim == 4 else mask.bool()


def _calls(length: int) -> dict[str, tuple[int, ...]]:
    """Ways to split a response into decoder calls: token by token (past 0, 1, 2, …), and several tokens per call."""
    ways = {"token by token": (1,) * length}
    if length > 4:
        ways[f"calls of 3, 1, {length - 4} tokens"] = (3, 1, length - 4)
    return ways


def _prompt_feed(case: ReferenceBatch) -> Feed:
    return {contract.INPUT_IDS: case.input_ids, contract.ATTENTION_MASK: case.attention_mask}


def _with_emulated_half(path: Path) -> bytes:
    """A float16 graph with its roundings emulated, because the CPU would skip them: see `emulate_half`."""
    model = ir.load(path)
    emulate_half(model)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _run(session: Any, feed: Feed) -> dict[str, Array]:
    """Outputs by name, in float32; inputs that the graph does not have are dropped from the feed."""
    wanted = {i.name for i in session.get_inputs()}
    arrays = {name: np.ascontiguousarray(value) for name, value in feed.items() if name in wanted}
    outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, arrays), strict=True))
    return {name: value.astype(np.float32, copy=False) for name, value in outputs.items()}
