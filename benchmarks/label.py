"""The engine's own cost: a labeler that does nothing, on photographs, by Ray and in this process, beside its parts.

python benchmarks/label.py [images]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dataengine import actors, local, modalities
from dataengine.ingest import IngestSettings, prepare
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Dataset
from dataengine.plan import plan_labels
from dataengine.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Nothing(Labeler):
    """No edges at all."""

    inputs = ("rgb",)
    emits = ("canny_edge",)
    batch_size = 32

    def load(self, device: str) -> Loaded:
        return lambda samples: [_empty(s) for s in samples]


def _empty(sample: Sample) -> dict[str, Any]:
    return {"canny_edge": np.zeros(sample.size, np.uint8)}


def photographs(folder: Path, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        image = cv2.resize(rng.integers(0, 256, (40, 60, 3), np.uint8), (512, 384), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{i:06d}.jpg"), image)


def timed(dataset: Dataset, run: Any, labelers: Sequence[Labeler]) -> float:
    for shard in dataset.committed("canny_edge"):
        dataset.uncommit("canny_edge", shard)
    plan = plan_labels(dataset, ["canny_edge"], labelers)
    began = time.perf_counter()
    run(plan.group(dataset.store.url), plan.tasks, workers=2, device="cpu", on_report=lambda report: None)
    return time.perf_counter() - began


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    with tempfile.TemporaryDirectory() as base:
        photographs(Path(base, "images"), count)
        dataset = Dataset(Path(base, "root"))
        worker, tasks = prepare(dataset, f"folder:{base}/images", IngestSettings(shard_size=50))
        began = time.perf_counter()
        local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
        print(f"{'ingest, in process':<34}{count / (time.perf_counter() - began):>8.0f} images/s")
        began = time.perf_counter()
        for shard in dataset.committed("rgb"):
            for member in dataset.read("rgb", shard):
                modalities.load("rgb").decode(member.data)
        bare = time.perf_counter() - began
        print(f"{'reading and decoding alone':<34}{count / bare:>8.0f} images/s")
        for name, run in (("null labeler, in process", local.run), ("null labeler, Ray, with its start", actors.run)):
            spent = timed(dataset, run, [Nothing()])
            print(f"{name:<34}{count / spent:>8.0f} images/s, {bare / spent:.2f} x reading and decoding alone")


if __name__ == "__main__":
    main()
