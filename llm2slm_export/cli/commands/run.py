"""`run`: generate responses with a bundle, or score given ones."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from llm2slm_export.cli import console
from llm2slm_export.cli.encoding_caches import cache_in_bundle, open_cache
from llm2slm_export.cli.generation_options import (
    AnyDeviceOption,
    BadWordsOption,
    DoSampleOption,
    EarlyStoppingOption,
    LengthPenaltyOption,
    MaxNewTokensOption,
    MinNewTokensOption,
    MinPOption,
    NoRepeatNgramSizeOption,
    NumBeamsOption,
    NumReturnSequencesOption,
    RepetitionPenaltyOption,
    SeedOption,
    SplitSpecialTokensOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    TypicalPOption,
    given_options,
)
from llm2slm_export.cli.help import INPUT, OUTPUT, RUNTIME
from llm2slm_export.cli.options import (
    PROMPT_FILE_KINDS,
    BundleArgument,
    CacheOption,
    DeferOption,
    DrafterOption,
    HeadOption,
    NumDraftTokensOption,
    PromptFieldOption,
    RuntimeOption,
    ThreadsOption,
    TruncateOption,
    VerifierOption,
)
from llm2slm_export.cli.prompt_fields import prompt_field_of, record_of_bundle, refuse_unused_field
from llm2slm_export.cli.runtime_notes import print_measured_runtimes
from llm2slm_export.errors import PromptError, UnknownTokenError, UsageError

if TYPE_CHECKING:
    from llm2slm_export.cli.prompt_files import GivenResponse, Prompt
    from llm2slm_export.inference.generation.options import GenerationOptions
    from llm2slm_export.inference.orchestrator import BundlePart, Orchestrator
    from llm2slm_export.inference.outputs import Generation, PromptScores
    from llm2slm_export.inference.runtime.onnxruntime.cuda_sessions import CudaOptions

_Parts = TypeVar("_Parts")
BATCH_SIZE = 8  # prompts run together; more gains little on a CPU and costs cache memory

EXAMPLES = """
llm2slm-export run engines/demo "How are you?"
llm2slm-export run engines/demo "How are you?" --do-sample --temperature 0.7
llm2slm-export run engines/demo --file tests/data/held_out.tsv --json
llm2slm-export run engines/demo "How are you?" --drafter ngram --profile
llm2slm-export run engines/demo "How are you?" --score responses.txt
llm2slm-export run engines/demo - < prompts.txt
"""


def run(
    bundle: BundleArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Prompts, or '-' for one per line of standard input."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=INPUT,
            help=f"File of prompts ({PROMPT_FILE_KINDS}): see --prompt-field, or, in .txt, one per line.",
        ),
    ] = None,
    encoding: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=INPUT,
            help="Encoding that --save-encoding wrote, here or elsewhere, instead of prompts.",
        ),
    ] = None,
    score: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=INPUT,
            help="Text file of responses, one per line, whose log-probabilities are printed for each prompt, the best first; no "
            "response is generated.",
        ),
    ] = None,
    head: HeadOption = None,
    truncate: TruncateOption = False,
    split_special_tokens: SplitSpecialTokensOption = False,
    prompt_field: PromptFieldOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    min_new_tokens: MinNewTokensOption = None,
    num_beams: NumBeamsOption = None,
    num_return_sequences: NumReturnSequencesOption = None,
    length_penalty: LengthPenaltyOption = None,
    early_stopping: EarlyStoppingOption = None,
    do_sample: DoSampleOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    typical_p: TypicalPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    no_repeat_ngram_size: NoRepeatNgramSizeOption = None,
    bad_words: BadWordsOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    drafter: DrafterOption = None,
    verifier: VerifierOption = None,
    defer: DeferOption = None,
    num_draft_tokens: NumDraftTokensOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=RUNTIME,
            help=f"Maximum number of prompts in a batch (default: {BATCH_SIZE}, or fewer where the engines take fewer; 1 with "
            "--drafter or --verifier).",
        ),
    ] = None,
    device: AnyDeviceOption = "cpu",
    threads: ThreadsOption = None,
    runtime: RuntimeOption = "onnxruntime",
    gpu_memory_mb: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=RUNTIME,
            help="Maximum GPU memory of each graph in MB, with --device cuda (default: no limit).",
        ),
    ] = None,
    no_cuda_graph: Annotated[
        bool,
        typer.Option(
            "--no-cuda-graph",
            rich_help_panel=RUNTIME,
            help="Launch a decoder step's kernels one by one, not as a CUDA graph, with --device cuda.",
        ),
    ] = False,
    cache: CacheOption = None,
    cache_mb: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=RUNTIME, help="Maximum size of --cache in MB (default: 256)."),
    ] = None,
    save_encoding: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=OUTPUT,
            help="File to write the prompts' encoding to; no response is generated. An earlier encoding is replaced, no other "
            "file.",
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            rich_help_panel=OUTPUT,
            help="Print one JSON object per line, for each response (with --score, for each prompt).",
        ),
    ] = False,
    output_scores: Annotated[
        bool,
        typer.Option(
            "--output-scores",
            rich_help_panel=OUTPUT,
            help="Add every token's log-probability to the JSON, with --json.",
        ),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", rich_help_panel=OUTPUT, help="Print times by stage, and accepted draft tokens, to stderr."
        ),
    ] = False,
) -> None:
    """Generate responses to prompts, or score given ones.

    One prompt's response is streamed. Several are answered in order, one line each, with line ends written as \\n.
    """
    options = given_options(
        max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, num_beams=num_beams,
        num_return_sequences=num_return_sequences, length_penalty=length_penalty, early_stopping=early_stopping,
        do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p,
        repetition_penalty=repetition_penalty, no_repeat_ngram_size=no_repeat_ngram_size, seed=seed, stop=stop,
        output_scores=output_scores or None,
    )  # fmt: skip
    drafting = {
        name: value
        for name, value in {
            "drafter": drafter, "verifier": verifier, "defer": defer, "num_draft_tokens": num_draft_tokens,
        }.items()
        if value is not None
    }  # fmt: skip
    generating = [
        f"--{name.replace('_', '-')}"
        for name, is_given in {
            **dict.fromkeys([*options, *drafting], True), "bad_words": bool(bad_words), "profile": profile,
            "save_encoding": save_encoding is not None,
        }.items()
        if is_given
    ]  # fmt: skip
    _refuse_run({
        "--output-scores goes with --json": output_scores and not json,
        "--cache-mb goes with --cache": cache_mb is not None and cache is None,
        f"--cache {cache} lies in the bundle": cache_in_bundle(cache, [bundle]) is not None,
        "--encoding replaces prompts": encoding is not None and bool(prompts or file),
        "--encoding is an encoding already: leave out --save-encoding": encoding is not None and save_encoding is not None,
        "--batch-size is for prompts that are answered: an encoding is one batch": batch_size is not None
        and (encoding is not None or save_encoding is not None),
        "--truncate and --cache are for prompts, not for --encoding": encoding is not None and bool(truncate or cache),
        "--split-special-tokens is for prompts, not for --encoding": encoding is not None and split_special_tokens,
        "--profile and generation options are for responses, not for --save-encoding": save_encoding is not None
        and bool(options or drafting or bad_words or profile),
        f"--score generates nothing, unlike {', '.join(generating)}": score is not None and bool(generating),
    })  # fmt: skip
    from llm2slm_export.inference.orchestrator import load

    if save_encoding is not None:
        from llm2slm_export.files.atomic import Replacement
        from llm2slm_export.inference.encodings.safetensors_file import TENSORS

        # A target that cannot be replaced is refused before the prompts are encoded.
        Replacement(save_encoding, TENSORS, inputs=[bundle], option="--save-encoding")
    responses = [] if score is None else _read_responses(score)
    refuse_unused_field(prompt_field, "--file", file)
    read = [] if encoding is not None else _read_prompts(prompts or [], file, bundle, prompt_field)
    reading = {"truncate": truncate} | ({"split_special_tokens": True} if split_special_tokens else {})
    part: BundlePart = "reader" if save_encoding else "writer" if encoding else "pair"
    with load(
        bundle, head=head, device=device, threads=threads, runtime=runtime, part=part, cache=open_cache(cache, cache_mb),
        cuda=_cuda_options(gpu_memory_mb, cuda_graphs=not no_cuda_graph),
    ) as pair:  # fmt: skip
        print_measured_runtimes(bundle, pair, runtime, threads)
        warned = pair.warnings
        for warning in warned:
            print(warning, file=sys.stderr)
        if bad_words:
            options["bad_words_ids"] = pair.bad_words_ids(bad_words)
        if save_encoding is not None:
            _save_encoding(pair, read, bundle, save_encoding, head=head, json=json, reading=reading)
            return
        if score is not None:
            error = _score(pair, read, encoding, responses, reading, batch_size=batch_size, json=json)
            if error is not None:
                raise error
            return
        if encoding is not None:
            answers = _answer_encoding(pair, encoding, options | drafting, json=json)
        else:
            answers = _answer(pair, read, reading, options, drafting, batch_size=batch_size, json=json)
    for warning in dict.fromkeys(warning for generation in answers.generations for warning in generation.warnings):
        if warning not in warned:
            print(warning, file=sys.stderr)
    if profile:
        from llm2slm_export.cli.responses import print_profile

        print_profile(answers.generations)
    if answers.error is not None:
        raise answers.error


@dataclass(frozen=True)
class _Answers:
    """The responses that were printed, and the error about the prompts that have none."""

    generations: Sequence["Generation"]
    error: PromptError | None = None


def _refuse_run(mistakes: dict[str, bool]) -> None:
    """Raise `UsageError` with every mistake that is made."""
    made = [mistake for mistake, is_made in mistakes.items() if is_made]
    if made:
        raise UsageError("These options do not go together.", *made, remedy="leave out one side of each")


def _read_prompts(
    arguments: Sequence[str], file: Path | None, bundle: Path, prompt_field: str | None
) -> "list[Prompt]":
    from llm2slm_export.cli.prompt_files import read_prompts
    from llm2slm_export.cli.terminal import standard_input

    field, origin = None, ""
    if file is not None:
        field, origin = prompt_field_of(file, "--file", prompt_field, record_of_bundle(bundle, prompt_field))
    return read_prompts(arguments, file, standard_input, prompt_field=field, origin=origin)


def _cuda_options(megabytes: int | None, *, cuda_graphs: bool) -> "CudaOptions | None":
    if megabytes is None and cuda_graphs:
        return None
    from llm2slm_export.inference.runtime.onnxruntime.cuda_sessions import CudaOptions

    return CudaOptions(memory_bytes=None if megabytes is None else megabytes * 10**6, cuda_graphs=cuda_graphs)


def _answer_encoding(pair: "Orchestrator", encoding: Path, options: Mapping[str, Any], *, json: bool) -> _Answers:
    from llm2slm_export.cli.responses import print_answers

    responses = pair.generate_from(pair.load_encoding(encoding), **options)
    return _Answers(print_answers([responses], [], json=json))


def _answer(
    pair: "Orchestrator",
    prompts: "list[Prompt]",
    reading: Mapping[str, bool],
    options: Mapping[str, Any],
    drafting: Mapping[str, Any],
    *,
    batch_size: int | None,
    json: bool,
) -> _Answers:
    """Print the responses to prompts. Those beside a prompt with an unknown token are answered, and it is refused."""
    from llm2slm_export.cli.prompt_files import located
    from llm2slm_export.cli.responses import print_answers, print_stream

    if len(prompts) == 1 and not json:
        # The options are over the defaults of the head that writes.
        writer = pair.head(drafting["verifier"]) if "verifier" in drafting else pair
        if _streams(writer.options(**options)):
            with located(prompts):
                steps = pair.stream(prompts[0].text, **reading, **options, **drafting)
                return _Answers(print_stream(steps, prompts[0]))
    size = batch_size or pair.at_a_time(BATCH_SIZE, **options, **drafting)

    def answered(texts: list[str]) -> "Iterator[list[Generation]]":
        return pair.generate_batches(texts, batch_size=size, **reading, **options, **drafting)

    parts, refused, error = _beside_refused(prompts, answered)
    return _Answers(print_answers(parts, prompts, json=json, refused=refused), error)


def _beside_refused(
    prompts: "list[Prompt]", run: "Callable[[list[str]], _Parts]"
) -> "tuple[_Parts, Mapping[int, str], PromptError | None]":
    """Run prompts. If some have unknown tokens, the others are run.

    Returns:
        The results, the reason for each refused prompt by its index, and the error about them.
    """
    from llm2slm_export.cli.prompt_files import located, with_locations

    with located(prompts):
        try:
            return run(_texts(prompts)), {}, None
        except UnknownTokenError as unknown:
            if len(unknown.prompts) == len(prompts):
                raise
            refused, error = unknown.prompts, with_locations(unknown, prompts)
    others = [prompt for index, prompt in enumerate(prompts) if index not in refused]
    with located(others):
        return run(_texts(others)), refused, error


def _score(
    pair: "Orchestrator",
    prompts: "list[Prompt]",
    encoding: Path | None,
    responses: "list[GivenResponse]",
    reading: Mapping[str, bool],
    *,
    batch_size: int | None,
    json: bool,
) -> PromptError | None:
    """Print the scores of responses to prompts, or to an encoding, and return the error about the prompts without scores."""
    from llm2slm_export.cli.prompt_files import located_responses
    from llm2slm_export.cli.responses import print_scores
    from llm2slm_export.inference.outputs import PromptScores

    texts = [response.text for response in responses]
    with located_responses(responses):
        if encoding is not None:
            loaded = pair.load_encoding(encoding)
            found = iter(pair.score(loaded, [texts] * len(loaded)))
            print_scores(
                [
                    PromptScores(tokens, dropped, tuple(islice(found, len(texts))))
                    for tokens, dropped in zip(loaded.prompt_tokens, loaded.dropped_tokens, strict=True)
                ],
                [],
                json=json,
            )
            return None

        def scored(asked: list[str]) -> "Iterator[PromptScores]":
            return pair.score_batches(asked, [texts] * len(asked), batch_size=batch_size or BATCH_SIZE, **reading)

        parts, refused, error = _beside_refused(prompts, scored)
        print_scores(parts, prompts, json=json, refused=refused)
        return error


def _read_responses(path: Path) -> "list[GivenResponse]":
    from llm2slm_export.cli.prompt_files import read_responses

    return read_responses(path)


def _texts(prompts: "Sequence[Prompt]") -> list[str]:
    return [prompt.text for prompt in prompts]


def _streams(options: "GenerationOptions") -> bool:
    """Whether a single response can be streamed; if not, a note on stderr explains the wait."""
    if options.num_beams > 1:
        print("beam search: responses are printed when they are complete", file=sys.stderr)
    elif options.num_return_sequences > 1:
        print("several sequences: responses are printed when they are complete", file=sys.stderr)
    return options.num_beams == options.num_return_sequences == 1


def _save_encoding(
    pair: "Orchestrator",
    prompts: "Sequence[Prompt]",
    bundle: Path,
    target: Path,
    *,
    head: str | None,
    json: bool,
    reading: Mapping[str, bool],
) -> None:
    from llm2slm_export.cli.prompt_files import located

    with located(prompts):
        encoding = pair.encode(_texts(prompts), **reading)
    pair.save_encoding(encoding, target)
    written, human = target.stat().st_size, console.console(stderr=json)
    human.print(f"{target} is written: {len(encoding)} prompts, {console.size(written)}.")
    chosen = f" --head {head}" if head is not None else ""
    human.print(f"Next: llm2slm-export run {bundle}{chosen} --encoding {target}", soft_wrap=True)
    if json:
        console.print_json(
            {"encoding": str(target), "bytes": written, "prompts": len(encoding), "prompt_tokens": encoding.prompt_tokens,
             "dropped_tokens": encoding.dropped_tokens}
        )  # fmt: skip
