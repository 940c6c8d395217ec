"""The state of a run: a pure reducer over its events, and the JSON form that every view is drawn from."""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dataengine.events import Event
from pipelines.stages import StageState, WorkerState

MAX_KINDS, MAX_TEXTS = 30, 200
"""Different reasons kept for a modality, short and in full; what goes beyond is counted as `other`."""
OTHER = "other"


@dataclass(frozen=True)
class Prices:
    """What an hour costs, in the user's currency; None: no cost is claimed for it."""

    gpu_hour: float | None = None
    cpu_hour: float | None = None

    def of(self, gpu_hours: float, cpu_hours: float) -> float | None:
        """The cost, or None without any price."""
        if self.gpu_hour is None and self.cpu_hour is None:
            return None
        return gpu_hours * (self.gpu_hour or 0.0) + cpu_hours * (self.cpu_hour or 0.0)


@dataclass
class ModalityState:
    """What became of one column in this run."""

    cells: int = 0
    samples: int = 0
    failed: int = 0
    num_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Failed labels by the kind of reason."""
    texts: Counter[str] = field(default_factory=Counter)
    where: dict[str, list[int]] = field(default_factory=dict)
    """Of each reason in full, the first shards it occurred in."""


@dataclass
class NodeState:
    """A node that is there. Utilisations are the latest and, as sums over `num_usages` readings, of the whole run."""

    resources: dict[str, Any] = field(default_factory=dict)
    draining: float | None = None
    cpu: float | None = None
    gpus: tuple[float, ...] = ()
    memory: int | None = None


def kind_of(reason: str) -> str:
    """A short kind for a reason: the class of its exception or its first words, without names and numbers."""
    head = reason.split(":", 1)[0].strip()
    if " " not in head:
        head = head.rsplit(".", 1)[-1]
    head = re.sub(r"^input \S+ is not valid$", "input not valid", head)
    head = re.sub(r"^gave no \S+$", "gave no value", head)
    return re.sub(r"\d+", "#", head)[:40].strip() or "unknown"


def _count(counter: Counter[str], name: str, n: int, limit: int) -> str:
    name = name if name in counter or len(counter) < limit else OTHER
    counter[name] += n
    return name


class RunState:
    """Everything a view of a run shows, kept up event by event: constant work for each, memory bounded by the plan."""

    def __init__(self) -> None:
        self.run: dict[str, Any] = {}
        self.began: float | None = None
        self.ended: float | None = None
        self.time = 0.0
        """Of the latest event."""
        self.summary: dict[str, Any] = {}
        self.stages: dict[str, StageState] = {}
        self.workers: dict[str, WorkerState] = {}
        self.modalities: dict[str, ModalityState] = {}
        self.nodes: dict[str, NodeState] = {}
        self.nodes_joined = 0
        self.nodes_lost: Counter[str] = Counter()
        self.workers_joined = 0
        self.num_notes = 0
        self.notes: deque[tuple[float, str]] = deque(maxlen=20)
        self._on = {
            "run": self._run, "stage": self._stage, "worker-up": self._worker_up, "worker-down": self._worker_down,
            "node-up": self._node_up, "node-down": self._node_down, "node-draining": self._node_draining,
            "start": self._start, "report": self._report, "lost": self._lost, "failed": self._failed,
            "usage": self._usage, "end": self._end,
        }  # fmt: skip

    @classmethod
    def of(cls, events: Iterable[Event]) -> RunState:
        """The state after these events."""
        state = cls()
        for event in events:
            state.apply(event)
        return state

    def apply(self, event: Event) -> None:
        """Take one event; a kind that is not known changes nothing but the time."""
        self.time = max(self.time, event.time)
        self.began = event.time if self.began is None else self.began
        if handler := self._on.get(event.kind):
            handler(event)

    def note(self, time: float, text: str) -> None:
        """Keep something that an operator should know."""
        if not self.notes or self.notes[-1][1] != text:
            self.num_notes += 1
            self.notes.append((time, text))

    def _run(self, event: Event) -> None:
        self.run, self.began = dict(event.values), event.time

    def _stage(self, event: Event) -> None:
        self._of(event).declare(event.values)

    def _of(self, event: Event) -> StageState:
        if event.stage not in self.stages:
            self.stages[event.stage] = StageState(event.stage)
        return self.stages[event.stage]

    def _worker_up(self, event: Event) -> None:
        seconds = float(event.values.get("seconds", 0.0))
        worker = self.workers.get(event.worker)
        if worker is None:
            self.workers_joined += 1
            stage = self._of(event)
            stage.workers += 1
            stage.began = event.time if stage.began is None else stage.began
            self.workers[event.worker] = WorkerState(event.stage, event.node, event.time)
        else:
            self._move(worker, event.stage, event.time - seconds)
            worker.mark = max(worker.mark, event.time)
        self._of(event).start_seconds += seconds

    def _move(self, worker: WorkerState, stage: str, time: float) -> None:
        """A worker that serves several stages (this process, without Ray) counts for the one it works for."""
        if worker.stage != stage:
            self.stages[worker.stage].account(worker, time)
            self.stages[worker.stage].workers -= 1
            self.stages.setdefault(stage, StageState(stage)).workers += 1
            worker.stage = stage

    def _worker_down(self, event: Event) -> None:
        if worker := self.workers.pop(event.worker, None):
            stage = self.stages[worker.stage]
            stage.lost_seconds += worker.busy(event.time)
            stage.account(worker, event.time)
            stage.workers -= 1
            if not event.values.get("planned", False):
                cause = _count(stage.workers_lost, kind_of(str(event.values.get("cause", ""))), 1, MAX_KINDS)
                self.note(event.time, f"{worker.stage}: worker lost ({cause}){_on_node(worker.node)}")

    def _node_up(self, event: Event) -> None:
        self.nodes_joined += event.node not in self.nodes
        self.nodes[event.node] = NodeState(dict(event.values.get("resources", {})))

    def _node_down(self, event: Event) -> None:
        self.nodes.pop(event.node, None)
        cause = _count(self.nodes_lost, kind_of(str(event.values.get("cause", ""))), 1, MAX_KINDS)
        self.note(event.time, f"node {event.node} is gone ({cause})")

    def _node_draining(self, event: Event) -> None:
        deadline = float(event.values.get("deadline") or event.time)
        # Ray counts milliseconds.
        self.nodes.setdefault(event.node, NodeState()).draining = deadline / 1000 if deadline > 1e11 else deadline
        self.note(event.time, f"node {event.node} announced its end")

    def _start(self, event: Event) -> None:
        stage = self._of(event)
        if event.worker and event.worker not in self.workers:
            self._worker_up(Event(event.time, "worker-up", event.stage, event.worker, event.node))
        worker = self.workers.get(event.worker)
        if worker is not None:
            self._move(worker, event.stage, event.time)
        stage.start(event, worker)

    def _report(self, event: Event) -> None:
        stage, values = self._of(event), event.values
        cells = [c if isinstance(c, Mapping) else vars(c) for c in values.get("cells", ())]
        new = event.rows is None and event.shard not in stage.done
        seconds = stage.end_attempt(event, self.workers.get(event.worker))
        stage.report(event, cells, seconds)
        self._close(stage, event.time)
        for text in values.get("notes", ()):
            self.note(event.time, f"{stage.name}, shard {event.shard}: {text}")
        for cell in cells if new else ():
            self._cell(stage, cell, event.shard or 0)

    def _close(self, stage: StageState, time: float) -> None:
        if stage.finished and stage.active_seconds is None:
            idle = sum(max(0.0, time - w.mark) for w in self.workers.values() if w.stage == stage.name)
            stage.active_seconds = stage.worker_seconds + idle

    def _cell(self, stage: StageState, cell: Mapping[str, Any], shard: int) -> None:
        column = self.modalities.setdefault(str(cell["modality"]), ModalityState())
        stage.cells[str(cell["modality"])] += 1
        stage.bad += int(cell["num_invalid"])
        column.cells += 1
        column.samples += int(cell["num_samples"])
        column.failed += int(cell["num_invalid"])
        column.num_bytes += int(cell["num_bytes"])
        unexplained = int(cell["num_invalid"])
        for text, n in cell.get("reasons", {}).items():
            unexplained -= int(n)
            _count(column.reasons, kind_of(text), int(n), MAX_KINDS)
            shards = column.where.setdefault(_count(column.texts, text, int(n), MAX_TEXTS), [])
            if len(shards) < 3 and shard not in shards:
                shards.append(shard)
        if unexplained > 0:
            _count(column.reasons, "unknown", unexplained, MAX_KINDS)

    def _lost(self, event: Event) -> None:
        stage, cause = self._of(event), str(event.values.get("cause", ""))
        seconds = stage.end_attempt(event, self.workers.get(event.worker))
        if cause == "busy":
            stage.held += 1
            return
        # What was told to stop left its finished rows in staging.
        stage.task_seconds += seconds if cause == "drained" else 0.0
        stage.lost_seconds += 0.0 if cause == "drained" else seconds
        _count(stage.lost, kind_of(cause), 1, MAX_KINDS)

    def _failed(self, event: Event) -> None:
        stage = self._of(event)
        stage.lost_seconds += stage.end_attempt(event, self.workers.get(event.worker))
        stage.give_up(event)
        self._close(stage, event.time)
        self.note(event.time, f"{stage.name}, shard {event.shard} was given up: {event.values.get('cause', '')}")

    def _usage(self, event: Event) -> None:
        if event.node not in self.nodes and self.nodes_joined:
            return  # the last word of a node that is gone
        node = self.nodes.setdefault(event.node, NodeState())
        node.cpu = float(event.values.get("cpu", 0.0))
        node.gpus = tuple(float(g) for g in event.values.get("gpus", ()))
        node.memory = event.values.get("memory")

    def _end(self, event: Event) -> None:
        self.ended, self.summary = event.time, dict(event.values)
        for worker in self.workers.values():
            self.stages[worker.stage].account(worker, event.time)
            self.stages[worker.stage].workers -= 1
        self.workers.clear()
        for stage in self.stages.values():
            stage.running.clear()

    def hours(self, now: float) -> dict[str, tuple[float, float]]:
        """GPU-hours and CPU-hours that each stage's workers have held, from the moment they began to start."""
        seconds = {name: s.worker_seconds + s.start_seconds for name, s in self.stages.items()}
        for worker in self.workers.values():
            seconds[worker.stage] += max(0.0, now - worker.mark)
        return {n: (t * self.stages[n].num_gpus / 3600, t * self.stages[n].num_cpus / 3600) for n, t in seconds.items()}

    def eta(self, now: float) -> tuple[float | None, dict[str, float | None]]:
        """Seconds that the run, and each stage, will still take; None where nothing is measured to tell it from.

        A stage needs its remaining rows at its late rate, and not less than the stages it waits for and one task more.
        The run needs as long as its slowest stage, and not less than all remaining work takes all workers.
        """
        measured = {name: t for name, s in self.stages.items() if (t := s.seconds_per_row()) is not None}
        if not measured:
            none: dict[str, float | None] = {n: 0.0 if s.finished else None for n, s in self.stages.items()}
            return (0.0 if self.stages and all(v == 0.0 for v in none.values()) else None), none
        scale = sum(measured.values()) / max(sum(self.stages[n].declared for n in measured), 1e-9)
        each = {name: measured.get(name, s.declared * scale) for name, s in self.stages.items()}
        left = {name: s.remaining(now, each[name], self.workers) for name, s in self.stages.items()}
        own = {name: self._own_eta(s, now, left[name], each[name]) for name, s in self.stages.items()}
        total: dict[str, float | None] = {}
        for name in self.stages:
            total[name] = self._with_needs(name, own, each, frozenset())
        work = sum(left[n] * each[n] for n in self.stages) / max(len(self.workers), 1)
        unstarted = any(own[n] is None for n in self.stages) and not self.workers
        return (None if unstarted else max([work, *(t for t in total.values() if t is not None)])), total

    def _own_eta(self, stage: StageState, now: float, rows: float, each: float) -> float | None:
        if stage.finished:
            return 0.0
        _, rate, reports = stage.recent(now)
        if reports >= max(3, stage.workers) and rate > 0:
            return rows / rate
        return rows * each / stage.workers if stage.workers else None

    def _with_needs(
        self, name: str, own: Mapping[str, float | None], each: Mapping[str, float], above: frozenset[str]
    ) -> float | None:
        stage, mine = self.stages[name], own[name]
        if mine is None or stage.finished:
            return mine
        last_task = each[name] * stage.rows / max(stage.tasks, 1)
        for need in stage.needs:
            if need in self.stages and need not in above and not self.stages[need].finished:
                other = self._with_needs(need, own, each, above | {name})
                mine = max(mine, (other or 0.0) + last_task)
        return mine

    def progress(self) -> float:
        """Share of the work that is behind, rows weighted by the seconds they were said to take; it never falls."""
        weights = [(s.declared * (s.rows or s.tasks), s) for s in self.stages.values()]
        whole = sum(w for w, _ in weights)
        part = sum(w * (1.0 if s.finished else min(1.0, s.settled / s.rows if s.rows else 0.0)) for w, s in weights)
        return part / whole if whole else 0.0


