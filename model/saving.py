"""Writing the checkpoints of a run: at once, or behind the training's back while it goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from model import snapshots
from model.parallel import Processes


class Saver:
    """Writes a run's checkpoints into a folder; all processes of the run call the methods, in one order.

    With `behind` a step is held up only while tensors are copied into the CPU's memory; a thread writes the copies,
    one checkpoint at a time: the next one waits for it. The files are the same either way, and so is how a checkpoint
    appears: by one rename, when every process has written its part. An error of the thread is raised by the next call.
    `sharded`: every process writes the parts that it holds; else the first one writes all.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes, *, sharded: bool, behind: bool) -> None:
        self._folder, self._keep, self._processes, self._sharded = folder, keep, processes, sharded
        self._writing: Future[None] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") if behind else None
        # A group of its own, since the training exchanges gradients through the other one meanwhile.
        self._group: dist.ProcessGroup | None = None
        if behind and sharded:
            made = dist.new_group(backend="gloo")
            assert isinstance(made, dist.ProcessGroup)
            self._group = made
        cuda = processes.device.type == "cuda"
        self._copies = DefaultStager(StagingOptions(cuda, False, False, cuda)) if behind else None

    def save(self, step: int, weights: snapshots.Weights, rest: dict[str, Any]) -> None:
        """Write one checkpoint; older ones beyond the number to keep are deleted after it."""
        self.wait()
        if self._pool is None or self._copies is None:
            self._write(step, weights, rest)
        elif self._sharded or self._processes.first:
            copied = self._copies.stage(weights)
            assert isinstance(copied, dict)
            self._writing = self._pool.submit(self._write, step, copied, rest)

    def wait(self) -> None:
        """Return when what was saved is there; the error that prevented it is raised."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Wait for what is being written, and end."""
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
            if self._copies is not None:
                self._copies.close()
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def _write(self, step: int, weights: snapshots.Weights, rest: dict[str, Any]) -> None:
        if self._processes.first:
            partial = snapshots.begin(self._folder, step)
            snapshots.write(partial, {} if self._sharded else weights, rest)
        self._meet()
        if self._sharded:
            snapshots.write_shards(snapshots.partial(self._folder, step), weights, self._group)
            self._meet()
        if self._processes.first:
            snapshots.publish(self._folder, step)
            snapshots.prune(self._folder, self._keep)
        self._meet()

    def _meet(self) -> None:
        """Wait for the other processes, where they write too."""
        if self._group is not None:
            dist.barrier(self._group)
        elif self._pool is None:
            self._processes.wait()
