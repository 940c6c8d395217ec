"""What a worker process is doing, left where it outlives the process: who watches it reads on what it died."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MAX_DEATHS = 3
"""How many processes one sample may end before it is given up."""

_SIZE = 512
_mark: int | None = None


@dataclass(frozen=True)
class Step:
    """Rows start..stop of a shard in the hands of a labeler (or of `decode`)."""

    shard: int
    who: str
    start: int
    stop: int


@dataclass(frozen=True)
class Death:
    """A process that ended, or had to be ended, in the middle of a step. `how`: SIGSEGV, SIGKILL, hung, exit code 1."""

    step: Step
    how: str


def leave_in(path: Path) -> None:
    """From now on, this process leaves its steps in this file."""
    global _mark
    _mark = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.pwrite(_mark, b" " * _SIZE, 0)


def watched() -> bool:
    """Whether somebody replaces this process when it ends."""
    return _mark is not None


@contextmanager
def step(shard: int, who: str, start: int, stop: int) -> Iterator[None]:
    """Run a step that may end this process. Costs two system calls when somebody watches, else nothing."""
    if _mark is None:
        yield
        return
    record = json.dumps([shard, who, start, stop, time.time()]).encode()
    os.pwrite(_mark, record.ljust(_SIZE)[:_SIZE], 0)
    try:
        yield
    finally:
        os.pwrite(_mark, b" " * _SIZE, 0)


def read(path: Path) -> tuple[Step, float] | None:
    """The step a process is in, or was in when it ended, and since when (seconds since the epoch)."""
    try:
        shard, who, start, stop, since = json.loads(path.read_bytes())
    except (ValueError, FileNotFoundError):
        return None
    return Step(shard, who, start, stop), since


def fate(deaths: Sequence[Death], now: Step) -> str:
    """What to do with a step, given the processes that ended before: `run`, `split`, or the reason to give its row up.

    A step that ended its process is split, so that the other rows of it go on; one that was killed from outside
    (SIGKILL: a preemption, the kernel short of memory) is first tried once more as it was, for a batch cut
    differently may round differently. A single row is given up after MAX_DEATHS processes, one of them on it alone.
    """
    same = [d for d in deaths if d.step == now]
    if now.stop - now.start > 1:
        outside = all(d.how == "SIGKILL" for d in same)
        return "split" if len(same) > int(outside) else "run"
    around = [
        d
        for d in deaths
        if (d.step.shard, d.step.who) == (now.shard, now.who) and d.step.start <= now.start < d.step.stop
    ]
    if same and len(around) >= MAX_DEATHS:
        return f"ended its process every time: {same[-1].how}"
    return "run"
