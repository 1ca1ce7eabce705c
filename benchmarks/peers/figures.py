"""What was measured, as data: JSON and Markdown."""

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from spec import OURS, REFERENCE
from worker import Written


@dataclass
class Figure:
    """One peer at one precision, writing with one model.

    Args:
        versions: of the packages that decode.
        ms: per token, one for each round: tokens 2 to the last.
        growth_ms: the same of the tokens after those; empty where not asked for.
        ids: what it wrote in the last round.
    """

    peer: str
    precision: str
    versions: dict[str, str]
    ms: list[float] = field(default_factory=list)
    growth_ms: list[float] = field(default_factory=list)
    ids: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.peer} {self.precision}"

    def add(self, written: Written) -> None:
        """A round's response."""
        self.ms.append(written.per_token(1, len(written.ids)))
        self.ids = written.ids

    def add_growth(self, written: Written, first: int) -> None:
        """A round's long response: what its tokens after the first `first` took."""
        self.growth_ms.append(written.per_token(first, len(written.ids)))


@dataclass
class Results:
    """What all peers did with one model. `refused`: peer, precision and the reason of each that gave no figure."""

    model: str
    bandwidth: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)

    def same_tokens(self, figure: Figure) -> int | None:
        """How many tokens are transformers' at fp32, up to the first that is not."""
        theirs = next((f.ids for f in self.figures if (f.peer, f.precision) == REFERENCE), None)
        if theirs is None:
            return None
        pairs = enumerate(zip(figure.ids, theirs, strict=True))
        return next((place for place, (own, other) in pairs if own != other), len(theirs))

    def as_json(self) -> dict[str, Any]:
        """Times in ms, one for each round and their medians; bandwidths in bytes/s."""
        figures = [
            {
                **{name: value for name, value in asdict(figure).items() if name != "ids"},
                "median_ms": median(figure.ms),
                "median_growth_ms": median(figure.growth_ms) if figure.growth_ms else None,
                "same_tokens": self.same_tokens(figure),
            }
            for figure in self.figures
        ]
        refused = [dict(zip(("peer", "precision", "reason"), one, strict=True)) for one in self.refused]
        return {
            "model": self.model, "bandwidth": self.bandwidth, "busy": self.busy, "figures": figures, "refused": refused,
        }  # fmt: skip

    def markdown(self, new: int, long: int | None) -> str:
        """A table, fastest first, and who is not in it."""
        lines = [f"### {self.model}"]
        if self.bandwidth:
            rates = [rate / 1e9 for rate in self.bandwidth]
            lines += ["", f"Memory {median(rates):.0f} GB/s ({min(rates):.0f}-{max(rates):.0f} over the rounds)."]
        if self.busy and max(self.busy) > 0.1:
            lines += ["", f"**Something else ran: up to {max(self.busy):.0%} of the processors before a round.**"]
        heads = ["peer", "precision", f"ms per token, 2-{new}", "rounds"]
        heads += [f"{new + 1}-{long}"] if long else []
        heads += ["versions"]
        if self.figures:
            lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for figure in sorted(self.figures, key=lambda figure: median(figure.ms)):
            name = f"**{figure.peer}**" if figure.peer == OURS else figure.peer
            cells = [name, figure.precision, f"{median(figure.ms):.2f}", f"{min(figure.ms):.2f}-{max(figure.ms):.2f}"]
            cells += [f"{median(figure.growth_ms):.2f}" if figure.growth_ms else ""] if long else []
            cells += [", ".join(f"{package} {version}" for package, version in figure.versions.items())]
            lines.append("| " + " | ".join(cells) + " |")
        same = {figure.label: self.same_tokens(figure) for figure in self.figures}
        if others := [f"{label} after {count}" for label, count in same.items() if count is not None and count < new]:
            lines += ["", f"Tokens other than transformers' at fp32: {', '.join(others)}."]
        if self.refused:
            lines += ["", "Not measured:", ""]
            lines += [f"- {peer} {precision}: {reason}" for peer, precision, reason in self.refused]
        return "\n".join(lines)
