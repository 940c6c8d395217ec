"""What single-channel 8-bit maps and drawings share."""

from __future__ import annotations

from typing import Any, ClassVar

import cv2
import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop, crop_map
from dataengine.modalities import Kind, Modality, Picture


def check_array(name: str, value: Any, dtype: type, shape: tuple[int, ...]) -> None:
    """ValueError unless `value` is an array of this dtype and shape."""
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.shape != shape:
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name}: expected {np.dtype(dtype)} {shape}, got {found}")


class EdgeMap(Modality):
    """Binary edges, uint8 (h, w) of 0 and 255, stored as 8-bit PNG.

    A crop that shrinks counts a pixel as edge where edges cover at least a quarter of it, so that one-pixel lines
    survive; one that grows takes the nearest pixel.
    """

    kind: ClassVar[Kind] = "map"
    suffix: ClassVar[str] = "png"

    def encode(self, value: np.ndarray) -> bytes:
        """An 8-bit PNG."""
        return codecs.encode_png(value)

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (h, w)."""
        return codecs.decode_png(data, np.uint8, 1)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """uint8 (h, w) with no value but 0 and 255."""
        check_array(self.name, value, np.uint8, size)
        if not np.isin(value, (0, 255)).all():
            raise ValueError(f"{self.name}: expected 0 and 255 only, got {np.setdiff1d(value, (0, 255))[:5]}")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """No edge."""
        return np.zeros(size, np.uint8)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Random pixels."""
        return np.where(rng.random(size) < 0.1, 255, 0).astype(np.uint8)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """(side, side)."""
        if crop.height <= side and crop.width <= side:
            return crop_map(value, crop, side, nearest=True)
        return np.where(crop_map(value, crop, side, nearest=False) >= 64, 255, 0).astype(np.uint8)

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """White on black."""
        return Picture(image=np.repeat(value[..., None], 3, axis=2))


def principal_components(features: np.ndarray) -> np.ndarray:
    """The three directions of largest variance of features (rows, cols, c) as colours, uint8 (rows, cols, 3)."""
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    _, _, axes = np.linalg.svd(flat, full_matrices=False)
    axes = axes[:3] * np.where(axes[:3].sum(axis=1, keepdims=True) < 0, -1, 1)  # the sign of an axis is arbitrary
    shown = np.zeros((len(flat), 3))
    shown[:, : len(axes)] = flat @ axes.T
    low, high = np.percentile(shown, (2, 98), axis=0)
    scaled = np.clip((shown - low) / np.maximum(high - low, 1e-9), 0, 1)
    return (scaled * 255).astype(np.uint8).reshape(*features.shape[:2], 3)


def enlarged(image: np.ndarray, side: int = 128) -> np.ndarray:
    """A small picture with every pixel a visible square."""
    factor = max(1, side // max(image.shape[:2]))
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
