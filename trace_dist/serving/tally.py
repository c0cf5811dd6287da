"""What a server counts, for ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trace_dist.serving.finding import Route
from trace_dist.serving.row import Row

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Tally:
    """Counters of one server; every method may be called from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        of: dict[str, Any] = {"namespace": "trace_dist", "registry": self._registry}
        self._requests = Counter("requests", "Requests, by endpoint and status", ["endpoint", "status"], **of)
        self._answers = Counter("answers", "Answers, by the task whose delta wrote them", ["task"], **of)
        self._rejected = Counter("rejected_prompts", "Prompts of no known task", **of)
        self._read = Counter("prompt_tokens", "Tokens of answered prompts", **of)
        self._written = Counter("answer_tokens", "Tokens of answers", **of)
        self._batches = Histogram("batch_answers", "Answers written together", buckets=BATCHES, **of)
        self._writing = Histogram("batch_seconds", "Time of a batch, both swaps included", **of)
        self._retrieving = Histogram("retrieval_seconds", "Time to find the tasks of some prompts", **of)
        self._open = Gauge("open_prompts", "Prompts that wait or are being answered", **of)
        self._generation = Gauge("bank_generation", "How often the bank was changed", **of)

    def watch(self, num_open: Callable[[], int], generation: Callable[[], int]) -> None:
        """Where present values are read."""
        self._open.set_function(num_open)
        self._generation.set_function(generation)

    def request(self, endpoint: str, status: int) -> None:
        """A request was answered, or refused."""
        self._requests.labels(endpoint, str(status)).inc()

    def retrieved(self, routes: Sequence[Route], seconds: float) -> None:
        """The tasks of some prompts were found together."""
        self._retrieving.observe(seconds)
        self._rejected.inc(sum(route.rejected for route in routes))

    def wrote(self, task: str, rows: Sequence[Row], seconds: float) -> None:
        """Some answers were written together."""
        self._answers.labels(task).inc(len(rows))
        self._read.inc(sum(len(row.prompt) for row in rows))
        self._written.inc(sum(len(row.tokens) for row in rows))
        self._batches.observe(len(rows))
        self._writing.observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
