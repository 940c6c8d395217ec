"""What this process has open of shards, and what it downloads ahead: at most so many, those used last."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

from dataengine.shard_cache import Remote, ShardCache

MAX_OPEN = 512
"""Shards that a process has open at once: each has a file descriptor for every file of it."""

MAX_HELD = 64
"""Of these, copies in a cache: what a process has open takes room there for as long."""

MAX_TARS = 32
"""Shards of tars that a process has open at once: each has a descriptor for every modality."""

_DOWNLOADS = 2  # at a time, beside those that are waited for; each has several requests under way

log = logging.getLogger(__name__)
T = TypeVar("T")


class Open:
    """Something open, by what names it, with the descriptors that are to be closed with it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._items: OrderedDict[Hashable, tuple[object, list[int]]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], tuple[T, list[int]]]) -> T:
        """What `key` names, made if it is not open; whatever was used longest ago is closed for it."""
        with self._lock:
            found = self._items.get(key)
            if found is not None:
                self._items.move_to_end(key)
                return found[0]  # type: ignore[return-value]
        made, handles = make()  # takes long, and other threads go on
        with self._lock:
            if key in self._items:
                _close(handles)
            else:
                self._items[key] = (made, handles)
            while len(self._items) > self._most:
                _close(self._items.popitem(last=False)[1][1])
        return made

    def clear(self) -> None:
        """Close all."""
        with self._lock:
            while self._items:
                _close(self._items.popitem()[1][1])

    def after_fork(self) -> None:
        """What is open stays so; but a thread that held the lock is not here any more."""
        self._lock = threading.Lock()


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)


here = Open(MAX_OPEN)
"""Files of this machine."""

held = Open(MAX_HELD)
"""Copies in a cache."""

tars = Open(MAX_TARS)
"""Tars of ml-4m, wherever they are."""


class Downloads:
    """Threads that fetch copies before they are needed; nobody waits for them, and they end with the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[ShardCache, Remote]] = queue.SimpleQueue()
        self._known: set[str] = set()
        self._threads = 0

    def add(self, cache: ShardCache, remote: Remote) -> None:
        """Fetch it in the background, after what was asked for before; what is asked for twice is fetched once."""
        with self._lock:
            if remote.digest in self._known:
                return
            self._known.add(remote.digest)
            self._waiting.put((cache, remote))
            if self._threads < _DOWNLOADS:
                self._threads += 1
                threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def _run(self) -> None:
        while True:
            cache, remote = self._waiting.get()
            try:
                cache.fetch(remote, ahead=True)
            except Exception as error:  # whoever needs it meets the same, and says so
                log.warning("fetching ahead: %s", error)
            with self._lock:
                self._known.discard(remote.digest)


downloads = Downloads()


def _after_fork() -> None:
    global downloads
    downloads = Downloads()  # its threads are not here
    here.after_fork()
    held.after_fork()
    tars.after_fork()


os.register_at_fork(after_in_child=_after_fork)
