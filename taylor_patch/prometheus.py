"""A collector for Prometheus, read from status() when it is scraped (the extra `prometheus`). It opens no port: the process does.

    from prometheus_client import REGISTRY
    from taylor_patch.prometheus import Collector

    REGISTRY.register(Collector())
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as Base

from taylor_patch.api import status


class Collector(Base):
    """Totals of all sampling runs of this process, the one in progress included."""

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client: one reading."""
        state = status()
        totals, running = state["totals"], state["current_run"]
        ended = {outcome: count for outcome, count in totals.runs.items() if running is None or outcome != running.outcome}
        yield _counter("runs", "Sampling runs that have ended, by outcome.", "outcome", ended)
        yield CounterMetricFamily("taylor_patch_evaluations", "Evaluations of a diffusion model.", value=totals.evaluations)
        yield _counter("attention_calls", "Attention calls, by what answered them.", "backend", totals.calls)
        yield _counter("exact_calls", "Attention calls that exact attention answered, by reason.", "reason", totals.fallbacks)
        seconds = {name: milliseconds / 1000 for name, milliseconds in totals.milliseconds.items()}
        yield _counter("backend_seconds", "Time in backends.", "backend", seconds)
        yield GaugeMetricFamily("taylor_patch_estimated_saved_seconds", "Estimated time saved against exact attention.",
                                value=totals.saved_seconds)
        yield GaugeMetricFamily("taylor_patch_runs_in_progress", "1 while a sampling run is in progress.", value=int(running is not None))


def _counter(name: str, text: str, label: str, values: dict[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"taylor_patch_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
