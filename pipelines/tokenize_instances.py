"""Tokenizers of the things in an image: the poses of its persons, and the masks of everything that has an outline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from dataengine import weights
from dataengine.geometry import Crop, crops_of
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.modalities import human_poses, sam_instance, sam_instance_tokens, sam_mask
from dataengine.sample import Sample
from dataengine.weights import Weights
from pipelines import tokens
from pipelines.tokens import AT_ONCE, Exact

SMALLEST = 0.0005
"""Of the area of a crop, that of the box of an instance which is left out (ml-4m's bbox_area_threshold)."""
MASK_SIDE = 64


@dataclass(frozen=True, kw_only=True)
class _Tokenizer(Labeler):
    """What both share."""

    batch_size = 32
    gpus = 0.1

    checkpoint: str
    precision: Exact = "float32"
    compiled: bool = False

    def weights(self) -> Weights:
        """The tokenizer's file."""
        return weights.describe(self.checkpoint, licence=tokens.LICENCE)

    def _encode(self, device: str) -> Any:
        """What turns any number of values into ids int64 (n, tokens), so many at once as fit."""
        from pipelines import _encoder

        file = str(weights.resolve(self.checkpoint))
        encoder = _encoder.Encoder(file, device, self.precision, compiled=self.compiled)

        def encode(values: Sequence[np.ndarray]) -> np.ndarray:
            parts = [encoder(values[at : at + AT_ONCE]) for at in range(0, len(values), AT_ONCE)]
            ids = np.concatenate([part.cpu().numpy() for part in parts])
            if (ids < 0).any():
                raise FloatingPointError(_encoder.not_finite(self.emits[0]))
            return ids

        return encode


@dataclass(frozen=True, kw_only=True)
class TokenizePoses(_Tokenizer):
    """The persons of an image, and the tokens of each pose and of its mirror image: `human_poses_tokens`."""

    inputs = ("human_poses",)
    emits = ("human_poses_tokens",)

    def load(self, device: str) -> Loaded:
        """Load the tokenizer; the persons of a batch are tokenised together."""
        encode = self._encode(device)

        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            return [{"human_poses_tokens": value} for value in tokenized([s.values["human_poses"] for s in samples])]

        def tokenized(values: Sequence[Any]) -> list[Any]:
            poses = [_poses(value) for value in values]
            both = [one for pose in poses for one in (pose, human_poses.mirrored(pose))]
            rows = np.concatenate(both).reshape(-1, human_poses.NUM_JOINTS * 9).astype(np.float32)
            ids = encode(list(rows)) if len(rows) else np.zeros((0, human_poses.NUM_TOKENS), np.int64)
            parts = iter(np.split(ids, np.cumsum([len(one) for one in both])[:-1]))
            out = []
            for value in values:
                plain, mirror = next(parts).tolist(), next(parts).tolist()
                made = {"pose_tokenized": plain, "pose_tokenized_mirrored": mirror}
                out.append({**value, **made} if isinstance(value, dict) else value)
            return out

        return run


def _poses(value: Any) -> np.ndarray:
    """`body_pose` (n, 23, 3, 3) of a value of human_poses."""
    if not isinstance(value, dict):
        return np.zeros((0, human_poses.NUM_JOINTS, 3, 3))
    return np.array(value["pred_smpl_params"]["body_pose"], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class TokenizeMasks(_Tokenizer):
    """The outlines of things under every crop, and the tokens of each mask in its box: `sam_instance_tokens`.

    A thing is the largest piece of its mask within the crop, without holes, as ml-4m has one polygon an instance; where
    its box is less than `smallest` of the crop, or has no width or height, it is left out.
    """

    inputs = ("sam_instance", "crop_settings")
    emits = ("sam_instance_tokens",)

    side: int = sam_instance_tokens.SIDE
    smallest: float = SMALLEST

    def load(self, device: str) -> Loaded:
        """Load the tokenizer; outlines are found ahead of it, and the masks of a batch are tokenised together."""
        encode, side = self._encode(device), self.side

        def prepare(sample: Sample) -> list[list[tuple[np.ndarray, np.ndarray]]]:
            polygons = [outline(mask) for mask in sample.values["sam_instance"]]
            return [
                [(points, mask_in_box(points)) for points in cropped(polygons, crop, side, self.smallest)]
                for crop in crops_of(sample.values["crop_settings"])
            ]

        def label(images: Sequence[list[list[tuple[np.ndarray, np.ndarray]]]]) -> list[dict[str, Any]]:
            masks = [mask for crops in images for instances in crops for _, mask in instances]
            ids = iter(encode(masks).tolist() if masks else [])
            return [
                {
                    "sam_instance_tokens": {
                        "side": side,
                        "crops": [[_instance(p, next(ids)) for p, _ in c] for c in crops],
                    }
                }
                for crops in images
            ]

        return Staged(prepare, label)


def outline(mask: dict[str, Any]) -> np.ndarray:
    """The corners int32 (n, 2) of x, y, in pixels of the image, of the largest piece of a mask of `sam_instance`."""
    x, y, w, h = (int(v) for v in mask["bbox"])
    points = sam_mask.outline(sam_instance.pixels(mask)[y : y + h, x : x + w].astype(np.uint8))
    return np.array(points, np.int32).reshape(-1, 2) + np.array([x, y], np.int32)


def cropped(polygons: Sequence[np.ndarray], crop: Crop, side: int, smallest: float = SMALLEST) -> list[np.ndarray]:
    """Polygons (n, 2) of the image as int32 (m, 2) under a crop, in 0..side, without those smaller than `smallest`.

    Cut to the crop, scaled to it and rounded, then mirrored, as ml-4m's SAMInstanceTransform does; only that a thing of
    which no corner, but some part, is within the crop is not left out here.
    """
    out = []
    for polygon in polygons:
        points = polygon.astype(np.float64) - (crop.left, crop.top)
        for axis, extent in ((0, crop.width), (1, crop.height)):
            points = _above(points, axis, 0.0)
            points = extent - _above(extent - points, axis, 0.0)
        points = np.rint(points * (side / crop.width, side / crop.height)).astype(np.int32)
        points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
        if not len(points) or np.prod(np.ptp(points, axis=0)) < smallest * side**2:
            continue
        out.append(points * (-1, 1) + (side, 0) if crop.hflip else points)
    return out


def _above(points: np.ndarray, axis: int, limit: float) -> np.ndarray:
    """What of a polygon float (n, 2) has a coordinate of at least `limit` (Sutherland and Hodgman 1974)."""
    if not len(points):
        return points
    after = np.roll(points, -1, axis=0)
    here, there = points[:, axis] - limit, after[:, axis] - limit
    crosses = (here >= 0) != (there >= 0)
    part = np.divide(here, here - there, out=np.zeros(len(points)), where=crosses)
    both = np.stack([points, points + part[:, None] * (after - points)], axis=1)
    both[:, 1, axis] = np.where(crosses, limit, both[:, 1, axis])
    kept: np.ndarray = both[np.stack([here >= 0, crosses], axis=1)]
    return kept


def mask_in_box(points: np.ndarray) -> np.ndarray:
    """bool (64, 64): a polygon int (n, 2) and all it encloses, its box stretched to the whole."""
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    # Truncated, not rounded, as ml-4m's: a corner on the far side of the box lies one pixel outside.
    inside = ((points - low) / extent * MASK_SIDE).astype(np.int32)
    canvas = np.zeros((MASK_SIDE, MASK_SIDE), np.uint8)
    cv2.drawContours(canvas, [inside[:, None]], 0, 1, thickness=cv2.FILLED)
    return canvas.astype(bool)


def _instance(points: np.ndarray, ids: list[int]) -> dict[str, Any]:
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return {"polygon": points.tolist(), "bbox": [top, left, bottom, right], "tokens": ids}
