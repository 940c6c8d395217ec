"""Real photographs as a corpus, and labelers that cost nothing: what the benchmarks of the engine run on."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dataengine import coco, codecs, local
from dataengine.ingest import IngestSettings, prepare
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Dataset
from dataengine.modalities import color_palette, sam_instance
from dataengine.modalities.metadata import KINDS
from dataengine.sample import Sample

MODALITIES = (
    *("canny_edge", "CLIP-B16", "color_palette", "depth", "det", "DINOv2-B14"),
    *("DINOv2-B14-global", "metadata", "normal", "sam_edge", "sam_instance", "semseg"),
)
"""All that are labels: the ingested ones and tokens aside."""
SIZE = (384, 512)
"""Height and width of the photographs in pixels."""
NUM_VALUES = 8
"""How many different sets of values there are; the key of an image says which it gets."""

_SOURCES = {
    "skimage": "data/{astronaut,chelsea,coffee,motorcycle_left,hubble_deep_field,ihc,rocket,retina}",
    "sklearn": "datasets/images/{china,flower}",
}


@functools.cache
def _pictures() -> tuple[np.ndarray, ...]:
    """The photographs that scikit-image and scikit-learn ship, RGB uint8 (h, w, 3)."""
    found = []
    for package, pattern in _SOURCES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"{package} is not installed; it ships some of the photographs")
        folder, names = pattern[:-1].split("{")
        for name in names.split(","):
            path = next(Path(spec.origin).parent.glob(f"{folder}{name}.*"))
            found.append(codecs.decode_rgb(path.read_bytes()))
    return tuple(found)


def photograph(index: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """RGB uint8 (h, w, 3): a window of a real photograph, its place, scale and mirroring drawn from the index."""
    rng = np.random.default_rng(index)
    picture = _pictures()[index % len(_pictures())]
    scale = min(picture.shape[0] / size[0], picture.shape[1] / size[1]) * rng.uniform(0.5, 1.0)
    height, width = int(size[0] * scale), int(size[1] * scale)
    top, left = rng.integers(0, picture.shape[0] - height + 1), rng.integers(0, picture.shape[1] - width + 1)
    window = picture[top : top + height, left : left + width, :: int(rng.choice((-1, 1)))]
    method = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(window), size[::-1], interpolation=method)


def corpus(base: Path, count: int, shard_size: int, size: tuple[int, int] = SIZE) -> Dataset:
    """A dataset of `count` JPEG photographs of (h, w) pixels, ingested in this process into `base/root`."""
    images = base / "images"
    images.mkdir(parents=True)
    for i in range(count):
        images.joinpath(f"{i:06d}.jpg").write_bytes(codecs.encode_jpeg(photograph(i, size)))
    dataset = Dataset(base / "root")
    worker, tasks = prepare(dataset, f"folder:{images}", IngestSettings(shard_size=shard_size))
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    return dataset


@functools.cache
def value_sets(size: tuple[int, int] = SIZE) -> tuple[dict[str, Any], ...]:
    """`NUM_VALUES` dicts with a valid value of each of `MODALITIES` for an image of (h, w) pixels.

    They have about the detail of a network's labels, which decides what encoding costs.
    """
    return tuple(_values(photograph(1_000_003 + i, size), i) for i in range(NUM_VALUES))


def values_of(key: str, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """The set of values that the image of this key gets."""
    return value_sets(size)[zlib.crc32(key.encode()) % NUM_VALUES]


def _values(rgb: np.ndarray, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    height = rgb.shape[0]
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    smooth = cv2.GaussianBlur(grey, (0, 0), 6).astype(np.float32) / 255
    depth = np.clip(0.6 * np.linspace(1, 0, height, dtype=np.float32)[:, None] + 0.4 * smooth, 0, 1)
    slope = np.stack([np.gradient(depth, axis=1) * 40, np.gradient(depth, axis=0) * 40, -np.ones_like(depth)], axis=2)
    regions = (np.rint(cv2.medianBlur(rgb, 21) / 43.0) @ np.array([1, 7, 49])).astype(np.int32)
    masks = _masks(regions)
    edges = (regions != np.roll(regions, 1, axis=1)) | (regions != np.roll(regions, 1, axis=0))
    boxes = np.sort(rng.uniform(0.02, 0.98, (6, 2, 2)), axis=1).reshape(6, 4).round(4)
    names = [coco.THINGS[i] for i in rng.integers(0, len(coco.THINGS), 6)]
    return {
        "canny_edge": cv2.Canny(grey, 100, 200),
        "CLIP-B16": rng.standard_normal((14, 14, 512), dtype=np.float32).astype(np.float16),
        "color_palette": [{str(n): rng.integers(0, 256, (n, 3)).tolist() for n in color_palette.SIZES}],
        "depth": depth,
        "det": {
            "instances": [
                {"boxes": box.tolist(), "class_name": name, "score": score}
                for box, name, score in zip(boxes, names, rng.uniform(0.3, 1, 6).round(4).tolist(), strict=True)
            ]
        },
        "DINOv2-B14": rng.standard_normal((16, 16, 768), dtype=np.float32).astype(np.float16),
        "DINOv2-B14-global": rng.standard_normal(768, dtype=np.float32).astype(np.float16),
        "metadata": {
            k.key: int(rng.integers(0, 900)) if k.is_whole else float(rng.uniform(k.low, k.high or 10)) for k in KINDS
        },
        "normal": (slope / np.linalg.norm(slope, axis=2, keepdims=True)).astype(np.float32),
        "sam_edge": edges.astype(np.uint8) * np.uint8(255),
        "sam_instance": masks,
        "semseg": (regions % len(coco.NAMES)).astype(np.uint8),
    }


def _masks(regions: np.ndarray) -> list[dict[str, Any]]:
    """The largest connected regions of one colour, up to 24, as masks with scores."""
    found = []
    for level in np.unique(regions):
        _, labels, stats, centres = cv2.connectedComponentsWithStats((regions == level).astype(np.uint8))
        found += [
            (int(stats[i, cv2.CC_STAT_AREA]), i, labels, centres[i].round(1).tolist()) for i in range(1, len(stats))
        ]
    found.sort(key=lambda entry: -entry[0])
    scores = {"predicted_iou": 0.93, "stability_score": 0.97}
    return [{**sam_instance.record(labels == i), **scores, "point": point} for _, i, labels, point in found[:24]]


def mark(folder: str) -> None:
    """Leave a file in a folder: this process has loaded what it needs and begins to work."""
    Path(folder, str(os.getpid())).touch()


@dataclass(frozen=True, kw_only=True)
class Null(Labeler):
    """Every label of `MODALITIES` at once, looked up by the key of the image: the engine's work and nothing else."""

    inputs = ("rgb",)
    emits = MODALITIES
    batch_size = 16

    marks: str
    """The folder that each process marks when it is ready."""

    def load(self, device: str) -> Loaded:
        value_sets()
        mark(self.marks)
        return lambda samples: [values_of(s.key, s.size) for s in samples]


