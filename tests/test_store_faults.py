"""Through a store that resets, refuses, cuts and lies, a dataset gets the bytes it has on a disk, or a clear error."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dataengine import _objects, _patience, _s3, local, validate
from dataengine.ingest import IngestSettings, prepare
from dataengine.manifest import Dataset
from dataengine.storage import Store, StoreError
from tests.fakes import Inverted, Threshold, tree, write_images
from tests.faulty_s3 import Fault, FaultyS3, s3_server
from tests.test_storage import label

# botocore and moto still use names that newer Pythons and libraries deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PREFIX = "s3://corpus"


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with s3_server("corpus") as url:
        yield url


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many attempts as ever, with hardly a wait between them."""
    _objects._conditional.clear()
    monkeypatch.setattr(_patience, "patience", _patience.Patience(first=0.001, longest=0.02))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("corpus") / "images", 2)


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed")
    make(Dataset(root), images)
    return tree(root)


@pytest.fixture(scope="module")
def between(upstream: str) -> Iterator[FaultyS3]:
    proxy = FaultyS3(upstream)
    with proxy as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        yield proxy


@pytest.fixture
def proxy(between: FaultyS3) -> FaultyS3:
    """What stands between this process and the server; faultless until told otherwise."""
    return between.obey()


@pytest.fixture
def root(tmp_path: Path) -> str:
    return f"{PREFIX}/{tmp_path.name}"


def make(dataset: Dataset, images: Path) -> None:
    """One shard of two images: three cells of ingest, two labels of which one is the other's input."""
    worker, tasks = prepare(dataset, f"folder:{images}", IngestSettings(shard_size=2, num_crops=2))
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda r: None)
    label(dataset, (Threshold(), Inverted()))


def contents(upstream: str, root: str) -> dict[str, bytes]:
    """What is visible below a root, asked of the server itself."""
    client = s3(upstream)
    prefix = root.removeprefix(f"{PREFIX}/") + "/"
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="corpus", Prefix=prefix)
    keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
    read = {k.removeprefix(prefix): client.get_object(Bucket="corpus", Key=k)["Body"].read() for k in keys}
    return {k: v for k, v in read.items() if not k.startswith("runs/")}


def unfinished(upstream: str) -> list[str]:
    return [u["Key"] for u in s3(upstream).list_multipart_uploads(Bucket="corpus").get("Uploads", [])]


@functools.cache
def s3(upstream: str):  # type: ignore[no-untyped-def]
    import boto3

    return boto3.client("s3", endpoint_url=upstream)


COMPLETE = {"method": "POST", "target": "uploadId="}
FAULTS = {
    "reset before": Fault("reset"),
    "reset after": Fault("reset", when="after"),
    "500 before": Fault("answer", status=500),
    "500 after": Fault("answer", status=500, when="after"),
    "503": Fault("answer", status=503, code="SlowDown"),
    "429": Fault("answer", status=429, code="TooManyRequests"),
    "409": Fault("answer", status=409, code="ConditionalRequestConflict", method="PUT"),
    "412 before": Fault("answer", status=412, code="PreconditionFailed", method="PUT"),
    "412 after": Fault("answer", status=412, code="PreconditionFailed", method="PUT", when="after"),
    "upload cut": Fault("cut_upload", method="PUT"),
    "download cut": Fault("cut_download", method="GET"),
    "download shortened": Fault("shorten", method="GET"),
}
LATE_FAULTS = {
    **{name: fault for name, fault in FAULTS.items() if not name.startswith("4")},
    "409": Fault("answer", status=409, code="ConditionalRequestConflict", **COMPLETE),
    "412 before": Fault("answer", status=412, code="PreconditionFailed", **COMPLETE),
    "412 after": Fault("answer", status=412, code="PreconditionFailed", when="after", **COMPLETE),
    "200 that is an error": Fault("answer", status=200, when="after", **COMPLETE),
    "end cut": Fault("cut_upload", **COMPLETE),
}


