"""Which group takes which shard next: pure bookkeeping, without clocks, processes or Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dataengine.work import Task, Worker


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One group of labelers and its tasks: what is started together, and scales by itself."""

    name: str
    worker: Worker
    tasks: tuple[Task, ...]
    num_rows: Mapping[int, int]
    """Rows of each shard."""
    window: int
    """Rows a task may be split at: multiples of this, counted from the start of the shard."""
    seconds_per_row: float = 1.0
    """Expected, on one worker; only its ratio to other stages matters until workers have been measured."""
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    max_workers: int | None = None
    needs: tuple[str, ...] = ()
    """Stages whose task of the same shard must be committed first."""
