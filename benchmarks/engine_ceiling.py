"""What the engine itself costs: null labelers, twelve modalities, beside a plain loop and beside Ray Data.

python -m benchmarks.engine_ceiling [--quick] [--reference DIR] [--json]

Every way of doing the job decodes the same photographs, gets the same twelve values for each, encodes them with the
same codecs and commits the same tars to the same disk; that they are the same bytes is checked. Each runs in a process
of its own, the ways in one core bound to one core.

Startup is excluded alike: time and processor seconds count from the moment when the last worker has loaded its values
to the last commit record on the disk. Per core: images/s divided by the cores the way may use. The processor seconds
are those of its whole process tree, raylet and driver included.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import _fresh, _null, _plain, _report


@dataclass(frozen=True, kw_only=True)
class Job:
    """One way of doing the job, once."""

    way: str
    root: str
    out: str
    num_shards: int
    cores: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured of a job, from the last worker being ready to the last commit."""

    images_per_second_per_core: float
    cpu_seconds_per_image: float
    seconds: float
    images: int
    digests: list[str]
    """For each shard, over the sha256 of its tars: equal for equal output."""


WAYS = {
    "plain": ("plain loop", 1),
    "plains": ("plain loops, one a core", 0),
    "local": ("engine, in process", 1),
    "raydata_sink": ("Ray Data, encode -> sink", 0),
    "raydata_queue": ("Ray Data, tars written in the function", 0),
    "ray": ("engine, on Ray", 0),
}
"""What each way is called, and how many cores it runs on; 0: all."""
BESIDE = {"local": ("plain",), "ray": ("plain", "plains", "raydata_sink", "raydata_queue")}
"""The engine's ways, and what each is measured against."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much of it: images in a shard, shards for each core, rounds of all ways in turn."""

    shard_size: int
    per_core: int
    rounds: int


QUICK = Amount(shard_size=32, per_core=4, rounds=1)
FULL = Amount(shard_size=64, per_core=8, rounds=3)
MOST_CORES = 16
"""With more, the shards of so many are all there is to do."""


