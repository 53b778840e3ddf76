"""What the server counts, for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from elutq.server.scheduler import Scheduler, Usage

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server. The text format is version 0.0.4 of Prometheus' exposition format."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, scheduler: Scheduler) -> None:
        """Count on behalf of this scheduler."""
        self._registry = CollectorRegistry()
        self._registry.register(_SchedulerCollector(scheduler))
        self._responses = Counter(
            "elutq_http_responses",
            "HTTP responses by path and status",
            ["path", "status"],
            registry=self._registry,
        )
        self._first_token = Histogram(
            "elutq_time_to_first_token_seconds",
            "Time from a request's arrival to its first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._per_token = Histogram(
            "elutq_time_per_token_seconds",
            "Mean time between two tokens of a request",
            buckets=tuple(s / 10 for s in _SECONDS),
            registry=self._registry,
        )

    def count_response(self, path: str, status: int) -> None:
        """Count an HTTP response to a known path."""
        self._responses.labels(path, str(status)).inc()

    def count_usage(self, usage: Usage) -> None:
        """Count a finished request."""
        self._first_token.observe(usage.queue_seconds + usage.prefill_seconds)
        if usage.completion_tokens > 1:
            self._per_token.observe(usage.decode_seconds / (usage.completion_tokens - 1))

    def render(self) -> bytes:
        """All of it, as text."""
        return generate_latest(self._registry)


class _SchedulerCollector(Collector):
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        stats = self._scheduler.stats
        for name, text, level in (
            ("requests_running", "Requests that take part in steps", stats.running),
            ("requests_queued", "Requests that wait", stats.queued),
            (
                "prefix_cache_sequences",
                "Sequences kept for requests that begin alike",
                stats.cached_sequences,
            ),
            ("prefix_cache_bytes", "Memory of these sequences", stats.cached_bytes),
        ):
            yield GaugeMetricFamily(f"elutq_{name}", text, level)
        for name, text, count in (
            ("requests_rejected", "Requests refused because the queue was full", stats.rejected),
            ("prompt_tokens", "Tokens of all prompts begun", stats.prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens that did not have to be computed", stats.cached_tokens),
            ("completion_tokens", "Tokens generated", stats.completion_tokens),
            ("engine_steps", "Steps of the engine", stats.steps),
            ("engine_step_seconds", "Time spent in steps", stats.step_seconds),
        ):
            yield CounterMetricFamily(f"elutq_{name}", text, count)
        finished = CounterMetricFamily(
            "elutq_requests_finished", "Requests that ended, by reason", labels=["reason"]
        )
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished
