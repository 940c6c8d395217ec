"""A small corpus on disk and labelers that cost nothing or fail on purpose."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dataengine import local
from dataengine.ingest import IngestSettings, prepare
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Dataset
from dataengine.sample import Sample


def write_images(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` PNG images of different sizes, each with a caption."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        h, w = int(rng.integers(24, 60)), int(rng.integers(24, 60))
        smooth = cv2.resize(rng.integers(0, 256, (5, 5, 3), np.uint8), (w, h), interpolation=cv2.INTER_NEAREST)
        assert cv2.imwrite(str(folder / f"image{i:03d}.png"), smooth)
        (folder / f"image{i:03d}.txt").write_text(f"picture number {i}\n")
    return folder


def ingested(tmp_path: Path, count: int = 10, shard_size: int = 4, name: str = "root") -> Dataset:
    """A dataset of `count` images, ingested in this process."""
    images = tmp_path / "images"
    if not images.exists():
        write_images(images, count)
    dataset = Dataset(tmp_path / name)
    worker, tasks = prepare(dataset, f"folder:{images}", IngestSettings(shard_size=shard_size, num_crops=2))
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    return dataset


def tree(root: Path) -> dict[str, bytes]:
    """Every file of a dataset with its bytes, but for the logs of its runs."""
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.relative_to(root).parts[0] != "runs"
    }


@dataclass(frozen=True, kw_only=True)
class Threshold(Labeler):
    """Edges that are the green channel above a level; can be slow, fail on keys, or end its process.

    `die_once` is a mark it leaves the first time; where it cannot be left, it dies every time.
    """

    inputs = ("rgb",)
    emits = ("canny_edge",)
    batch_size = 3

    level: int = 128
    seconds: float = 0.0
    fail_on: tuple[str, ...] = ()
    wrong_on: tuple[str, ...] = ()
    too_many: int = 100
    die_once: str = ""

    def load(self, device: str) -> Loaded:
        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            time.sleep(self.seconds)
            if self.die_once and not os.path.exists(self.die_once):
                if Path(self.die_once).parent.exists():
                    Path(self.die_once).touch()
                os._exit(1)
            if len(samples) > self.too_many:
                raise MemoryError("out of memory")
            if any(s.key in self.fail_on for s in samples):
                raise RuntimeError("cannot label this")
            return [{"canny_edge": self._edges(s)} for s in samples]

        return run

    def _edges(self, sample: Sample) -> Any:
        if sample.key in self.wrong_on:
            return np.zeros((1, 1), np.float32)
        return np.where(sample.rgb[..., 1] > self.level, 255, 0).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Inverted(Labeler):
    """SAM edges that are everything the Canny edges are not: a labeler whose input is a label."""

    inputs = ("canny_edge",)
    emits = ("sam_edge",)

    def load(self, device: str) -> Loaded:
        return lambda samples: [{"sam_edge": (255 - s.values["canny_edge"]).astype(np.uint8)} for s in samples]


@dataclass(frozen=True, kw_only=True)
class Unloadable(Threshold):
    """A labeler whose weights are not there."""

    def load(self, device: str) -> Loaded:
        raise FileNotFoundError("no weights at all")


@dataclass(frozen=True, kw_only=True)
class BatchMean(Labeler):
    """Edges that depend on the whole batch, as the last bits of a network's output may."""

    inputs = ("rgb",)
    emits = ("sam_edge",)
    batch_size = 2

    def load(self, device: str) -> Loaded:
        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            mean = np.mean([s.rgb.mean() for s in samples])
            return [{"sam_edge": np.where(s.rgb[..., 0] > mean, 255, 0).astype(np.uint8)} for s in samples]

        return run
