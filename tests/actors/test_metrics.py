"""The metrics of a run: what Prometheus would read, and that a refusal stops nothing."""

import logging
import os
import subprocess
import sys
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors import metrics
from actors.metrics import METRICS, RunMetrics, exposed_names
from engine.core.cli import PROJECT_ROOT

RUN = "runs/read back"
SCRIPT = f"""
from actors.cluster import connect
from actors.metrics import RunMetrics
from engine.core.config import RayConfig

with connect(RayConfig()):
    metrics = RunMetrics({RUN!r})
    metrics.step("joint", 2, 20)
    metrics.tiles(8)
    metrics.batch("denoise", 0.3)
    metrics.batch("denoise", 0.4)
    metrics.batch("decode", 30.0)
    metrics.step("joint", 3, 20)
    metrics.tiles(4)
    metrics.tiles(0)
    metrics.restart()
    print("told", flush=True)
    input()
    metrics.judged({{"seam_score": 1.05, "consistency_psnr_db": None}})
    metrics.judged({{"consistency_psnr_db": 27.5, "seam_score": float("inf")}})
"""
"""A driver that joins the session's cluster, as one on a real cluster would, and leaves when told to."""


def scraped(url: str) -> dict[tuple[str, str], float]:
    """Return the run's samples by name and the tag that is neither the run's nor Ray's."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("run") == RUN:
                tags = [sample.labels[tag] for tag in ("pass", "method", "le") if tag in sample.labels]
                found[sample.name, " ".join(tags)] = sample.value
    return found


def wait_for(url: str, name: str) -> dict[tuple[str, str], float]:
    """Scrape until a metric is there: Ray's processes report every ten seconds, and once more when they leave."""
    until = time.monotonic() + 250
    while True:
        found = scraped(url)
        if any(key[0] == name for key in found):
            return found
        assert time.monotonic() < until, f"no {name} at {url} within 250 s; got {sorted(found)}"
        time.sleep(0.5)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_prometheus_reads_what_was_told() -> None:
    import ray

    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=PROJECT_ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as driver:  # fmt: skip
        found = wait_for(url, "ray_zoomldm_tiles_total")
        _, errors = driver.communicate("\n", timeout=250)
    assert driver.returncode == 0, errors
    assert found["ray_zoomldm_tiles_total", ""] == 12
    assert found["ray_zoomldm_restarts_total", ""] == 1
    assert found["ray_zoomldm_step", "joint"] == 3
    assert found["ray_zoomldm_steps", "joint"] == 20
    assert found["ray_zoomldm_batch_seconds_count", "denoise"] == 2
    assert found["ray_zoomldm_batch_seconds_bucket", "denoise 0.2"] == 0
    assert found["ray_zoomldm_batch_seconds_bucket", "denoise 0.5"] == 2
    assert found["ray_zoomldm_batch_seconds_bucket", "decode 50.0"] == 1
    later = wait_for(url, "ray_zoomldm_seam_score")  # told last, just before the driver left
    assert later["ray_zoomldm_seam_score", ""] == 1.05
    assert later["ray_zoomldm_consistency_db", ""] == 27.5
    assert later["ray_zoomldm_tiles_total", ""] == 12
    assert {name for name, _ in later} | {name for name, _ in found} == exposed_names()


def test_what_ray_refuses_turns_metrics_off_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(metrics.Counter):
        def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
            raise ValueError(f"no {value} today")

    monkeypatch.setattr(metrics, "Counter", Refusing)
    told = RunMetrics("runs/refused")
    told.step("joint", 1, 2)
    with caplog.at_level(logging.WARNING):
        told.tiles(3)
        told.restart()
        told.batch("denoise", 1.0)
        told.judged({"seam_score": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        "The metrics of this run are off: Ray must take them; it said no 3 today. The run goes on."
    ]


def test_metrics_that_cannot_be_made_are_off_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(METRICS, "zoomldm_extra", metrics.Spec("gauge", "Refused.", (3,)))  # type: ignore[arg-type]
    told = RunMetrics("runs/refused")
    told.tiles(1)
    assert len(caplog.records) == 1
