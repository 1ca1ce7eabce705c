"""What the row groups of a request have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from llm2slm_export.errors import Llm2SlmError
from llm2slm_export.inference.decode_core import Continuation, RowGroup
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.request import Request
from llm2slm_export.inference.runtime.backend import Ids, Logits


class RequestRows(RowGroup, ABC):
    """The rows of prompts of a request.

    Args:
        request: the request.
        num_prompts: the number of prompts.

    Attributes:
        error: the error that ended the group; None: none.
    """

    def __init__(self, request: Request, num_prompts: int) -> None:
        self._request, self._num_prompts = request, num_prompts
        self._new_tokens = 0  # of each row
        self.error: Llm2SlmError | None = None

    @property
    def num_prompts(self) -> int:
        """The number of prompts."""
        return self._num_prompts

    @property
    def room(self) -> int:
        """The number of tokens that each row may still be fed: the last new token never is."""
        return self._request.options.max_new_tokens - self._new_tokens

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the group only needs the highest logit of each row of the next call."""
        return False

    @abstractmethod
    def advance(self, logits: Logits) -> Continuation | None:
        """See `RowGroup`."""

    def advance_greedy(self, ids: Ids, logits: Logits) -> Continuation | None:
        """See `RowGroup`. It is not called unless `is_plain_greedy`."""
        raise NotImplementedError

    def add_call(self, ms: float) -> None:
        """See `RowGroup`."""

    def fail(self, error: Llm2SlmError) -> None:
        """End the group with an error."""
        self.error = error

    @abstractmethod
    def responses(self, timings_ms: Mapping[str, float]) -> list[list[Generation]]:
        """The responses so far, a list per prompt."""
