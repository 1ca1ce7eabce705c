"""The figures as bars: one SVG, by itself."""

from collections.abc import Sequence
from html import escape
from statistics import median

from figures import Results
from spec import OURS

LABEL, BAR, ROW, NUMBER = 190, 420, 20, 110  # pixels
OWN, OTHER, INK = "#1668b8", "#b8bec6", "#1f2328"


def svg(results: Sequence[Results], caption: str) -> str:
    """Bars of ms per token, fastest first, a panel for each model; ours in blue."""
    parts, y = [], 24
    parts.append(_text(8, y, "Time per token, ms: shorter is better", weight="bold"))
    y += 18
    parts.append(_text(8, y, caption, size=11))
    for result in results:
        y += 34
        parts.append(_text(8, y, result.model, weight="bold"))
        longest = max((median(figure.ms) for figure in result.figures), default=1.0)
        for figure in sorted(result.figures, key=lambda figure: median(figure.ms)):
            y += ROW
            ms = median(figure.ms)
            width = max(1.0, BAR * ms / longest)
            colour = OWN if figure.peer == OURS else OTHER
            parts.append(_text(LABEL, y, figure.label, anchor="end"))
            parts.append(f'<rect x="{LABEL + 8}" y="{y - 12}" width="{width:.1f}" height="{ROW - 5}" fill="{colour}"/>')
            parts.append(_text(LABEL + width + 14, y, f"{ms:.2f}"))
    total = LABEL + BAR + NUMBER
    size = f'width="{total}" height="{y + 16}" viewBox="0 0 {total} {y + 16}"'
    style = f'font-family="sans-serif" fill="{INK}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'


def _text(x: float, y: float, text: str, *, size: int = 13, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
