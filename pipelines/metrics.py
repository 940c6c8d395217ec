"""What a run tells Prometheus: the metrics by name, and their values at one moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipelines.live import Prices, RunState


@dataclass(frozen=True)
class Definition:
    """One metric. Counters are given as totals since the run began; the exporter adds what is new."""

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    labels: tuple[str, ...] = ()


def _counter(name: str, description: str, *labels: str) -> Definition:
    return Definition(f"dataengine_{name}", "counter", description, labels)


def _gauge(name: str, description: str, *labels: str) -> Definition:
    return Definition(f"dataengine_{name}", "gauge", description, labels)


METRICS = (
    _counter("images_total", "Images labelled.", "stage"),
    _counter("cells_committed_total", "Cells (a modality of a shard) committed.", "modality"),
    _counter("labels_failed_total", "Labels that failed, by kind of reason.", "modality", "reason"),
    _counter("bytes_written_total", "Bytes of committed tars.", "modality"),
    _counter("attempts_lost_total", "Attempts at a task that were lost and made again.", "stage", "cause"),
    _counter("workers_lost_total", "Workers that ended though they were needed.", "stage", "cause"),
    _gauge("tasks", "Tasks by state: waiting, running, done, failed.", "stage", "state"),
    _gauge("workers", "Workers that are up.", "stage"),
    _gauge("images_per_second", "Images a second of late.", "stage"),
    _gauge("eta_seconds", "Seconds the stage will still take; absent while unknown.", "stage"),
    _gauge("device_busy_ratio", "Share of the workers' time in which a labeler ran.", "stage"),
    _gauge("node_cpu_ratio", "Share of a node's CPU time in use.", "node"),
    _gauge("node_gpu_ratio", "Share of a GPU's time in use.", "node", "gpu"),
    _gauge("cost_so_far", "Cost of the hours that workers have held, in the currency of the prices given."),
)
"""Every metric. Ray exports them with the prefix `ray_` and labels of its own."""

Value = tuple[str, dict[str, str], float]


def values(state: RunState, now: float, prices: Prices | None = None) -> Iterator[Value]:
    """The metrics of a run at `now` that are known, as (name, labels, value)."""
    _, etas = state.eta(now) if state.ended is None else (0.0, dict.fromkeys(state.stages, 0.0))
    for name, stage in state.stages.items():
        at = {"stage": name}
        yield "dataengine_images_total", at, stage.images
        for cause, n in stage.lost.items():
            yield "dataengine_attempts_lost_total", at | {"cause": cause}, n
        for cause, n in stage.workers_lost.items():
            yield "dataengine_workers_lost_total", at | {"cause": cause}, n
        for task_state, n in stage.counts().items():
            yield "dataengine_tasks", at | {"state": task_state}, n
        yield "dataengine_workers", at, stage.workers
        yield "dataengine_images_per_second", at, 0.0 if state.ended else stage.recent(now)[0]
        if (eta := etas[name]) is not None:
            yield "dataengine_eta_seconds", at, eta
        if (busy := stage.device_busy()) is not None:
            yield "dataengine_device_busy_ratio", at, busy
    for modality, column in state.modalities.items():
        of = {"modality": modality}
        yield "dataengine_cells_committed_total", of, column.cells
        yield "dataengine_bytes_written_total", of, column.num_bytes
        for reason, n in column.reasons.items():
            yield "dataengine_labels_failed_total", of | {"reason": reason}, n
    for name, node in state.nodes.items():
        if node.cpu is not None:
            yield "dataengine_node_cpu_ratio", {"node": name}, node.cpu
        for gpu, share in enumerate(node.gpus):
            yield "dataengine_node_gpu_ratio", {"node": name, "gpu": str(gpu)}, share
    hours = state.hours(now).values()
    if prices and (cost := prices.of(sum(g for g, _ in hours), sum(c for _, c in hours))) is not None:
        yield "dataengine_cost_so_far", {}, cost
