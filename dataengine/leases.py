"""Leases: who works on which cells of a shard. They save work that two would do; that a commit is one is not theirs.

A lease is a file `leases/<shard>/<epoch>.json`. Taking one means creating the next epoch, which only one can do. Its
holder rewrites it every few seconds; one that stays unchanged for its time to live, on the clock of whoever looks, is
dead, and so is at once one whose process on this machine is gone. No two clocks are compared. A holder that slept past
its time finds its file gone before it commits; should it sleep just then, the commit record can be made only once.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from dataengine.shards import shard_name
from dataengine.storage import Store

BEATS = 4
"""How often a holder renews within one time to live."""


class LeaseLost(RuntimeError):
    """Somebody else took these cells over: this worker was silent for too long."""


class Lease:
    """Held cells of one shard. Use as a context manager: leaving it releases them."""

    def __init__(self, keeper: Leases, path: str, record: dict[str, Any]) -> None:
        self._keeper, self.path, self.record = keeper, path, record

    def check(self) -> None:
        """LeaseLost when it is no longer ours."""
        there = self._keeper.read(self.path)
        if there is None or there["owner"] != self.record["owner"]:
            raise LeaseLost(f"{self.path} was taken over: this worker was silent for longer than its time to live")

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._keeper.release(self)


class Leases:
    """The leases of one dataset as one process sees and holds them; a thread renews what it holds."""

    def __init__(self, store: Store, seconds: float = 60.0) -> None:
        self._store, self._seconds = store, seconds
        self._held: dict[str, Lease] = {}
        self._seen: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._nothing_held: threading.Event | None = None

    def take(self, shard: int, cells: Collection[str], rows: tuple[int, int] | None = None) -> Lease | None:
        """A lease on cells of a shard, or on some rows of them; None while a live one holds any of that."""
        folder = f"leases/{shard_name(shard)}"
        while True:
            dead, last = [], 0
            for name in self._store.files(folder):
                path = f"{folder}/{name}"
                last = max(last, int(name.removesuffix(".json")))
                there = self.read(path)
                if there is None or not set(cells) & set(there["cells"]) or not _meet(rows, there["rows"]):
                    continue
                if self.alive(path, there):
                    return None
                dead.append(path)
            record = {"owner": uuid.uuid4().hex, "cells": sorted(cells), "rows": rows, "beat": 0, **_process()}
            lease = Lease(self, f"{folder}/{last + 1:06d}.json", record)
            if not self._store.publish(lease.path, _json(record)):
                there = self.read(lease.path)
                if there is None or there["owner"] != record["owner"]:
                    continue  # somebody was faster: look again
            for path in dead:
                self._remove(path)
            with self._lock:
                self._held[lease.path] = lease
                if self._nothing_held is None:
                    self._nothing_held = threading.Event()
                    threading.Thread(target=self._renew, args=(self._nothing_held,), name="leases", daemon=True).start()
            return lease

    def read(self, path: str) -> dict[str, Any] | None:
        """A lease file, or None when it is gone or not one."""
        try:
            record: dict[str, Any] = json.loads(self._store.read(path))
        except (FileNotFoundError, ValueError):
            return None
        return record if {"owner", "cells", "rows", "beat", "host", "pid", "born"} <= record.keys() else None

    def alive(self, path: str, record: dict[str, Any]) -> bool:
        """Whether its holder may still be at work."""
        here = _process()
        if record["host"] == here["host"] and _born(record["pid"]) != record["born"]:
            return False
        mark = f"{record['owner']} {record['beat']}"
        before, since = self._seen.get(path, ("", 0.0))
        if before != mark:
            self._seen[path] = (mark, time.monotonic())
            return True
        return time.monotonic() - since < self._seconds

    def live(self) -> Iterator[tuple[int, frozenset[str]]]:
        """Shard and cells of every lease that may be alive."""
        for folder in self._store.folders("leases"):
            for name in self._store.files(f"leases/{folder}"):
                record = self.read(f"leases/{folder}/{name}")
                if record is not None and self.alive(f"leases/{folder}/{name}", record):
                    yield int(folder.rsplit("-", 1)[-1]), frozenset(record["cells"])

    def at_work(self) -> Callable[[str], bool]:
        """Whether somebody may be at work on what lies under a path: what `gc` must leave alone."""
        live = {(shard_name(shard), cell) for shard, cells in self.live() for cell in cells}
        shards = {shard for shard, _ in live}

        def busy(path: str) -> bool:
            folder, _, rest = path.partition("/")
            if folder == "leases":
                return rest.partition("/")[0] in shards
            column, _, rest = rest.partition("/") if folder == "staging" else (folder, "", rest)
            return (rest.partition("/")[0].partition(".")[0], column) in live

        return busy

    def release(self, lease: Lease) -> None:
        """Give cells back."""
        with self._lock:
            self._held.pop(lease.path, None)
            if not self._held and self._nothing_held is not None:
                self._nothing_held.set()
                self._nothing_held = None
        there = self.read(lease.path)
        if there is not None and there["owner"] == lease.record["owner"]:
            self._remove(lease.path)

    def _remove(self, path: str) -> None:
        try:
            self._store.remove(path)
        except FileNotFoundError:
            return

    def _renew(self, nothing_held: threading.Event) -> None:
        while not nothing_held.wait(self._seconds / BEATS):
            with self._lock:
                held = list(self._held.values())
            for lease in held:
                try:
                    lease.check()  # never revive a lease that was taken over
                    lease.record["beat"] += 1
                    if lease.path in self._held:
                        self._store.put(lease.path, _json(lease.record))
                    if lease.path not in self._held:
                        self.release(lease)  # released while it was being renewed
                except (LeaseLost, OSError):
                    continue  # the commit checks again, and says so


def _meet(one: Sequence[int] | None, other: Sequence[int] | None) -> bool:
    """Whether two ranges of rows share one; None is all of them."""
    return one is None or other is None or (one[0] < other[1] and other[0] < one[1])


def _process() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "born": _born(os.getpid())}


def _host() -> str:
    """What names this machine and its process numbers: a container has its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _born(pid: int) -> int:
    """When a process of this machine began, in clock ticks since the machine did; 0 when there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        # No such process; or no /proc, and then a process number that is taken is all that can be known.
        return 0 if Path("/proc").is_dir() else int(psutil.pid_exists(pid))
    return 0 if state == "Z" else int(fields[18])


def _json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode()