@dataclass(frozen=True, kw_only=True)
class Holding(Labeler):
    """Holds a stand-in for a device for a fixed time per batch, and computes nothing.

    Every batch is noted as `begin end rows`, seconds since the epoch, in a file of this process in `logs`: how busy the
    device was is read there, and not in the engine's own accounts. A process is a device, and holds it for one batch at
    a time.
    """

    inputs = ("rgb",)
    emits = ()
    batch_size = 8

    stage: str
    seconds: float
    size: tuple[int, int]
    logs: str

    def load(self, device: str) -> Loaded:
        log = Path(self.logs, f"{self.stage}-{os.getpid()}").open("a", buffering=1)  # noqa: SIM115
        held = threading.Lock()

        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            with held:
                begin = time.time()
                time.sleep(self.seconds)
                log.write(f"{begin} {time.time()} {len(samples)}\n")
            return [values_of(s.key, s.size) for s in samples]

        value_sets(self.size)
        return run


@dataclass(frozen=True, kw_only=True)
class Masks(Holding):
    """A slow one that makes much: masks, their edges, classes."""

    emits = ("sam_instance", "sam_edge", "semseg")


@dataclass(frozen=True, kw_only=True)
class Features(Holding):
    """A fast one: features of the whole image, and a map."""

    emits = ("DINOv2-B14-global", "color_palette", "canny_edge")
