"""Log-probabilities of given responses. All positions of a response are computed in one decoder call, or in few."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.manifest import EngineLimits, Manifest
from llm2slm_export.errors import Llm2SlmError, ResponseError, UsageError
from llm2slm_export.inference.outputs import Score
from llm2slm_export.inference.request import Request
from llm2slm_export.inference.runtime.backend import DecoderState, Ids, Logits
from llm2slm_export.inference.tokenization import lone_surrogate

MOST_ROWS = 32  # responses that are computed together
MOST_LOGITS_BYTES = 256 * 2**20  # logits of one decoder call


@dataclass(frozen=True)
class Response:
    """A response to be scored, and its ids."""

    text: str
    token_ids: tuple[int, ...]


class ResponseReader:
    """Tokenizes responses with the SLM's tokenizer.

    Args:
        manifest: the manifest of the head.
        tokenizer: the SLM's tokenizer.
        limits: of the engines; None: unlimited.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, limits: EngineLimits | None) -> None:
        self._manifest, self._tokenizer, self._limits = manifest, tokenizer, limits

    def read(self, responses: Any, prompt_tokens: Sequence[int], *, add_eos: bool) -> list[list[Response]]:
        """The responses to each prompt. All that cannot be scored are refused in one error.

        Args:
            responses: a list of texts per prompt; for one prompt, a list of texts.
            prompt_tokens: number of tokens of each prompt.
            add_eos: append the end-of-sequence token.

        Raises:
            UsageError: the lists are not one per prompt, there is no response, or the SLM has no end-of-sequence token.
            ResponseError: responses are not texts, hold lone surrogates, have no tokens, tokens without an embedding, or more
                tokens than fit behind the prompt.
        """
        nested = _nested(responses, len(prompt_tokens))
        eos = self._manifest.special_ids.eos[:1]
        if add_eos and not eos:
            raise UsageError(
                f"The SLM of {self._manifest.name!r} has no end-of-sequence token.", remedy="give add_eos=False"
            )
        known: dict[str, Response] = {}  # the same responses are often given for every prompt
        found: list[list[Response]] = []
        problems: dict[tuple[int, int], str] = {}
        for prompt, (texts, tokens) in enumerate(zip(nested, prompt_tokens, strict=True)):
            most = self._most_tokens(tokens)
            found.append([])
            for index, text in enumerate(texts):
                problem = _text_problem(text)
                if problem is None:
                    if text not in known:
                        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
                        known[text] = Response(text, (*ids, *(eos if add_eos else ())))
                    found[-1].append(known[text])
                    problem = self._ids_problem(known[text].token_ids, most)
                if problem is not None:
                    problems[prompt, index] = problem
        if problems:
            raise ResponseError(
                f"{len(problems)} of {sum(map(len, nested))} responses cannot be scored by {self._manifest.name!r}.",
                remedy="give texts, and shorten or remove these responses, or their prompts",
                responses=problems,
                prompts=len(nested),
            )
        return found

    def _most_tokens(self, prompt_tokens: int) -> int | None:
        """The maximum number of a response's tokens. The last one is never fed to the decoder."""
        shape, most = self._manifest.shape, self._manifest.max_total_tokens
        rooms = [] if self._limits is None else [self._limits.new]
        if most is not None:
            # In an encoder-decoder SLM the start token takes the position of the last one.
            taken = prompt_tokens * shape.context_per_token - 1 if shape.slm_kind == "decoder-only" else 0
            rooms.append(max(0, most - taken))
        return min(rooms, default=None)

    def _ids_problem(self, ids: Sequence[int], most: int | None) -> str | None:
        if not ids:
            return "no tokens, and the end-of-sequence token is not scored"
        if most is not None and len(ids) > most:
            return f"{len(ids)} tokens, at most {most}"
        rows = self._manifest.shape.vocab_size
        beyond = [id for id in dict.fromkeys(ids) if id >= rows]
        if beyond:
            named = ", ".join(f"{self._tokenizer.id_to_token(id)!r} (id {id})" for id in beyond[:3])
            return f"{named}: the SLM's table has {rows} rows"
        return None


