"""The index of the commit records says what they say, costs one listing when nothing changed, and is never truth."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dataengine import index
from dataengine.index import Index
from dataengine.manifest import Dataset
from dataengine.storage import Store, StoreError
from pipelines import look
from tests.fakes import ingested

CACHE = Path(index.PATH)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Ten images in three shards, ingested long ago."""
    made = ingested(tmp_path)
    age(tmp_path / "root")
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the records that were read since the start of the test."""
    seen: list[str] = []
    read = index._read

    def counted(store: Store, paths: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        for path, data in read(store, paths):
            seen.append(path)
            yield path, data

    monkeypatch.setattr(index, "_read", counted)
    return seen


def age(root: Path) -> None:
    """Make the commit records an hour old."""
    then = time.time() - 3600
    for path in (root / "commits").rglob("*.json"):
        os.utime(path, (then, then))


def agrees(found: Index, dataset: Dataset) -> None:
    """The index says what each record says."""
    assert set(found.modalities()) == set(dataset.modalities())
    for m in dataset.modalities():
        records = [record for shard in dataset.committed(m) if (record := dataset.commit(m, shard)) is not None]
        assert found.shards(m) == [r.shard for r in records]
        assert found.specs(m) == {r.shard: r.spec for r in records}
        assert found.num_samples(m) == {r.shard: r.num_samples for r in records}
        assert found.failed(m) == [r.shard for r in records if r.invalid]
        assert {r.file for r in records} <= set(found.files())
        totals = found.totals(m)
        assert (totals.num_cells, totals.num_bytes) == (len(records), sum(r.num_bytes for r in records))
        assert (totals.maker, totals.random) == (look.maker(records[0]), False)


def change(root: Path, name: str, **values: Any) -> None:
    path = root / "commits" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_nothing_is_read_again_that_did_not_change(dataset: Dataset, asked: list[str]) -> None:
    root = Path(dataset.store.base)
    agrees(Index.open(dataset.store), dataset)
    assert len(asked) == 9
    asked.clear()
    agrees(Index.open(dataset.store), dataset)
    assert asked == []
    change(root, "caption/shard-00001.json", spec="another", invalid={"key": "why"})
    dataset.uncommit("rgb", 2)
    found = Index.open(dataset.store)
    assert asked == ["commits/caption/shard-00001.json"]
    assert (found.specs("caption")[1], found.failed("caption"), found.shards("rgb")) == ("another", [1], [0, 1])
    agrees(found, dataset)
    for shard in (0, 1):
        dataset.uncommit("rgb", shard)
    assert Index.open(dataset.store).modalities() == ["caption", "crop_settings"]


def test_a_record_replaced_in_the_same_tick_of_the_clock_is_seen(dataset: Dataset) -> None:
    path = Path(dataset.store.base, "commits/rgb/shard-00000.json")
    change(Path(dataset.store.base), "rgb/shard-00000.json", spec="before")
    Index.open(dataset.store)
    (before,) = [e for e in dataset.store.entries("commits/rgb") if e.name == path.name]
    stat = path.stat()
    # In place and with its times put back: size, time and number of the file are those of the record before it.
    path.write_text(path.read_text().replace("before", "behind"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert before in dataset.store.entries("commits/rgb")
    assert Index.open(dataset.store).specs("rgb")[0] == "behind"


def lost(cache: Path) -> None:
    cache.unlink()


def cut(cache: Path) -> None:
    cache.write_bytes(cache.read_bytes()[:-100])


def flipped(cache: Path) -> None:
    data = bytearray(cache.read_bytes())
    data[len(data) // 2] ^= 1
    cache.write_bytes(bytes(data))


def emptied(cache: Path) -> None:
    cache.write_bytes(b"")


def of_another_program(cache: Path) -> None:
    sink = pa.BufferOutputStream()
    batch = pa.record_batch({"modality": ["rgb"], "shard": [0]})
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getvalue().to_pybytes()
    cache.write_bytes(data + index.hashlib.sha256(data).digest())


def no_arrow(cache: Path) -> None:
    cache.write_bytes(b"not arrow" + index.hashlib.sha256(b"not arrow").digest())


@pytest.mark.parametrize("damage", [lost, cut, flipped, emptied, of_another_program, no_arrow])
def test_a_lost_or_damaged_cache_costs_time_and_nothing_else(
    dataset: Dataset, asked: list[str], damage: Callable[[Path], None]
) -> None:
    cache = Path(dataset.store.base) / CACHE
    Index.open(dataset.store)
    whole = cache.read_bytes()
    damage(cache)
    asked.clear()
    agrees(Index.open(dataset.store), dataset)
    assert len(asked) == 9
    assert cache.read_bytes() == whole
    asked.clear()
    agrees(Index.open(dataset.store), dataset)
    assert asked == []


def test_a_root_that_cannot_be_written_has_no_cache(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(store: Store, path: str, data: bytes) -> None:
        raise StoreError(f"writing {path}: read-only file system")

    monkeypatch.setattr(Store, "put", refuse)
    agrees(Index.open(dataset.store), dataset)
    assert not (Path(dataset.store.base) / CACHE).exists()


def test_many_at_once_do_one_another_no_harm(dataset: Dataset, asked: list[str]) -> None:
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda _: Index.open(dataset.store), range(16)):
            agrees(found, dataset)
    asked.clear()
    agrees(Index.open(dataset.store), dataset)
    assert asked == []


def test_a_cell_that_is_forgotten_while_the_index_opens_is_no_cell(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = Store.entries

    def then_forgotten(store: Store, folder: str) -> list[Any]:
        found = entries(store, folder)
        if folder == "commits/rgb":
            dataset.uncommit("rgb", 1)
        return found

    monkeypatch.setattr(Store, "entries", then_forgotten)
    assert Index.open(dataset.store).shards("rgb") == [0, 2]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"spec": 1}', '{"provenance": 3}'])
def test_what_is_no_record_is_named(dataset: Dataset, text: str) -> None:
    Path(dataset.store.base, "commits/rgb/shard-00001.json").write_text(text)
    with pytest.raises(ValueError, match=r"commits/rgb/shard-00001.json is no commit record"):
        Index.open(dataset.store)


def test_any_store_has_an_index(dataset: Dataset) -> None:
    there = Store(f"memory://{Path(dataset.store.base).parent.name}")
    for path in dataset.store.find():
        there.put(path, dataset.store.read(path))
    agrees(Index.open(there), dataset)
    assert there.exists(index.PATH)
    agrees(Index.open(there), dataset)


def test_orphans_are_what_no_record_names(dataset: Dataset) -> None:
    root = Path(dataset.store.base)
    assert dataset.orphans() == []
    left = [
        "caption/.staging/abc",
        "commits/rgb/.staging/abc",
        "commits/rgb/notes.txt",
        "depth/shard-00000.tar",
        "leases/shard-00000/1.json",
        "rgb/shard-00007.tar",
        "staging/depth/shard-00000/0123456789abcdef/0-8.tar",
    ]
    for path in left:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"half")
    assert dataset.orphans() == left
    assert dataset.orphans(lambda path: path.startswith(("leases/", "staging/"))) == [*left[:4], left[5]]
    assert dataset.modalities() == ["rgb", "caption", "crop_settings"]


def test_a_cell_that_is_committed_while_orphans_are_looked_for_is_none(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, data = dataset.commit("rgb", 0), dataset.store.read("rgb/shard-00000.tar")
    assert record is not None
    find = Store.find

    def then_committed(store: Store) -> list[str]:
        found = list(find(store))
        dataset.record(record)
        return found

    dataset.uncommit("rgb", 0)
    dataset.store.publish("rgb/shard-00000.tar", data)
    assert dataset.orphans() == ["rgb/shard-00000.tar"]
    monkeypatch.setattr(Store, "find", then_committed)
    assert dataset.orphans() == []
