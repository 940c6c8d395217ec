"""Run stages on Ray actors: the only door to Ray, its metrics aside. An actor is one watched worker."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import psutil
import ray

from dataengine.driver import Driver
from dataengine.events import Event, reports
from dataengine.schedule import Stage, single
from dataengine.supervise import Supervised
from dataengine.work import Report, Task, Worker


@ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=8)  # type: ignore[call-overload]
class _Actor:
    """One supervised worker; `run` is called by two tasks at most, the rest of the concurrency is for questions."""

    def __init__(self, worker: Worker, device: str, batch_seconds: float) -> None:
        self._work = Supervised(worker, device, batch_seconds=batch_seconds)
        psutil.cpu_percent()  # what the next call counts from

    def ready(self) -> str:
        """Wait until the weights are loaded; the id of the node. Raises what kept the worker from starting."""
        self._work.wait_started()
        return str(ray.get_runtime_context().get_node_id())

    def run(self, task: Task) -> Report:
        return self._work(task)

    def drain(self) -> None:
        self._work.drain()

    def usage(self) -> dict[str, Any]:
        """How busy this node is, and what the worker does."""
        now = self._work.step()
        return {
            "cpu": psutil.cpu_percent() / 100,
            "gpus": _gpus(),
            "memory": int(psutil.virtual_memory().used),
            "step": None if now is None else asdict(now[0]),
            "step_seconds": 0.0 if now is None else time.time() - now[1],
        }

    def close(self) -> None:
        self._work.close()


def _gpus() -> list[float]:
    """How busy the GPUs are that this actor may use, 0..1 each."""
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not mine:
        return []
    ask = ["nvidia-smi", f"--id={mine}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=5, check=True).stdout
        return [float(line) / 100 for line in said.split()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


class _Ray:
    """The cluster this process is connected to."""

    def __init__(self) -> None:
        self.elastic = "RAY_ADDRESS" in os.environ
        self._settings: dict[str, Any] = {}

    def start(self, stage: Stage, device: str, batch_seconds: float) -> Any:
        if stage.name not in self._settings:
            self._settings[stage.name] = ray.put(stage.worker)
        options = _Actor.options(num_cpus=stage.num_cpus, num_gpus=stage.num_gpus)  # type: ignore[attr-defined]
        return options.remote(self._settings[stage.name], device, batch_seconds)

    def ask(self, worker: Any, what: str, *arguments: Any) -> Any:
        return getattr(worker, what).remote(*arguments)

    def wait(self, answers: list[Any], seconds: float) -> list[Any]:
        done, waiting = ray.wait(answers, num_returns=1, timeout=seconds)
        return done + (ray.wait(waiting, num_returns=len(waiting), timeout=0)[0] if waiting else [])

    def get(self, answer: Any) -> Any:
        return ray.get(answer)

    def kill(self, worker: Any) -> None:
        ray.kill(worker)

    def nodes(self) -> dict[str, dict[str, float]]:
        return nodes()

    def draining(self) -> dict[str, int]:
        from ray._private import worker

        try:
            found = worker.global_worker.gcs_client.get_draining_nodes(timeout=5)  # type: ignore[attr-defined]
        except Exception:
            return {}  # no notice is no reason to stop: the node will be gone soon enough
        return {node if isinstance(node, str) else node.hex(): int(deadline) for node, deadline in found.items()}


def run_stages(
    stages: Sequence[Stage],
    *,
    on_event: Callable[[Event], None] = lambda event: None,
    device: str = "cpu",
    max_workers: int | None = None,
    batch_seconds: float = 300.0,
) -> None:
    """Run the tasks of all stages; dead workers and nodes are replaced, and new nodes used as they come.

    `max_workers` bounds all stages together; None takes what the cluster has. Joins the Ray cluster of `RAY_ADDRESS`
    or of the current connection, else starts one on this machine for this call. Unfinished at the end names what could
    not be done; Stopped says that SIGTERM or SIGINT came, and that finished rows are in staging.
    """
    stages = [s for s in stages if s.tasks]
    if not stages:
        return
    with connected():
        driver = Driver(_Ray(), stages, on_event, device, max_workers, batch_seconds)
        with driver.stopped_by_signals():
            driver.run()


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Ray, joined or started here: quiet, without the dashboard, with this checkout importable in the actors."""
    if ray.is_initialized():
        yield
        return
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}}
    if "RAY_ADDRESS" not in os.environ:
        options |= {"address": "local", "include_dashboard": False, "num_cpus": os.cpu_count()}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> dict[str, dict[str, float]]:
    """What each node has, CPU, GPU, memory, by its id, in the cluster that this process is connected to."""
    return {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}


def run(
    worker: Worker, tasks: Sequence[Task], *, workers: int, device: str, on_report: Callable[[Report], None]
) -> None:
    """Run the tasks of one worker as one stage; see `run_stages`."""
    stage = single(worker, tasks, gpus=1.0 if device.startswith("cuda") else 0.0)
    run_stages([stage], on_event=reports(on_report), device=device, max_workers=workers)
