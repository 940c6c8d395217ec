"""Where the joints of persons are seen."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import cv2
import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop, crop_boxes
from dataengine.modalities import Kind, Modality, Picture, _draw
from dataengine.modalities import _checks as expect

NAMES = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist "
    "right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle"
).split()
"""COCO's keypoints, in its order; left and right are the person's own."""

MIRRORED = (0, *(i + (1 if i % 2 else -1) for i in range(1, len(NAMES))))
"""Which keypoint takes the place of each when left and right change places."""

_LIMBS = (
    (0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12), (11, 12), (11, 13),
    (13, 15), (12, 14), (14, 16),
)  # fmt: skip
_SHOWN_SCORE = 0.3


class HumanKeypoints(Modality):
    """A list of persons as JSON: where COCO's 17 keypoints (`NAMES`) of each are seen.

    Each is a dict: `bbox_xyxy` [x0, y0, x1, y1], the box in which they were looked for, and `keypoints` [[x, y], ...],
    both in pixels of the image (x right, y down; a keypoint may lie outside of it), and `scores` [...], how sure each
    is, about 0..1.
    """

    kind: ClassVar[Kind] = "instances"
    suffix: ClassVar[str] = "json"

    def encode(self, value: list[dict[str, Any]]) -> bytes:
        """Compact JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> list[dict[str, Any]]:
        """The list of persons."""
        value = codecs.decode_json(data)
        if not isinstance(value, list):
            raise ValueError(f"{self.name}: expected a list of persons, got {type(value).__name__}")
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """Boxes within the image and with an area, 17 points and 17 scores for each."""
        if not isinstance(value, list):
            raise ValueError(f"{self.name}: expected a list of persons, got {type(value).__name__}")
        for person in value:
            expect.dictionary(self.name, person, ("bbox_xyxy", "keypoints", "scores"))
            expect.numbers(f"{self.name} bbox_xyxy", person["bbox_xyxy"], 4, 0, max(size))
            x0, y0, x1, y1 = person["bbox_xyxy"]
            if not (x0 < x1 <= size[1] and y0 < y1 <= size[0]):
                raise ValueError(f"{self.name}: expected a box within {size[1]} x {size[0]}, got {person['bbox_xyxy']}")
            if not isinstance(person["keypoints"], list) or len(person["keypoints"]) != len(NAMES):
                raise ValueError(f"{self.name}: expected {len(NAMES)} keypoints, got {person['keypoints']!r:.60}")
            for point in person["keypoints"]:
                expect.numbers(f"{self.name} keypoint", point, 2, -math.inf, math.inf)
            expect.numbers(f"{self.name} scores", person["scores"], len(NAMES), -math.inf, math.inf)

    def placeholder(self, size: tuple[int, int]) -> list[dict[str, Any]]:
        """No person."""
        return []

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Two persons with points anywhere in their boxes."""
        height, width = size
        out = []
        for _ in range(2):
            # Whole and half pixels: mirroring twice is then exact.
            x0, y0 = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
            x1, y1 = int(rng.integers(width // 2 + 1, width + 1)), int(rng.integers(height // 2 + 1, height + 1))
            points = np.rint(2 * rng.uniform((x0, y0), (x1, y1), (len(NAMES), 2))) / 2
            scores = rng.uniform(0.2, 1, len(NAMES)).round(4)
            out.append({"bbox_xyxy": [x0, y0, x1, y1], "keypoints": points.tolist(), "scores": scores.tolist()})
        return out

    def crop(self, value: list[dict[str, Any]], crop: Crop, size: tuple[int, int], side: int) -> list[dict[str, Any]]:
        """The persons of whose box a part is left, in pixels of the crop; a mirror exchanges left and right."""
        height, width = size
        extent = np.array([width, height, width, height], dtype=np.float64)
        shares = np.array([person["bbox_xyxy"] for person in value], dtype=np.float64).reshape(-1, 4) / extent
        boxes, kept = crop_boxes(shares, crop, height, width)
        out = []
        for person, box, keep in zip(value, boxes, kept, strict=True):
            if keep:
                points = np.array(person["keypoints"]) - (crop.left, crop.top)
                points = points * side / (crop.width, crop.height)
                scores = person["scores"]
                if crop.hflip:
                    points = (points * [-1, 1] + [side, 0])[list(MIRRORED)]
                    scores = [scores[i] for i in MIRRORED]
                placed = {"bbox_xyxy": (box * side).round(6).tolist(), "keypoints": points.tolist(), "scores": scores}
                out.append({**person, **placed})
        return out

    def picture(self, value: list[dict[str, Any]], rgb: np.ndarray) -> Picture:
        """Boxes, and the limbs between points that are sure enough."""
        image, factor = _draw.canvas(rgb)
        thick = max(2, math.ceil(max(image.shape[:2]) / 250))
        far = 4 * max(image.shape[:2])
        for i, person in enumerate(value):
            colour = _draw.distinct(i)
            x0, y0, x1, y1 = (factor * v for v in person["bbox_xyxy"])
            image = _draw.rectangle(image, x0, y0, x1, y1, colour)
            points = [(round(factor * x), round(factor * y)) for x, y in person["keypoints"]]
            sure = [
                s >= _SHOWN_SCORE and max(abs(x), abs(y)) < far
                for s, (x, y) in zip(person["scores"], points, strict=True)
            ]
            for a, b in _LIMBS:
                if sure[a] and sure[b]:
                    cv2.line(image, points[a], points[b], (0, 0, 0), thick + 2, cv2.LINE_AA)
                    cv2.line(image, points[a], points[b], colour, thick, cv2.LINE_AA)
            for point, shown in zip(points, sure, strict=True):
                if shown:
                    cv2.circle(image, point, thick + 1, (255, 255, 255), -1, cv2.LINE_AA)
        return Picture(image=image, text=f"{len(value)} person{'' if len(value) == 1 else 's'}")
