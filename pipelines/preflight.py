"""Preflight: what each labeler costs on the hardware it will run on, measured once on the dataset's images and kept.

`Preflight` is a worker like any other, so that it can be sent to where the labelers will run; its reports carry the
measurements as notes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataengine import groups, modalities, provenance
from dataengine.attempt import free_memory
from dataengine.labeler import Labeler
from dataengine.manifest import Dataset
from dataengine.measured import Measured, from_json
from dataengine.sample import Sample
from dataengine.work import Report, Task, Work
from pipelines.measure import device_name, measure_and_label, pixels

IMAGES = 8
"""Images of the dataset that are measured on; larger batches repeat them."""
NEAR_PIXELS = 2.0
"""A kept measurement is for images of up to this factor more or fewer pixels."""


@dataclass(frozen=True)
class Preflight:
    """A worker that measures labelers on the first images of a task's shard; its notes are the measurements.

    `again` measures what was measured before. Labelers are in dependency order: what one reads and no tar holds yet is
    made by those before it.
    """

    root: str
    labelers: tuple[Labeler, ...]
    again: bool = False

    def start(self, device: str) -> Work:
        """Nothing is loaded yet: each labeler is loaded alone, one after another."""

        def run(task: Task) -> Report:
            began = time.perf_counter()
            found = examine(Dataset(self.root), self.labelers, task.shard, device, again=self.again)
            notes = tuple(seen.as_json() for seen in found)
            return Report(task.shard, (), time.perf_counter() - began, notes=notes)

        return run


def examine(
    dataset: Dataset, labelers: Sequence[Labeler], shard: int, device: str, *, again: bool = False
) -> list[Measured]:
    """A measurement for each labeler, in this process; what was measured before on this device is not repeated."""
    samples, decode_seconds = _samples(dataset, shard, {m for x in labelers for m in x.inputs})
    known = [None if again else kept(labeler, device_name(device), pixels(samples)) for labeler in labelers]
    there = set(samples[0].values)
    run = {i for i, seen in enumerate(known) if seen is None}
    for i in reversed(range(len(labelers))):
        # A labeler that is known still runs when one that is not reads what it makes.
        wanted = {m for j in run if j > i for m in labelers[j].inputs} - there
        run |= {i} if set(labelers[i].emits) & wanted else set()
    out: list[Measured] = []
    for i, labeler in enumerate(labelers):
        seen = known[i]
        if i in run:
            ready = [s for s in samples if set(labeler.inputs) <= set(s.values)]
            if not ready:
                raise ValueError(f"{labeler.name}: none of {len(samples)} images has {', '.join(labeler.inputs)}")
            seen, outputs = measure_and_label(labeler, ready, device)
            seen = dataclasses.replace(seen, decode_seconds=decode_seconds)
            keep(labeler, seen)
            samples = _with_outputs(samples, ready, outputs)
            free_memory()
        out += [] if seen is None else [seen]
    return out


def _samples(dataset: Dataset, shard: int, inputs: set[str]) -> tuple[list[Sample], float]:
    """The first images of a shard with the inputs that are committed, and the seconds an image to decode it."""
    values: list[dict[str, Any]] = []
    seconds = 0.0
    for m in sorted({"rgb", *inputs}):
        record = dataset.commit(m, shard)
        if record is None:
            continue
        members = dataset.read(m, shard)[:IMAGES]
        values = values or [{} for _ in members]
        began = time.perf_counter()
        for value, member in zip(values, members, strict=True):
            if member.key not in record.invalid:
                value[m] = modalities.load(m).decode(member.data)
        seconds += time.perf_counter() - began
    if not values:
        raise ValueError(f"shard {shard} of {dataset.store.name} has no images to measure on")
    samples = [Sample(key, value) for key, value in zip(dataset.keys(shard), values, strict=False)]
    return samples, seconds / len(samples)


def _with_outputs(
    samples: Sequence[Sample], ready: Sequence[Sample], outputs: Sequence[Mapping[str, Any]]
) -> list[Sample]:
    """The samples with what was made for them, as it would be read back from a tar."""
    made = {
        s.key: {m: modalities.load(m).decode(modalities.load(m).encode(value)) for m, value in output.items()}
        for s, output in zip(ready, outputs, strict=True)
    }
    return [Sample(s.key, {**s.values, **made.get(s.key, {})}) for s in samples]


def preflight(
    dataset: Dataset, labelers: Sequence[Labeler], device: str, *, again: bool = False, on_ray: bool = False
) -> dict[str, Measured]:
    """Measure labelers in a process of its own, on this machine or on a worker of the Ray cluster; by `groups.names`.

    What a worker of the cluster measured is kept here too. RuntimeError when a labeler ends that process.
    """
    shards = dataset.committed("rgb")
    if not shards or not labelers:
        return {}
    worker, task = Preflight(dataset.store.url, tuple(labelers), again), Task(shards[0], {})
    # A fresh process: what loading costs is seen, and a labeler that crashes does not take this one with it.
    found = [from_json(note) for note in (_on_ray if on_ray else _here)(worker, device, task).notes]
    if on_ray:
        for labeler, seen in zip(labelers, found, strict=True):
            keep(labeler, seen)
    return dict(zip(groups.names(labelers), found, strict=True))


def _here(worker: Preflight, device: str, task: Task) -> Report:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_run, worker, device, task).result()
        except BrokenProcessPool as error:
            names = ", ".join(labeler.name for labeler in worker.labelers)
            raise RuntimeError(f"the process that measured {names} was ended by one of them: {error}") from error


def _on_ray(worker: Preflight, device: str, task: Task) -> Report:
    from dataengine import actors

    reports: list[Report] = []
    actors.run(worker, [task], workers=1, device=device, on_report=reports.append)
    return reports[0]


def _run(worker: Preflight, device: str, task: Task) -> Report:
    return worker.start(device)(task)


# -- what was measured before ------------------------------------------------------------------------------------------


def kept(labeler: Labeler, device: str, size: float | None = None) -> Measured | None:
    """What was measured of this labeler on this kind of device with these library versions; None when nothing was.

    `cuda` stands for whichever GPU was measured last, for a driver that has none itself.

    With `size`, only if it was on images of about so many pixels.
    """
    try:
        seen = from_json(_path(labeler, device).read_text())
    except (OSError, ValueError):
        return None  # Not there, or not readable: it is measured again.
    if size is not None and not 1 / NEAR_PIXELS < seen.pixels / max(size, 1) < NEAR_PIXELS:
        return None
    return seen


def keep(labeler: Labeler, seen: Measured) -> None:
    """Keep a measurement in the user's cache."""
    for device in (seen.device, *(["cuda"] if seen.gpu else [])):
        path = _path(labeler, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(seen.as_json() + "\n")
        partial.replace(path)


def _path(labeler: Labeler, device: str) -> Path:
    key = {"labeler": labeler.identity(), "device": device, "versions": provenance.versions()}
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "dataengine" / "preflight" / f"{name}.json"
