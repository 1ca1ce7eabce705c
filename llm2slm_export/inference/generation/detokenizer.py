"""The text of a growing response."""

from collections.abc import Callable, Sequence

_UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of a growing response: never half a character, never a part of a stop string.

    Args:
        decode: ids → text, special tokens left out.
        stop: strings that end the text, which is cut before the first of them.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        # A window of ids is decoded, not all of them; `_shown` is the part of it whose text is out.
        self._start = self._read = 0
        self._shown = self._text = self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; "" where none did."""
        self._ids.append(token_id)
        piece = self._piece()
        if not piece or piece.endswith(_UNFINISHED_CHARACTER):
            return ""
        self._start, self._read = self._read, len(self._ids)
        self._shown = self._decode(self._ids[self._start :])
        return self._release(piece, last=False)

    def finish(self) -> str:
        """What was held back, at the end of a response."""
        whole = self._decode(self._ids)
        piece = whole[len(self._text) :] if whole.startswith(self._text) else self._piece()
        return self._release(piece, last=True)

    def _piece(self) -> str:
        window = self._decode(self._ids[self._start :])
        if window.startswith(self._shown):
            return window[len(self._shown) :]
        # A byte that spoils the character before it: what is out stays out.
        return self._decode(self._ids[self._read :])

    def _release(self, piece: str, *, last: bool) -> str:
        self._text += piece
        self._held += piece
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        self.stopped = bool(found)
        kept = 0 if last else self._stop_prefix()
        end = min(found) if found else len(self._held) - kept
        out, self._held = self._held[:end], self._held[end:]
        return out

    def _stop_prefix(self) -> int:
        """The length of the longest end of the held text that a stop string begins with."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)
