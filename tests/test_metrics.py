"""What Prometheus is told: the values of a run whose truth is known, and the series that a real Ray node serves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dataengine.events import Event
from pipelines.live import Prices, RunState, as_json
from pipelines.metrics import METRICS, values
from tests.simulated import T0, declared, simulate

ROOT = Path(__file__).parents[1]
DEFINED = {d.name: d for d in METRICS}


def found(state: RunState, now: float, prices: Prices | None = None) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name and labels, each of which must be defined and given once."""
    given: dict[tuple[str, tuple[str, ...]], float] = {}
    for name, labels, value in values(state, now, prices):
        assert tuple(labels) == DEFINED[name].labels
        assert all(isinstance(v, str) for v in labels.values())
        key = (name, tuple(labels.values()))
        assert key not in given
        given[key] = value
    return given


def test_the_metrics_are_the_agreed_ones() -> None:
    assert {(d.name, d.kind, d.labels) for d in METRICS} == {
        ("dataengine_images_total", "counter", ("stage",)),
        ("dataengine_cells_committed_total", "counter", ("modality",)),
        ("dataengine_labels_failed_total", "counter", ("modality", "reason")),
        ("dataengine_bytes_written_total", "counter", ("modality",)),
        ("dataengine_attempts_lost_total", "counter", ("stage", "cause")),
        ("dataengine_workers_lost_total", "counter", ("stage", "cause")),
        ("dataengine_tasks", "gauge", ("stage", "state")),
        ("dataengine_workers", "gauge", ("stage",)),
        ("dataengine_images_per_second", "gauge", ("stage",)),
        ("dataengine_eta_seconds", "gauge", ("stage",)),
        ("dataengine_device_busy_ratio", "gauge", ("stage",)),
        ("dataengine_node_cpu_ratio", "gauge", ("node",)),
        ("dataengine_node_gpu_ratio", "gauge", ("node", "gpu")),
        ("dataengine_cost_so_far", "gauge", ()),
    }
    assert all(d.description.endswith(".") for d in METRICS)


def test_values_are_those_of_the_run() -> None:
    log, truth = simulate(3)
    state = RunState.of(log)
    state.apply(Event(state.time, "usage", node="n9", values={"cpu": 0.5, "gpus": [0.9, 0.8]}))
    given = found(state, state.time, Prices(cpu_hour=36.0))
    for stage in ("depth", "edges"):
        assert given["dataengine_images_total", (stage,)] == truth.images[stage]
        assert given["dataengine_cells_committed_total", (stage,)] == truth.cells[stage]
        assert given["dataengine_bytes_written_total", (stage,)] == truth.num_bytes[stage]
        assert given.get(("dataengine_labels_failed_total", (stage, "OutOfMemoryError")), 0) == truth.bad[stage]
        assert given.get(("dataengine_attempts_lost_total", (stage, "WorkerCrashedError")), 0) == truth.lost[stage]
        states = {k: given["dataengine_tasks", (stage, k)] for k in ("waiting", "running", "done", "failed")}
        assert states == {"waiting": 0, "running": 0, "done": truth.done[stage], "failed": truth.failed[stage]}
        assert given["dataengine_eta_seconds", (stage,)] == 0.0
    assert given["dataengine_node_gpu_ratio", ("n9", "1")] == 0.8
    assert given["dataengine_cost_so_far", ()] == pytest.approx(36.0 * as_json(state, state.time)["cpu_hours"])


def test_what_is_unknown_is_not_given() -> None:
    given = found(RunState.of([declared("depth", 4)]), T0 + 1)
    assert {name for name, _ in given} == {
        "dataengine_images_total", "dataengine_tasks", "dataengine_workers", "dataengine_images_per_second"
    }  # fmt: skip


class FakeMetric:
    """Stands where Ray's counters and gauges stand, and keeps what it was told."""

    told: ClassVar[Counter[tuple[str, str, float]]] = Counter()

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name = name

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        self.told["set", f"{self.name}{dict(tags)}", value] += 1

    def inc(self, value: float, tags: Mapping[str, str]) -> None:
        assert value > 0
        self.told["inc", f"{self.name}{dict(tags)}", value] += 1


def test_counters_grow_by_what_is_new_and_forgotten_gauges_fall_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    from dataengine._ray_metrics import make_meters

    fake: Any = types.SimpleNamespace(Counter=FakeMetric, Gauge=FakeMetric)
    for name in ("ray", "ray.util", "ray.util.metrics"):
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(FakeMetric, "told", Counter())
    meters = make_meters(METRICS)
    steps: Iterable[list[tuple[str, dict[str, str], float]]] = (
        [("dataengine_images_total", {"stage": "a"}, 5), ("dataengine_node_cpu_ratio", {"node": "n"}, 0.5)],
        [("dataengine_images_total", {"stage": "a"}, 5), ("dataengine_node_cpu_ratio", {"node": "n"}, 0.25)],
        [("dataengine_images_total", {"stage": "a"}, 8)],
        [("dataengine_images_total", {"stage": "a"}, 8)],
    )
    for given in steps:
        meters.update(given)
    images, cpu = "dataengine_images_total{'stage': 'a'}", "dataengine_node_cpu_ratio{'node': 'n'}"
    assert FakeMetric.told == {
        ("inc", images, 5.0): 1, ("inc", images, 3.0): 1,
        ("set", cpu, 0.5): 1, ("set", cpu, 0.25): 1, ("set", cpu, 0.0): 1,
    }  # fmt: skip
    with pytest.raises(KeyError):
        meters.update([("dataengine_unheard_of", {}, 1.0)])


SERVED = """
import logging, sys, time, urllib.request
import ray
# As the engine starts Ray here: without the dashboard. Metrics leave a process every second, not every ten.
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         _system_config={"metrics_report_interval_ms": 1000})
from dataengine._ray_metrics import make_meters
from pipelines.live import Prices, RunState
from pipelines.metrics import METRICS, values
from tests.simulated import simulate
log, _ = simulate(3)
meters, half = make_meters(METRICS), len(log) // 2
state = RunState.of(log[:half])
meters.update(values(state, state.time))
for event in log[half:]:
    state.apply(event)
meters.update(values(state, state.time, Prices(cpu_hour=1.0)))
port = ray.nodes()[0]["MetricsExportPort"]
until = time.monotonic() + 60
while time.monotonic() < until:
    try:
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        page = ""
    if "ray_dataengine_cost_so_far{" in page:
        break
    time.sleep(0.3)
print("\\n".join(line for line in page.splitlines() if line.startswith("ray_dataengine_")))
ray.shutdown()
"""


@pytest.mark.ray
def test_a_ray_node_serves_the_series_to_prometheus() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SERVED], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    served = {}
    for line in done.stdout.splitlines():
        name, labels, value = re.fullmatch(r"ray_(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
        ours = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        served[name, tuple(ours[key] for key in DEFINED[name].labels)] = float(value)
    log, _ = simulate(3)
    state = RunState.of(log)
    expected = found(state, state.time, Prices(cpu_hour=1.0))
    assert {key: served.get(key) for key in expected if expected[key] or DEFINED[key[0]].kind == "gauge"} == {
        key: pytest.approx(value) for key, value in expected.items() if value or DEFINED[key[0]].kind == "gauge"
    }
    assert len(expected) > 20
