"""The batches of a training, made ahead of their use and in order: by a thread, or by worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from model.measuring import Work, WorkOf

B = TypeVar("B")

_AHEAD = 2
"""Batches that each worker process is ahead."""


class WorkerDied(RuntimeError):
    """A process that made batches ended without being told to; the message names the batch."""


class Fed(NamedTuple):
    """A batch, and what it takes to train on it, where that is known."""

    batch: Any
    work: Work | None


class Feed(Generic[B]):
    """Iterates over `batch_at(n)` for the numbers, in their order; a context, at whose end no process is left.

    Without `workers` one thread makes a batch while the one before it is in use. With them so many processes make two
    batches each ahead: they are forked, get `batch_at` as it is then, and live until the end; nothing that they change
    comes back. Either way the batches are the same. `pin` puts them into page-locked memory, if they have a method for
    it. An error while a batch is made is raised here, with a note that names the batch.
    """

    def __init__(
        self,
        batch_at: Callable[[int], B],
        numbers: Iterable[int],
        *,
        workers: int = 0,
        pin: bool = False,
        work: WorkOf | None = None,
    ) -> None:
        self._made: Iterator[Fed]
        self._pool: ThreadPoolExecutor | None = None
        self._processes: _Processes | None = None
        if workers:
            self._processes = _Processes(_Numbered(batch_at, work), numbers, workers, pin)
            self._made = self._processes
        else:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
            self._made = _by_thread(self._pool, batch_at, iter(numbers), work, pin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._processes is not None:
            # torch raises a worker's death wherever the training is just then.
            died = self._processes.died() if isinstance(error, RuntimeError) else None
            self._processes.close()
            if died is not None and not isinstance(error, WorkerDied):
                raise died from error

    def __iter__(self) -> Iterator[B]:
        return (fed.batch for fed in self._made)

    def with_work(self) -> Iterator[Fed]:
        """The batches, each with what it takes to train on it."""
        return self._made


def _made(batch_at: Callable[[int], Any], number: int, work: WorkOf | None, pin: bool = False) -> Fed:
    try:
        batch = batch_at(number)
        taken = None if work is None else work(batch)
    except Exception as error:
        error.add_note(f"while batch {number} was made")
        raise
    return Fed(batch.pin_memory() if pin and hasattr(batch, "pin_memory") else batch, taken)


def _by_thread(
    pool: ThreadPoolExecutor, batch_at: Callable[[int], Any], numbers: Iterator[int], work: WorkOf | None, pin: bool
) -> Iterator[Fed]:
    upcoming: Future[Fed] | None = None
    for number in numbers:
        ready, upcoming = upcoming, pool.submit(_made, batch_at, number, work, pin)
        if ready is not None:
            yield ready.result()
    if upcoming is not None:
        yield upcoming.result()


class _Numbered(Dataset[Fed]):
    """`batch_at` as a data set; each worker writes down which batch it is at."""

    def __init__(self, batch_at: Callable[[int], Any], work: WorkOf | None) -> None:
        self._batch_at, self._work = batch_at, work
        self.at = torch.empty(0)

    def __getitem__(self, number: int) -> Fed:
        worker = get_worker_info()
        assert worker is not None
        self.at[worker.id, 1] = number
        made = _made(self._batch_at, number, self._work)
        self.at[worker.id, 1] = -1
        return made


class _Processes:
    """The worker processes of one feed."""

    def __init__(self, data: _Numbered, numbers: Iterable[int], workers: int, pin: bool) -> None:
        # A row for each worker, its process and its batch, and one that says whether the end has come.
        self._at = torch.full((workers + 1, 2), -1).share_memory_()
        data.at = self._at
        loader = DataLoader(
            data,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=_AHEAD,
            pin_memory=pin,
            collate_fn=_unchanged,
            # Its own, since a seed for the workers is drawn: not from the training's random numbers.
            generator=torch.Generator(),
            multiprocessing_context="fork",
            worker_init_fn=partial(_begin, self._at, os.getpid()),
        )
        self._loaded = iter(loader)

    def __iter__(self) -> Iterator[Fed]:
        return self

    def __next__(self) -> Fed:
        try:
            fed: Fed = next(self._loaded)
        except RuntimeError as error:
            if (died := self.died()) is not None:
                raise died from error
            raise
        return fed

    def died(self) -> WorkerDied | None:
        """The error that names a worker which is gone, if there is one."""
        alive = {child.pid for child in multiprocessing.active_children()}
        for process, number in self._at[:-1].tolist():
            if process != -1 and process not in alive:
                where = "between two batches" if number < 0 else f"at batch {number}"
                return WorkerDied(
                    f"worker process {process} died {where}, expected it to live; "
                    "often the system stops a process for want of memory: try fewer loop.workers"
                )
        return None

    def close(self) -> None:
        """End the processes, at once where they do not hear."""
        self._at[-1] = 1
        # Not only by leaving it to the garbage collector: an error that is under way holds the iterator.
        self._loaded._shutdown_workers()  # type: ignore[attr-defined]
        ours = set(self._at[:-1, 0].tolist())
        for child in multiprocessing.active_children():
            if child.pid in ours:
                child.kill()
                child.join()


def _unchanged(made: Any) -> Any:
    return made


def _begin(at: Tensor, parent: int, worker: int) -> None:
    """Run in a worker when it starts."""

    def terminated(number: int, frame: Any) -> None:
        if at[-1, 0] > 0 or os.getppid() != parent:
            os._exit(0)  # as told: another code, and torch would raise in whoever is closing the feed

    at[worker, 0] = os.getpid()
    # Who takes a machine back signals all processes; the training needs batches until it has written a checkpoint.
    signal.signal(signal.SIGTERM, terminated)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
