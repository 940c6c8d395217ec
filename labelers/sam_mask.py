"""Outlines of instances: the largest outer contour of each SAM mask as one polygon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from dataengine.labeler import Labeler, Loaded
from dataengine.modalities import sam_mask
from dataengine.sample import Sample


@dataclass(frozen=True, kw_only=True)
class SamMask(Labeler):
    """One polygon an instance in pixels of the image, in the order of the instances: `{"points": [[x, y], ...]}`.

    What ml-4m trains its tokenizer of instances on. Holes are filled, and smaller pieces of a thing in several are
    left out, as ml-4m has one polygon an instance. Corners alone are stored, the same polygon in a fifth of the bytes,
    unless `every_pixel` of the outline is asked for.
    """

    inputs = ("sam_instance",)
    emits = ("sam_mask",)
    batch_size = 32

    every_pixel: bool = False

    def load(self, device: str) -> Loaded:
        """Nothing to load; the device is not used."""

        def label(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            return [{"sam_mask": [self._polygon(mask) for mask in sample.values["sam_instance"]]} for sample in samples]

        return label

    def _polygon(self, mask: dict[str, Any]) -> dict[str, Any]:
        run_lengths = {"size": mask["size"], "counts": mask["counts"].encode()}
        x, y, w, h = coco_mask.toBbox(run_lengths).astype(int)
        inside = coco_mask.decode(run_lengths)[y : y + h, x : x + w]
        points = np.array(sam_mask.outline(inside, every_pixel=self.every_pixel))
        return {"points": (points + np.array([x, y])).tolist()}
