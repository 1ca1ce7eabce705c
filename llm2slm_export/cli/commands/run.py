"""`run`: run a bundle on prompts."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llm2slm_export.cli import console
from llm2slm_export.cli.options import (
    PROMPT_FILES,
    BundleArgument,
    HeadOption,
    PromptFieldOption,
    RuntimeOption,
    ThreadsOption,
    TruncateOption,
)
from llm2slm_export.cli.prompt_fields import prompt_field_of, record_of_bundle, refuse_unused_field
from llm2slm_export.cli.runtime_notes import print_measured_runtimes
from llm2slm_export.errors import PromptError, UnknownTokenError, UsageError

if TYPE_CHECKING:
    from llm2slm_export.inference.generation.options import GenerationOptions
    from llm2slm_export.inference.orchestrator import BundlePart, Orchestrator

BATCH_SIZE = 8  # prompts run together; more gains little on a CPU and costs cache memory


def run(
    bundle: BundleArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]... | -", help="Prompts; '-' reads one a line from standard input."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar=PROMPT_FILES, help="Prompts of a data file (see --prompt-field), or, of .txt, one a line."
        ),
    ] = None,
    prompt_field: PromptFieldOption = None,
    encoding: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead of prompts: what --save-encoding wrote, maybe elsewhere."),
    ] = None,
    save_encoding: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Encode the prompts into this file, and write no response; an earlier encoding is replaced, and no other file.",
        ),
    ] = None,
    head: HeadOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest response. What is not said, the bundle decides.")
    ] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Shortest response.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams; 1: no beam search.")] = None,
    num_return_sequences: Annotated[
        int | None, typer.Option(help="Responses to each prompt, of beams or of sampling.")
    ] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Of beams: above 0 favours long responses.")] = None,
    early_stopping: Annotated[
        Literal["true", "false", "never"] | None,
        typer.Option(help="Of beams: whether to stop once as many are finished."),
    ] = None,
    do_sample: Annotated[bool | None, typer.Option(help="Sample instead of taking the likeliest token.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens; 0: from all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that make up p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens below min_p times the likeliest.")] = None,
    typical_p: Annotated[float | None, typer.Option(help="Sample from the most typical tokens that make up p.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(help="No sequence of so many tokens twice; 0: no limit.")
    ] = None,
    bad_words: Annotated[
        list[str] | None,
        typer.Option(
            metavar="S",
            help="Never write this text, as it is split into tokens at the start and after a space; can be given several times.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="S", help="Stop at this text; can be given several times.")
    ] = None,
    output_scores: Annotated[
        bool, typer.Option("--output-scores", help="With --json: every token's log-probability.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda[:n] or tensorrt[:n].")] = "cpu",
    threads: ThreadsOption = None,
    gpu_memory_mb: Annotated[
        int | None,
        typer.Option(min=1, help="With --device cuda: most MB of its memory for each graph's weights and work."),
    ] = None,
    no_cuda_graph: Annotated[
        bool, typer.Option("--no-cuda-graph", help="With --device cuda: launch a step's kernels one by one.")
    ] = False,
    runtime: RuntimeOption = "onnxruntime",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help=f"Most prompts run together; {BATCH_SIZE} by default, or what engines take."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep encodings here, and take those that are here already.")
    ] = None,
    cache_mb: Annotated[int | None, typer.Option(min=1, help="Most MB in --cache; 256 by default.")] = None,
    truncate: TruncateOption = False,
    split_special_tokens: Annotated[
        bool,
        typer.Option(
            "--split-special-tokens", help="Take text that spells a special token, such as </s>, as any other text."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One object a line for each response.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Times by stage, on stderr.")] = False,
) -> None:
    """Run a bundle on prompts: one is streamed, several are answered in order, one line each (line ends as \\n)."""
    given = {
        "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "num_beams": num_beams,
        "num_return_sequences": num_return_sequences, "length_penalty": length_penalty,
        "early_stopping": {"true": True, "false": False}.get(early_stopping or "", early_stopping),
        "do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "typical_p": typical_p, "repetition_penalty": repetition_penalty, "no_repeat_ngram_size": no_repeat_ngram_size,
        "seed": seed, "stop": tuple(stop) if stop else None, "output_scores": output_scores or None,
    }  # fmt: skip
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    _refuse_run({
        "--output-scores goes with --json": output_scores and not json,
        "--cache-mb goes with --cache": cache_mb is not None and cache is None,
        f"--cache {cache} lies in the bundle": cache is not None
        and bundle.resolve() in (cache.resolve(), *cache.resolve().parents),
        "--encoding takes the place of prompts": encoding is not None and bool(prompts or file),
        "--encoding is not saved again: leave out --save-encoding": encoding is not None and save_encoding is not None,
        "--batch-size is for prompts that are answered; an encoding is one batch": batch_size is not None
        and (encoding is not None or save_encoding is not None),
        "--truncate and --cache are for prompts, not for --encoding": encoding is not None and bool(truncate or cache),
        "--split-special-tokens is for prompts, not for --encoding": encoding is not None and split_special_tokens,
        "--profile and options of generation are for responses, not for --save-encoding": save_encoding is not None
        and bool(options or bad_words or profile),
    })  # fmt: skip
    from llm2slm_export.cli.prompt_files import Prompt, read_prompts, with_locations
    from llm2slm_export.cli.responses import print_answers, print_profile, print_stream
    from llm2slm_export.cli.terminal import standard_input
    from llm2slm_export.inference.encodings.cache import DEFAULT_BYTES, EncodingCache
    from llm2slm_export.inference.orchestrator import load

    if save_encoding is not None:
        from llm2slm_export.files.atomic import Replacement
        from llm2slm_export.inference.encodings.safetensors_file import TENSORS

        # Said before the prompts are encoded.
        Replacement(save_encoding, TENSORS, inputs=[bundle], option="--save-encoding")
    reading = {"truncate": truncate} | ({"split_special_tokens": True} if split_special_tokens else {})
    unknown: UnknownTokenError | None = None
    read: list[Prompt] = []
    refuse_unused_field(prompt_field, "--file", file)
    if encoding is None:
        field, origin = None, ""
        if file is not None:
            field, origin = prompt_field_of(file, "--file", prompt_field, record_of_bundle(bundle, prompt_field))
        read = read_prompts(prompts or [], file, standard_input, prompt_field=field, origin=origin)
    texts = [prompt.text for prompt in read]
    max_bytes = DEFAULT_BYTES if cache_mb is None else cache_mb * 10**6
    kept = None if cache is None else EncodingCache(max_bytes=max_bytes, directory=cache)
    part: BundlePart = "reader" if save_encoding else "writer" if encoding else "pair"
    cuda = None
    if gpu_memory_mb is not None or no_cuda_graph:
        from llm2slm_export.inference.runtime.onnxruntime.cuda_backend import CudaOptions

        memory_bytes = None if gpu_memory_mb is None else gpu_memory_mb * 10**6
        cuda = CudaOptions(memory_bytes=memory_bytes, graphs=not no_cuda_graph)
    with load(
        bundle, head=head, device=device, threads=threads, runtime=runtime, part=part, cache=kept, cuda=cuda
    ) as pair:
        print_measured_runtimes(bundle, pair, runtime, threads)
        told = pair.warnings
        for note in told:
            print(note, file=sys.stderr)
        if bad_words:
            options["bad_words_ids"] = pair.bad_words_ids(bad_words)
        try:
            if save_encoding is not None:
                _save_encoding(pair, texts, bundle, save_encoding, head=head, json=json, **reading)
                return
            if encoding is not None:
                parts = iter([pair.generate_from(pair.load_encoding(encoding), **options)])
                answered = print_answers(parts, [], json=json)
            elif len(read) == 1 and not json and _streams(pair.options(**options)):
                answered = print_stream(pair.stream(texts[0], **reading, **options), read[0])
            else:
                size = batch_size or pair.at_a_time(BATCH_SIZE, **options)
                try:
                    parts = pair.generate_batches(texts, batch_size=size, **reading, **options)
                except UnknownTokenError as error:
                    # The others are answered before it is told.
                    unknown = error
                    kept_texts = [text for index, text in enumerate(texts) if index not in error.prompts]
                    if not kept_texts:
                        raise
                    parts = pair.generate_batches(kept_texts, batch_size=size, **reading, **options)
                answered = print_answers(parts, read, json=json, refused=unknown.prompts if unknown else {})
        except PromptError as error:
            raise with_locations(error, read) from error
    for warning in dict.fromkeys(warning for generation in answered for warning in generation.warnings):
        if warning not in told:
            print(warning, file=sys.stderr)
    if profile:
        print_profile(answered)
    if unknown is not None:
        raise with_locations(unknown, read)


def _refuse_run(mistakes: dict[str, bool]) -> None:
    """Raise `UsageError` with every sentence that is true."""
    made = [mistake for mistake, is_made in mistakes.items() if is_made]
    if made:
        raise UsageError("These options do not go together.", *made, remedy="leave out one side of each")


def _streams(options: "GenerationOptions") -> bool:
    """Whether a single response can be shown as it is written; where it cannot, say why nothing is seen yet."""
    if options.num_beams > 1:
        print("beams are printed when they are complete", file=sys.stderr)
    elif options.num_return_sequences > 1:
        print("several responses are printed when they are complete", file=sys.stderr)
    return options.num_beams == options.num_return_sequences == 1


def _save_encoding(
    pair: "Orchestrator",
    texts: list[str],
    bundle: Path,
    target: Path,
    *,
    head: str | None,
    json: bool,
    **reading: bool,
) -> None:
    encoding = pair.encode(texts, **reading)
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
