"""Incremental detokenization of a response."""

from collections.abc import Callable, Sequence

_UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Decodes a response token by token. Incomplete characters and beginnings of stop strings are held back.

    Args:
        decode: ids → text, without special tokens.
        stop: stop strings. The text ends before the first of them.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        # Only a window of ids is decoded. `_shown` is the window's text that has been released.
        self._start = self._read = 0
        self._shown = self._text = self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Append a token. Returns the text released by it, possibly empty."""
        self._ids.append(token_id)
        piece = self._piece()
        if not piece or piece.endswith(_UNFINISHED_CHARACTER):
            return ""
        self._start, self._read = self._read, len(self._ids)
        self._shown = self._decode(self._ids[self._start :])
        return self._release(piece, last=False)

    def finish(self) -> str:
        """Release the held text at the end of a response."""
        whole = self._decode(self._ids)
        piece = whole[len(self._text) :] if whole.startswith(self._text) else self._piece()
        return self._release(piece, last=True)

    def _piece(self) -> str:
        window = self._decode(self._ids[self._start :])
        if window.startswith(self._shown):
            return window[len(self._shown) :]
        # An invalid byte changed the previous character. Released text cannot be taken back.
        return self._decode(self._ids[self._read :])

    def _release(self, piece: str, *, last: bool) -> str:
        self._text += piece
        self._held += piece
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        self.stopped = bool(found)
        held_back = 0 if last else self._stop_prefix()
        end = min(found) if found else len(self._held) - held_back
        out, self._held = self._held[:end], self._held[end:]
        return out

    def _stop_prefix(self) -> int:
        """The length of the longest suffix of the held text that is a prefix of a stop string."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)
