"""Leases: one holder for a cell of a shard, dead ones taken over, and nothing of a live one collected."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dataengine.leases import Lease, LeaseLost, Leases
from dataengine.storage import Store
from tests.fakes import ingested


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture(autouse=True)
def released(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test takes is released behind it: a lease that is held is renewed for as long as its process lives."""
    made, take = [], Leases.take

    def taken(self: Leases, *arguments: Any) -> Lease | None:
        if (lease := take(self, *arguments)) is not None:
            made.append((self, lease))
        return lease

    monkeypatch.setattr(Leases, "take", taken)
    yield
    for leases, lease in made:
        leases.release(lease)
    assert not [t for t in threading.enumerate() if t.name == "leases" and not t.join(5) and t.is_alive()]


def test_a_cell_has_one_holder_and_others_of_the_shard_have_theirs(store: Store) -> None:
    leases = Leases(store)
    with leases.take(3, ["depth", "normal"]) or pytest.fail("free") as first:
        assert leases.take(3, ["normal", "canny_edge"]) is None
        assert leases.take(3, ["canny_edge"]) is not None
        assert leases.take(4, ["depth"]) is not None
        first.check()
    assert leases.take(3, ["depth"]) is not None


def test_ranges_of_rows_are_held_side_by_side_but_not_beside_the_whole(store: Store) -> None:
    leases = Leases(store)
    assert leases.take(0, ["depth"], (0, 64)) is not None
    assert leases.take(0, ["depth"], (64, 128)) is not None
    assert leases.take(0, ["depth"], (32, 96)) is None
    assert leases.take(0, ["depth"]) is None


def test_of_many_takers_at_once_one_gets_it(store: Store) -> None:
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: Leases(store).take(0, ["depth"]), range(8)))
    assert sum(lease is not None for lease in taken) == 1
    assert len(store.files("leases/shard-00000")) == 1


def test_a_lease_of_a_process_that_is_gone_is_free_at_once(tmp_path: Path, store: Store) -> None:
    code = "import sys, os; from dataengine.leases import Leases; from dataengine.storage import Store\n"
    code += "Leases(Store(sys.argv[1])).take(0, ['depth']); os._exit(1)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1], check=False)
    assert store.files("leases/shard-00000") == ["000001.json"]
    lease = Leases(store).take(0, ["depth"])
    assert lease is not None
    assert store.files("leases/shard-00000") == ["000002.json"]


def elsewhere(store: Store, beat: int) -> str:
    """A lease of a process on another machine."""
    record = {"owner": "other", "cells": ["depth"], "rows": None, "beat": beat, "host": "far", "pid": 1, "born": 1}
    store.put("leases/shard-00000/000007.json", json.dumps(record).encode())
    return "leases/shard-00000/000007.json"


def test_a_silent_machine_loses_its_lease_and_one_that_beats_does_not(store: Store) -> None:
    elsewhere(store, 1)
    leases = Leases(store, seconds=1.0)
    assert leases.take(0, ["depth"]) is None
    time.sleep(0.7)
    elsewhere(store, 2)
    assert leases.take(0, ["depth"]) is None
    time.sleep(0.5)
    assert leases.take(0, ["depth"]) is None  # 1.2 s after the first look, but 0.5 s after the last beat
    until = time.monotonic() + 10
    while (lease := leases.take(0, ["depth"])) is None and time.monotonic() < until:
        time.sleep(0.05)
    assert lease is not None
    assert lease.path == "leases/shard-00000/000008.json"
    assert store.files("leases/shard-00000") == ["000008.json"]


def test_a_holder_whose_lease_was_taken_over_is_told_and_does_not_revive_it(store: Store) -> None:
    lease = Leases(store, seconds=0.2).take(0, ["depth"])
    assert lease is not None
    store.remove(lease.path)
    with pytest.raises(LeaseLost, match="silent for longer"):
        lease.check()
    time.sleep(0.2)  # three of its beats
    assert store.files("leases/shard-00000") == []


def test_a_held_lease_beats(store: Store) -> None:
    lease = Leases(store, seconds=0.2).take(0, ["depth"])
    assert lease is not None
    until = time.monotonic() + 5
    while json.loads(store.read(lease.path))["beat"] < 3 and time.monotonic() < until:
        time.sleep(0.02)
    assert json.loads(store.read(lease.path))["beat"] >= 3


def test_gc_leaves_alone_what_a_live_run_is_at_work_on(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    for path in (
        "staging/depth/shard-00000/abc/000000-000008-0.tar",
        "staging/depth/shard-00001/abc/000000-000008-0.tar",
        "staging/normal/shard-00000/abc/000000-000008-0.tar",
        "depth/shard-00000.tar",
        "depth/shard-00001.tar",
    ):
        dataset.store.put(path, b"x")
    with Leases(dataset.store).take(0, ["depth"]) or pytest.fail("free"):
        assert dataset.orphans(Leases(dataset.store).at_work()) == [
            "depth/shard-00001.tar",
            "staging/depth/shard-00001/abc/000000-000008-0.tar",
            "staging/normal/shard-00000/abc/000000-000008-0.tar",
        ]
    assert len(dataset.orphans(Leases(dataset.store).at_work())) == 5
