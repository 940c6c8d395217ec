"""Labelers that fail in every way: aligned output, exact reasons, and no row that was healthy is done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dataengine import modalities, validate
from dataengine.attempt import Attempt, out_of_memory
from dataengine.labeler import Labeler, Staged
from dataengine.manifest import Commit, Dataset
from dataengine.plan import plan_labels
from dataengine.pulse import Death, Step, fate
from dataengine.sample import Sample
from dataengine.supervise import Supervised, WorkerDies
from dataengine.work import LabelGroup, Report, Task
from tests.fakes import Inverted, Threshold, Unloadable, ingested, tree
from tests.faulty import KINDS, Faulty, called

REASONS = {
    "raises": "RuntimeError: cannot label this",
    "nan": "invalid value: depth: expected finite",
    "wrong-shape": "invalid value: depth: expected",
    "missing": "gave no depth",
    "wrong-count": "ValueError: gave 0 outputs for 1 samples",
    "hangs": "ended its process every time: hung for more than 2 s",
    "segfaults": "ended its process every time: SIGSEGV",
    "cuda": "ended its process every time: exit code 70",
}


def group(dataset: Dataset, *labelers: Labeler, **settings: float) -> tuple[LabelGroup, tuple[Task, ...]]:
    plan = plan_labels(dataset, [m for x in labelers for m in x.emits], labelers)
    return LabelGroup(dataset.store.url, plan.labelers, **settings), plan.tasks  # type: ignore[arg-type]


def supervised(dataset: Dataset, *labelers: Labeler, batch_seconds: float = 30.0) -> list[Report]:
    worker, tasks = group(dataset, *labelers)
    running = Supervised(worker, "cpu", batch_seconds=batch_seconds)
    try:
        return [running(task) for task in tasks]
    finally:
        running.close()


def the_child() -> psutil.Process:
    (child,) = (p for p in psutil.Process().children() if "supervise._main" in " ".join(p.cmdline()))
    return child


def committed(dataset: Dataset, column: str = "depth", shard: int = 0) -> Commit:
    record = dataset.commit(column, shard)
    assert record is not None
    return record


@pytest.mark.parametrize("kind", KINDS)
def test_a_poisoned_sample_is_found_and_costs_no_other(tmp_path: Path, kind: str) -> None:
    healthy = ingested(tmp_path, 20, shard_size=20, name="healthy")
    supervised(healthy, Faulty())
    dataset, calls = ingested(tmp_path, 20, shard_size=20), tmp_path / "calls"
    keys = dataset.keys(0)
    poisoned = (keys[10],)
    supervised(
        dataset, Faulty(kind=kind, keys=poisoned, calls=str(calls)), batch_seconds=2.0 if kind == "hangs" else 60.0
    )
    record = committed(dataset)
    assert list(record.invalid) == list(poisoned)
    assert record.invalid[poisoned[0]].startswith(REASONS[kind])
    assert validate.verify(dataset) == []
    good, bad = (d.read("depth", 0) for d in (healthy, dataset))
    assert [m.key for m in bad] == list(keys)
    assert [a.data == b.data for a, b in zip(good, bad, strict=True)] == [k not in poisoned for k in keys]
    counts = called(calls)
    # The batch of the poisoned row is cut until that row is alone; those before and after it run once. A process that
    # ends may take the batch along that was being encoded just then.
    lost = 1 if kind in ("hangs", "segfaults", "cuda") else 0
    assert all(counts[k] == 1 for k in keys[16:])
    assert all(counts[k] <= 1 + lost for k in keys[:8])
    assert max(counts[k] for k in keys[8:16]) <= 5
    assert dataset.store.files("leases/shard-00000") == []
    assert list(dataset.store.find()) == [p for p in dataset.store.find() if not p.startswith("staging/")]


def test_two_percent_of_the_samples_fail_and_only_they_are_marked(tmp_path: Path) -> None:
    dataset = ingested(tmp_path, 100, shard_size=50)
    bad = {dataset.keys(0)[7], dataset.keys(1)[31]}
    reports = supervised(dataset, Faulty(kind="raises", keys=tuple(bad)))
    assert {k for shard in (0, 1) for k in committed(dataset, shard=shard).invalid} == bad
    assert [r.cells[0].num_invalid for r in reports] == [1, 1]
    assert reports[0].cells[0].reasons == {"RuntimeError: cannot label this": 1}


def test_memory_for_three_images_is_found_out_and_fills_every_row(tmp_path: Path) -> None:
    dataset, calls = ingested(tmp_path, 40, shard_size=40), tmp_path / "calls"
    (report,) = supervised(dataset, Faulty(fits=3, calls=str(calls)))
    assert committed(dataset).invalid == {}
    sizes = [len(line.split()) for line in calls.read_text().splitlines()]
    assert sizes[:3] == [8, 4, 2]
    assert set(sizes[3:]) == {2}
    assert report.notes[:2] == (
        "faulty: out of memory with 8 images, going on with 4",
        "faulty: out of memory with 4 images, going on with 2",
    )


def test_a_batch_grows_back_slowly_and_more_slowly_when_it_fails_again() -> None:
    sizes: list[int] = []

    def call(samples: Sequence[Sample]) -> list[dict[str, Any]]:
        sizes.append(len(samples))
        if len(samples) > 2:
            raise MemoryError
        return [{"depth": 0.0}] * len(samples)

    attempt = Attempt(Faulty(), call, 8)
    image = {"rgb": np.zeros((2, 2, 3), np.uint8)}
    for i in range(60):
        attempt.label(0, 8 * i, [Sample(f"{j}", image) for j in range(8)], ())
    assert attempt.notes[:3] == [
        "faulty: out of memory with 8 images, going on with 4",
        "faulty: out of memory with 4 images, going on with 2",
        "faulty: trying 4 images at once again",
    ]
    tries = [i for i, size in enumerate(sizes) if size == 4]
    assert [b - a for a, b in pairwise(tries)] == [33, 65, 129]


def test_what_counts_as_out_of_memory() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    for error in (MemoryError(), OutOfMemoryError("x"), RuntimeError("CUDA error: out of memory")):
        assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_the_fate_of_a_step_follows_from_the_deaths_alone() -> None:
    def died(start: int, stop: int, how: str = "SIGSEGV", shard: int = 0) -> Death:
        return Death(Step(shard, "sam", start, stop), how)

    batch, single = Step(0, "sam", 0, 8), Step(0, "sam", 3, 4)
    assert fate([], batch) == "run"
    assert fate([died(0, 8)], batch) == "split"
    assert fate([died(0, 8, "SIGKILL")], batch) == "run"  # perhaps a preemption: the same batch once more
    assert fate([died(0, 8, "SIGKILL")] * 2, batch) == "split"
    assert fate([died(0, 8), died(0, 4), died(2, 4)], single) == "run"
    assert fate([died(0, 8), died(2, 4), died(3, 4)], single) == "ended its process every time: SIGSEGV"
    assert fate([died(0, 8, shard=1)] * 5, batch) == "run"


def test_a_killed_worker_process_goes_on_where_it_was(tmp_path: Path) -> None:
    calm = ingested(tmp_path, 40, shard_size=40, name="calm")
    supervised(calm, Faulty())
    dataset, calls = ingested(tmp_path, 40, shard_size=40), tmp_path / "calls"
    worker, (task,) = group(dataset, Faulty(calls=str(calls), seconds=0.1))
    running = Supervised(worker, "cpu")
    running.wait_started()
    with ThreadPoolExecutor(1) as thread:
        report = thread.submit(running, task)
        while not calls.exists() or len(calls.read_text().splitlines()) < 4:
            time.sleep(0.01)
        child = the_child()
        child.kill()
        assert "SIGKILL" in " ".join(report.result(timeout=60).notes)
    running.close()
    assert tree(tmp_path / "root") == tree(tmp_path / "calm")
    assert max(called(calls).values()) <= 3
    assert all(called(calls)[k] == 1 for k in dataset.keys(0)[:8])


def test_a_drained_worker_leaves_its_rows_to_the_next(tmp_path: Path) -> None:
    calm = ingested(tmp_path, 40, shard_size=40, name="calm")
    supervised(calm, Faulty())
    dataset, calls = ingested(tmp_path, 40, shard_size=40), tmp_path / "calls"
    worker, (task,) = group(dataset, Faulty(calls=str(calls), seconds=0.1))
    running = Supervised(worker, "cpu")
    with ThreadPoolExecutor(1) as thread:
        report = thread.submit(running, task)
        while not calls.exists() or len(calls.read_text().splitlines()) < 2:
            time.sleep(0.01)
        running.drain()
        assert report.result(timeout=30).outcome == "drained"
    running.close()
    assert dataset.committed("depth") == []
    assert dataset.store.files("leases/shard-00000") == []
    before = called(calls)
    supervised(dataset, Faulty(calls=str(calls)))
    assert tree(tmp_path / "root") == tree(tmp_path / "calm")
    assert all(called(calls)[k] == 1 for k in before)


def test_a_frozen_worker_loses_its_shard_and_does_no_damage_when_it_wakes(tmp_path: Path) -> None:
    calm = ingested(tmp_path, 16, shard_size=16, name="calm")
    supervised(calm, Faulty())
    dataset, calls = ingested(tmp_path, 16, shard_size=16), tmp_path / "calls"
    worker, (task,) = group(dataset, Faulty(calls=str(calls), seconds=0.3), lease_seconds=1.0)
    zombie = Supervised(worker, "cpu", batch_seconds=3600)
    with ThreadPoolExecutor(1) as thread:
        late = thread.submit(zombie, task)
        while not calls.exists():
            time.sleep(0.01)
        child = the_child()
        os.kill(child.pid, signal.SIGSTOP)
        other = Supervised(worker, "cpu")
        until = time.monotonic() + 30
        while (outcome := other(task).outcome) == "busy" and time.monotonic() < until:
            time.sleep(0.1)
        assert outcome == "done"
        other.close()
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "root").rglob("*.tar")}
        os.kill(child.pid, signal.SIGCONT)
        assert late.result(timeout=30).outcome == "busy"
    zombie.close()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "root").rglob("*.tar")} == before
    assert tree(tmp_path / "root") == tree(tmp_path / "calm")


def test_two_workers_on_one_shard_do_it_once(tmp_path: Path) -> None:
    dataset, calls = ingested(tmp_path, 16, shard_size=16), tmp_path / "calls"
    worker, (task,) = group(dataset, Faulty(calls=str(calls), seconds=0.2))
    works = [worker.start("cpu") for _ in range(2)]
    barrier = threading.Barrier(2)

    def run(i: int) -> str:
        barrier.wait()
        return works[i](task).outcome

    with ThreadPoolExecutor(2) as threads:
        outcomes = sorted(threads.map(run, range(2)))
    assert outcomes == ["busy", "done"]
    assert set(called(calls).values()) == {1}


def test_what_keeps_a_worker_from_starting_is_raised(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    worker, (task, *_) = group(dataset, Unloadable())
    running = Supervised(worker, "cpu")
    with pytest.raises(FileNotFoundError, match="no weights at all"):
        running.wait_started()
    with pytest.raises((FileNotFoundError, WorkerDies)):
        running(task)


def test_what_a_labeler_prepares_is_made_ahead_in_other_threads_and_only_where_it_can_be(tmp_path: Path) -> None:
    dataset, where = ingested(tmp_path, 20, shard_size=20), set[str]()
    broken = dataset.keys(0)[3]

    def prepare(sample: Sample) -> float:
        where.add(threading.current_thread().name.split("_")[0])
        if sample.key == broken:
            raise RuntimeError("cannot prepare this")
        return float(sample.rgb[..., 1].max()) / 255

    worker, (task,) = group(dataset, Faulty())
    work = worker.start("cpu")
    shape = {k: Sample(k, {"rgb": decode(dataset, k)}).size for k in dataset.keys(0)}
    keys = iter(k for k in dataset.keys(0) if k != broken)
    call = Staged(prepare, lambda made: [{"depth": np.full(shape[next(keys)], m, np.float32)} for m in made])
    work.attempts[0].call = call  # type: ignore[attr-defined]
    work(task)
    assert committed(dataset).invalid == {broken: "RuntimeError: cannot prepare this"}
    assert "codec" in where


def decode(dataset: Dataset, key: str) -> np.ndarray:
    (found,) = (m.data for m in dataset.read("rgb", 0) if m.key == key)
    image: np.ndarray = modalities.load("rgb").decode(found)
    return image


def test_a_shard_done_in_ranges_by_several_workers_has_the_bytes_of_one_done_whole(tmp_path: Path) -> None:
    calm = ingested(tmp_path, 60, shard_size=60, name="calm")
    (marked,) = [k for k in calm.keys(0) if "image009" in k]
    (failing,) = [k for k in calm.keys(0) if "image030" in k]
    labelers = (Faulty(kind="raises", keys=(marked,)), Threshold(fail_on=(failing,)), Inverted())
    worker, (task,) = group(calm, *labelers)
    worker.start("cpu")(task)
    dataset, calls = ingested(tmp_path, 60, shard_size=60), tmp_path / "calls"
    worker, (task,) = group(dataset, replace(labelers[0], calls=str(calls)), *labelers[1:])
    one, other = (worker.start("cpu") for _ in range(2))
    with pytest.raises(ValueError, match="cut batches"):
        one(replace(task, rows=(0, 8)))  # a batch of eight, but not three of three
    assert [
        w(replace(task, rows=rows)).outcome for w, rows in ((other, (24, 48)), (one, (0, 24)), (one, (48, 60)))
    ] == ["done"] * 3
    assert dataset.committed("depth") == []
    counts = called(calls)
    other(task)
    assert called(calls) == counts
    assert tree(tmp_path / "root") == tree(tmp_path / "calm")
    assert committed(dataset, "sam_edge").invalid == {failing: "input canny_edge is not valid"}


def test_what_a_killed_worker_left_on_its_machine_is_cleared_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (there := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(there))
    monkeypatch.setattr(tempfile, "tempdir", None)
    dataset = ingested(tmp_path)
    worker, _ = group(dataset, Faulty())
    code = "import os, pickle, sys; from dataengine.supervise import Supervised\n"
    code += "from dataengine.work import LabelGroup; from tests.faulty import Faulty\n"
    code += "Supervised(LabelGroup(sys.argv[1], (Faulty(),)), 'cpu').wait_started(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, dataset.store.url], cwd=Path(__file__).parents[1], check=False)
    (left,) = there.glob("dataengine-worker-*")
    running = Supervised(worker, "cpu")
    running.wait_started()
    assert not left.exists()
    assert len(list(there.glob("dataengine-worker-*"))) == 1
    running.close()
    assert list(there.iterdir()) == []


def test_a_process_killed_while_it_starts_is_started_again(tmp_path: Path) -> None:
    dataset = ingested(tmp_path, 8, shard_size=8)
    worker, (task,) = group(dataset, Faulty())
    running = Supervised(worker, "cpu")
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            the_child().kill()
            break
        except (ValueError, psutil.Error):
            time.sleep(0.001)
    began = time.monotonic()
    assert running(task).outcome == "done"
    assert time.monotonic() - began < 60
    running.close()
    with pytest.raises(WorkerDies):
        running(task)
