"""Objects appear whole or not at all, on a local disk and on a real S3 API."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dataengine import _objects, local, storage, validate
from dataengine.ingest import IngestSettings, prepare
from dataengine.manifest import Conflict, Dataset, Plan
from dataengine.plan import plan_labels
from dataengine.storage import Store, StoreError
from tests.fakes import Inverted, Threshold, ingested, tree, write_images
from tests.faulty_s3 import s3_server

# botocore and moto still use names that newer Pythons and libraries deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket on an S3 server of this process."""
    with s3_server("corpus"):
        yield "s3://corpus"


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store(tmp_path / "root")
    return Store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def test_the_first_writer_wins_and_the_loser_is_told(store: Store) -> None:
    assert store.publish("a/b.txt", b"first")
    assert not store.publish("a/b.txt", b"second")
    assert store.read("a/b.txt") == b"first"
    assert store.exists("a/b.txt")
    assert (store.files("a"), store.files("nothing")) == (["b.txt"], [])
    assert list(store.find()) == ["a/b.txt"]
    store.remove("a/b.txt")
    assert not store.exists("a/b.txt")
    with pytest.raises(FileNotFoundError):
        store.read("a/b.txt")


def test_a_put_creates_and_replaces(store: Store) -> None:
    store.put("leases/0.json", b"first")
    (before,) = store.entries("leases")
    store.put("leases/0.json", b"second and longer")
    (after,) = store.entries("leases")
    assert store.read("leases/0.json") == b"second and longer"
    assert (before.name, before.size, after.size) == ("0.json", 5, 17)
    assert before.tag != after.tag
    assert store.entries("leases") == [after]
    assert list(store.find()) == ["leases/0.json"]


def test_a_listing_names_every_object_of_a_folder_and_no_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "7")  # several pages
    names = [f"shard-{i:05d}.json" for i in range(23)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: store.put(f"commits/rgb/{n}", n.encode()), names))
    store.put("commits/rgb/deeper/file", b"")
    store.put("commits/rgbb", b"")
    assert [e.name for e in store.entries("commits/rgb")] == store.files("commits/rgb") == names
    assert {e.size for e in store.entries("commits/rgb")} == {16}
    assert (store.folders("commits/rgb"), store.folders("commits")) == (["deeper"], ["rgb"])
    assert store.entries("commits/nothing") == []
    paths = [f"commits/rgb/{n}" for n in [*names, "missing.json"]]
    assert list(store.read_many(paths)) == [*((p, p[-16:].encode()) for p in paths[:-1]), (paths[-1], None)]
    store.remove_many([*paths, "commits/rgb/deeper/file"])
    assert list(store.find()) == ["commits/rgbb"]


def test_of_many_writers_at_once_one_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda i: store.publish("cell.tar", bytes([i]) * 1000), range(8)))
    assert won.count(True) == 1
    assert store.read("cell.tar") == bytes([won.index(True)]) * 1000


def label(dataset: Dataset, labelers: Sequence[Threshold | Inverted]) -> None:
    plan = plan_labels(dataset, ["sam_edge"], labelers)
    local.run(plan.group(dataset.store.url), plan.tasks, workers=1, device="cpu", on_report=lambda r: None)


def test_a_dataset_on_s3_has_the_bytes_of_one_on_disk(tmp_path: Path, bucket: str) -> None:
    here = ingested(tmp_path)
    label(here, (Threshold(), Inverted()))
    there = Dataset(f"{bucket}/dataset")
    worker, tasks = prepare(there, f"folder:{tmp_path}/images", IngestSettings(shard_size=4, num_crops=2))
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda r: None)
    label(there, (Threshold(), Inverted()))
    kept = [path for path in there.store.find() if not path.startswith("runs/")]
    assert {path: there.store.read(path) for path in kept} == tree(tmp_path / "root")
    assert validate.verify(there) == []
    assert there.orphans() == []
    again = plan_labels(there, ["sam_edge"], (Threshold(), Inverted()))
    assert (again.num_cells, again.num_done) == (0, 3)


def test_a_corpus_on_s3_is_read_as_one_on_disk(tmp_path: Path, bucket: str) -> None:
    images = write_images(tmp_path / "images", 4)
    fs, path = storage.split_url(f"{bucket}/images")
    fs.put(str(images), path, recursive=True)
    found = []
    for name, corpus in (("disk", f"folder:{images}"), ("s3", f"folder:{bucket}/images")):
        dataset = Dataset(tmp_path / name)
        worker, tasks = prepare(dataset, corpus, IngestSettings(shard_size=2))
        local.run(worker, tasks, workers=1, device="cpu", on_report=lambda r: None)
        found.append({k: v for k, v in tree(tmp_path / name).items() if k.endswith(".tar")})
    assert len(found[0]) == 6
    assert [v for _, v in sorted(found[0].items())] == [v for _, v in sorted(found[1].items())]


def test_a_plan_is_written_once(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    plan = dataset.plan
    dataset.write_plan(plan)
    changed = Plan(**{**vars(plan), "seed": 9})
    with pytest.raises(Conflict, match="seed: 0 there, 9 asked"):
        dataset.write_plan(changed)
    assert json.loads((tmp_path / "root/plan.json").read_text())["seed"] == 0


@pytest.fixture
def memory() -> Iterator[str]:
    import fsspec

    yield "memory://bucket/root"
    fsspec.filesystem("memory").rm("/", recursive=True)


@pytest.mark.parametrize("heeded", [True, False])
def test_any_other_filesystem_serves_and_is_found_out(
    heeded: bool, memory: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_objects, "RANGE", 1000)
    _objects._conditional.clear()
    if not heeded:
        from fsspec.implementations.memory import MemoryFileSystem

        whole = MemoryFileSystem.pipe_file
        monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda fs, path, value, mode="": whole(fs, path, value))
    store = Store(memory)
    assert [store.publish("a/b.tar", b"1" * 2500), store.publish("a/b.tar", b"2")] == [True, False]
    assert store.read("a/b.tar") == b"1" * 2500
    store.put("a/c", b"3")
    store.put("a/c", b"4")
    assert [(e.name, e.size) for e in store.entries("a")] == [("b.tar", 2500), ("c", 1)]
    assert list(store.read_many(["a/c", "a/d"])) == [("a/c", b"4"), ("a/d", None)]
    assert (store.folders(""), list(store.find())) == (["a"], ["a/b.tar", "a/c"])
    store.remove_many(["a/b.tar", "a/c", "a/d"])
    assert (list(store.find()), store.exists("a/c"), store.abort_uploads(older=0)) == ([], False, [])
    assert ["no conditional put" in r.getMessage() for r in caplog.records] == ([] if heeded else [True])


def test_a_filesystem_where_files_grow_under_their_name_is_refused() -> None:
    with pytest.raises(StoreError, match=r"https? cannot make an object appear at once"):
        Store("https://127.0.0.1:1/root").put("status.json", b"{}")