class Meter(threading.Thread):
    """Notes the processor seconds of this process and all its descendants, four times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._me, self._enough = psutil.Process(), threading.Event()
        self.times: list[float] = []
        self.seconds: list[float] = []

    def note(self) -> None:
        """One reading; the seconds of descendants that ended are with whoever waited for them."""
        total = 0.0
        for process in [self._me, *self._me.children(recursive=True)]:
            try:
                total += sum(process.cpu_times()[:4])
            except psutil.Error:
                continue
        self.times.append(time.time())
        self.seconds.append(total)

    def run(self) -> None:
        """Until `finish`."""
        while not self._enough.wait(0.25):
            self.note()

    def finish(self) -> None:
        """One last reading."""
        self._enough.set()
        self.join()
        self.note()

    def between(self, begin: float, end: float) -> float:
        """Processor seconds between two times. A process that ends may take its seconds along: none are given back."""
        first, last = np.interp([begin, end], self.times, np.maximum.accumulate(self.seconds))
        return float(last - first)


def do(job: Job) -> Figures:
    """Do the job in this process, and measure it."""
    root, out, marks = Path(job.root), Path(job.out), Path(job.out, "runs", "ready")
    marks.mkdir(parents=True)
    shards = range(job.num_shards)
    if job.cores == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    meter = Meter()
    meter.start()
    if job.way == "plain":
        _loop(root, out, shards, marks)
    elif job.way == "plains":
        fresh = multiprocessing.get_context("spawn")
        loops = [fresh.Process(target=_loop, args=(root, out, shards[i :: job.cores], marks)) for i in range(job.cores)]
        for loop in loops:
            loop.start()
        for loop in loops:
            loop.join()
    elif job.way in BESIDE:
        _engine(job, marks)
    else:
        from benchmarks import _raydata

        _raydata.run(root, out, shards, job.cores, marks, sink=job.way == "raydata_sink")
    meter.finish()
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    begin = max(path.stat().st_mtime for path in marks.iterdir())
    records = [[out / "commits" / m / f"shard-{s:05d}.json" for m in _null.MODALITIES] for s in shards]
    end = max(path.stat().st_mtime for row in records for path in row)
    cells = [[json.loads(path.read_bytes()) for path in row] for row in records]
    images = sum(row[0]["num_samples"] for row in cells)
    return Figures(
        images_per_second_per_core=images / (end - begin) / job.cores,
        cpu_seconds_per_image=meter.between(begin, end) / images,
        seconds=end - begin,
        images=images,
        digests=[hashlib.sha256(" ".join(c["sha256"] for c in row).encode()).hexdigest() for row in cells],
    )


def _loop(root: Path, out: Path, shards: Sequence[int], marks: Path) -> None:
    _null.value_sets()
    _null.mark(str(marks))
    _plain.run(root, out, shards)


def _engine(job: Job, marks: Path) -> None:
    from dataengine import actors, local
    from dataengine.manifest import Dataset
    from dataengine.plan import plan_labels
    from dataengine.work import LabelGroup

    dataset = Dataset(job.out)
    plan = plan_labels(dataset, _null.MODALITIES, [_null.Null(marks=str(marks))])
    group, tasks = LabelGroup(dataset.store.url, plan.labelers), plan.tasks[: job.num_shards]
    if job.way == "local":
        local.run(group, tasks, workers=1, device="cpu", on_report=lambda report: None)
        return
    from benchmarks import _raydata

    _raydata.start(job.cores)
    actors.run(group, tasks, workers=job.cores, device="cpu", on_report=lambda report: None)


def measured(job: Job, where: Path) -> Figures:
    """The job done in a fresh process, in a folder that is gone afterwards."""
    if job.way in BESIDE:
        shutil.copytree(job.root, job.out, copy_function=os.link)
    found = _fresh.call("engine_ceiling", "child", asdict(job), where)
    shutil.rmtree(job.out)
    return Figures(**found)


def child(**job: Any) -> dict[str, Any]:
    """What the fresh process does."""
    return asdict(do(Job(**job)))


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """What the engine itself costs, beside a plain loop and Ray Data: images/s per core with null labelers."""
    cores = len(os.sched_getaffinity(0))
    amount = QUICK if quick else FULL
    num_shards = amount.per_core * min(cores, MOST_CORES)
    found: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory(prefix="ceiling-") as folder:
        base = Path(folder)
        _null.corpus(base, num_shards * amount.shard_size, amount.shard_size)
        engines = {"": _fresh.packages(base / "here")}
        if reference is not None:
            engines["reference_"] = _fresh.packages(base / "there", reference)
        for _ in range(amount.rounds):
            for way, (_, wanted) in WAYS.items():
                for prefix, where in engines.items():
                    if prefix and way not in BESIDE:
                        continue
                    job = Job(
                        way=way,
                        root=str(base / "root"),
                        out=str(base / "out"),
                        num_shards=amount.per_core if wanted else num_shards,
                        cores=wanted or cores,
                    )
                    _report.console.print(f"{WAYS[way][0]}{' (reference)' if prefix else ''} ...")
                    found.setdefault(prefix + way, []).append(measured(job, where))
    return _summary(found, cores)


def _summary(found: dict[str, list[Figures]], cores: int) -> dict[str, Any]:
    for prefix in ("reference_", ""):
        same = [f.digests for w, each in found.items() for f in each if w.startswith("reference_") == bool(prefix)]
        if any(len(set(shard)) > 1 for shard in zip(*same, strict=False)):
            raise RuntimeError("the ways wrote different bytes")
    figures = {
        way: {
            name: statistics.median(getattr(f, name) for f in each)
            for name in ("images_per_second_per_core", "cpu_seconds_per_image", "seconds", "images")
        }
        for way, each in found.items()
    }

    def ratio(one: str, other: str, name: str = "images_per_second_per_core") -> float:
        return float(
            statistics.median(
                getattr(a, name) / max(getattr(b, name), 1e-9) for a, b in zip(found[one], found[other], strict=True)
            )
        )

    pairs = [(ours, other) for ours, others in BESIDE.items() for other in (*others, f"reference_{ours}")]
    pairs = [(ours, other) for ours, other in pairs if ours in found and other in found]
    ratios = {f"{ours}_over_{other}": ratio(ours, other) for ours, other in pairs}
    ratios |= {f"cpu_{ours}_over_{other}": ratio(ours, other, "cpu_seconds_per_image") for ours, other in pairs}
    return {
        "benchmark": "engine_ceiling",
        "cores": cores,
        "rounds": len(found["plain"]),
        "modalities": len(_null.MODALITIES),
        "figures": figures,
        "ratios": ratios,
        "targets": {"local_over_plain": 0.9, "ray_over_plain": 0.9, "ray_over_raydata_sink": 2.0},
        "same_bytes": True,
    }


if __name__ == "__main__":
    _report.main(measure)
