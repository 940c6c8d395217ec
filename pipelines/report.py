"""The final report of a run, made from its events: what was done, how fast, what failed, what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dataengine.manifest import Dataset
from dataengine.storage import redacted
from pipelines.live import OTHER, Prices, RunState, as_json, kind_of
from pipelines.stages import StageState

MAX_FAILURES, MAX_GIVEN_UP = 50, 100
"""Entries that the report lists; what it leaves out is counted."""

Examples = Callable[[str, int, str], list[str]]
"""Keys of a (modality, shard) whose label failed for a reason."""


def no_examples(modality: str, shard: int, reason: str) -> list[str]:
    """No keys: for a report without its dataset."""
    return []


def examples_of(dataset: Dataset) -> Examples:
    """Keys from the commit records, which name every label that failed."""

    def found(modality: str, shard: int, reason: str) -> list[str]:
        commit = dataset.commit(modality, shard)
        return [] if commit is None else [key for key, why in commit.invalid.items() if redacted(why) == reason]

    return found


def build(
    state: RunState,
    now: float,
    *,
    run_id: str = "",
    light: Mapping[str, float] | None = None,
    prices: Prices | None = None,
    examples: Examples = no_examples,
) -> dict[str, Any]:
    """The report as plain values; `docs/watching.md` says what each key holds.

    `light` is what each labeler labels alone on one worker, in images a second, as measured by the preflight.
    """
    view = as_json(state, now, prices, run_id)
    stages = [
        _stage(s, view["time"], light or {}, shown)
        for s, shown in zip(state.stages.values(), view["stages"], strict=True)
    ]
    images = max((s["images"] for s in stages), default=0)
    modalities = _modalities(state)
    time = Counter[str]()
    for s in stages:
        time.update(s["seconds_by"])
    lost, workers_lost = Counter[str](), Counter[str]()
    for stage in state.stages.values():
        lost.update(stage.lost)
        workers_lost.update(stage.workers_lost)
    missing = {m: c["missing"] for m, c in modalities.items() if c["missing"]}
    given_up = [(s.name, shard, why) for s in state.stages.values() for shard, why in sorted(s.failed.items())]
    held = sum(s["worker_seconds"] for s in stages)
    return {
        **{key: view[key] for key in ("run", "what", "runner", "device", "host", "began", "ended")},
        "finished": state.ended is not None,
        "complete": state.ended is not None and not missing and all(s.finished for s in state.stages.values()),
        "seconds": view["elapsed"],
        "images": images,
        "refused": sum(s["refused"] for s in stages),
        "images_per_second": images / view["elapsed"] if view["elapsed"] else 0.0,
        "light": _light(stages, view["elapsed"]),
        "stages": stages,
        "time": {name: seconds / held for name, seconds in time.items()} if held else {},
        "modalities": modalities,
        "bytes": sum(c["bytes"] for c in modalities.values()),
        "labels": sum(c["samples"] for c in modalities.values()),
        "labels_failed": sum(c["failed"] for c in modalities.values()),
        **_failures(state, examples),
        "given_up": [{"stage": n, "shard": shard, "cause": why} for n, shard, why in given_up[:MAX_GIVEN_UP]],
        "num_given_up": len(given_up),
        "attempts_lost": dict(lost),
        "workers_joined": state.workers_joined,
        "workers_lost": dict(workers_lost),
        "nodes_joined": state.nodes_joined,
        "nodes_lost": view["nodes_lost"],
        "gpu_hours": view["gpu_hours"],
        "cpu_hours": view["cpu_hours"],
        "prices": {"gpu_hour": prices.gpu_hour, "cpu_hour": prices.cpu_hour} if prices else None,
        "cost": view["cost"],
        "missing": {"cells": sum(missing.values()), "by_modality": missing},
        "notes": view["notes"],
        "num_notes": view["num_notes"],
        "summary": state.summary,
    }


def priced(report: dict[str, Any], prices: Prices) -> dict[str, Any]:
    """The same report at other prices."""
    cost = prices.of(report["gpu_hours"], report["cpu_hours"])
    return report | {"cost": cost, "prices": {"gpu_hour": prices.gpu_hour, "cpu_hour": prices.cpu_hour}}


def _stage(stage: StageState, now: float, light: Mapping[str, float], view: Mapping[str, Any]) -> dict[str, Any]:
    began = stage.began if stage.began is not None else now
    seconds = max(0.0, (stage.last if stage.finished else now) - began)
    held = (
        view["cpu_hours"] * 3600 / stage.num_cpus
        if stage.num_cpus
        else view["gpu_hours"] * 3600 / (stage.num_gpus or 1)
    )
    # Workers that stay up after the last task of their stage have no part in how fast it was.
    up = max(0.0, held - stage.start_seconds) if stage.active_seconds is None else stage.active_seconds
    unmeasured = sorted({name for name in stage.labelers if not light.get(name)})
    each = None
    if stage.labelers and not unmeasured:
        each = 1.0 / sum(1.0 / light[name] for name in stage.labelers)
    return {
        "stage": stage.name,
        "labelers": list(stage.labelers),
        "tasks": view["tasks"],
        "images": stage.images,
        "refused": stage.refused,
        "seconds": seconds,
        "images_per_second": stage.images / seconds if seconds else 0.0,
        "workers": up / seconds if seconds else 0.0,
        "light_per_worker": each,
        "light_not_measured": unmeasured,
        "efficiency": stage.images / (up * each) if each and up else None,
        "device_busy": stage.device_busy(),
        "worker_seconds": held,
        "seconds_by": _seconds_by(stage, held),
        "attempts_lost": dict(stage.lost),
        "held_elsewhere": stage.held,
        "workers_lost": dict(stage.workers_lost),
        "gpu_hours": view["gpu_hours"],
        "cpu_hours": view["cpu_hours"],
    }


def _seconds_by(stage: StageState, held: float) -> dict[str, float]:
    """Where the seconds of a stage's workers went. What is read, decoded and encoded may overlap with labelling."""
    known = sum(stage.spent.values())
    seconds = {
        "start": stage.start_seconds,
        **stage.spent,
        "other": max(0.0, stage.task_seconds - known),
        "lost": stage.lost_seconds,
        "idle": max(0.0, held - stage.start_seconds - stage.task_seconds - stage.lost_seconds),
    }
    return {name: n for name, n in seconds.items() if n > 0}


