"""What an evaluation tells while it runs."""

from typing import Protocol


class Progress(Protocol):
    """Is told of everything that begins, and of its steps. The command line's is `render.WorkLog`."""

    def start(self, what: str, total: int | None = None) -> None:
        """Something begins, of so many steps where that is known."""
        ...

    def advance(self, count: int) -> None:
        """So many more of them are done."""
        ...


class Silent:
    """Tells nobody."""

    def start(self, what: str, total: int | None = None) -> None:
        """See `Progress`."""

    def advance(self, count: int) -> None:
        """See `Progress`."""
