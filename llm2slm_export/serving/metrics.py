"""Metrics in Prometheus' format. Names follow vLLM's where the quantity is the same."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llm2slm_export.inference.encodings.host_encoding import HostEncoding
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.scheduler import Scheduler, SchedulerStats

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GAP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class _SchedulerCollector(Collector):
    """What the schedulers count."""

    _GAUGES = (
        ("llm2slm_num_requests_waiting", "Requests that wait for room.", "waiting"),
        ("llm2slm_num_requests_running", "Requests that have rows.", "running"),
        ("llm2slm_num_rows_running", "Decoder rows.", "rows"),
    )
    _COUNTERS = (
        ("llm2slm_requests_submitted", "Requests that were accepted.", "submitted"),
        ("llm2slm_prompt_tokens", "Prompt tokens that were encoded.", "prompt_tokens"),
        ("llm2slm_generation_tokens", "New tokens.", "new_tokens"),
        ("llm2slm_decoder_calls", "Decoder calls after the prompt passes.", "calls"),
    )

    def __init__(self, schedulers: Mapping[str, Scheduler]) -> None:
        self._schedulers = schedulers

    def collect(self) -> Iterable[Metric]:
        """The metrics at present."""
        stats: dict[str, SchedulerStats] = {name: scheduler.stats for name, scheduler in self._schedulers.items()}
        for metric, text, field in self._GAUGES:
            gauge = GaugeMetricFamily(metric, text, labels=["bundle"])
            for name, found in stats.items():
                gauge.add_metric([name], getattr(found, field))
            yield gauge
        for metric, text, field in self._COUNTERS:
            counter = CounterMetricFamily(metric, text, labels=["bundle"])
            for name, found in stats.items():
                counter.add_metric([name], getattr(found, field))
            yield counter
        outcomes = CounterMetricFamily(
            "llm2slm_requests_finished", "Finished requests, by outcome.", labels=["bundle", "outcome"]
        )
        for name, found in stats.items():
            for outcome in ("stop", "length", "encoded", "cancelled", "deadline", "failed"):
                outcomes.add_metric([name, outcome], found.outcomes.get(outcome, 0))
        yield outcomes


class ServerMetrics:
    """The metrics of a server.

    Args:
        schedulers: the bundles' schedulers, by name.
    """

    def __init__(self, schedulers: Mapping[str, Scheduler]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a time for each counter, which nobody reads
        self._registry = CollectorRegistry()
        self._registry.register(_SchedulerCollector(schedulers))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"llm2slm_{name}", text, ["model"], buckets=buckets, registry=self._registry)

        self._first = histogram("time_to_first_token_seconds", "Seconds from a request to its first token.", _SECONDS)
        self._gap = histogram("inter_token_latency_seconds", "Seconds between two tokens of a response.", _GAP_SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "Seconds from a request to its end.", _SECONDS)
        self._stages = {
            "queue": histogram("request_queue_time_seconds", "Seconds before the prompt was encoded.", _SECONDS),
            "encode": histogram("request_encode_time_seconds", "Seconds of the encoder.", _SECONDS),
            "prefill": histogram("request_prefill_time_seconds", "Seconds of the first decoder call.", _SECONDS),
            "decode": histogram("request_decode_time_seconds", "Seconds of the later decoder calls.", _SECONDS),
        }
        self._encoding = histogram(
            "encoding_latency_seconds", "Seconds from a request for encodings to its end.", _SECONDS
        )
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._new = histogram("request_generation_tokens", "New tokens of a response.", _TOKENS)
        self._cache = Counter(
            "llm2slm_encoding_cache", "Encodings looked up in the cache.", ["model", "result"], registry=self._registry
        )
        self._reader = Counter(
            "llm2slm_reader_requests",
            "Prompts sent to the reader, by result.",
            ["model", "result"],
            registry=self._registry,
        )
        self._reader_time = histogram("reader_latency_seconds", "Seconds of the reader's responses.", _SECONDS)
        self._errors = Counter(
            "llm2slm_http_errors", "Responses with an error, by status.", ["status"], registry=self._registry
        )

    def first_token(self, model: str, seconds: float) -> None:
        """Record a request's first token."""
        self._first.labels(model).observe(seconds)

    def token_gap(self, model: str, seconds: float) -> None:
        """Record the time between two tokens of a response."""
        self._gap.labels(model).observe(seconds)

    def finished(self, model: str, generations: Iterable[Generation], seconds: float) -> None:
        """Record the responses to a prompt, and the seconds since the request."""
        self._whole.labels(model).observe(seconds)
        for generation in generations:
            self._new.labels(model).observe(generation.new_tokens)
            if generation.sequence == 0:
                self._prompt.labels(model).observe(generation.prompt_tokens)
                for stage, metric in self._stages.items():
                    metric.labels(model).observe(generation.timings_ms.get(stage, 0.0) / 1e3)
                if generation.cached is not None:
                    self._cache.labels(model, "hit" if generation.cached else "miss").inc()

    def encoded(self, model: str, encodings: Iterable[HostEncoding], seconds: float) -> None:
        """Record the encodings of a request's prompts, and the seconds since the request."""
        self._encoding.labels(model).observe(seconds)
        for encoding in encodings:
            self._prompt.labels(model).observe(encoding.prompt_tokens[0])
            for stage in ("queue", "encode"):
                self._stages[stage].labels(model).observe(encoding.timings_ms.get(stage, 0.0) / 1e3)
            for cached in encoding.cached:
                self._cache.labels(model, "hit" if cached else "miss").inc()

    def read(self, model: str, result: str, seconds: float) -> None:
        """Record the result of the reader's response to a prompt."""
        self._reader.labels(model, result).inc()
        if result == "ok":
            self._reader_time.labels(model).observe(seconds)

    def error(self, status: int) -> None:
        """Record a response with an error."""
        self._errors.labels(str(status)).inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