@pytest.mark.parametrize("multipart", [False, True])
def test_every_fault_alone_changes_nothing(
    multipart: bool, proxy: FaultyS3, upstream: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published once, read whole, replaced, listed and deleted, whichever request meets the fault."""
    monkeypatch.setattr(_s3, "MULTIPART", 1 if multipart else 1 << 40)
    store = Store(root)
    assert store.publish("first", b"first")
    for name, fault in (LATE_FAULTS if multipart else FAULTS).items():
        for skip in (0,) if fault.target == COMPLETE["target"] else (0, 1):
            proxy.obey(replace(fault, skip=skip))
            path = f"{name}/{skip}.tar"
            assert store.publish(path, name.encode())
            assert not store.publish(path, b"second")
            assert store.read(path) == name.encode()
            assert store.read(path) == name.encode()
            store.put(path, b"third")
            store.put("other", b"fourth")
            assert (store.files(name), store.exists(path)) == ([f"{skip}.tar"], True)
            assert contents(upstream, f"{root}/{name}") == {f"{skip}.tar": b"third"}
            store.remove(path)
            assert not store.exists(path)
            assert (name, proxy.injected.total()) == (name, 1)
            assert unfinished(upstream) == []


@pytest.mark.parametrize("multipart", [False, True])
def test_a_dataset_made_through_every_fault_is_the_undisturbed_one(
    multipart: bool,
    proxy: FaultyS3,
    upstream: str,
    root: str,
    images: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_s3, "MULTIPART", 1 if multipart else 1 << 40)
    faults = LATE_FAULTS if multipart else FAULTS
    often = {COMPLETE["target"]: 12}  # of which there are few; every other request meets a fault at one time in three
    proxy.obey(
        *(
            replace(fault, skip=2 * (i % 6), every=often.get(fault.target, 30), times=None)
            for i, fault in enumerate(faults.values())
        )
    )
    make(Dataset(root), images)
    assert set(proxy.injected) == {fault.kind for fault in faults.values()}
    assert contents(upstream, root) == undisturbed
    assert unfinished(upstream) == []


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_dataset_made_in_a_storm_is_the_undisturbed_one(
    seed: int,
    proxy: FaultyS3,
    upstream: str,
    root: str,
    images: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_s3, "MULTIPART", 8_000)  # some of the objects
    proxy.obey(chance=0.25, seed=seed)
    make(Dataset(root), images)
    assert sum(proxy.injected.values()) > 3
    assert contents(upstream, root) == undisturbed
    assert unfinished(upstream) == []
    assert validate.verify(Dataset(root)) == []


@pytest.mark.parametrize("multipart", [False, True])
def test_a_fault_that_stays_is_told_and_the_next_run_resumes(
    multipart: bool,
    proxy: FaultyS3,
    upstream: str,
    root: str,
    images: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_s3, "MULTIPART", 1 if multipart else 1 << 40)
    proxy.obey(Fault("answer", status=503, code="SlowDown", method="PUT", target="sam_edge/.*tar", times=None))
    with pytest.raises(StoreError, match=r"writing s3://corpus/.*/sam_edge/shard-0000\d.tar failed \(tried 8 times\)"):
        make(Dataset(root), images)
    assert proxy.injected["answer"] == 8  # one layer retries
    half = contents(upstream, root)
    assert not any("sam_edge" in path for path in half)
    assert half.items() <= undisturbed.items()
    assert unfinished(upstream) == []
    proxy.obey()
    make(Dataset(root), images)
    assert contents(upstream, root) == undisturbed


LARGE = os.urandom(11 << 20)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts for LARGE: of the smallest size that S3 takes."""
    monkeypatch.setattr(_s3, "MULTIPART", 5 << 20)
    monkeypatch.setattr(_s3, "RANGE", 5 << 20)


ENDLESS = {
    "a part fails": Fault("answer", status=500, method="PUT", target="partNumber=2", times=None),
    "a part is cut": Fault("cut_upload", method="PUT", target="partNumber=3", times=None),
    "completing fails": Fault("answer", status=500, times=None, **COMPLETE),
    "the last part is refused": Fault("answer", status=403, code="AccessDenied", method="PUT", target="partNumber=3"),
}


@pytest.mark.parametrize("fault", ENDLESS.values(), ids=list(ENDLESS))
@pytest.mark.usefixtures("parts")
def test_an_upload_that_fails_is_aborted_and_nothing_is_visible(
    fault: Fault, proxy: FaultyS3, upstream: str, root: str
) -> None:
    proxy.obey(fault)
    with pytest.raises(StoreError, match=r"writing s3://corpus/.*/cell.tar failed"):
        Store(root).publish("cell.tar", LARGE)
    assert proxy.injected.total() > 0
    assert (contents(upstream, root), unfinished(upstream)) == ({}, [])
    assert "DELETE" in [method for method, target in proxy.seen if "uploadId=" in target]


@pytest.mark.usefixtures("parts")
def test_an_interrupted_upload_is_aborted(
    proxy: FaultyS3, upstream: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.obey()
    store = Store(root)
    assert store.publish("first.tar", b"small")

    def interrupt(futures: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_s3, "completed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.publish("cell.tar", LARGE)
    assert list(contents(upstream, root)) == ["first.tar"]
    assert unfinished(upstream) == []


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("when", ["before", "after"])
def test_completing_that_is_lost_for_ever_is_told_unless_the_object_is_there(
    when: str, proxy: FaultyS3, upstream: str, root: str
) -> None:
    proxy.obey(Fault("reset", when=when, times=8, **COMPLETE))  # type: ignore[arg-type]
    store = Store(root)
    if when == "after":  # the second attempt finds the object: its metadata say whose it is
        assert store.publish("cell.tar", LARGE)
        assert contents(upstream, root) == {"cell.tar": LARGE}
    else:
        with pytest.raises(StoreError, match="tried 8 times"):
            store.publish("cell.tar", LARGE)
        assert contents(upstream, root) == {}
    assert unfinished(upstream) == []


@pytest.mark.usefixtures("parts")
def test_what_killed_uploads_left_can_be_aborted(proxy: FaultyS3, upstream: str, root: str) -> None:
    proxy.obey()
    prefix = root.removeprefix(f"{PREFIX}/")
    for key in (f"{prefix}/depth/a.tar", f"{prefix}-other/a.tar"):
        s3(upstream).create_multipart_upload(Bucket="corpus", Key=key)
    store = Store(root)
    assert store.abort_uploads(older=1e9) == []
    assert store.abort_uploads(older=0) == ["depth/a.tar"]
    assert unfinished(upstream) == [f"{prefix}-other/a.tar"]
    assert Store(f"{root}-other").abort_uploads(older=0) == ["a.tar"]


@pytest.mark.usefixtures("parts")
def test_of_two_writers_one_of_whom_is_answered_late_one_wins(
    proxy: FaultyS3, upstream: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes from both, so that only the object's metadata tell whose it is."""
    for size in (1 << 10, 11 << 20):
        proxy.obey(Fault("reset", when="after", method="PUT|POST", every=2, times=None))
        stores = [Store(root) for _ in range(4)]
        with ThreadPoolExecutor(4) as threads:
            won = list(threads.map(lambda s, n=size: s.publish(f"{n}.tar", LARGE[:n]), stores))
        assert won.count(True) == 1
        assert contents(upstream, root)[f"{size}.tar"] == LARGE[:size]
        assert unfinished(upstream) == []


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_large_object_is_read_in_few_parallel_ranges_and_a_small_one_at_once(
    proxy: FaultyS3, upstream: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_s3, "RANGE", 1 << 20)
    client, prefix = s3(upstream), root.removeprefix(f"{PREFIX}/")
    for name, size in (("large", 4_500_000), ("range", 1 << 20), ("small", 10), ("empty", 0)):
        client.put_object(Bucket="corpus", Key=f"{prefix}/{name}", Body=LARGE[:size])
        proxy.obey()
        assert Store(root).read(name) == LARGE[:size]
        assert [method for method, _ in proxy.seen] == ["GET"] * {"large": 5, "range": 1, "small": 1, "empty": 2}[name]
        proxy.obey(Fault("cut_download", method="GET", every=2, times=None))
        assert Store(root).read(name) == LARGE[:size]
        assert proxy.injected["cut_download"] > 0


def test_an_object_replaced_while_it_is_read_is_never_a_mixture(
    proxy: FaultyS3, upstream: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_s3, "RANGE", 1 << 20)
    key = root.removeprefix(f"{PREFIX}/") + "/cell.tar"
    client = s3(upstream)
    client.put_object(Bucket="corpus", Key=key, Body=b"a" * (3 << 20))

    meets = proxy.fault

    def replacing(method: str, target: str) -> Fault | None:
        if len(proxy.seen) == 1:
            client.put_object(Bucket="corpus", Key=key, Body=b"b" * (3 << 20))
        return meets(method, target)

    monkeypatch.setattr(proxy, "fault", replacing)
    assert Store(root).read("cell.tar") == b"b" * (3 << 20)


# -- stores that know no conditional put ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 6 << 20])
@pytest.mark.parametrize("how", ["ignored", "501"])
@pytest.mark.usefixtures("parts")
def test_a_store_without_conditional_puts_is_found_out_and_served(
    how: str,
    size: int,
    proxy: FaultyS3,
    upstream: str,
    root: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusal = Fault("answer", status=501, code="NotImplemented", method="PUT", target="probe", times=None)
    if how == "ignored":
        proxy.obey(drop_headers=["If-None-Match"])
    else:
        proxy.obey(refusal)
    with caplog.at_level(logging.WARNING, logger="dataengine"):
        for name in ("a.tar", "b.tar"):
            assert Store(root).publish(name, LARGE[:size])
            assert not Store(root).publish(name, b"second")
    (warning,) = [r.getMessage() for r in caplog.records]
    assert warning.startswith(f"{root} has no conditional put")
    assert contents(upstream, root) == {"a.tar": LARGE[:size], "b.tar": LARGE[:size]}
    assert Store(root).files("runs") == []
    proxy.obey(Fault("reset", when="after", method="PUT", times=1, skip=3), drop_headers=["If-None-Match"])
    assert Store(root).publish("c.tar", LARGE[:size])
