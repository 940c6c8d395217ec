"""Train on a Ray cluster, such as the one that labelled the data: one process a worker, started again when one dies.

The one other place that imports Ray, through Ray Train: it starts processes that torch connects, which
`dataengine.actors`, the door to everything else, must not know.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist
from ray.train.torch import TorchConfig, TorchTrainer

from dataengine import actors
from model.loop import FitResult, NonFiniteLoss
from pipelines import train as training
from pipelines.train import TrainFourM

_PATIENCE = 2 * 60 * 60
"""Seconds that processes wait for each other: the others wait while the first one evaluates."""


class WorkersDied(RuntimeError):
    """Workers died more often than was allowed; what they trained is in the checkpoints of the run's folder."""


@dataclass(frozen=True)
class _Refused:
    """What no second try would change, as a worker's answer: Ray Train would start all workers again."""

    error: Exception


def train(
    run: TrainFourM, *, num_workers: int | None = None, use_gpu: bool | None = None, max_failures: int = 3
) -> FitResult:
    """`pipelines.train.train` in `num_workers` processes of the cluster; the result of the first.

    `use_gpu` gives each a GPU, by default if the cluster has any; `num_workers` is by default all GPUs, or one process.
    Each works in this process's working directory: datasets and `run.out` must lie where all machines see them. When a
    worker or a machine dies, all workers start anew and go on from the last checkpoint, `max_failures` times.
    ValueError, before anything starts, as `pipelines.train.train` gives it.
    """
    training.examined(run)
    with actors.connected():
        gpus = int(sum(node.get("GPU", 0) for node in actors.nodes().values()))
        use_gpu = gpus > 0 if use_gpu is None else use_gpu
        workers = num_workers or (max(gpus, 1) if use_gpu else 1)
        if run.loop.batches_per_step % workers:
            raise ValueError(f"{workers} workers, expected a divisor of batches_per_step {run.loop.batches_per_step}")
        out = Path(run.out).absolute()
        trainer = TorchTrainer(
            _worker,  # type: ignore[arg-type]  # what it returns comes back, whatever the annotation says
            train_loop_config={"run": run, "folder": os.getcwd()},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=_PATIENCE),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": 1 + run.loop.workers, **({"GPU": 1} if use_gpu else {})},
            ),
            run_config=ray.train.RunConfig(
                name=out.name,
                storage_path=str(out.parent / ".ray"),
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
            ),
        )
        return _answer(trainer.fit, out)


def _answer(fit: Callable[[], Any], out: Path) -> FitResult:
    try:
        said = fit().return_value
    except ray.train.TrainingFailedError as error:
        raise WorkersDied(f"{error}; the checkpoints are in {out}: run it again to go on") from error
    if isinstance(said, _Refused):
        raise said.error
    if not isinstance(said, FitResult):
        raise WorkersDied(f"the first worker gave no result; the checkpoints are in {out}: run it again to go on")
    return said


def _worker(config: dict[str, Any]) -> FitResult | _Refused:
    """What each process does."""
    os.chdir(config["folder"])
    run: TrainFourM = config["run"]
    wrong: list[Exception | None] = [None]
    try:
        training.examined(run)
    except (ValueError, FileNotFoundError) as error:
        wrong = [error]
    if dist.is_initialized():
        # What one machine does not see must not leave the others waiting for it.
        heard: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(heard, wrong[0])
        wrong = heard
    for said in wrong:
        if said is not None:
            return _Refused(said)
    try:
        return training.train(run)
    except (NonFiniteLoss, ValueError) as error:  # raised in all processes alike
        return _Refused(error)
