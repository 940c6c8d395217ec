"""Masks of everything that has an outline."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from dataengine import codecs
from dataengine.geometry import Crop, crop_map
from dataengine.modalities import Kind, Modality, Picture, _draw
from dataengine.modalities import _checks as expect

_SCORES = ("predicted_iou", "stability_score")


class SamInstance(Modality):
    """A list of masks as COCO run lengths, which may overlap, as JSON.

    Each is a dict: `size` [h, w] and `counts` (pycocotools' compressed string), `bbox` [x, y, w, h] and `area` in
    pixels; a network's masks also have `predicted_iou` and `stability_score` (about 0..1) and `point` [x, y], the query
    in pixels.
    """

    kind: ClassVar[Kind] = "instances"
    suffix: ClassVar[str] = "json"

    def encode(self, value: list[dict[str, Any]]) -> bytes:
        """Compact JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> list[dict[str, Any]]:
        """The list of masks."""
        value = codecs.decode_json(data)
        if not isinstance(value, list):
            raise ValueError(f"{self.name}: expected a list of masks, got {type(value).__name__}")
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """Every mask of the image's size, its run lengths readable, its area that of its run lengths."""
        if not isinstance(value, list):
            raise ValueError(f"{self.name}: expected a list of masks, got {type(value).__name__}")
        for mask in value:
            expect.dictionary(self.name, mask, ("size", "counts", "bbox", "area"))
            if mask["size"] != list(size) or not isinstance(mask["counts"], str):
                raise ValueError(f"{self.name}: expected a mask of size {list(size)}, got {mask['size']!r:.40}")
            expect.numbers(f"{self.name} bbox", mask["bbox"], 4, 0, max(size))
            expect.numbers(f"{self.name} point", mask.get("point", [0, 0]), 2, -math.inf, math.inf)
            scores = [mask.get(score, 0) for score in _SCORES]
            expect.numbers(f"{self.name} scores", scores, len(_SCORES), -math.inf, math.inf)
        _check_areas(self.name, value)

    def placeholder(self, size: tuple[int, int]) -> list[dict[str, Any]]:
        """No mask."""
        return []

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> list[dict[str, Any]]:
        """A disc, and a square inside it."""
        height, width = size
        rows, cols = np.mgrid[:height, :width]
        disc = (rows - height / 2) ** 2 + (cols - width / 2) ** 2 <= (min(size) / 2.5) ** 2
        square = np.maximum(abs(rows - height / 2), abs(cols - width / 2)) <= min(size) / 6
        scores = rng.random((2, len(_SCORES))).round(4).tolist()
        return [
            {**record(mask), **dict(zip(_SCORES, two, strict=True)), "point": [width / 2, height / 2]}
            for mask, two in zip((disc, square), scores, strict=True)
        ]

    def crop(self, value: list[dict[str, Any]], crop: Crop, size: tuple[int, int], side: int) -> list[dict[str, Any]]:
        """Masks of (side, side) pixels, by nearest pixels; those that no pixel is left of are gone.

        A point may come to lie outside of the crop.
        """
        out = []
        for mask in value:
            cut = crop_map(pixels(mask).astype(np.uint8), crop, side, nearest=True).astype(bool)
            if cut.any():
                out.append({**mask, **record(cut)})
                if "point" in mask:
                    x = (mask["point"][0] - crop.left) * side / crop.width
                    y = (mask["point"][1] - crop.top) * side / crop.height
                    out[-1]["point"] = [round(side - x if crop.hflip else x, 2), round(y, 2)]
        return out

    def picture(self, value: list[dict[str, Any]], rgb: np.ndarray) -> Picture:
        """Every mask in a colour of its own over the greyed image, the largest at the bottom."""
        image, _ = _draw.canvas(rgb)
        height, width = image.shape[:2]
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        image = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
        for i, mask in enumerate(sorted(value, key=lambda m: -m["area"])):
            large = cv2.resize(pixels(mask).astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
            image = _draw.overlay(image, large.astype(bool), _draw.distinct(i))
        return Picture(image=image, text=f"{len(value)} mask{'' if len(value) == 1 else 's'}")


def record(mask: np.ndarray) -> dict[str, Any]:
    """The dict of one mask bool (h, w) that has at least one pixel, without scores and point."""
    run_lengths = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "size": list(mask.shape),
        "counts": run_lengths["counts"].decode(),
        "bbox": [int(v) for v in coco_mask.toBbox(run_lengths)],
        "area": int(mask.sum()),
    }


def pixels(mask: dict[str, Any]) -> np.ndarray:
    """bool (h, w) of the dict of one mask."""
    decoded: np.ndarray = coco_mask.decode({"size": mask["size"], "counts": mask["counts"].encode()})
    return decoded.astype(bool)


def _check_areas(name: str, masks: list[dict[str, Any]]) -> None:
    # One call for all: reading a few run lengths costs less than calling.
    areas = coco_mask.area([{"size": mask["size"], "counts": mask["counts"].encode()} for mask in masks])
    for mask, area in zip(masks, areas, strict=True):
        if mask["area"] != area or area == 0:
            raise ValueError(f"{name}: expected the area of the run lengths, {int(area)} > 0, got {mask['area']!r}")
