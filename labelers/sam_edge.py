"""Edges of instances: the outlines of all SAM masks of an image, in one map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from dataengine.labeler import Labeler, Loaded
from dataengine.sample import Sample

Mode = Literal["gradient", "canny"]


@dataclass(frozen=True, kw_only=True)
class SamEdge(Labeler):
    """Edges uint8 (h, w) 0/255 of the instance masks, at the resolution of the image; 0 everywhere without masks.

    `gradient` draws the outermost pixels of each mask (its internal morphological gradient, 1 px wide); `canny` runs
    Canny's detector on each mask as a 0/255 image, as the paper of 4M-21 says. In both a mask has no edge along the
    image border, and masks are outlined one by one: neighbours keep the edge between them whatever their order.
    """

    inputs = ("rgb", "sam_instance")
    emits = ("sam_edge",)
    batch_size = 32

    mode: Mode = "gradient"
    low: float = 100.0
    high: float = 200.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"sam_edge: expected mode gradient or canny, got {self.mode!r}")

    def load(self, device: str) -> Loaded:
        """Nothing to load; the device is not used."""

        def label(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            return [{"sam_edge": self._edges(sample.values["sam_instance"], sample.size)} for sample in samples]

        return label

    def _edges(self, masks: Sequence[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
        edges = np.zeros(size, dtype=np.uint8)
        for mask in masks:
            if tuple(mask["size"]) != size:
                raise ValueError(f"sam_edge: a mask of {mask['size']} (h, w) on an image of {size}")
            filled = coco_mask.decode({"size": mask["size"], "counts": mask["counts"].encode()})
            x, y, w, h = coco_mask.toBbox({"size": mask["size"], "counts": mask["counts"].encode()}).astype(int)
            # Outlines are sought in the mask's box and a margin that the 5 x 5 support of Canny needs.
            rows, columns = slice(max(y - 3, 0), y + h + 3), slice(max(x - 3, 0), x + w + 3)
            np.maximum(edges[rows, columns], self._outline(filled[rows, columns]), out=edges[rows, columns])
        return edges

    def _outline(self, mask: np.ndarray) -> np.ndarray:
        filled = np.ascontiguousarray(mask) * np.uint8(255)
        if self.mode == "canny":
            return cv2.Canny(filled, self.low, self.high)
        cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
        return filled - cv2.erode(filled, cross)
