"""Boxes of objects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from dataengine import coco, codecs
from dataengine.geometry import Crop, crop_boxes
from dataengine.modalities import Kind, Picture, Piece, TextLike, _draw
from dataengine.modalities import _checks as expect
from dataengine.modalities._text import BOX, NUM_BINS, quoted, unbinned, until_end

_BOX = re.compile(rf"{BOX.pattern} ([^=]+)")
_SHOWN_SCORE = 0.3


class Det(TextLike):
    """`{"instances": [{"boxes": [x0, y0, x1, y1], "class_name": str, "score": float}]}` as JSON, as in ml-4m.

    Corners in 0..1 of the stored image, x right, y down; `class_name` is one of COCO's 80 (`coco.THINGS`), the ones
    the text tokenizer knows; score in 0..1. Further keys of an instance are kept and ignored.
    """

    kind: ClassVar[Kind] = "instances"
    suffix: ClassVar[str] = "json"
    choice: ClassVar[Literal["crop", "any"]] = "crop"
    max_tokens: ClassVar[int] = 256
    threshold: ClassVar[float] = 0.6
    """Instances of a lower score are not in the text (ml-4m's det_threshold)."""

    def encode(self, value: dict[str, Any]) -> bytes:
        """Compact JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> dict[str, Any]:
        """The dict of instances."""
        value = codecs.decode_json(data)
        expect.dictionary(self.name, value, ("instances",))
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """Boxes in 0..1 with an area, COCO's names, scores in 0..1."""
        expect.dictionary(self.name, value, ("instances",))
        if not isinstance(value["instances"], list):
            raise ValueError(f"{self.name}: expected a list of instances, got {type(value['instances']).__name__}")
        for instance in value["instances"]:
            expect.dictionary(f"{self.name} instance", instance, ("boxes", "class_name", "score"))
            expect.numbers(f"{self.name} boxes", instance["boxes"], 4, 0, 1)
            x0, y0, x1, y1 = instance["boxes"]
            if not (x0 < x1 and y0 < y1):
                raise ValueError(f"{self.name}: expected x0 < x1 and y0 < y1, got {instance['boxes']}")
            if instance["class_name"] not in coco.THINGS:
                raise ValueError(f"{self.name}: expected a COCO class name, got {instance['class_name']!r:.40}")
            expect.numbers(f"{self.name} score", [instance["score"]], 1, 0, 1)

    def placeholder(self, size: tuple[int, int]) -> dict[str, Any]:
        """No instance."""
        return {"instances": []}

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> dict[str, Any]:
        """Three boxes, the first of a person, so that what looks at persons has something to do."""
        corners = np.round(rng.uniform((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1), (3, 4)), 4)
        names = ["person", *(coco.THINGS[i] for i in rng.integers(0, len(coco.THINGS), 2))]
        return {
            "instances": [
                {"boxes": box.tolist(), "class_name": name, "score": score}
                for box, name, score in zip(corners, names, (0.9, 0.75, 0.5), strict=True)
            ]
        }

    def crop(self, value: dict[str, Any], crop: Crop, size: tuple[int, int], side: int) -> dict[str, Any]:
        """The instances of which a part is left, in 0..1 of the crop."""
        instances = value["instances"]
        boxes, kept = crop_boxes(np.array([i["boxes"] for i in instances], dtype=np.float64), crop, *size)
        whole = [{**i, "boxes": box} for i, box, keep in zip(instances, boxes.tolist(), kept, strict=True) if keep]
        return {**value, "instances": whole}

    def variants(self, value: dict[str, Any], crops: Sequence[Crop], size: tuple[int, int]) -> list[list[Piece]]:
        """For each crop one piece an instance, those nearest to the top left corner first (ml-4m's dist_to_orig)."""
        sure = {"instances": [i for i in value["instances"] if i["score"] >= self.threshold]}
        return [self._pieces(self.crop(sure, crop, size, 0)["instances"]) for crop in crops]

    @staticmethod
    def _pieces(instances: list[dict[str, Any]]) -> list[Piece]:
        ordered = sorted(instances, key=lambda i: i["boxes"][0] ** 2 + i["boxes"][1] ** 2)
        return [
            " ".join(f"v{axis}={round(x * (NUM_BINS - 1))}" for axis, x in enumerate(i["boxes"]))
            + f" {i['class_name']}"
            for i in ordered
        ]

    def parse(self, text: str) -> tuple[dict[str, Any], list[str]]:
        """Instances of score 1 (the text has none), corners in steps of 1/999."""
        before, *chunks = re.split(r"(?:^|\s+)(?=v0=)", " ".join(until_end(text).split()))
        complaints = [f"expected a box to begin with v0=, got {quoted(before)}"] if before else []
        instances = []
        for chunk in chunks:
            match = _BOX.fullmatch(chunk)
            if match is None:
                complaints.append(f"expected v0= v1= v2= v3= and a class, got {quoted(chunk)}")
                continue
            x0, y0, x1, y1 = (int(bin_) for bin_ in match.groups()[:4])
            if match[5] not in coco.THINGS:
                complaints.append(f"expected a COCO class name, got {quoted(match[5])}")
            elif x0 > x1 or y0 > y1:
                complaints.append(f"expected x0 <= x1 and y0 <= y1, got {quoted(chunk)}")
            else:
                box = unbinned((x0, y0, x1, y1))
                instances.append({"boxes": box, "class_name": match[5], "score": 1.0})
        return {"instances": instances}, complaints

    def picture(self, value: dict[str, Any], rgb: np.ndarray) -> Picture:
        """Boxes with class and score on the image, the surest on top; those below 0.3 are only counted."""
        image, _ = _draw.canvas(rgb)
        height, width = image.shape[:2]
        shown = sorted((i for i in value["instances"] if i["score"] >= _SHOWN_SCORE), key=lambda i: i["score"])
        for instance in shown:
            x0, y0, x1, y1 = np.multiply(instance["boxes"], (width, height, width, height)).tolist()
            colour = coco.colour(coco.NAMES.index(instance["class_name"]))
            label = f"{instance['class_name']} {instance['score']:.2f}"
            image = _draw.tag(_draw.rectangle(image, x0, y0, x1, y1, colour), label, x0, y0, colour)
        hidden = len(value["instances"]) - len(shown)
        text = f"{len(shown)} box{'' if len(shown) == 1 else 'es'}"
        return Picture(image=image, text=f"{text}, {hidden} more below {_SHOWN_SCORE}" if hidden else text)