def _on_node(node: str) -> str:
    return f" on {node}" if node else ""


def as_json(state: RunState, now: float, prices: Prices | None = None, run_id: str = "") -> dict[str, Any]:
    """The state as plain values; `docs/watching.md` says what each key holds."""
    now = max(now if state.ended is None else state.ended, state.time)
    eta, etas = (0.0, dict.fromkeys(state.stages, 0.0)) if state.ended else state.eta(now)
    hours = state.hours(now)
    gpu_hours, cpu_hours = (math.fsum(h[i] for h in hours.values()) for i in (0, 1))
    stages = [_stage(s, now, etas[s.name], hours[s.name]) for s in state.stages.values()]
    on_node = Counter(w.node for w in state.workers.values())
    failures = Counter({(m, why): n for m, c in state.modalities.items() for why, n in c.reasons.items()})
    return {
        "run": run_id,
        **{name: state.run.get(name) for name in ("what", "runner", "device", "host", "pid")},
        "time": now,
        "began": state.began,
        "ended": state.ended,
        "elapsed": now - (state.began if state.began is not None else now),
        "eta": eta,
        "progress": state.progress(),
        "tasks": {k: sum(s["tasks"][k] for s in stages) for k in ("waiting", "running", "done", "failed")},
        "stages": stages,
        "modalities": {
            name: {"cells": c.cells, "samples": c.samples, "failed": c.failed, "failed_by_reason": dict(c.reasons),
                   "bytes": c.num_bytes}
            for name, c in state.modalities.items()
        },
        "failures": [{"modality": m, "reason": why, "labels": n} for (m, why), n in failures.most_common(5)],
        "nodes": [
            {"node": name, "workers": on_node[name], "cpu": n.cpu, "gpus": list(n.gpus), "memory": n.memory,
             "resources": n.resources, "draining": n.draining}
            for name, n in state.nodes.items()
        ],
        "nodes_joined": state.nodes_joined,
        "nodes_lost": dict(state.nodes_lost),
        "gpu_hours": gpu_hours,
        "cpu_hours": cpu_hours,
        "cost": prices.of(gpu_hours, cpu_hours) if prices else None,
        "notes": [{"time": time, "note": text} for time, text in state.notes],
        "num_notes": state.num_notes,
    }  # fmt: skip


def _stage(stage: StageState, now: float, eta: float | None, hours: tuple[float, float]) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "tasks": stage.counts(),
        "rows": stage.rows,
        "images": stage.images,
        "refused": stage.refused,
        "images_per_second": stage.recent(now)[0],
        "images_per_second_overall": stage.overall(now),
        "eta": eta,
        "workers": stage.workers,
        "device_busy": stage.device_busy(),
        "failed_labels": stage.bad,
        "attempts_lost": dict(stage.lost),
        "held_elsewhere": stage.held,
        "workers_lost": dict(stage.workers_lost),
        "labelers": list(stage.labelers),
        "modalities": list(stage.modalities),
        "needs": list(stage.needs),
        "gpu_hours": hours[0],
        "cpu_hours": hours[1],
    }
