"""How fast and how large a loader is: one side of `benchmarks.loader`, in a process of its own.

Both sides are measured by this file. Processor time is that of all the processes that load: with a worker, of it and of
the process that takes its batches, user and system together.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Make = Callable[[int], Iterator[Any]]
"""Number of worker processes, 0 for none, to batches without an end."""

_TICK = os.sysconf("SC_CLK_TCK")


def age() -> float:
    """Seconds since this process was started, its imports included."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / _TICK
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def memory(pid: int) -> dict[str, float]:
    """Megabytes that a process has resident: all; of its own, not of files; and private, which no other process has.

    What one worker more takes is the last: one that is forked shares the libraries and what they made at their import.
    """
    found: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) / 1024
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"resident_mb": found["Rss"], "own_mb": found["Anonymous"], "private_mb": private}


def rate(make: Make, batch_size: int, warm: int, count: int, workers: int) -> dict[str, Any]:
    """Samples a second and processor time a sample of `count` samples, after `warm` others; memory after them."""
    began = time.perf_counter()
    batches = make(workers)
    next(batches)
    first = time.perf_counter() - began
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]
    if len(processes) != 1 + workers:
        raise RuntimeError(f"{len(processes) - 1} worker processes, expected {workers}")
    for _ in range(-(-warm // batch_size)):
        next(batches)
    rounds = -(-count // batch_size)
    before, began = [cpu_seconds(p) for p in processes], time.perf_counter()
    for _ in range(rounds):
        next(batches)
    seconds = time.perf_counter() - began
    spent = [1e3 * (cpu_seconds(p) - b) / (rounds * batch_size) for p, b in zip(processes, before, strict=True)]
    return {
        "samples": rounds * batch_size,
        "samples_per_second": rounds * batch_size / seconds,
        "cpu_ms_per_sample": sum(spent),
        "worker_cpu_ms_per_sample": sum(spent[1:]) if workers else spent[0],
        "samples_per_cpu_second": 1e3 / sum(spent),
        "first_batch_s": first,
        "worker_memory": memory(processes[-1]),
    }


def memory_over(make: Make, batches: int, every: int) -> dict[str, Any]:
    """The memory of one worker while it makes many batches, each `every` of them."""
    made = make(1)
    next(made)
    (worker,) = (child.pid for child in multiprocessing.active_children())
    assert worker is not None
    seen = []
    for number in range(1, batches):
        next(made)
        if number % every == 0 or number == batches - 1:
            gc.collect()
            seen.append({"batches": number + 1, **memory(worker)})
    return {"batches": batches, "over_time": seen, **growth([each["resident_mb"] for each in seen])}


def growth(resident: list[float]) -> dict[str, float]:
    """What is resident at most, and how much more the last fifth has than the second: the first one warms up."""
    fifth = max(len(resident) // 5, 1)
    early, late = resident[fifth : 2 * fifth] or resident[:1], resident[-fifth:]
    return {"largest_mb": max(resident), "grown_mb": sum(late) / len(late) - sum(early) / len(early)}


def summary(rounds: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians of several measurements, and the range of their processor times."""
    middle = sorted(rounds, key=lambda r: r["cpu_ms_per_sample"])[len(rounds) // 2]
    times = [r["cpu_ms_per_sample"] for r in rounds]
    return {**middle, "rounds": len(rounds), "cpu_ms_range": [min(times), max(times)]}
