"""One function a kind of metadata: the decoded value of one modality in, one number out.

The definitions are those of the 4M-21 paper (Bachmann, Kar et al. 2024, appendix D.1). It leaves several open; there
the variant was taken that reproduces the numbers of its published predictions, and the docstring says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

MIN_SCORE = 0.6
"""Detections below it are not counted: ml-4m's threshold for the boxes that it trains on."""

WALKABLE = (87, 90, 97, 100, 102, 105, 106, 122, 123, 125, 126, 132)
"""COCO panoptic ids that one can walk on: floor-wood, gravel, playingfield, road, sand, snow, stairs, floor, pavement,
grass, dirt, rug (4M-21, D.1)."""

UNCOUNTABLE = (87, 90, *range(96, 104), 105, 106, *range(109, 114), *range(117, 120), *range(122, 127), 129, 131, 132)
"""COCO panoptic ids that are surroundings and not objects: floors, walls, ground, sky, water, mountain (4M-21, D.1)."""

UNLABELLED = 255
DEPTH_SIDE = 224
MAX_GRADIENT = 0.3


def original_width(rgb: np.ndarray) -> int:
    """Width of the stored canonical image in pixels."""
    return int(rgb.shape[1])


def original_height(rgb: np.ndarray) -> int:
    """Height of the stored canonical image in pixels."""
    return int(rgb.shape[0])


def caption_n_chars(captions: Sequence[str]) -> int:
    """Characters of the first caption; 0 without one."""
    return len(_first(captions))


def caption_n_words(captions: Sequence[str]) -> int:
    """Words of the first caption, split at white space."""
    return len(_first(captions).split())


def caption_n_sentences(captions: Sequence[str]) -> int:
    """Sentences of the first caption, ended by runs of . ! ? before white space or the end; 1 in text without any."""
    text = _first(captions).strip()
    return max(sum(bool(part.strip()) for part in re.split(r"[.!?]+(?:\s|$)", text)), int(bool(text)))


def _first(captions: Sequence[str]) -> str:
    return captions[0] if captions else ""


def n_humans(poses: Any) -> int:
    """Instances of the human-pose network ("crowdedness" in 4M-21)."""
    return len(poses["bbox_xyxy"]) if isinstance(poses, dict) else 0


def n_persons(det: dict[str, Any]) -> int:
    """Persons among the counted detections: they stand in for `n_humans` where there are no poses."""
    return sum(instance["class_name"] == "person" for instance in _counted(det))


def n_coco_instances(det: dict[str, Any]) -> int:
    """Detections of score >= 0.6 ("COCO clutter" in 4M-21)."""
    return len(_counted(det))


def coco_instance_diversity(det: dict[str, Any]) -> int:
    """Different classes among the detections of score >= 0.6."""
    return len({instance["class_name"] for instance in _counted(det)})


def _counted(det: dict[str, Any]) -> list[dict[str, Any]]:
    return [instance for instance in det["instances"] if instance["score"] >= MIN_SCORE]


def n_sam_instances(masks: Sequence[dict[str, Any]]) -> int:
    """Number of masks ("SAM clutter" in 4M-21)."""
    return len(masks)


def colorfulness(rgb: np.ndarray) -> float:
    """Hasler and Suesstrunk (2003) with absolute opponent channels |R-G| and |(R+G)/2-B|, about 0..150.

    The published measure has signed channels; the predictions of 4M-21 agree with the absolute variant.
    """
    red, green, blue = np.moveaxis(rgb.astype(np.float64), -1, 0)
    rg, yb = np.abs(red - green), np.abs((red + green) / 2 - blue)
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def brightness(rgb: np.ndarray) -> float:
    """Mean of the grey image (PIL mode L, ITU-R 601 luma), 0..255."""
    return float(_channel(rgb, "L").mean())


def contrast(rgb: np.ndarray) -> float:
    """Standard deviation of the grey image (PIL mode L), 0..127.5."""
    return float(_channel(rgb, "L").std())


def saturation(rgb: np.ndarray) -> float:
    """Mean S of HSV (PIL mode HSV), 0..255."""
    return float(_channel(rgb, "HSV")[..., 1].mean())


def entropy(rgb: np.ndarray) -> float:
    """Shannon entropy in bits of the joined R, G and B histogram (PIL's `Image.entropy`), 0..9.58."""
    return float(Image.fromarray(rgb).entropy())


def _channel(rgb: np.ndarray, mode: str) -> np.ndarray:
    return np.asarray(Image.fromarray(rgb).convert(mode), dtype=np.float64)


def walkability(semseg: np.ndarray) -> float:
    """Share 0..1 of the labelled pixels that are of a walkable class."""
    return _share(semseg, WALKABLE)


def objectness(semseg: np.ndarray) -> float:
    """Share 0..1 of the labelled pixels that are of no uncountable class.

    The paper calls its list of classes countable, but they are floors, walls and sky, and its own predictions are 0 on
    an image made of them: the complement is meant.
    """
    return 1.0 - _share(semseg, UNCOUNTABLE) if np.any(semseg != UNLABELLED) else 0.0


def semantic_diversity(semseg: np.ndarray) -> int:
    """Number of classes that label any pixel."""
    return int(np.setdiff1d(semseg, [UNLABELLED]).size)


def _share(semseg: np.ndarray, ids: Sequence[int]) -> float:
    counts = np.bincount(semseg.ravel(), minlength=UNLABELLED + 1)[:UNLABELLED]
    return float(counts[list(ids)].sum() / max(counts.sum(), 1))


def geometric_complexity(normal: np.ndarray) -> float:
    """Spherical variance 1 - |mean normal| of the unit normals (Mardia and Jupp 2000), 0 for a plane, at most 1.

    4M-21 says "angular variance" of the normals on the unit sphere and gives the range 0..0.75.
    """
    mean = normal.reshape(-1, 3).mean(axis=0, dtype=np.float64)
    return 1.0 - min(float(np.linalg.norm(mean)), 1.0)


def occlusion_score(depth: np.ndarray) -> float:
    """Share 0..1 of pixels where the Sobel gradient of the min-max scaled depth exceeds 0.3, at a short side of 224.

    The 3 x 3 Sobel is OpenCV's unnormalised one. The resolution matters and is the one that agrees with the
    predictions of 4M-21.
    """
    height, width = depth.shape
    scale = DEPTH_SIDE / min(height, width)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = cv2.resize(depth, (round(width * scale), round(height * scale)), interpolation=how).astype(np.float64)
    near, far = float(small.min()), float(small.max())
    if near == far:
        return 0.0
    small = (small - near) / (far - near)
    gradient = np.hypot(cv2.Sobel(small, cv2.CV_64F, 1, 0, ksize=3), cv2.Sobel(small, cv2.CV_64F, 0, 1, ksize=3))
    return float((gradient > MAX_GRADIENT).mean())