def _light(stages: Iterable[Mapping[str, Any]], elapsed: float) -> dict[str, Any]:
    """How near the run came to its speed of light: the time that its slowest stage needs at its labelers' own rates."""
    stages = [s for s in stages if s["images"] and s["labelers"]]
    unmeasured = sorted({name for s in stages for name in s["light_not_measured"]})
    seconds = [
        s["images"] / (s["light_per_worker"] * s["workers"]) for s in stages if s["light_per_worker"] and s["workers"]
    ]
    if unmeasured or not seconds or not elapsed:
        return {"seconds": None, "share": None, "not_measured": unmeasured}
    return {"seconds": max(seconds), "share": max(seconds) / elapsed, "not_measured": []}


def _modalities(state: RunState) -> dict[str, dict[str, Any]]:
    """What became of every column that was wanted. A task that is done has nothing missing, whoever committed it."""
    found: dict[str, dict[str, Any]] = {}
    for stage in state.stages.values():
        undone = max(0, stage.tasks - len(stage.done))
        for name in sorted({*stage.modalities, *stage.wanted, *stage.cells}):
            wanted = stage.wanted.get(name, stage.tasks)
            row = found.setdefault(name, {"wanted": 0, "missing": 0})
            row["wanted"] += wanted
            row["missing"] += min(undone, max(0, wanted - stage.cells[name]))
    for name, c in state.modalities.items():
        row = found.setdefault(name, {"wanted": c.cells, "missing": 0})
        row |= {"cells": c.cells, "samples": c.samples, "failed": c.failed, "bytes": c.num_bytes}
    empty = {"cells": 0, "samples": 0, "failed": 0, "bytes": 0}
    return {name: empty | row for name, row in found.items()}


def _failures(state: RunState, examples: Examples) -> dict[str, Any]:
    """Failed labels by modality and reason, most first, with a few of their keys."""
    texts = Counter({(m, why): n for m, c in state.modalities.items() for why, n in c.texts.items()})
    failures = []
    for (modality, reason), n in texts.most_common(MAX_FAILURES):
        shards = state.modalities[modality].where.get(reason, [])
        keys: list[str] = []
        for shard in shards if reason != OTHER else ():
            keys += examples(modality, shard, reason)[: 3 - len(keys)]
        kind = OTHER if reason == OTHER else kind_of(reason)
        failures.append(
            {"modality": modality, "kind": kind, "reason": reason, "labels": n, "shards": shards, "keys": keys}
        )
    by_kind = {name: dict(c.reasons) for name, c in state.modalities.items() if c.reasons}
    return {"failures": failures, "num_reasons": len(texts), "failed_by_reason": by_kind}
