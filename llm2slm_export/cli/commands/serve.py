"""`serve`: serve bundles over HTTP."""

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from llm2slm_export.cli.encoding_caches import cache_in_bundle, open_cache
from llm2slm_export.cli.help import LIMITS, NETWORK, OUTPUT, RUNTIME
from llm2slm_export.cli.options import CacheOption, DeviceOption, RuntimeOption, ThreadsOption
from llm2slm_export.cli.runtime_notes import print_thread_notes
from llm2slm_export.errors import UsageError, require_extra

EXAMPLES = """
llm2slm-export serve engines/demo
llm2slm-export serve engines/demo small=engines/small --port 9000
llm2slm-export serve engines/demo --host 0.0.0.0 --api-key-file keys.txt
llm2slm-export serve engines/demo --cache-mb 500
llm2slm-export serve engines/demo --part reader --port 8001
llm2slm-export serve engines/demo --part writer --reader http://127.0.0.1:8001
"""
BundlePart = Literal["pair", "reader", "writer"]


def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]BUNDLE…",
            help="Bundle directories that `build` wrote, each with the name of its model (default: the directory's).",
        ),
    ],
    host: Annotated[
        str,
        typer.Option(
            rich_help_panel=NETWORK, help="Address to listen on; one that other machines reach needs --api-key-file."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, rich_help_panel=NETWORK, help="Port; 0: a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=NETWORK,
            help="File with one API key per line; requests to /v1/ must have one of them (default: none is needed).",
        ),
    ] = None,
    reader: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            rich_help_panel=NETWORK,
            help="Server that encodes the prompts, with --part writer: one with the same bundles under the same names (default: "
            "none, requests have encodings instead of prompts).",
        ),
    ] = None,
    reader_api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=NETWORK,
            help="File with the API key that --reader asks for (default: none is sent).",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            rich_help_panel=NETWORK,
            help="Origin whose pages may use the server; repeatable (default: none).",
        ),
    ] = None,
    max_rows: Annotated[
        int, typer.Option(min=1, rich_help_panel=LIMITS, help="Maximum running decoder rows of a bundle.")
    ] = 16,
    max_waiting: Annotated[
        int,
        typer.Option(min=1, rich_help_panel=LIMITS, help="Maximum waiting requests of a bundle; more get status 429."),
    ] = 64,
    max_prefill_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=LIMITS,
            help="Maximum prompt tokens that are encoded together, while running responses pause.",
        ),
    ] = 2048,
    max_body_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=LIMITS,
            help="Maximum size of a request's body (default: 1000000; with --part writer also the longest encoding's in base64).",
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="SECONDS",
            rich_help_panel=LIMITS,
            help="Time until a request ends with status 504, if it gives no timeout (default: never).",
        ),
    ] = None,
    drain: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            rich_help_panel=LIMITS,
            help="Time that running requests have after SIGTERM or SIGINT.",
        ),
    ] = 30.0,
    part: Annotated[
        BundlePart,
        typer.Option(
            rich_help_panel=RUNTIME,
            help="Part of the bundles to load: pair; reader, which encodes prompts; or writer, which generates from encodings.",
        ),
    ] = "pair",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    runtime: RuntimeOption = "onnxruntime",
    cache: CacheOption = None,
    cache_mb: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=RUNTIME,
            help="Maximum size of the cached encodings in MB, in memory and separately in --cache; without --cache they are in "
            "memory alone (default: 256 with --cache, else no encoding is cached).",
        ),
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", rich_help_panel=OUTPUT, help="Write prompts and responses to the log.")
    ] = False,
) -> None:
    """Serve bundles over HTTP with OpenAI's protocol.

    Requests run together: prompts are encoded in batches, and their rows join and leave the running decoder calls. The heads of a
    bundle are models too, as NAME/HEAD. The page to try them is at /, the metrics are at /metrics.

    With --part, prompts are encoded by one server and answered by another, each with its part of the bundles in memory.
    """
    require_extra("serve", "fastapi", "httpx", "prometheus_client", "uvicorn", purpose="serve")
    from llm2slm_export.inference.encodings.host_encoding import max_encoding_bytes
    from llm2slm_export.inference.orchestrator import load
    from llm2slm_export.inference.scheduler import Scheduler
    from llm2slm_export.serving.app import AppOptions, ServerState, create_app
    from llm2slm_export.serving.gate import read_api_keys
    from llm2slm_export.serving.reader_client import ReaderClient
    from llm2slm_export.serving.served_models import ServedModels, named_bundle
    from llm2slm_export.serving.server import listen
    from llm2slm_export.serving.server import serve as run_server

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    _refuse_parts(
        part,
        {"--reader": reader, "--reader-api-key-file": reader_api_key_file, "--cache": cache, "--cache-mb": cache_mb},
    )
    keys = () if api_key_file is None else read_api_keys(api_key_file)
    reader_key = None if reader_api_key_file is None else read_api_keys(reader_api_key_file)[0]
    client = None if reader is None else ReaderClient(reader, api_key=reader_key, max_waiting=max_waiting)
    paths = [named_bundle(bundle) for bundle in bundles]
    if (within := cache_in_bundle(cache, [path for _, path in paths])) is not None:
        raise UsageError(f"--cache {cache} lies in the bundle {within}.", remedy="give another directory")
    threads = print_thread_notes(threads)
    with ExitStack() as stack:
        # Before the bundles are loaded, which takes longer.
        listener = stack.enter_context(listen(host, port, has_keys=bool(keys)))
        loaded, encodings = [], open_cache(cache, cache_mb)
        for name, path in paths:
            print(f"loading {path} …", file=sys.stderr, flush=True)
            pair = stack.enter_context(
                load(path, device=device, threads=threads, runtime=runtime, part=part, cache=encodings)
            )
            scheduler = stack.enter_context(
                Scheduler(pair, max_rows=max_rows, max_waiting=max_waiting, max_prefill_tokens=max_prefill_tokens)
            )
            loaded.append((name, scheduler, pair))
        models, state = ServedModels(loaded, part=part), ServerState()
        if max_body_bytes is None:
            longest = max(max_encoding_bytes(model.pair.manifest) for model in models) if part == "writer" else 0
            max_body_bytes = 1_000_000 + longest * 4 // 3
        options = AppOptions(
            api_keys=keys, timeout=timeout, max_body_bytes=max_body_bytes, cors_origins=cors_origin or (),
            log_prompts=log_prompts, reader=client,
        )  # fmt: skip
        address = f"[{host}]" if ":" in host else host

        def ready() -> None:
            names = ", ".join(model.name for model in models)
            served = names if part == "pair" else f"{names} ({part})"
            print(f"serving {served} at http://{address}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)

        run_server(create_app(models, options, state), state, listener, drain=drain, on_ready=ready)


def _refuse_parts(part: str, given: Mapping[str, object]) -> None:
    """Refuse options that have no effect on a part.

    Raises:
        UsageError: all of them named.
    """
    options = [name for name, value in given.items() if value is not None]
    mistakes = [
        f"{name} goes with --part writer" for name in options if name.startswith("--reader") and part != "writer"
    ]
    mistakes += [
        f"{name} is for prompts that this server encodes, not for --part writer"
        for name in options
        if name.startswith("--cache") and part == "writer"
    ]
    if "--reader-api-key-file" in options and "--reader" not in options:
        mistakes.append("--reader-api-key-file goes with --reader")
    if mistakes:
        raise UsageError("These options do not go together.", *mistakes, remedy="leave out one side of each")
