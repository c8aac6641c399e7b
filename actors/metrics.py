"""What a run tells Prometheus, through Ray's own metrics; no mathematics and no pool.

Invariant: it only counts. What Ray refuses turns the metrics of the run off, with one warning, and never stops the run.
Ray exposes each name with the prefix `ray_`, counters with the suffix `_total`. Source: Ray 2.60, `ray.util.metrics`.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from ray.exceptions import RayError
from ray.util.metrics import Counter, Gauge, Histogram

log = logging.getLogger(__name__)
K = TypeVar("K", Counter, Gauge, Histogram)

BATCH_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
"""Bounds of the histogram, from a GPU's small batch to a CPU's large one."""


@dataclass(frozen=True)
class Spec:
    """One metric: its kind, what it says, and the tags beside `run` (the run folder)."""

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    tags: tuple[str, ...] = ()

    def make(self, name: str) -> Counter | Gauge | Histogram:
        """Register the metric with Ray."""
        tags = ("run", *self.tags)
        if self.kind == "histogram":
            return Histogram(name, self.text, list(BATCH_SECONDS), tags)
        return (Counter if self.kind == "counter" else Gauge)(name, self.text, tags)


METRICS = {
    "zoomldm_tiles": Spec("counter", "Tiles denoised."),
    "zoomldm_batch_seconds": Spec("histogram", "Seconds a replica computed on one batch.", ("method",)),
    "zoomldm_restarts": Spec("counter", "Replicas lost and replaced."),
    "zoomldm_step": Spec("gauge", "Steps of a pass that are committed.", ("pass",)),
    "zoomldm_steps": Spec("gauge", "Steps a pass has.", ("pass",)),
    "zoomldm_consistency_db": Spec("gauge", "Agreement of the finished picture with its guide, PSNR in dB."),
    "zoomldm_seam_score": Spec("gauge", "Gradient across tile borders relative to inside; up to 1.10 is good."),
}
"""Every metric of this project; configs/cluster/grafana.json shows them."""
SCORES = {"consistency_psnr_db": "zoomldm_consistency_db", "seam_score": "zoomldm_seam_score"}
"""Keys of report.json and the metrics they become."""


def exposed_names() -> set[str]:
    """Return the names under which Prometheus finds the metrics."""
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {f"ray_{name}{end}" for name, spec in METRICS.items() for end in endings[spec.kind]}


class RunMetrics:
    """The metrics of one run: a looker-on of `Progress` and of the pool. Calls take microseconds and never raise."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        self._pass: tuple[str, int, int] | None = None
        self._off = False
        for name, spec in METRICS.items():
            self._safely(lambda name=name, spec=spec: self._metrics.update({name: spec.make(name)}))

    def step(self, name: str, done: int, total: int) -> None:
        """Tell how far a pass is."""
        self._pass = (name, done, total)
        self._gauge("zoomldm_step", done, {"pass": name})
        self._gauge("zoomldm_steps", total, {"pass": name})

    def tiles(self, count: int) -> None:
        """Count tiles."""
        if count > 0:  # a counter refuses zero
            self._count("zoomldm_tiles", count)
        if self._pass is not None:
            self.step(*self._pass)  # Ray forgets a gauge that is not set again within 20 s; steps may take longer

    def batch(self, method: str, seconds: float) -> None:
        """Record how long a replica computed on a batch; `method` is denoise or decode."""
        self._safely(lambda: self._of("zoomldm_batch_seconds", Histogram).observe(seconds, self._tags(method=method)))

    def restart(self) -> None:
        """Count a replica that was lost and replaced."""
        self._count("zoomldm_restarts", 1)

    def judged(self, scores: Mapping[str, object]) -> None:
        """Tell the scores of the finished picture; one that is missing or infinite is left out."""
        for key, name in SCORES.items():
            value = scores.get(key)
            if isinstance(value, float) and math.isfinite(value):
                self._gauge(name, value, {})

    def _count(self, name: str, by: float) -> None:
        self._safely(lambda: self._of(name, Counter).inc(by, self._tags()))

    def _gauge(self, name: str, value: float, tags: dict[str, str]) -> None:
        self._safely(lambda: self._of(name, Gauge).set(value, self._tags(**tags)))

    def _of(self, name: str, kind: type[K]) -> K:
        metric = self._metrics[name]
        assert isinstance(metric, kind)
        return metric

    def _tags(self, **more: str) -> dict[str, str]:
        return {"run": self._run, **more}

    def _safely(self, record: Callable[[], object]) -> None:
        """Do it unless metrics are off; turn them off when Ray refuses."""
        if self._off:
            return
        try:
            record()
        except (RayError, RuntimeError, TypeError, ValueError) as error:  # what ray.util.metrics and Ray's core raise
            self._off = True
            log.warning("The metrics of this run are off: Ray must take them; it said %s. The run goes on.", error)
