"""One cell, many writers: who is first with a record keeps it, and its file holds its bytes, whatever came between."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dataengine import shards
from dataengine.manifest import Commit, Conflict, Dataset, Published

STEPS = ("publish", "read", "take")
FILE = "canny_edge/shard-00000.tar"


def record(data: bytes, spec: str = "same") -> Commit:
    return Commit(
        modality="canny_edge",
        shard=0,
        spec=spec,
        file=FILE,
        num_bytes=len(data),
        sha256=shards.sha256(data),
        num_samples=1,
        keys_sha256="",
    )


def outcome(dataset: Dataset, mine: Commit, data: bytes) -> str:
    try:
        return dataset.publish(mine, data).value
    except Conflict:
        return "conflict"


def test_publishing_says_what_became_of_the_cell(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path)
    assert dataset.publish(record(b"a"), b"a") is Published.NEW
    assert dataset.publish(record(b"a"), b"a") is Published.SAME
    assert dataset.publish(record(b"b"), b"b") is Published.DIFFERS
    with pytest.raises(Conflict, match=r"identity same, here other\); the one that came first is kept"):
        dataset.publish(record(b"a", "other"), b"a")
    assert dataset.store.read(FILE) == b"a"
    assert dataset.commit("canny_edge", 0) == record(b"a")


class Turns:
    """Lets writers make one step each, in an order that is given; one that is finished is passed over."""

    def __init__(self, order: Sequence[int], num_writers: int) -> None:
        # When the order is used up, the writers end one after the other.
        self._order: Iterator[int] = itertools.chain(order, itertools.cycle(range(num_writers)))
        self._open = set(range(num_writers))
        self._changed = threading.Condition()
        self._whose = next(self._order)

    def _pass_on(self) -> None:
        while self._open:
            self._whose = next(self._order)
            if self._whose in self._open:
                break
        self._changed.notify_all()

    def step(self, writer: int, do: Any) -> Any:
        with self._changed:
            assert self._changed.wait_for(lambda: self._whose == writer, timeout=60)
            try:
                return do()
            finally:
                self._pass_on()

    def leave(self, writer: int) -> None:
        with self._changed:
            self._open.discard(writer)
            if self._whose == writer:
                self._pass_on()


def together(root: Path, contents: Sequence[tuple[bytes, str]], order: Sequence[int]) -> list[str]:
    """Writers that publish one cell at once, every touch of the disk in the order given; what each was told."""
    turns, told = Turns(order, len(contents)), [""] * len(contents)

    def write(writer: int, data: bytes, spec: str) -> None:
        dataset = Dataset(root)
        for name in STEPS:
            do = getattr(dataset.store, name)

            def step(*given: Any, _do: Any = do) -> Any:
                return turns.step(writer, lambda: _do(*given))

            setattr(dataset.store, name, step)
        try:
            told[writer] = outcome(dataset, record(data, spec), data)
        finally:
            turns.leave(writer)

    threads = [threading.Thread(target=write, args=(i, *c)) for i, c in enumerate(contents)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def held(root: Path, told: Sequence[str], contents: Sequence[tuple[bytes, str]], seen: str) -> None:
    """One writer won, the file holds its bytes, and each loser knows what it lost to."""
    assert told.count("new") == 1, seen
    data, spec = contents[told.index("new")]
    dataset = Dataset(root)
    there = dataset.commit("canny_edge", 0)
    assert there == record(data, spec), seen
    assert dataset.store.read(FILE) == data, seen
    for (other, its), said in zip(contents, told, strict=True):
        if said != "new":
            assert said == ("conflict" if its != spec else "same" if other == data else "differs"), seen


@pytest.mark.parametrize("other", ["same", "other"])
def test_two_writers_on_the_leftover_of_a_third_in_every_order(
    tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    contents = [(b"first", "same"), (b"second", other)]
    # Six steps each at most until the record: every order of the first ones is tried, either writer ahead.
    orders = [o for o in itertools.product((0, 1), repeat=9) if sum(o) in range(2, 8)]
    for i, order in enumerate(orders):
        root = tmp_path / str(i)
        Dataset(root).store.publish(FILE, b"leftover")
        told = together(root, contents, order)
        held(root, told, contents, f"{order} {told}")


def test_three_writers_in_random_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    contents = [(b"first", "same"), (b"second", "same"), (b"third", "other")]
    rng = random.Random(0)
    for i in range(200):
        root = tmp_path / str(i)
        if i % 2:
            Dataset(root).store.publish(FILE, b"leftover")
        order = [rng.randrange(3) for _ in range(30)]
        told = together(root, contents, order)
        held(root, told, contents, f"{order} {told}")


def test_a_loser_gives_the_winner_its_bytes_back(tmp_path: Path) -> None:
    winner, loser = Dataset(tmp_path), Dataset(tmp_path)
    winner.store.publish(FILE, b"winner")  # its file is there, its record not yet
    publish = loser.store.publish

    def late(path: str, data: bytes) -> bool:
        if path.startswith("commits/"):
            # By now the loser has put its own file in place of what looked like a leftover.
            assert loser.store.read(FILE) == b"loser"
            assert winner.record(record(b"winner")) is Published.NEW
        return publish(path, data)

    loser.store.publish = late  # type: ignore[method-assign]
    assert loser.publish(record(b"loser"), b"loser") is Published.DIFFERS
    assert winner.store.read(FILE) == b"winner"
    assert winner.orphans() == []
