"""Shards in a store are downloaded once a machine, checked, evicted under a budget, and readable while it happens."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dataengine import _opened, packed, stored
from dataengine._patience import StoreError
from dataengine.manifest import Dataset
from dataengine.packed import Column
from dataengine.shard_cache import Remote, ShardCache
from dataengine.storage import Store
from dataengine.stored import Shard, StoredShard, prefetch
from dataengine.work import Task
from pipelines import pack, sources
from tests.faulty_s3 import Fault, FaultyS3, s3_server

# botocore and moto still use names that newer Pythons and libraries deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

COLUMNS = (Column(name="tok_depth@16", kind="tokens", max_tokens=4, vocab_size=65536, side=16, grid=(2, 2)),)
ROWS = 1000
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def between() -> Iterator[FaultyS3]:
    with s3_server("corpus") as upstream:
        proxy = FaultyS3(upstream)
        with proxy as url, pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", url)
            yield proxy


@pytest.fixture
def proxy(between: FaultyS3) -> Iterator[FaultyS3]:
    yield between.obey()
    _opened.held.clear()


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "root")
    request.getfixturevalue("proxy")
    return f"s3://corpus/{tmp_path.name}"


@pytest.fixture
def bucket(proxy: FaultyS3, tmp_path: Path) -> str:
    return f"s3://corpus/{tmp_path.name}"


def made(root: str, num_shards: int = 3, about: bool = True) -> list[int]:
    """A dataset of packed shards, whose ids are the number of the shard and the row; the sizes of their files."""
    dataset, sizes = Dataset(root), []
    for shard in range(num_shards):
        ids = [np.array([[shard, row, 0, 0]], np.uint16) for row in range(ROWS)]
        keys = [f"k{row}" for row in range(ROWS)]
        pieces = packed.pieces(packed.build(COLUMNS, 1, keys, {COLUMNS[0].name: ids}))
        said = {stored.ABOUT: stored.about(COLUMNS, 1)} if about else {}
        report = pack.publish(dataset, COLUMNS, Task(shard, {pack.CELL: "s"}), keys, pieces, said, 0.0)
        sizes.append(report.cells[0].num_bytes)
    assert len(set(sizes)) == 1
    return sizes


def read(shard: Shard, row: int = 7) -> list[int]:
    ids: list[int] = shard.row(row, RNG, ["tok_depth@16"])["tok_depth@16"].tolist()
    return ids


def gets(proxy: FaultyS3, ending: str = ".arrow") -> int:
    return sum(method == "GET" and target.partition("?")[0].endswith(ending) for method, target in proxy.seen)


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    start = "import sys; from pipelines.sources import shards; from dataengine.shard_cache import ShardCache\n"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", start + code, *arguments], stdout=subprocess.PIPE, text=True
    )


def copies(cache: ShardCache) -> list[str]:
    return sorted(p.name for p in cache.base.iterdir() if p.is_file())


def remotes(shards: Sequence[Shard]) -> list[Remote]:
    found = []
    for shard in shards:
        assert isinstance(shard, StoredShard)
        found.append(shard.remote)
    return found


def test_a_dataset_is_known_by_its_records_and_read_row_by_row(root: str, tmp_path: Path) -> None:
    made(root)
    cache = ShardCache(str(tmp_path / "cache"))
    shards = sources.shards(root, cache)
    assert [(len(s), s.num_crops, s.columns) for s in shards] == [(ROWS, 1, {c.name: c for c in COLUMNS})] * 3
    assert not cache.base.exists()
    again: tuple[Shard, ...] = pickle.loads(pickle.dumps(shards))
    assert [read(s, 9) for s in again] == [[0, 9, 0, 0], [1, 9, 0, 0], [2, 9, 0, 0]]
    assert shards[1].keys[:2] == ["k0", "k1"]
    assert shards[1].present(["tok_depth@16"]).tolist() == [[True]] * ROWS
    assert shards[1].lengths(["tok_depth@16"]).tolist() == [[4]] * ROWS
    local = not root.startswith("s3:")
    assert cache.base.exists() != local
    assert all(cache.has(r) for r in remotes(shards)) != local
    prefetch(shards)  # all is here


def test_ten_thousand_shards_open_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(str(tmp_path / "root"), 1)
    record = Dataset(tmp_path / "root").commit(pack.CELL, 0)
    assert record is not None
    dataset = Dataset("memory://bucket/root")
    monkeypatch.setattr(Store, "read", lambda self, path: pytest.fail(f"{path} is read"))
    shards = stored.stored(dataset, [record] * 10_000, ShardCache(str(tmp_path / "cache")))
    assert (len(shards), {len(s) for s in shards}) == (10_000, {ROWS})
    assert len({id(s.columns) for s in shards}) == 1
    assert not (tmp_path / "cache").exists()


def test_a_record_that_does_not_say_what_the_file_holds_has_it_opened(root: str, tmp_path: Path) -> None:
    made(root, 2, about=False)
    shards = sources.shards(root, ShardCache(str(tmp_path / "cache")))
    assert [(len(s), list(s.columns)) for s in shards] == [(ROWS, ["tok_depth@16"])] * 2
    assert read(shards[1]) == [1, 7, 0, 0]


def test_several_processes_download_a_shard_once(proxy: FaultyS3, bucket: str, tmp_path: Path) -> None:
    made(bucket, 2)
    proxy.obey()
    code = """
