"""What ``/metrics`` tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The server's counters, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.queue = Gauge("xdit_queue_length", "Pictures that wait", registry=registry)
        self.ready = Gauge("xdit_ready", "1 if the ranks can draw", registry=registry)
        self.latency = Histogram(
            "xdit_latency_seconds", "From acceptance to result", buckets=SECONDS, registry=registry
        )
        self.steps = Counter("xdit_steps", "Denoising steps of batches", registry=registry)
        self.batches = Histogram("xdit_batch_size", "Pictures in a call", buckets=(1, 2, 4, 8, 16), registry=registry)
        self.failures = Counter("xdit_failures", "Requests without a result, by code", ["code"], registry=registry)
        self.restarts = Counter("xdit_restarts", "Starts of the ranks after the first", registry=registry)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
