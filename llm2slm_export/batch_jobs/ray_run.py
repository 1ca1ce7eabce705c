"""A job's parts on Ray Data: each block is a part, and each worker loads the bundle once.

The workers read the bundle and the input at their paths, and return the parts' bytes to the driver, which writes them. Ray
repeats a block whose worker has ended.
"""

import json
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from llm2slm_export.batch_jobs.input_file import Part
from llm2slm_export.batch_jobs.part_result import PartResult, Tally
from llm2slm_export.batch_jobs.part_runner import BatchRequest, PartRunner
from llm2slm_export.errors import Llm2SlmError, UsageError

LOCAL = "local"
_CONNECT_SECONDS = 10.0
MODULES = ("ray", "pyarrow", "pandas")


class _Worker:
    """Answers blocks of one part, in a process of Ray."""

    def __init__(self, request: BatchRequest) -> None:
        self._request = request
        self._parts = {part.number: part for part in request.input.parts}
        self._runner: PartRunner | None = None

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        answered = [self._answered(self._parts[int(number)]) for number in block["item"]]
        return {"facts": [facts for facts, _ in answered], "content": [content for _, content in answered]}

    def _answered(self, part: Part) -> tuple[str, bytes]:
        # An error does not survive Ray's pickling, so the driver makes it again from its parts.
        try:
            if self._runner is None:
                self._runner = PartRunner(self._request)
            found = self._runner.run(part)
        except Llm2SlmError as error:
            return json.dumps({"error": [error.fact, *error.evidence], "remedy": error.remedy}), b""
        return json.dumps({"number": found.number, "tally": asdict(found.tally)}), found.content


def run_on_ray(
    request: BatchRequest, parts: Sequence[Part], address: str, *, workers: int | None = None
) -> Iterator[PartResult]:
    """Yield the parts, in the order in which they are answered.

    Args:
        address: of a cluster, as `ray.init` takes it; `local`: a new one on this machine, which ends with the job.
        workers: number of workers; None: one per node of the cluster.

    Raises:
        Llm2SlmError: the cluster cannot be reached, Ray fails, or as `PartRunner`.
    """
    # Before the import: Ray's usage statistics are on otherwise.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    try:
        _connect(ray, address)
    except Exception as error:
        raise Llm2SlmError(
            f"Ray cannot be started at {address!r}."
            if address == LOCAL
            else f"There is no Ray cluster at {address!r}.",
            *_first_lines(error),
            remedy="check the address given with --ray, or give --ray local",
        ) from error
    try:
        _check_cores(ray, request, workers, address)
        nodes = sum(node["Alive"] for node in ray.nodes())
        yield from _results(ray, request, parts, min(workers or nodes, len(parts)))
    except Llm2SlmError:
        raise
    except Exception as error:
        raise Llm2SlmError(
            f"Ray failed: {type(error).__name__}.", *_first_lines(error),
            remedy="run the same command again: complete parts are kept",
        ) from error  # fmt: skip
    finally:
        with suppress(Exception):
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        # Ray itself tries for many minutes.
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    handler = signal.getsignal(signal.SIGTERM)
    if address == LOCAL:
        ray.init(address=LOCAL, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    else:
        ray.init(address=address, **quiet)
    # Ray's own handler would end the process without a word about the job.
    signal.signal(signal.SIGTERM, handler)


def _check_cores(ray: Any, request: BatchRequest, workers: int | None, address: str) -> None:
    """Refuse workers that this machine never has the cores for: Ray would wait for them. A cluster may grow.

    Raises:
        UsageError: with the numbers.
    """
    cores, wanted = int(ray.cluster_resources().get("CPU", 0)), (workers or 1) * (request.threads or 1)
    if address == LOCAL and wanted > cores:
        raise UsageError(
            f"{workers or 1} workers of {request.threads or 1} threads need {wanted} cores; Ray has {cores}.",
            remedy="lower --workers or --threads",
        )


def _results(ray: Any, request: BatchRequest, parts: Sequence[Part], workers: int) -> Iterator[PartResult]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    on_gpu = {} if request.job.device == "cpu" else {"num_gpus": 1}
    answered = ray.data.from_items([part.number for part in parts], override_num_blocks=len(parts)).map_batches(
        _Worker, fn_constructor_args=[request], batch_size=1, num_cpus=request.threads or 1,
        compute=ray.data.ActorPoolStrategy(size=workers), **on_gpu,
    )  # fmt: skip
    for row in answered.iter_rows():
        facts = json.loads(row["facts"])
        if "error" in facts:
            fact, *evidence = facts["error"]
            raise Llm2SlmError(fact, *evidence, remedy=facts["remedy"])
        yield PartResult(facts["number"], row["content"], Tally(**facts["tally"]))


def _first_lines(error: BaseException) -> list[str]:
    return [line.strip()[:300] for line in str(error).splitlines() if line.strip()][:3]
