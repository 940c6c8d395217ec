"""Crops: pixel rectangles of the stored image, resized to a square, perhaps mirrored; pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Crop:
    """One row of `crop_settings`: pixels of the stored image, then a mirror about the vertical axis."""

    top: int
    left: int
    height: int
    width: int
    hflip: bool = False


def crops_of(crop_settings: np.ndarray) -> list[Crop]:
    """The rows of a `crop_settings` array (n, 5): top, left, height, width, hflip."""
    return [Crop(int(t), int(x), int(h), int(w), bool(f)) for t, x, h, w, f in crop_settings]


def center_crop(height: int, width: int) -> Crop:
    """The largest centred square, as ml-4m's first crop: its offset is rounded down."""
    side = min(height, width)
    return Crop((height - side) // 2, (width - side) // 2, side, side)


def crop_settings(rng: np.random.Generator, height: int, width: int, num_crops: int, min_scale: float) -> np.ndarray:
    """int64 (num_crops, 5): row 0 the centre crop, the others torchvision's RandomResizedCrop, hflip by a coin.

    Area in (min_scale, 1) of the image, aspect log-uniform in (3/4, 4/3), ten tries, then the clamped centre crop
    (torchvision.transforms.RandomResizedCrop.get_params).
    """
    center = center_crop(height, width)
    rows = [(center.top, center.left, center.height, center.width, 0)]
    for _ in range(num_crops - 1):
        top, left, h, w = _random_rectangle(rng, height, width, min_scale)
        rows.append((top, left, h, w, int(rng.integers(2))))
    return np.array(rows, dtype=np.int64)


def _random_rectangle(rng: np.random.Generator, height: int, width: int, min_scale: float) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * rng.uniform(min_scale, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_map(values: np.ndarray, crop: Crop, side: int, *, nearest: bool) -> np.ndarray:
    """Cut a (H, W) or (H, W, C) map, resize it to (side, side) and mirror it; the dtype stays.

    `nearest` for ids; else area averaging when it shrinks and bilinear when it grows. Outside the map counts as 0.
    """
    cut = _cut(values, crop)
    shrinks = crop.height >= side and crop.width >= side
    how = cv2.INTER_NEAREST_EXACT if nearest else cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    out = cut if cut.shape[:2] == (side, side) else cv2.resize(cut, (side, side), interpolation=how)
    return np.ascontiguousarray(out[:, ::-1]) if crop.hflip else np.ascontiguousarray(out)


def cut(values: np.ndarray, crop: Crop) -> np.ndarray:
    """What lies under a crop of a (H, W) or (H, W, C) map, not resized, mirrored as it says; outside counts as 0."""
    part = _cut(values, crop)
    return np.ascontiguousarray(part[:, ::-1] if crop.hflip else part)


def _cut(values: np.ndarray, crop: Crop) -> np.ndarray:
    height, width = values.shape[:2]
    t, b = max(crop.top, 0), min(crop.top + crop.height, height)
    x, r = max(crop.left, 0), min(crop.left + crop.width, width)
    if t >= b or x >= r:
        raise ValueError(f"{crop} lies outside of a map of {height} x {width} pixels")
    if (b - t, r - x) == (crop.height, crop.width):
        return values[t:b, x:r]
    padded = np.zeros((crop.height, crop.width, *values.shape[2:]), dtype=values.dtype)
    padded[t - crop.top : b - crop.top, x - crop.left : r - crop.left] = values[t:b, x:r]
    return padded


def crop_boxes(boxes: np.ndarray, crop: Crop, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) x0 y0 x1 y1 in 0..1 of the stored image, in 0..1 of the crop; and which n keep any area (bool)."""
    scale = np.array([width, height, width, height], dtype=np.float64)
    origin = np.array([crop.left, crop.top, crop.left, crop.top], dtype=np.float64)
    extent = np.array([crop.width, crop.height, crop.width, crop.height], dtype=np.float64)
    out = np.clip((boxes.reshape(-1, 4) * scale - origin) / extent, 0.0, 1.0)
    kept = (out[:, 2] > out[:, 0]) & (out[:, 3] > out[:, 1])
    if crop.hflip:
        out = out[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [1, 0, 1, 0]
    return out, kept
