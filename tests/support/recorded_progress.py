"""Progress that tests compare: each task with its steps."""


class RecordedProgress:
    """Tasks in order: name, total, and steps done."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int | None, int]] = []

    def start(self, what: str, total: int | None = None) -> None:
        """See `Progress`."""
        self.tasks.append((what, total, 0))

    def advance(self, count: int) -> None:
        """See `Progress`."""
        what, total, done = self.tasks[-1]
        self.tasks[-1] = what, total, done + count