def _nested(responses: Any, prompts: int) -> list[Sequence[Any]]:
    """One list of responses per prompt.

    Raises:
        UsageError: there are other lists, or no responses.
    """
    kinds = {isinstance(item, list | tuple) for item in responses} if isinstance(responses, list | tuple) else set()
    nested = [responses] if prompts == 1 and kinds == {False} else responses
    if not kinds:
        what = f"got: {responses!r}" if isinstance(responses, list | tuple) else f"got: {type(responses).__name__}"
    elif kinds == {False, True}:
        what = "got: texts and lists of texts"
    elif kinds == {False} and prompts > 1:
        what = f"prompts: {prompts}; got: a list of texts"
    elif len(nested) != prompts:
        what = f"prompts: {prompts}; lists of responses: {len(nested)}"
    elif not any(nested):
        what = "got: no responses"
    else:
        return list(nested)
    raise UsageError(
        "The responses are not one list of texts per prompt.",
        what,
        remedy="give a list of texts for an encoding of one prompt, else a list of such lists, in the prompts' order",
    )


def _text_problem(text: Any) -> str | None:
    if not isinstance(text, str):
        return f"{type(text).__name__}, not a string"
    found = lone_surrogate(text)
    return None if found is None else f"not Unicode text: {found}"


@dataclass(eq=False)
class _Candidate:
    """A response to a prompt of the request, and what is known of its first tokens."""

    prompt: int
    response: Response
    logprobs: list[float] = field(default_factory=list)
    is_greedy: bool = True

    @property
    def num_tokens(self) -> int:
        return len(self.response.token_ids)

    def score(self) -> Score:
        logprobs, ids = tuple(self.logprobs), self.response.token_ids
        return Score(self.response.text, ids, logprobs, float(np.sum(logprobs)), self.is_greedy)


