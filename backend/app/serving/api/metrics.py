"""Prometheus 的十八个数。标签只有模型、原因与代码：没有用户写的内容。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from app.serving.served import Served

_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """引擎自己数着的在取的时候读，其余的由 hub 记。"""

    def __init__(self, served: Mapping[str, Served]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_Engines(served))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"gpt2_{name}", text, buckets=buckets, registry=registry)

        def counter(name: str, text: str, label: str) -> Counter:
            return Counter(f"gpt2_{name}", text, [label], registry=registry)

        self._first = histogram("time_to_first_token_seconds", "request to first token", _LONG)
        self._gap = histogram("inter_token_latency_seconds", "between tokens of a text", _SHORT)
        self._whole = histogram("e2e_request_latency_seconds", "request to end of a text", _LONG)
        self._success = counter("request_success_total", "texts finished", "reason")
        self._cancelled = counter("requests_cancelled_total", "requests given up", "where")
        self._rejected = counter("requests_rejected_total", "requests refused", "code")

    def token(self, seconds: float, first: bool) -> None:
        (self._first if first else self._gap).observe(seconds)

    def finished(self, reason: str, seconds: float) -> None:
        self._success.labels(reason).inc()
        self._whole.observe(seconds)

    def cancelled(self, where: str) -> None:
        self._cancelled.labels(where).inc()

    def rejected(self, status: int) -> None:
        self._rejected.labels(str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engines:
    def __init__(self, served: Mapping[str, Served]) -> None:
        self._served = served

    def collect(self) -> Iterator[Metric]:
        rows: list[tuple[str, dict[str, Any]]] = []
        for name, each in self._served.items():
            engine, cache = each.engine, each.engine.flat.cache
            counts = engine.counts
            held = sum(cache.lengths[row] for row in list(engine.rows.busy))
            gauges = {
                "num_requests_running": engine.running,
                "num_requests_waiting": engine.waiting,
                "kv_cache_usage_ratio": held / (cache.rows * each.context),
            }
            counters = {
                "prompt_tokens": counts.prompt, "generation_tokens": counts.made,
                "prefix_cache_queries": counts.asked, "prefix_cache_hits": counts.borrowed,
                "spec_decode_draft_tokens": counts.drafted,
                "spec_decode_accepted_tokens": counts.accepted,
                "engine_steps": counts.steps, "engine_step_tokens": counts.step_tokens,
                "engine_step_seconds": counts.step_seconds,
            }  # fmt: skip
            rows.append((name, {"gauge": gauges, "counter": counters}))
        for kind, family in (("gauge", GaugeMetricFamily), ("counter", CounterMetricFamily)):
            for metric in rows[0][1][kind] if rows else ():
                found = family(f"gpt2_{metric}", metric.replace("_", " "), labels=["model"])
                for name, values in rows:
                    found.add_metric([name], values[kind][metric])
                yield found
