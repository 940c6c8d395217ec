"""What a label plan will cost: each labeler timed on a few images of the dataset, here and now."""

from __future__ import annotations

import time
from dataclasses import dataclass

from threadpoolctl import threadpool_limits

from dataengine import modalities
from dataengine.labeler import Labeler
from dataengine.manifest import Dataset
from dataengine.plan import LabelPlan
from dataengine.sample import Sample

MEASURED_IMAGES = 2


@dataclass(frozen=True)
class Line:
    """The cost of one labeler; `seconds` is core time, None per image when an input does not exist yet."""

    labeler: str
    emits: tuple[str, ...]
    cells: int
    images: int
    seconds_per_image: float | None
    seconds: float


def estimate(dataset: Dataset, plan: LabelPlan) -> list[Line]:
    """One line a labeler in the order they will run, timed on the first images after one warm-up."""
    known = _samples(dataset)
    lines = []
    for labeler in plan.labelers:
        tasks = [t for t in plan.tasks if set(labeler.emits) & set(t.specs)]
        images = sum(len(dataset.keys(t.shard)) for t in tasks)
        each = _time(labeler, known) if tasks and known else None
        cells = sum(len(set(labeler.emits) & set(t.specs)) for t in tasks)
        lines.append(Line(labeler.name, labeler.emits, cells, images, each, images * (each or 0.0)))
    return lines


def _samples(dataset: Dataset) -> list[dict[str, object]]:
    shards = dataset.committed("rgb")
    if not shards:
        return []
    out: list[dict[str, object]] = [{} for _ in dataset.keys(shards[0])[:MEASURED_IMAGES]]
    for m in dataset.modalities():
        if dataset.commit(m, shards[0]) is not None and not m.startswith("tok"):
            members = dataset.read(m, shards[0])
            for values, member in zip(out, members, strict=False):
                values[m] = modalities.load(m).decode(member.data)
    return out


def _time(labeler: Labeler, known: list[dict[str, object]]) -> float | None:
    if any(m not in values for values in known for m in labeler.inputs):
        return None
    samples = [Sample(f"sample{i}", values) for i, values in enumerate(known)]
    with threadpool_limits(limits=1):
        call = labeler.load("cpu")
        call(samples[:1])
        began = time.perf_counter()
        outputs = call(samples)
        spent = (time.perf_counter() - began) / len(samples)
    for values, output in zip(known, outputs, strict=True):
        values.update(output)
    return spent
