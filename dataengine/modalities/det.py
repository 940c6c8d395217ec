"""Boxes of things."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from dataengine import coco, codecs
from dataengine.geometry import Crop, crop_boxes
from dataengine.modalities import Picture, TextLike

SCORE_THRESHOLD = 0.6
"""A box is written as text from this score on (ml-4m's det_threshold)."""
BINS = 1000

_BOX = re.compile(r"v0=(\d+)\s+v1=(\d+)\s+v2=(\d+)\s+v3=(\d+)\s+([^=]*?)\s*(?=v0=|$)")


class Det(TextLike):
    """{"instances": [{"boxes": [x0, y0, x1, y1], "class_name": str, "score": float}]}, ml-4m's JSON.

    Corners are in 0..1 of the stored image with x0 < x1 and y0 < y1, scores in 0..1.
    """

    kind = "instances"
    suffix = "json"
    choice = "crop"

    def encode(self, value: dict[str, Any]) -> bytes:
        """JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> dict[str, Any]:
        """The dictionary."""
        value: dict[str, Any] = codecs.decode_json(data)
        self.check(value, (0, 0))
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """The keys, types and ranges of every instance."""
        if not isinstance(value, dict) or set(value) != {"instances"} or not isinstance(value["instances"], list):
            raise ValueError(f'det: expected {{"instances": [...]}}, got {value!r:.100}')
        for instance in value["instances"]:
            if not isinstance(instance, dict) or not {"boxes", "class_name", "score"} <= set(instance):
                raise ValueError(f"det: expected boxes, class_name and score, got {instance!r:.100}")
            box, score = instance["boxes"], instance["score"]
            if (
                not isinstance(box, list)
                or len(box) != 4
                or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1)
            ):
                raise ValueError(f"det: expected x0 < x1 and y0 < y1 in 0..1, got {box!r:.100}")
            if not isinstance(instance["class_name"], str) or not 0 <= score <= 1:
                raise ValueError(f"det: expected a class name and a score in 0..1, got {instance!r:.100}")

    def placeholder(self, size: tuple[int, int]) -> dict[str, Any]:
        """No instance."""
        return {"instances": []}

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> dict[str, Any]:
        """Three random boxes."""
        instances = []
        for _ in range(3):
            x0, y0 = (float(v) for v in rng.uniform(0, 0.6, 2))
            w, h = (float(v) for v in rng.uniform(0.1, 0.4, 2))
            name = str(rng.choice(coco.THINGS))
            instances.append(
                {"boxes": [x0, y0, x0 + w, y0 + h], "class_name": name, "score": float(rng.uniform(0.5, 1))}
            )
        return {"instances": instances}

    def crop(self, value: dict[str, Any], crop: Crop, size: tuple[int, int], side: int) -> dict[str, Any]:
        """Boxes relative to the crop; those with no area in it are dropped."""
        instances = value["instances"]
        boxes, kept = crop_boxes(np.array([i["boxes"] for i in instances], np.float64).reshape(-1, 4), crop, *size)
        return {
            "instances": [
                {**instance, "boxes": box.tolist()}
                for instance, box, keep in zip(instances, boxes, kept, strict=True)
                if keep
            ]
        }

    def picture(self, value: dict[str, Any], rgb: np.ndarray) -> Picture:
        """The boxes drawn on the image, with class and score in the legend."""
        shown = rgb.copy()
        height, width = rgb.shape[:2]
        line = max(1, round(max(height, width) / 180))
        legend = []
        for instance in value["instances"]:
            name = instance["class_name"]
            colour = coco.colour(coco.NAMES.index(name) if name in coco.NAMES else 0)
            x0, y0, x1, y1 = (round(v * (n - 1)) for v, n in zip(instance["boxes"], (width, height) * 2, strict=True))
            cv2.rectangle(shown, (x0, y0), (x1, y1), colour, line)
            legend.append((f"{name} {instance['score']:.2f}", colour))
        return Picture(image=shown, legend=tuple(legend[:6]), text="" if legend else "no box")

    def variants(self, value: dict[str, Any], crops: Sequence[Crop], size: tuple[int, int]) -> list[list[str]]:
        """For each crop one piece: boxes of a sufficient score, nearest to the upper left corner first."""
        sure = {"instances": [i for i in value["instances"] if i["score"] >= SCORE_THRESHOLD]}
        return [[self._text(self.crop(sure, crop, size, 0))] for crop in crops]

    @staticmethod
    def _text(value: dict[str, Any]) -> str:
        near_first = sorted(value["instances"], key=lambda i: i["boxes"][0] ** 2 + i["boxes"][1] ** 2)
        boxes = [
            " ".join(f"v{axis}={round(v * (BINS - 1))}" for axis, v in enumerate(i["boxes"])) + f" {i['class_name']}"
            for i in near_first
        ]
        return " ".join(boxes)

    def parse(self, text: str) -> tuple[dict[str, Any], list[str]]:
        """The boxes that are whole; complaints about the rest."""
        body = text.replace("[EOS]", "").strip()
        instances, complaints, end = [], [], 0
        for match in _BOX.finditer(body):
            if body[end : match.start()].strip():
                complaints.append(f"not a box: {body[end : match.start()].strip()!r}")
            end = match.end()
            box = [int(g) / (BINS - 1) for g in match.groups()[:4]]
            name = match[5]
            if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                complaints.append(f"no area: {match[0]!r}")
            elif not name:
                complaints.append(f"no class: {match[0]!r}")
            else:
                instances.append({"boxes": box, "class_name": name, "score": 1.0})
        if body[end:].strip():
            complaints.append(f"not a box: {body[end:].strip()!r}")
        return {"instances": instances}, complaints
