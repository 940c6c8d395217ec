"""Run tasks on Ray actors: the only module that imports ray. An actor is a worker with its weights loaded."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from dataengine.work import Report, Task, Work, Worker

MAX_DEATHS = 3
"""How many times one task may take its process down with it before the run stops."""


class TaskKilledWorkers(RuntimeError):
    """A task ended its process several times (a crash, or the machine's memory)."""


@ray.remote(max_restarts=0)
class _Actor:
    """One process, one started worker."""

    def __init__(self, worker: Worker, device: str) -> None:
        self._worker, self._device = worker, device
        self._work: Work | None = None

    def run(self, task: Task) -> Report:
        # Started by the first task and not by the constructor: a worker that cannot start (no weights, a missing
        # package) then raises its own error, where Ray would report a dead actor.
        if self._work is None:
            self._work = self._worker.start(self._device)
        return self._work(task)


def run(
    worker: Worker, tasks: Sequence[Task], *, workers: int, device: str, on_report: Callable[[Report], None]
) -> None:
    """Run every task on up to `workers` actors; a dead actor is replaced and its task given to another.

    Joins the Ray cluster of `RAY_ADDRESS` or of the current connection, else starts one on this machine for this call.
    """
    if not tasks:
        return
    ours = not ray.is_initialized()
    if ours:
        _start()
    try:
        _drive(worker, tasks, workers, device, on_report)
    finally:
        if ours:
            ray.shutdown()


def _start() -> None:
    """Connect, or start Ray here: quiet, without the dashboard, with this checkout importable in the actors."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}}
    if "RAY_ADDRESS" not in os.environ:
        options |= {"include_dashboard": False, "num_cpus": os.cpu_count()}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


def _drive(
    worker: Worker, tasks: Sequence[Task], workers: int, device: str, on_report: Callable[[Report], None]
) -> None:
    waiting = deque(tasks)
    deaths: dict[int, int] = {}
    reference = ray.put(worker)
    gpus = 1.0 if device.startswith("cuda") else 0.0

    def spawn() -> Any:
        return _Actor.options(num_cpus=1, num_gpus=gpus).remote(reference, device)  # type: ignore[attr-defined]

    idle = [spawn() for _ in range(min(workers, len(tasks), _room(gpus)))]
    running: dict[Any, tuple[Any, Task]] = {}
    while waiting or running:
        while waiting and idle:
            actor, task = idle.pop(), waiting.popleft()
            running[actor.run.remote(task)] = (actor, task)
        done, _ = ray.wait(list(running), num_returns=1)
        actor, task = running.pop(done[0])
        try:
            report = ray.get(done[0])
        except RayActorError as error:
            deaths[task.shard] = deaths.get(task.shard, 0) + 1
            if deaths[task.shard] >= MAX_DEATHS:
                raise TaskKilledWorkers(
                    f"shard {task.shard} ended {MAX_DEATHS} worker processes, the last with: {error}"
                ) from error
            waiting.appendleft(task)
            idle.append(spawn())
            continue
        except RayTaskError as error:
            raise error.cause from error
        idle.append(actor)
        on_report(report)


def _room(gpus: float) -> int:
    """How many actors the cluster can hold: one beyond that would wait for ever for its core, holding a task."""
    resources = ray.cluster_resources()
    cores = int(resources.get("CPU", 0))
    room = min(cores, int(resources.get("GPU", 0) / gpus)) if gpus else cores
    if room < 1:
        raise ValueError(
            f"the Ray cluster has {cores} cores and {resources.get('GPU', 0):.0f} GPUs: no room for a worker"
        )
    return room