class Scorer:
    """Scores responses to the prompts of a request. Its generation options are not used.

    Args:
        request: the request.
        limits: of the engines; None: unlimited.
    """

    def __init__(self, request: Request, limits: EngineLimits | None) -> None:
        self._request, self._backend, self._manifest = request, request.backend, request.manifest
        self._rows = MOST_ROWS if limits is None else min(MOST_ROWS, limits.batch)

    def scores(self, responses: Sequence[Sequence[Response]]) -> list[list[Score]]:
        """The scores of the responses to each prompt.

        Raises:
            BundleError: the decoder's logits are not finite.
            Llm2SlmError: there is too little memory for the rows.
        """
        candidates = [[_Candidate(prompt, response) for response in row] for prompt, row in enumerate(responses)]
        # Responses of similar length share calls.
        pending = {
            prompt: waiting
            for prompt, row in enumerate(candidates)
            if (waiting := sorted((c for c in row if c.num_tokens > 1), key=lambda c: -c.num_tokens))
        }
        try:
            # The first tokens are scored by the prompt pass alone.
            for number, together in enumerate(self._groups(pending) or [{}]):
                state, logits = self._backend.prefill(self._request.encoding.conditioning)
                if number == 0:
                    everyone = [candidate for row in candidates for candidate in row]
                    self._read_first(logits, everyone)
                self._run(state, together)
        except MemoryError as error:
            raise Llm2SlmError(
                "There is too little memory for the responses.",
                f"prompts: {len(responses)}, vocabulary: {self._manifest.shape.vocab_size}",
                remedy="score fewer prompts at a time",
            ) from error
        return [[candidate.score() for candidate in row] for row in candidates]

    def _groups(self, pending: Mapping[int, list[_Candidate]]) -> list[dict[int, list[_Candidate]]]:
        """The prompts whose responses may share calls: padding behind a short response must fit into the decoder's positions.

        Almost always that is one group. Each has its own prompt pass.
        """
        shape, most = self._manifest.shape, self._manifest.max_total_tokens
        if most is None or shape.slm_kind == "encoder-decoder":
            return [dict(pending)] if pending else []
        tokens = self._request.encoding.prompt_tokens
        groups: list[dict[int, list[_Candidate]]] = []
        longest = 0
        for prompt in sorted(pending, key=lambda prompt: tokens[prompt]):
            room, fed = most - tokens[prompt] * shape.context_per_token, pending[prompt][0].num_tokens - 1
            longest = max(longest, fed)
            if not groups or longest > room:
                groups.append({})
                longest = fed
            groups[-1][prompt] = pending[prompt]
        return [dict(sorted(group.items())) for group in groups]

    def _run(self, state: DecoderState, pending: Mapping[int, list[_Candidate]]) -> None:
        """Score the later tokens of candidates, in rounds of rows. Between rounds the rows are set back to their prompts.

        Args:
            pending: the candidates of each prompt, by ascending prompt.
        """
        starts = self._backend.lengths(state)  # of each prompt
        held = np.arange(len(starts))  # the prompt of each row of the state
        while pending:
            share = max(1, self._rows // len(pending))
            batch = [candidate for waiting in pending.values() for candidate in waiting[:share]]
            pending = {prompt: waiting[share:] for prompt, waiting in pending.items() if len(waiting) > share}
            prompts = np.array([candidate.prompt for candidate in batch])
            if not np.array_equal(prompts, held):
                # The first row of each prompt, as `held` is sorted.
                self._backend.select(state, np.searchsorted(held, prompts))
                held = prompts
            self._round(state, batch)
            self._backend.rewind(state, starts[held])

    def _round(self, state: DecoderState, batch: Sequence[_Candidate]) -> None:
        """Score the later tokens of one candidate per row of the state."""
        fed = max(candidate.num_tokens for candidate in batch) - 1
        # The padding behind a row is not read.
        ids = np.zeros((len(batch), fed + 1), np.int64)
        for row, candidate in enumerate(batch):
            ids[row, : candidate.num_tokens] = candidate.response.token_ids
        at_once = max(1, MOST_LOGITS_BYTES // (len(batch) * self._manifest.shape.vocab_size * 4))
        for start in range(0, fed, at_once):
            logits = self._backend.step(state, ids[:, start : min(start + at_once, fed)])
            self._read(logits, ids, batch, start + 1)

    def _read_first(self, logits: Logits, candidates: Sequence[_Candidate]) -> None:
        """Score the first token of candidates, from the prompts' logits [prompts, vocab_size]."""
        rows = np.array([candidate.prompt for candidate in candidates])
        self._request.check_finite(logits[np.unique(rows)], np.unique(rows), new_token=1)
        highest = logits.max(axis=1)
        normalizers, best = _normalizers(logits, highest), self._best(logits)
        for candidate in candidates:
            row, token_id = candidate.prompt, candidate.response.token_ids[0]
            candidate.logprobs.append(float(logits[row, token_id]) - float(normalizers[row]))
            candidate.is_greedy = bool(best[row] == token_id)

    def _read(self, logits: Logits, ids: Ids, batch: Sequence[_Candidate], first: int) -> None:
        """Score tokens `first`, … of candidates, from their logits [rows, tokens, vocab_size]."""
        tokens = logits.shape[1]
        counts = np.array([min(tokens, max(0, candidate.num_tokens - first)) for candidate in batch])
        highest = logits.max(axis=2)
        self._check_finite(logits, highest, counts, batch, first)
        for row, (candidate, count) in enumerate(zip(batch, counts.tolist(), strict=True)):
            own, wanted = logits[row, :count], ids[row, first : first + count]
            chosen = own[np.arange(count), wanted].astype(np.float64)
            candidate.logprobs += (chosen - _normalizers(own, highest[row, :count])).tolist()
            candidate.is_greedy &= bool((self._best(own) == wanted).all())

    def _best(self, logits: Logits) -> Ids:
        """The ids that greedy search chooses from logits [positions, vocab_size]: none that the tokenizer does not have."""
        best: Ids = logits[:, : self._request.num_tokens].argmax(axis=1)
        return best

    def _check_finite(
        self, logits: Logits, highest: Logits, counts: Ids, batch: Sequence[_Candidate], first: int
    ) -> None:
        """Refuse logits without a finite maximum, in the first `counts` [rows] positions of each row."""
        real = np.arange(logits.shape[1]) < counts[:, None]
        bad = np.flatnonzero((real & ~np.isfinite(highest)).any(axis=0))
        if len(bad):
            position = int(bad[0])
            rows = np.flatnonzero(real[:, position])
            prompts = np.array([batch[row].prompt for row in rows.tolist()])
            self._request.check_finite(logits[rows, position], prompts, new_token=first + position + 1)


def _normalizers(logits: Logits, highest: Logits) -> Array:
    """The logarithm of the sum of exponentials of logits [positions, vocab_size], in float64.

    Args:
        highest: [positions] their maxima.
    """
    sums = np.exp(logits - highest[:, None]).sum(axis=1, dtype=np.float64)
    normalizers: Array = highest.astype(np.float64) + np.log(sums)
    return normalizers
