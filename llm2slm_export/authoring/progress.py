"""Progress of long work: training, evaluation."""

from typing import Protocol


class Progress(Protocol):
    """Receives tasks and their steps. The command line's is `console.WorkLog`."""

    def start(self, what: str, total: int | None = None) -> None:
        """A task starts, with `total` steps if known."""
        ...

    def advance(self, count: int) -> None:
        """`count` more steps are done."""
        ...


class _Silent:
    """Ignores all progress."""

    def start(self, what: str, total: int | None = None) -> None:
        """See `Progress`."""

    def advance(self, count: int) -> None:
        """See `Progress`."""


SILENT: Progress = _Silent()