import numpy as np
found = shards(sys.argv[1], ShardCache(sys.argv[2]))
print(*(s.row(3, np.random.default_rng(0), ["tok_depth@16"])["tok_depth@16"][0] for s in found))
"""
    children = [child(code, bucket, str(tmp_path / "cache")) for _ in range(2)]
    assert [read(s)[0] for s in sources.shards(bucket, ShardCache(str(tmp_path / "cache")))] == [0, 1]
    assert [c.communicate()[0].split() for c in children] == [["0", "1"]] * 2
    assert gets(proxy) == 2
    assert gets(proxy, ".json") == 6


def test_threads_download_a_shard_once_and_fork_keeps_what_is_open(
    proxy: FaultyS3, bucket: str, tmp_path: Path
) -> None:
    made(bucket, 1)
    (shard,) = sources.shards(bucket, ShardCache(str(tmp_path / "cache")))
    proxy.obey()
    threads = [threading.Thread(target=read, args=(shard,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gets(proxy) == 1
    parent, children = os.pipe()
    with _opened.held._lock:  # as if another thread held it just when the process forks
        pid = os.fork()
        if not pid:
            os.write(children, bytes(read(shard)[:2]))
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(parent, 2) == bytes([0, 7])


def test_what_was_used_longest_ago_is_evicted_and_what_is_mapped_last(
    proxy: FaultyS3, bucket: str, tmp_path: Path
) -> None:
    sizes = made(bucket, 4)
    cache = ShardCache(str(tmp_path / "cache"), max_bytes=sum(sizes[:3]) + 5)
    shards = sources.shards(bucket, cache)
    names = [r.sha256 for r in remotes(shards)]
    for i in (0, 1, 2, 0, 1):
        read(shards[i])
        os.utime(cache.base / names[i], (time.time(), 1000 + i + 10 * (i < 2)))
    _opened.held.clear()
    row = shards[3].row(5, RNG, ["tok_depth@16"])
    assert copies(cache) == sorted([names[0], names[1], names[3]])  # 2 is the oldest
    os.utime(cache.base / names[3], (0, 0))
    for i in (2, 0, 1, 2, 0):
        os.close(cache.open(remotes(shards)[i]))
        assert cache.num_bytes() == sum(sizes[:3])
        assert names[3] in copies(cache)  # the oldest, but it is mapped
    assert row["tok_depth@16"].tolist() == [3, 5, 0, 0]


def test_a_mapping_outlives_its_file(proxy: FaultyS3, bucket: str, tmp_path: Path) -> None:
    sizes = made(bucket, 2)
    cache = ShardCache(str(tmp_path / "cache"), max_bytes=sizes[0])
    first, second = sources.shards(bucket, cache)
    assert [read(first, 1), read(second, 1)] == [[0, 1, 0, 0], [1, 1, 0, 0]]
    assert copies(cache) == [remotes([second])[0].sha256]  # though both are mapped
    proxy.obey()
    assert [read(first, row) for row in (2, 999)] == [[0, 2, 0, 0], [0, 999, 0, 0]]
    assert gets(proxy) == 0
    _opened.held.clear()
    assert read(first, 2) == [0, 2, 0, 0]
    assert gets(proxy) == 1


def test_a_process_killed_in_a_download_leaves_nothing_in_the_way(proxy: FaultyS3, bucket: str, tmp_path: Path) -> None:
    sizes = made(bucket, 2)
    proxy.obey(Fault("delay", method="GET", target="arrow", seconds=60))
    folder = tmp_path / "cache"
    killed = child("list(s.keys for s in shards(sys.argv[1], ShardCache(sys.argv[2])))", bucket, str(folder))
    end = time.monotonic() + 20
    while not list(folder.glob("*.partial")) and time.monotonic() < end:
        time.sleep(0.02)
    cache = ShardCache(str(folder), max_bytes=sizes[0])  # no room beside what was left
    first, second = sources.shards(bucket, cache)
    assert cache.num_bytes() == sizes[0]  # its room is taken from the beginning
    assert not cache.fetch(remotes([first])[0], ahead=True)  # somebody does it already
    assert not cache.fetch(remotes([second])[0], ahead=True)  # no room
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(list(folder.glob("*.partial"))) == 1
    assert read(second) == [1, 7, 0, 0]
    assert copies(cache) == [remotes([second])[0].sha256]
    proxy.obey()
    assert read(first) == [0, 7, 0, 0]


def test_what_is_not_what_was_committed_is_refused(
    proxy: FaultyS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = made(bucket, 2)
    cache = ShardCache(str(tmp_path / "cache"))
    first, second = sources.shards(bucket, cache)
    whole, copy = Store(bucket), Store.copy

    def damaged_once(self: Store, path: str, handle: int) -> int:
        monkeypatch.setattr(Store, "copy", copy)
        size = copy(self, path, handle)
        os.pwrite(handle, b"\xff", 4000)
        return size

    monkeypatch.setattr(Store, "copy", damaged_once)
    assert read(first) == [0, 7, 0, 0]  # downloaded once more
    path = remotes([second])[0].path
    whole.put(path, bytes(sizes[1]))
    with pytest.raises(ValueError, match=rf"{bucket}/{path} has {sizes[1]} bytes of sha256 .*, expected .*start again"):
        read(second)
    whole.put(path, b"short")
    with pytest.raises(ValueError, match=rf"has 5 bytes of sha256 .*, expected {sizes[1]} bytes of sha256"):
        read(second)
    whole.remove(path)
    with pytest.raises(StoreError, match="is not there any more: it was made anew or deleted"):
        read(second)
    assert copies(cache) == [remotes([first])[0].sha256]
    _opened.held.clear()
    with (cache.base / remotes([first])[0].sha256).open("ab") as stream:
        stream.write(b"x")  # somebody has meddled with the cache
    assert read(first) == [0, 7, 0, 0]


def test_a_shard_that_cannot_fit_is_told(proxy: FaultyS3, bucket: str, tmp_path: Path) -> None:
    sizes = made(bucket, 1)
    (shard,) = sources.shards(bucket, ShardCache(str(tmp_path / "cache"), max_bytes=sizes[0] - 1))
    with pytest.raises(ValueError, match=f"has {sizes[0]} bytes, the cache .*/cache may hold {sizes[0] - 1}: allow"):
        read(shard)
    with pytest.raises(ValueError, match="max_bytes 0, expected at least 1"):
        ShardCache(max_bytes=0)


def test_a_full_disk_is_told_and_leaves_nothing(
    proxy: FaultyS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(bucket, 1)
    cache = ShardCache(str(tmp_path / "cache"))
    (shard,) = sources.shards(bucket, cache)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match=rf"caching {bucket}.* in {tmp_path}/cache .* failed: .*the disk is full"):
        read(shard)
    assert copies(cache) == []


def test_what_comes_next_is_fetched_ahead_as_far_as_there_is_room(
    proxy: FaultyS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = made(bucket, 5)
    cache = ShardCache(str(tmp_path / "cache"), max_bytes=sum(sizes[:3]))
    shards = sources.shards(bucket, cache)
    read(shards[0])
    proxy.obey()
    prefetch(shards[1:])
    prefetch(shards[1:])
    end = time.monotonic() + 20
    while (_opened.downloads._known or gets(proxy) < 2) and time.monotonic() < end:
        time.sleep(0.01)
    assert gets(proxy) == 2  # of four: neither what is in use nor what was fetched goes for the others
    names = [r.sha256 for r in remotes(shards)]
    assert names[0] in copies(cache)
    ahead = [i for i in range(5) if f"{names[i]}.ahead" in copies(cache)]
    assert len(ahead) == 2
    for i in ahead:
        assert read(shards[i])[0] == i
    assert gets(proxy) == 2
    assert sorted(copies(cache)) == sorted(names[i] for i in (0, *ahead))
    _opened.held.clear()
    assert cache.fetch(remotes(shards)[({1, 2, 3, 4} - set(ahead)).pop()], ahead=True)  # what was used goes for it
    proxy.obey(Fault("answer", status=403, code="AccessDenied", times=None))
    said: list[object] = []
    monkeypatch.setattr(_opened.log, "warning", lambda *args: said.append(args))
    prefetch(sources_left := [s for s in shards if not cache.has(remotes([s])[0])])
    while _opened.downloads._known and time.monotonic() < end:
        time.sleep(0.01)
    assert len(said) == len(sources_left)


def test_the_environment_of_a_machine_says_where_and_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ShardCache.of_machine() == ShardCache()
    monkeypatch.setenv("DATAENGINE_CACHE", "/scratch")
    monkeypatch.setenv("DATAENGINE_CACHE_GB", "1.5")
    assert ShardCache.of_machine() == ShardCache("/scratch", 1_500_000_000)
    for bad in ("much", "inf", "0", "-1"):
        monkeypatch.setenv("DATAENGINE_CACHE_GB", bad)
        with pytest.raises(ValueError, match=r"DATAENGINE_CACHE_GB is|expected at least 1"):
            ShardCache.of_machine()


@pytest.mark.parametrize(("free", "held", "limit"), [(500_000, 0, 450_000), (20_000, 80_000, 90_000), (0, 0, 0)])
def test_without_a_number_a_tenth_of_what_is_free_or_held_is_left(
    free: int, held: int, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(str(tmp_path / "cache"))
    if held:
        cache.base.mkdir()
        (cache.base / "copy").write_bytes(bytes(held))
    disk = SimpleNamespace(f_bavail=free // 1000, f_frsize=1000, f_blocks=10**9)  # of a terabyte
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    assert cache._limit() == limit
