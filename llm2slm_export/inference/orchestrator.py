"""A loaded pair: it encodes prompts once and generates responses, on any backend."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from llm2slm_export.bundle.bundle import Bundle, open_bundle
from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.contract import GRAPHS, GraphName, Runtime
from llm2slm_export.errors import PromptError, UsageError
from llm2slm_export.inference.batching import batches
from llm2slm_export.inference.decode_loop import DecodeLoop
from llm2slm_export.inference.drafting import Drafting, EncodedOnce
from llm2slm_export.inference.encodings.cache import EncodingCache
from llm2slm_export.inference.encodings.encoding import Encoding, EncodingIdentity
from llm2slm_export.inference.encodings.host_encoding import HostEncoding
from llm2slm_export.inference.generation.drafting import DraftOptions, NgramDrafter
from llm2slm_export.inference.generation.draws import fresh_seed
from llm2slm_export.inference.generation.options import GenerationOptions, is_whole
from llm2slm_export.inference.head_drafter import HeadDrafter
from llm2slm_export.inference.outputs import Generation, PromptScores, Score, Step
from llm2slm_export.inference.prompt_encoder import PromptEncoder
from llm2slm_export.inference.request import Request
from llm2slm_export.inference.request_limits import check_new_tokens, check_prompts, check_rows, prompts_at_a_time
from llm2slm_export.inference.runtime.backend import Backend, Conditioning
from llm2slm_export.inference.runtime.forks import ForkSafeLock
from llm2slm_export.inference.runtime.stored_costs import StoredCosts
from llm2slm_export.inference.scoring import Response, ResponseReader, Scorer
from llm2slm_export.inference.tokenization import PromptIds, PromptTokenizer, open_tokenizer

if TYPE_CHECKING:
    from llm2slm_export.inference.runtime.onnxruntime.cuda_sessions import CudaOptions

_Result = TypeVar("_Result")
BundlePart = Literal["pair", "reader", "writer"]
_GRAPHS: dict[BundlePart, tuple[GraphName, ...]] = {
    "pair": GRAPHS,
    "reader": ("encoder", "projector"),
    "writer": ("decoder",),
}


def load(
    path: str | os.PathLike[str],
    *,
    head: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    runtime: str = "onnxruntime",
    part: BundlePart = "pair",
    cache: EncodingCache | None = None,
    cuda: "CudaOptions | None" = None,
) -> "Orchestrator":
    """Open a bundle, check its files, and load its graphs.

    Args:
        path: a directory written by `llm2slm-export build`.
        head: name of one of the bundle's heads; None: the first.
        device: `cpu`, `cuda`, `cuda:n`, or `tensorrt`, `tensorrt:n` for the bundle's engines.
        threads: CPU threads per operator, at most one per available core; None: the runtime's choice. If fewer are used,
            `warnings` and `Generation.warnings` have the reason. A pair with 1 thread can be used after a fork; any other
            only in the process that loaded it.
        runtime: the runtime of encoder and projector on the CPU: `onnxruntime`, `openvino`, `auto` (the faster one on this
            machine, measured once and cached), or one per graph, `encoder=openvino`. ONNX Runtime runs the decoder.
        part: `reader` loads the encoder and projector only, `writer` the decoder only, for encoding and generating on
            different machines.
        cache: a cache of prompts' encodings; None: every prompt is encoded.
        cuda: options of a CUDA device (`CudaOptions`); None: the defaults.

    Raises:
        BundleError: `path` is not a bundle, or its files are damaged.
        DeviceError: the device is not available.
        UsageError: an invalid part, head, device name, runtime or number of threads.
        MissingExtraError: a runtime is not installed.
    """
    from llm2slm_export.inference.runtime.selection import check_device, open_backend, parse_runtime

    if part not in tuple(_GRAPHS):  # a tuple also accepts an unhashable part
        raise UsageError(
            f"There is no part {part!r}.", f"parts: {', '.join(_GRAPHS)}", remedy="give one of them as part"
        )
    # Invalid names are refused before gigabytes are hashed.
    check_device(device)
    parse_runtime(runtime)
    bundle = open_bundle(Path(path))
    selected = bundle.select(head) if head is not None else bundle
    backend = open_backend(selected, device=device, threads=threads, graphs=_GRAPHS[part], runtime=runtime, cuda=cuda)
    return Orchestrator(bundle, backend, head=head, cache=cache)


class Orchestrator:
    """A loaded pair, or one of its heads. A context manager; `close` releases the graphs.

    Args:
        bundle: an opened bundle.
        backend: runs the graphs of the head.
        head: name of one of the bundle's heads; None: the first.
        cache: a cache of prompts' encodings; None: every prompt is encoded.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend, *, head: str | None = None, cache: EncodingCache | None = None
    ) -> None:
        selected = bundle.select(head) if head is not None else bundle
        self._bundle, self._manifest, self._cache = bundle, selected.manifest, cache
        self._backend: Backend | None = backend
        self._device, self._runtimes, self._limits = backend.device, dict(backend.runtimes), backend.limits
        self._num_tokens = min(self._manifest.tokenizer.slm_size, self._manifest.shape.vocab_size)
        self._llm_tokenizer = PromptTokenizer(selected)
        self._slm_tokenizer = open_tokenizer(selected.path(self._manifest.tokenizer.slm))
        # A head refers to the pair that opened it; only that pair's `_opened` lists other heads.
        self._loaded, self._opened = self, {self._manifest.head: self}
        self._opening = ForkSafeLock()
        self._same_tokenizer = set[
            str
        ]()  # heads that have this pair's tokenizer, as far as it was asked: comparing takes milliseconds
        self._costs = StoredCosts(bundle, self._manifest, backend)

    @property
    def manifest(self) -> Manifest:
        """The manifest of this head."""
        return self._manifest

    @property
    def device(self) -> str:
        """The device in use."""
        return self._device

    @property
    def backend(self) -> Backend:
        """What runs the graphs of this head.

        Raises:
            UsageError: the pair has been closed.
        """
        return self._running()

    @property
    def runtimes(self) -> dict[GraphName, Runtime]:
        """The runtime of each loaded graph."""
        return dict(self._runtimes)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Requested settings that are not in effect, with the reason, one sentence each.

        Raises:
            UsageError: the pair has been closed.
        """
        return self._running().warnings

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of all heads of the bundle."""
        return (self._bundle.manifest.head, *self._bundle.manifest.heads)

    def head(self, name: str) -> "Orchestrator":
        """The pair with another head, sharing the encoder. Repeated calls return the same object.

        Raises:
            UsageError: there is no head of this name, or the pair has been closed.
        """
        selected, loaded = self._bundle.select(name), self._loaded
        with loaded._opening:
            opened = loaded._opened.get(name)
            if opened is None or opened._backend is None:
                backend = loaded._running().head(selected)
                opened = Orchestrator(self._bundle, backend, head=name, cache=self._cache)
                opened._loaded = loaded
                loaded._opened[name] = opened
            return opened

    def options(self, **given: Any) -> GenerationOptions:
        """Resolve generation options over the pair's defaults.

        Raises:
            UsageError: invalid options.
        """
        options = GenerationOptions.resolve(self._manifest.generation, **given)
        options.check_ids(self._num_tokens)
        return options

    def at_a_time(self, usual: int, **options: Any) -> int:
        """The batch size `usual`, or the engines' maximum with these options if that is smaller; 1 where tokens are drafted.

        Raises:
            UsageError: invalid options, or the engines have fewer rows than one prompt needs.
        """
        plan = self._plan(options)
        if plan.drafting is not None:
            usual = min(usual, 1)
        most = prompts_at_a_time(self._limits, plan.options, None)
        return usual if most is None else min(usual, most)

    def bad_words_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The option `bad_words_ids` for words: the SLM's ids of each word at the start of a text and after a space."""
        spellings = (spelling for word in words for spelling in (word, f" {word}"))
        ids = (tuple(self._slm_tokenizer.encode(spelling, add_special_tokens=False).ids) for spelling in spellings)
        return tuple(dict.fromkeys(word for word in ids if word))

    def encode(self, prompts: Sequence[str], *, truncate: bool = False, split_special_tokens: bool = False) -> Encoding:
        """Run the encoder and the projector once on a batch of prompts.

        Args:
            truncate: truncate prompts that are too long instead of refusing them.
            split_special_tokens: tokenize special tokens in prompts as plain text.

        Raises:
            UsageError: no prompts, not a sequence of strings, or `split_special_tokens` with special tokens in the prompt
                template.
            PromptError: prompts are empty or too long, or (`UnknownTokenError`) have ids outside the pair's embedding
                tables.
        """
        return self.prompt_encoder().read(
            self.tokenize(prompts, truncate=truncate, split_special_tokens=split_special_tokens)
        )

    def save_encoding(self, encoding: Encoding | HostEncoding, path: str | os.PathLike[str]) -> None:
        """Write an encoding to a safetensors file. The same pair can load it in any process and on any machine.

        Raises:
            EncodingError: it is an encoding of another pair, or the file cannot be written.
        """
        self.host_encoding(encoding).write(Path(path))

    def load_encoding(self, path: str | os.PathLike[str]) -> Encoding:
        """Read an encoding from a file written by `save_encoding`.

        Raises:
            EncodingError: the file is missing, damaged, not an encoding, or an encoding of another pair.
        """
        backend = self._running()
        return HostEncoding.read(Path(path), manifest=self._manifest).on(backend, self._manifest.shape)

    def encoding_to_bytes(self, encoding: Encoding | HostEncoding) -> bytes:
        """The encoding as the content of the file that `save_encoding` writes.

        Raises:
            EncodingError: it is an encoding of another pair.
        """
        return self.host_encoding(encoding).to_bytes()

    def encoding_from_bytes(self, data: bytes) -> HostEncoding:
        """Read what `encoding_to_bytes` returned. The pair need not be open, and any thread may call this.

        Raises:
            EncodingError: it is damaged, not an encoding, or an encoding of another pair.
        """
        return HostEncoding.from_bytes(data, manifest=self._manifest)

    def host_encoding(self, encoding: Encoding | HostEncoding) -> HostEncoding:
        """The encoding in host memory.

        Raises:
            EncodingError: it is an encoding of another pair.
        """
        self._check_encoding(encoding)
        if isinstance(encoding, HostEncoding):
            return encoding
        return HostEncoding.of(encoding, backend=self._running(), manifest=self._manifest)

    def device_encoding(self, encoding: Encoding | HostEncoding) -> Encoding:
        """The encoding on this pair's device.

        Raises:
            EncodingError: it is an encoding of another pair.
        """
        self._check_encoding(encoding)
        return encoding if isinstance(encoding, Encoding) else encoding.on(self._running(), self._manifest.shape)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        batch_size: int | None = None,
        truncate: bool = False,
        split_special_tokens: bool = False,
        **options: Any,
    ) -> list[Generation]:
        """Generate the responses to prompts, in order, with `num_return_sequences` consecutive responses per prompt.

        Args:
            batch_size: maximum prompts per batch; None: unlimited, prompts of similar length run together.
            truncate: truncate prompts that are too long instead of refusing them.
            split_special_tokens: tokenize special tokens in prompts as plain text, as in transformers' tokenizers.
            options: fields of `GenerationOptions` and of `DraftOptions`; the bundle's defaults otherwise. With a `verifier`
                the responses, and the defaults, are that head's.

        Raises:
            UsageError: invalid options or prompts.
            PromptError: prompts are empty or too long, or have ids outside the pair's embedding tables
                (`UnknownTokenError` if that is the only problem). Nothing is generated.
            BundleError: the decoder's logits are not finite: an overflow in fp16, or weights that are not finite.
        """
        results = self.generate_batches(
            prompts, batch_size=batch_size, truncate=truncate, split_special_tokens=split_special_tokens, **options
        )
        return [generation for generations in results for generation in generations]

    def generate_batches(
        self,
        prompts: Sequence[str],
        *,
        batch_size: int | None,
        truncate: bool = False,
        split_special_tokens: bool = False,
        **options: Any,
    ) -> Iterator[list[Generation]]:
        """Generate like `generate`, yielding responses as soon as they and all earlier ones are complete.

        All prompts are checked before this returns. Batches are formed by length (`batching.py`), so the yielded lists are
        not batches: responses of one batch have the same `Generation.batch`.

        Raises:
            UsageError, PromptError: as `generate`.
            BundleError: as `generate`, while iterating.
        """
        plan = self._plan(options)
        _check_batch_size(batch_size)
        if batch_size is None and plan.drafting is not None:
            batch_size = 1
        size = prompts_at_a_time(self._limits, plan.options, batch_size)
        rows = self._read(prompts, plan, truncate=truncate, split_special_tokens=split_special_tokens)
        loop = plan.pair.decode_loop()

        def written(batch: Sequence[int], number: int) -> list[list[Generation]]:
            encoding, drafting = self._encoded([rows[index] for index in batch], plan)
            return loop.write(encoding, plan.options, prompts=batch, batch=number, drafting=drafting)

        ready = _in_order([len(row.ids) for row in rows], size, written)
        return ([generation for row in part for generation in row] for part in ready)

    def generate_from(self, encoding: Encoding | HostEncoding, **options: Any) -> list[Generation]:
        """Generate the responses to an encoding. The encoding can be reused.

        Raises:
            UsageError: invalid options.
            EncodingError: it is an encoding of another pair.
            PromptError: prompts leave too little room for the response.
            BundleError: as `generate`.
        """
        plan = self._plan(options)
        if plan.pair is not self:
            raise UsageError(
                f"An encoding of the head {self._manifest.head!r} cannot be verified by the head "
                f"{plan.pair._manifest.head!r}: it does not have that head's conditioning.",
                remedy="use generate or stream with the verifier, or encode and generate with that head alone",
            )
        encoding = self.device_encoding(encoding)
        self._check_total(encoding.prompt_tokens, plan.options)
        check_rows(self._limits, plan.options, prompts=len(encoding))
        results = self.decode_loop().write(
            encoding, plan.options, prompts=range(len(encoding)), drafting=self._drafting(plan, None)
        )
        return [generation for generations in results for generation in generations]

    def stream(
        self, prompt: str, *, truncate: bool = False, split_special_tokens: bool = False, **options: Any
    ) -> Iterator[Step]:
        """Stream the response to one prompt, token by token. The texts of the steps add up to `Generation.text`.

        The prompt is encoded before this returns. Arguments and errors are those of `generate`.

        Raises:
            UsageError: the options or the bundle's defaults ask for beam search or several sequences.
        """
        plan = self._plan(options)
        _check_stream(plan.options)
        rows = self._read([prompt], plan, truncate=truncate, split_special_tokens=split_special_tokens)
        encoding, drafting = self._encoded(rows, plan)
        return plan.pair.decode_loop().stream(encoding, plan.options, drafting=drafting)

    def score(self, encoding: Encoding | HostEncoding, responses: Any, *, add_eos: bool = True) -> list[Score]:
        """The log-probabilities of given responses to an encoding, with a prompt's responses consecutive.

        They are those of the logits themselves: logits processors and generation options have no effect. All tokens of a
        response are computed in one decoder call, or in few. At int8 and int4 ONNX Runtime's CPU kernels for one position and
        for several round differently, so `Generation.token_logprobs` of the same tokens differ a little there.

        Args:
            responses: a list of texts for an encoding of one prompt, else one list of texts per prompt.
            add_eos: score the end-of-sequence token after each response. Without it the response may go on.

        Raises:
            UsageError: the lists are not one per prompt, there is no response, the SLM has no end-of-sequence token, or the
                prompts are more than the engines accept.
            ResponseError: responses are not texts, are empty without `add_eos`, or are too long; all of them named.
            EncodingError: it is an encoding of another pair.
            PromptError: prompts are longer than the engines accept.
            BundleError: the decoder's logits are not finite.
        """
        encoding = self.device_encoding(encoding)
        check_prompts(self._limits, encoding.prompt_tokens)
        check_rows(self._limits, self._unused_options(), prompts=len(encoding))
        given = self._response_reader().read(responses, encoding.prompt_tokens, add_eos=add_eos)
        return [score for row in self._scored(encoding, given) for score in row]

    def score_batches(
        self,
        prompts: Sequence[str],
        responses: Any,
        *,
        batch_size: int | None,
        add_eos: bool = True,
        truncate: bool = False,
        split_special_tokens: bool = False,
    ) -> Iterator[PromptScores]:
        """Encode prompts in batches and score given responses to them like `score`, in the prompts' order.

        All prompts and responses are checked before this returns.

        Args:
            responses: one list of texts per prompt; for one prompt, a list of texts.
            batch_size: maximum prompts per batch, at most the engines'; None: unlimited.
            add_eos: as `score`.
            truncate, split_special_tokens: as `generate`.

        Raises:
            UsageError, PromptError: invalid prompts, as `generate`.
            ResponseError: as `score`.
            BundleError: as `score`, while iterating.
        """
        _check_batch_size(batch_size)
        rows = self.tokenize(prompts, truncate=truncate, split_special_tokens=split_special_tokens)
        lengths = [len(row.ids) for row in rows]
        given = self._response_reader().read(responses, lengths, add_eos=add_eos)
        most = None if self._limits is None else self._limits.batch
        size = min((bound for bound in (batch_size, most) if bound is not None), default=None)
        encoder = self.prompt_encoder()

        def scored(batch: Sequence[int], _: int) -> list[PromptScores]:
            encoding = encoder.read([rows[index] for index in batch])
            scores = self._scored(encoding, [given[index] for index in batch])
            return [
                PromptScores(lengths[index], rows[index].dropped, tuple(row))
                for index, row in zip(batch, scores, strict=True)
            ]

        return (entry for part in _in_order(lengths, size, scored) for entry in part)

    def prepare(
        self, prompt: str, *, truncate: bool = False, split_special_tokens: bool = False, **options: Any
    ) -> tuple[PromptIds, GenerationOptions]:
        """Tokenize a prompt and resolve its options, with all checks of `generate`. Nothing is computed.

        Raises:
            UsageError: as `generate`; or options of `DraftOptions`.
            PromptError: as `generate`.
        """
        plan = self._plan(options)
        _refuse_drafting(plan)
        (row,) = self._read([prompt], plan, truncate=truncate, split_special_tokens=split_special_tokens)
        check_rows(self._limits, plan.options, prompts=1)
        return row, plan.options

    def tokenize(
        self,
        prompts: Sequence[str],
        *,
        truncate: bool = False,
        max_prompt_tokens: int | None = None,
        split_special_tokens: bool = False,
    ) -> list[PromptIds]:
        """Tokenize prompts, with all checks of `encode`. Nothing is computed.

        Args:
            max_prompt_tokens: maximum tokens of a truncated prompt; None: the pair's.

        Raises:
            UsageError, PromptError: as `encode`.
        """
        rooms = [max_prompt_tokens, self._limits.prompt if self._limits else None]
        room = min((room for room in rooms if room is not None), default=None)
        rows = self._llm_tokenizer.read(
            prompts, truncate=truncate, room=room, split_special_tokens=split_special_tokens
        )
        check_prompts(self._limits, [len(row.ids) for row in rows])
        return rows

    def prepare_from(self, encoding: Encoding | HostEncoding, **options: Any) -> GenerationOptions:
        """Resolve the options of one prompt's encoding, with all checks of `generate_from`. Nothing is computed.

        Raises:
            UsageError: as `generate_from`; options of `DraftOptions`; or the encoding has several prompts.
            EncodingError, PromptError: as `generate_from`.
        """
        plan = self._plan(options)
        _refuse_drafting(plan)
        self._check_encoding(encoding)
        if len(encoding) != 1:
            raise UsageError(f"The encoding has {len(encoding)} prompts.", remedy="give the encoding of one prompt")
        self._check_total(encoding.prompt_tokens, plan.options)
        check_rows(self._limits, plan.options, prompts=1)
        return plan.options

    def close(self) -> None:
        """Release the graphs, and those of heads opened by this pair. Closing twice is harmless."""
        for pair in self._opened.values():
            if pair._backend is not None:
                pair._costs.save()
                pair._backend.close()
                pair._backend = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _running(self) -> Backend:
        if self._backend is None:
            raise UsageError("This pair has been closed.", remedy="load the bundle again")
        return self._backend

    def prompt_encoder(self) -> PromptEncoder:
        """The encoder half, for ids that `prepare` returned.

        Raises:
            UsageError: the pair has been closed.
        """
        return PromptEncoder(self._running(), self._manifest, self._cache)

    def decode_loop(self) -> DecodeLoop:
        """The decoder half.

        Raises:
            UsageError: the pair has been closed.
        """
        return DecodeLoop(self._running(), self._manifest, self._slm_tokenizer, num_tokens=self._num_tokens)

    def _check_encoding(self, encoding: Any) -> None:
        if not isinstance(encoding, Encoding | HostEncoding):
            raise UsageError(
                f"{type(encoding).__name__} is not an encoding.", remedy="give what `encode` or `load_encoding` returns"
            )
        EncodingIdentity.of(self._manifest).check(encoding.identity, "The encoding")

    def _unused_options(self) -> GenerationOptions:
        """Options of one row per prompt, for what generates nothing."""
        return self.options(do_sample=False, num_beams=1, num_return_sequences=1)

    def _response_reader(self) -> ResponseReader:
        return ResponseReader(self._manifest, self._slm_tokenizer, self._limits)

    def _scored(self, encoding: Encoding, responses: Sequence[Sequence[Response]]) -> list[list[Score]]:
        request = self.decode_loop().request(encoding, self._unused_options(), range(len(encoding)))
        return Scorer(request, self._limits).scores(responses)

    def _plan(self, given: Mapping[str, Any]) -> "_GenerationPlan":
        """Who writes the responses, and how, from a caller's options.

        Raises:
            UsageError: invalid options, or a verifier that cannot verify this pair's drafts.
        """
        names = [field.name for field in fields(DraftOptions)]
        drafting = DraftOptions(**{name: given[name] for name in names if name in given})
        pair = self._verifier(drafting.verifier) if drafting.verifier is not None else self
        others = {name: value for name, value in given.items() if name not in names}
        options = GenerationOptions.resolve(pair._manifest.generation, others=names, **others)
        options.check_ids(pair._num_tokens)
        drafting.check(options)
        if drafting.is_given and options.do_sample and options.seed is None:
            # The drafter and the verifier draw with the same seed.
            options = replace(options, seed=fresh_seed())
        return _GenerationPlan(pair, options, drafting if drafting.is_given else None)

    def _verifier(self, name: str) -> "Orchestrator":
        """The head that verifies this pair's drafts.

        Raises:
            UsageError: there is no such head, it is this pair's own, or it has another tokenizer.
        """
        if name == self._manifest.head:
            raise UsageError(
                f"The head {name!r} cannot verify its own drafts.", f"heads: {', '.join(self.heads)}",
                remedy="give another head as the verifier, or leave it out",
            )  # fmt: skip
        pair = self.head(name)
        if name not in self._same_tokenizer and self._slm_tokenizer.to_str() == pair._slm_tokenizer.to_str():
            self._same_tokenizer.add(name)
        if name not in self._same_tokenizer or self._num_tokens != pair._num_tokens:
            raise UsageError(
                f"The head {name!r} cannot verify the drafts of {self._manifest.head!r}: their tokenizers differ.",
                f"{self._manifest.head}: {self._manifest.tokenizer.slm}, {self._num_tokens} tokens",
                f"{name}: {pair._manifest.tokenizer.slm}, {pair._num_tokens} tokens",
                remedy="leave out the verifier: only heads with the same tokenizer can verify",
            )
        return pair

    def _read(
        self, prompts: Sequence[str], plan: "_GenerationPlan", *, truncate: bool, split_special_tokens: bool
    ) -> list[PromptIds]:
        """Tokenize prompts and check that they leave room for the responses."""
        checks = [(plan.pair, plan.options)]
        if plan.pair is not self:
            # A draft may be shorter than the response.
            checks.append((self, replace(plan.options, max_new_tokens=1, min_new_tokens=0)))
        rooms = [pair._room(options) for pair, options in checks]
        rows = self._llm_tokenizer.read(
            prompts, truncate=truncate, room=min((room for room in rooms if room is not None), default=None),
            split_special_tokens=split_special_tokens,
        )  # fmt: skip
        for pair, options in checks:
            pair._check_total([len(row.ids) for row in rows], options)
        return rows

    def _encoded(self, rows: Sequence[PromptIds], plan: "_GenerationPlan") -> tuple[Encoding, Drafting | None]:
        """The encoding for the head that writes, and how its rows are drafted. Prompts are encoded once for both heads."""
        if plan.pair is self:
            encoding = self.prompt_encoder().read(rows)
            return encoding, self._drafting(plan, None)
        backend = EncodedOnce(plan.pair._running())
        encoding = PromptEncoder(backend, plan.pair._manifest, self._cache).read(rows)
        own = PromptEncoder(EncodedOnce(self._running(), backend), self._manifest, self._cache)
        # Read at the first draft: where drafts do not pay, the pair's projector does not run.
        return encoding, self._drafting(plan, functools.cache(lambda: own.read(rows)))

    def _drafting(self, plan: "_GenerationPlan", own: Callable[[], Encoding] | None) -> Drafting | None:
        """How rows are drafted; None: they are not.

        Args:
            own: this pair's encoding of the prompts, if it drafts.
        """
        if plan.drafting is None:
            return None

        def prompt_lookup(request: Request, row: int) -> NgramDrafter:
            return NgramDrafter(self._prompt_ids(request, row))

        lookup = prompt_lookup if plan.drafting.drafter == "ngram" else None
        if own is None:
            return Drafting(plan.drafting, self._costs.of(None), lookup)
        costs, loop = self._costs.of(plan.pair._manifest.head), self.decode_loop()
        backend = self._running()
        arrays = functools.cache(lambda: backend.arrays(own().conditioning))

        def one_prompt(row: int) -> Conditioning:
            whole = own().conditioning
            if len(whole.attention_mask) == 1:
                return whole
            mask = whole.attention_mask[row : row + 1]
            return backend.conditioning({name: array[row : row + 1] for name, array in arrays().items()}, mask)

        def drafter(request: Request, row: int, least_confidence: float) -> HeadDrafter:
            drafted = loop.request(own(), request.options, request.prompts)
            return HeadDrafter(drafted, row, one_prompt(row), costs.head, least_confidence=least_confidence)

        return Drafting(plan.drafting, costs, lookup, drafter)

    def _prompt_ids(self, request: Request, row: int) -> list[int]:
        """A prompt's ids in the SLM's tokenizer."""
        ids: list[int] = request.encoding.input_ids[row, : request.encoding.prompt_tokens[row]].tolist()
        if self._manifest.tokenizer.llm == self._manifest.tokenizer.slm:
            return ids
        text = self._llm_tokenizer.decode(ids)
        known: list[int] = self._slm_tokenizer.encode(text, add_special_tokens=False).ids
        return known

    def _room(self, options: GenerationOptions) -> int | None:
        """The maximum number of prompt tokens: the engines' limit, and in a decoder-only SLM the positions that the response
        leaves. None: unlimited."""
        most, shape = self._manifest.max_total_tokens, self._manifest.shape
        rooms = [] if self._limits is None else [self._limits.prompt]
        if most is not None and shape.slm_kind == "decoder-only":
            rooms.append((most - options.max_new_tokens + 1) // shape.context_per_token)
        return min(rooms, default=None)

    def _check_total(self, prompt_tokens: Sequence[int], options: GenerationOptions) -> None:
        """Refuse requests beyond the engines' limits or the maximum positions of the SLM's decoder.

        The last new token is never fed to the decoder. In an encoder-decoder SLM the start token takes its position.
        """
        check_prompts(self._limits, prompt_tokens)
        check_new_tokens(self._limits, options)
        most, shape = self._manifest.max_total_tokens, self._manifest.shape
        if most is None:
            return
        fact = f"{self._manifest.name!r} has {most} positions"
        if shape.slm_kind == "encoder-decoder":
            if options.max_new_tokens > most:
                raise UsageError(
                    f"{fact}, and max_new_tokens is {options.max_new_tokens}.",
                    remedy=f"lower max_new_tokens (--max-new-tokens) to {most} or less",
                )
            return
        problems = {
            index: f"{tokens * shape.context_per_token} positions and {options.max_new_tokens} new tokens"
            for index, tokens in enumerate(prompt_tokens)
            if tokens * shape.context_per_token + options.max_new_tokens - 1 > most
        }
        if problems:
            raise PromptError(
                f"{len(problems)} of {len(prompt_tokens)} prompts leave too little room: {fact}.",
                remedy="shorten these prompts, set truncate=True (--truncate), or lower max_new_tokens "
                "(--max-new-tokens)",
                prompts=problems,
            )


@dataclass(frozen=True)
class _GenerationPlan:
    """The pair whose responses are generated, with which options, and how tokens are drafted (None: they are not)."""

    pair: Orchestrator
    options: GenerationOptions
    drafting: DraftOptions | None


def _refuse_drafting(plan: _GenerationPlan) -> None:
    if plan.drafting is not None:
        raise UsageError(
            "A request that shares decoder calls with others cannot be drafted.",
            remedy="leave out drafter and verifier, or use generate or stream",
        )


def _in_order(
    lengths: Sequence[int], size: int | None, run: Callable[[Sequence[int], int], Sequence[_Result]]
) -> Iterator[list[_Result]]:
    """Run batches of prompts, and yield their results in the prompts' order.

    Complete results are held until all earlier ones are complete.

    Args:
        lengths: number of tokens of each prompt.
        size: maximum prompts per batch; None: unlimited.
        run: the results of a batch of prompts, from their indices and the batch's number.
    """
    done: dict[int, _Result] = {}
    following = 0
    for number, batch in enumerate(batches(lengths, size=size)):
        done.update(zip(batch, run(batch, number), strict=True))
        ready: list[_Result] = []
        while following in done:
            ready.append(done.pop(following))
            following += 1
        if ready:
            yield ready


def _check_batch_size(batch_size: Any) -> None:
    if batch_size is not None and not is_whole(batch_size, 1):
        raise UsageError(f"batch_size is {batch_size!r}.", remedy="give a whole number, at least 1")


def _check_stream(options: GenerationOptions) -> None:
    reasons = []
    if options.num_beams > 1:
        reasons.append(
            f"num_beams is {options.num_beams}: a stream returns tokens once they are certain, and the best beam is known "
            "only at the end"
        )
    if options.num_return_sequences > 1:
        reasons.append(f"num_return_sequences is {options.num_return_sequences}: a stream has one response")
    if reasons:
        raise UsageError(
            "This response cannot be streamed.",
            *reasons,
            remedy="use generate, or give num_beams=1 and num_return_sequences=1",
        )
