"""A full, a write-protected or an unusual disk: nothing is half-written under a final name, and it is told."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dataengine import validate
from dataengine.manifest import Dataset
from dataengine.storage import Store, StoreError
from tests.fakes import Inverted, Threshold, ingested, tree
from tests.test_storage import label

ROOT = Path(__file__).parents[1]


WRITER = """
import os, sys
from dataengine.storage import Store
root, mine, nameless = sys.argv[1:]
if nameless == "named":
    del os.O_TMPFILE
print("ready", flush=True)
sys.stdin.readline()
print(*(int(Store(root).publish(f"depth/{i:02d}.tar", mine.encode() * (1 + i * 1000))) for i in range(40)))
"""


@pytest.mark.parametrize("how", ["nameless", "named"])
def test_of_many_processes_on_one_disk_one_wins_each_file(how: str, tmp_path: Path) -> None:
    """With files that have no name until they are linked, and with names in `.staging/` where the disk has no such."""
    writers = ["a", "b", "c"]
    commands = [[sys.executable, "-c", WRITER, str(tmp_path), w, how] for w in writers]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(c, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for c in commands]
    assert [p.stdout.readline() for p in processes if p.stdout] == ["ready\n"] * 3
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    won = [[int(n) for n in p.communicate()[0].split()] for p in processes]
    assert [sum(each) for each in zip(*won, strict=True)] == [1] * 40
    for i in range(40):
        (winner,) = [w for w, each in zip(writers, won, strict=True) if each[i]]
        assert (tmp_path / f"depth/{i:02d}.tar").read_bytes() == winner.encode() * (1 + i * 1000)
    assert [p.name for p in (tmp_path / "depth").iterdir() if p.is_dir()] == [".staging"] * (how == "named")
    assert len(list(Store(tmp_path).find())) == 40


def test_what_lies_in_staging_is_no_object_and_gc_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.O_TMPFILE")
    store = Store(tmp_path)
    assert store.publish("a/b.txt", b"first")
    assert not store.publish("a/b.txt", b"second")
    assert (store.read("a/b.txt"), store.files("a/.staging")) == (b"first", [])
    (tmp_path / "a/.staging/left.over").write_bytes(b"half")
    (tmp_path / "a/.killed.tmp").write_bytes(b"half")
    (tmp_path / "plan.json").write_text("{}")
    assert store.files("a") == [e.name for e in store.entries("a")] == ["b.txt"]
    assert Dataset(tmp_path).orphans() == ["a/.killed.tmp", "a/.staging/left.over", "a/b.txt"]


def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS asks again, and is told that the name is taken."""
    link = os.link

    def answered_late(*args: object, **options: object) -> None:
        link(*args, **options)  # type: ignore[arg-type]
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr("os.link", answered_late)
    assert Store(tmp_path).publish("a.tar", b"mine")
    assert not Store(tmp_path).publish("a.tar", b"theirs")
    assert tree(tmp_path) == {"a.tar": b"mine"}


def test_a_write_that_the_system_cuts_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("status.json", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        for write in (store.publish, store.put):
            for name in ("cell.tar", "status.json") if write == store.put else ("cell.tar",):
                with pytest.raises(StoreError, match=rf"writing {tmp_path}/{name} failed: .*the file is larger than"):
                    write(name, b"x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert tree(tmp_path) == {"status.json": b"old"}


def test_a_file_that_is_not_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "depth").write_text("")
    with pytest.raises(StoreError, match=r"depth/a.tar failed: .*a file stands where a folder is needed"):
        Store(tmp_path).publish("depth/a.tar", b"")


def on_a_full_and_a_read_only_disk(folder: str) -> None:
    """The body of the next test, in a mount namespace: ingest, label while the disk is full, resume, write-protect."""

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)

    disk = Path(folder, "disk")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)], check=True)
    dataset = ingested(disk)
    before = tree(disk / "root")
    shutil.copytree(disk / "root", Path(folder, "undisturbed"))
    label(Dataset(Path(folder, "undisturbed")), (Threshold(), Inverted()))
    expected = tree(Path(folder, "undisturbed"))
    blocks = os.statvfs(disk)
    used = (blocks.f_blocks - blocks.f_bfree) * blocks.f_frsize
    for room in (0, 4, 8, 12, 16):
        remount(f"size={used + room * 1024}")
        with pytest.raises(StoreError, match=rf"{disk}/.*the disk is full: free some space and run the") as full:
            label(dataset, (Threshold(), Inverted()))
        assert full.value.errno == errno.ENOSPC
        there = tree(disk / "root")
        done = {p: v for p, v in there.items() if not p.startswith(("leases/", "staging/"))}
        assert before.items() <= done.items() <= expected.items(), sorted(done)
    remount("size=16m")
    label(dataset, (Threshold(), Inverted()))
    assert tree(disk / "root") == expected
    remount("ro")
    with pytest.raises(StoreError, match="mounted read-only") as refused:
        dataset.store.publish("depth/shard-00000.tar", b"new")
    assert refused.value.errno == errno.EROFS
    with pytest.raises(StoreError, match="mounted read-only"):
        dataset.store.remove("plan.json")
    assert validate.verify(dataset) == []
    assert tree(disk / "root") == expected


def test_a_full_or_read_only_disk_is_told_and_the_run_resumes(tmp_path: Path) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    possible = subprocess.run(
        [*namespace, "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True, text=True
    )
    if possible.returncode:
        pytest.skip(f"no mount namespace can be had here: {possible.stderr.strip()}")
    body = f"from tests.test_disk import on_a_full_and_a_read_only_disk as body; body({str(tmp_path)!r})"
    done = subprocess.run([*namespace, sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
