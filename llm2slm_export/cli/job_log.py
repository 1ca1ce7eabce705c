"""Progress of a job on stderr: a bar with the time that is left on a terminal, else a line every half minute."""

from time import monotonic
from typing import TYPE_CHECKING

from llm2slm_export.cli.console import WorkLog

if TYPE_CHECKING:
    from rich.console import Console

_EVERY = 30.0  # seconds


class JobLog(WorkLog):
    """Progress of a job whose rows are counted.

    Args:
        rows: number of all rows.
        done: number of those that an earlier run has answered.
    """

    def __init__(self, to: "Console", *, rows: int, done: int) -> None:
        super().__init__(to)
        self._rows, self._before, self._done = rows, done, done
        self._started = self._told = monotonic()

    def advance(self, count: int) -> None:
        """Count further rows as answered."""
        super().advance(count)
        self._done += count
        now = monotonic()
        if self._console.is_terminal or now - self._told < _EVERY:
            return
        self._told = now
        speed = (self._done - self._before) / (now - self._started)
        left = "" if not speed else f", {_span((self._rows - self._done) / speed)} left"
        self._console.print(
            f"{self._done:,} of {self._rows:,} rows ({100 * self._done / self._rows:.0f} %), {speed:.1f} rows/s{left}"
        )


def _span(seconds: float) -> str:
    """A time span as h:mm:ss."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}"
