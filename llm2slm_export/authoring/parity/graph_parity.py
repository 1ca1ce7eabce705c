"""Parity of each graph alone, on the reference's tensors."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from llm2slm_export import contract
from llm2slm_export.arrays import Array
from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.authoring.parity.bundle_graphs import BundleGraphs
from llm2slm_export.authoring.parity.float64 import Double
from llm2slm_export.authoring.parity.measurements import Measurements, relative
from llm2slm_export.authoring.parity.reference_outputs import ReferenceBatch
from llm2slm_export.authoring.parity.teacher_forcing import (
    CONTEXT_MASK,
    Feed,
    ResponseCall,
    apart,
    conditioning,
    forced_logits,
    in_turn,
    prompt_feed,
    reference_logits,
)
from llm2slm_export.authoring.parity.tolerances import TOLERANCES
from llm2slm_export.bundle.parity_report import ParityRow
from llm2slm_export.contract import GraphName


class GraphParity:
    """The comparison of each of a bundle's graphs with the reference.

    Args:
        graphs: the bundle's.
        reference: the unmodified models; its LLM is not used.
    """

    def __init__(self, graphs: BundleGraphs, reference: Reference) -> None:
        self.graphs, self.reference, self.ids = graphs, reference, graphs.manifest.special_ids

    def encoder(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare hidden_states of every case, without padding."""
        encoder, measured = self.graphs.open("encoder"), Measurements()
        for case in cases:
            real = case.attention_mask.bool()
            got = encoder(prompt_feed(case))[contract.HIDDEN_STATES][real.numpy()]
            expected, exact = case.hidden_states[real], None if case.exact is None else case.exact[real]
            yield from self._rows(measured, "encoder", case.name, contract.HIDDEN_STATES, got, expected, exact)
        yield from measured.rows()

    def projector_and_decoder(self, cases: Sequence[ReferenceBatch]) -> Iterator[ParityRow]:
        """Compare the projector's outputs and the decoder's logits of every case."""
        projector, decoder, measured = self.graphs.open("projector"), self.graphs.open("decoder"), Measurements()
        for case in cases:
            given, context = conditioning(self.reference, self.ids, case)
            logits, mask = reference_logits(self.reference, case, context), given[CONTEXT_MASK]
            exact, exact_logits = self._exact(case, context)
            got = projector(prompt_feed(case) | {contract.HIDDEN_STATES: case.hidden_states})
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
            for name, calls in _calls(*case.generated.shape).items():
                out = forced_logits(decoder, self.graphs.shape, self.ids, case, given, calls)
                yield from self._rows(
                    measured, "decoder", f"{case.name}, {name}", contract.LOGITS, out, logits, exact_logits
                )
        yield from measured.rows()

    def _exact(self, case: ReferenceBatch, context: Tensor) -> tuple[Feed | None, Tensor | None]:
        """The decoder's conditioning and logits in float64; None if neither projector nor decoder is at fp32."""
        if "fp32" not in (self.graphs.precision["projector"], self.graphs.precision["decoder"]):
            return None, None
        with Double():
            given, _ = conditioning(self.reference, self.ids, case)
            return given, reference_logits(self.reference, case, context)

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
        expected, limit = reference.numpy(), TOLERANCES[self.graphs.compared_at(graph)].tensor
        if limit is None:
            assert exact is not None  # required by `compare`
            measured.add(graph, case, tensor, got, expected, exact.numpy())
            return
        error, whole = (float(np.sqrt(np.square(values).mean())) for values in (got - expected, expected))
        yield ParityRow.judged(graph, case, tensor, "rms error / rms reference", relative(error, whole), limit)


def _real(mask: Tensor, tensor: Tensor) -> Tensor:
    """The real positions of a conditioning tensor: [batch, heads, context], or [batch, context] for embeddings."""
    return mask.bool()[:, None, :].expand(tensor.shape[:3]) if tensor.ndim == 4 else mask.bool()


def _calls(batch: int, length: int) -> dict[str, tuple[ResponseCall, ...]]:
    """Ways to split a response into decoder calls: token by token (past 0, 1, 2, …), and several tokens per call with the
    rows apart."""
    ways = {"token by token": in_turn(batch, (1,) * length)}
    if length > 4:
        ways[f"calls of 3, 1, {length - 4}, 2 tokens, rows apart"] = apart(batch, length)
    return ways
