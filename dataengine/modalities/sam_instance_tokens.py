"""Masks of everything that has an outline, as tokens, under every crop."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import cv2
import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop, center_crop, crop_map
from dataengine.modalities import Kind, Picture, Piece, TextLike, _draw, _lattice
from dataengine.modalities import _checks as expect
from dataengine.modalities._text import BOX, INT, chunks, quoted, spelled, unspelled, until_end

NUM_TOKENS = 16
CODEBOOK = 1024
SIDE = 224
"""Pixels of the crops that ml-4m's text speaks of."""
_POINT = re.compile(f"v0={INT} v1={INT}")


class SamInstanceTokens(TextLike):
    """`{"side": 224, "crops": [[{"polygon": [[x, y], ...], "bbox": [...], "tokens": [...]}, ...], ...]}` as JSON.

    One list of instances for each row of crop_settings, all in pixels of the (side, side) crop, mirrored if it is.
    `polygon`: corners of the outline, whole numbers, the last joined to the first, as OpenCV's contours; empty where
    it is not known, as in what a model wrote. `bbox`: ymin, xmin, ymax, xmax, in ml-4m's order. `tokens`: 16 ids
    0..1023 of the mask within its box. Further keys are kept. In ml-4m a member is a pickled `.npy` of these numbers.

    The text: query points, drawn anew every time, and after each all instances that contain it, in random order.
    """

    kind: ClassVar[Kind] = "text"
    suffix: ClassVar[str] = "json"
    choice: ClassVar[Literal["crop", "any"]] = "crop"
    max_tokens: ClassVar[int] = 290
    packs_as: ClassVar[str] = "sam_instance"
    points_per_side: ClassVar[int] = 7
    point_order: ClassVar[Literal["random", "grid"]] = "random"
    """random: so many points, anywhere. grid: the inner points of a lattice of as many each way, in random order."""

    def encode(self, value: dict[str, Any]) -> bytes:
        """Compact JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> dict[str, Any]:
        """The dict."""
        value = codecs.decode_json(data)
        expect.dictionary(self.name, value, ("side", "crops"))
        found: dict[str, Any] = value
        return found

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """A side of 1..255, and of each instance corners and a box within it, and ids."""
        expect.dictionary(self.name, value, ("side", "crops"))
        side = value["side"]
        if type(side) is not int or not 1 <= side <= _lattice.LARGEST:
            raise ValueError(f"{self.name}: expected a side of 1..{_lattice.LARGEST} pixels, got {side!r:.40}")
        if not isinstance(value["crops"], list) or not all(isinstance(crop, list) for crop in value["crops"]):
            raise ValueError(f"{self.name}: expected a list of instances for each crop, got {value['crops']!r:.80}")
        for instance in (instance for crop in value["crops"] for instance in crop):
            expect.dictionary(f"{self.name} instance", instance, ("polygon", "bbox", "tokens"))
            _check_polygon(self.name, instance["polygon"], side)
            expect.numbers(f"{self.name} bbox", instance["bbox"], 4, 0, side)
            ymin, xmin, ymax, xmax = instance["bbox"]
            if ymin > ymax or xmin > xmax:
                raise ValueError(f"{self.name} bbox: expected ymin, xmin, ymax, xmax, got {instance['bbox']}")
            expect.numbers(f"{self.name} tokens", instance["tokens"], NUM_TOKENS, 0, CODEBOOK - 1)
            if not all(type(i) is int for i in instance["tokens"]):
                raise ValueError(f"{self.name} tokens: expected ints, got {instance['tokens']!r:.80}")

    def placeholder(self, size: tuple[int, int]) -> dict[str, Any]:
        """No crop: how many there would have been, only the crop settings know."""
        return {"side": SIDE, "crops": []}

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> dict[str, Any]:
        """Two crops, of two triangles and of one."""
        return {"side": SIDE, "crops": [[_example(rng) for _ in range(count)] for count in (2, 1)]}

    def crop(self, value: dict[str, Any], crop: Crop, size: tuple[int, int], side: int) -> dict[str, Any]:
        """Unchanged: it is of every crop already, choose one of its lists instead."""
        return value

    def variants(self, value: dict[str, Any], crops: Sequence[Crop], size: tuple[int, int]) -> list[list[Piece]]:
        """For each crop what `assemble` takes: the words, then the lattice points of each instance, then its text.

        `point`; `v0=0 v1=0`, from which the ids of other coordinates are counted; `none`; the side and how many ends
        each instance has in the ends of `_lattice.runs`, which are next; `polygon`, box and tokens of each instance.
        ValueError when there are not as many lists as crops.
        """
        if len(value["crops"]) != len(crops):
            raise ValueError(f"{self.name}: expected instances of {len(crops)} crops, got {len(value['crops'])}")
        side = value["side"]
        everything = [i for instances in value["crops"] for i in instances]
        counts, ends = _lattice.runs([np.array(i["polygon"], np.int64) for i in everything], side)
        stops = np.cumsum([0, *(len(instances) for instances in value["crops"])])
        at = np.concatenate([[0], np.cumsum(counts)])
        return [
            [
                "point",
                "v0=0 v1=0",
                "none",
                [side, *counts[a:b].tolist()],
                ends[at[a] : at[b]].tolist(),
                *(_text(instance) for instance in instances),
            ]
            for instances, a, b in zip(value["crops"], stops[:-1], stops[1:], strict=True)
        ]

    def assemble(self, pieces: Sequence[Sequence[int]], rng: np.random.Generator) -> list[Sequence[int]]:
        """Query points drawn as ml-4m's SAMInstanceTokTransform does, and what they meet, in the order to be read."""
        points = self._points(int(pieces[3][0]), rng)
        return self.say(pieces, points, rng.random((len(points), len(pieces) - 5)))

    def _points(self, side: int, rng: np.random.Generator) -> np.ndarray:
        """int (n, 2) of distinct x, y, in random order."""
        if self.point_order == "grid":
            steps = np.linspace(0, side, self.points_per_side + 2)[1:-1].astype(np.int64)
            lattice = np.stack(np.meshgrid(steps, steps), axis=2).reshape(-1, 2)
            return lattice[rng.permutation(len(lattice))]
        # Independent draws are in random order already, and so are the first ones of each of them.
        drawn = rng.integers(side, size=(self.points_per_side, 2))
        return np.array(list(dict.fromkeys(map(tuple, drawn.tolist()))))

    def say(self, pieces: Sequence[Sequence[int]], points: np.ndarray, priority: np.ndarray) -> list[Sequence[int]]:
        """The pieces said of points int (n, 2) of x, y, in that order; `assemble` without its draws.

        Instances (m) that contain a point follow it in the order of its row of `priority` float (n, m) in 0..1.
        Coordinates count up from their first ids, as in every vocabulary with 4M's special tokens.
        """
        point, coordinates, none, layout, ends, *instances = pieces
        row_id, column_id = int(coordinates[0]), int(coordinates[1])
        side, counts = int(layout[0]), np.asarray(layout[1:], np.int64)
        inside = _lattice.contains(points, counts, np.asarray(ends, np.int64), side)
        which, found = np.nonzero(inside)
        order = np.argsort(which + priority[which, found])
        found = found[order]
        stops = np.searchsorted(which, np.arange(len(points) + 1)).tolist()
        met = [found[a:b].tolist() for a, b in pairwise(stops)]
        out: list[Sequence[int]] = []
        for (x, y), those in zip(points.tolist(), met, strict=True):
            out += [point, (row_id + y, column_id + x)]
            out += [instances[i] for i in those] if those else [none]
        return out

    def parse(self, text: str) -> tuple[dict[str, Any], list[str]]:
        """One crop of side 224: the instances of the text, each once, with the query `points` [x, y] it was met at.

        `points` beside `crops` has all query points. Outlines are not in a text: their masks come from the tokens.
        """
        before, said = chunks(until_end(text).split(), "point")
        complaints = [f"expected 'point' first, got {quoted(' '.join(before))}"] if before or not said else []
        points: list[list[int]] = []
        instances: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[str, Any]] = {}
        for words in said:
            match = _POINT.fullmatch(" ".join(words[:2]))
            if match is None or max(int(match[1]), int(match[2])) >= SIDE:
                complaints.append(f"expected v0= v1= below {SIDE} after 'point', got {quoted(' '.join(words[:3]))}")
                continue
            point = [int(match[2]), int(match[1])]
            if point in points:
                complaints.append(f"the point {' '.join(words[:2])} a second time")
            else:
                points.append(point)
            rest, polygons = chunks(words[2:], "polygon")
            if (rest != ["none"] or polygons) and (rest or not polygons):
                complaints.append(f"expected 'none' or 'polygon' after a point, got {quoted(' '.join(words[2:]))}")
            for polygon in polygons:
                try:
                    bbox, tokens = _instance(polygon)
                except ValueError as error:
                    complaints.append(str(error))
                    continue
                known = {"polygon": [], "bbox": bbox, "tokens": tokens, "points": []}
                met = instances.setdefault((tuple(bbox), tuple(tokens)), known)["points"]
                if point in met:
                    complaints.append(f"an instance twice at one point: {quoted(' '.join(polygon))}")
                else:
                    met.append(point)
        return {"side": SIDE, "crops": [list(instances.values())], "points": points}, complaints

    def picture(self, value: dict[str, Any], rgb: np.ndarray) -> Picture:
        """The instances of the first crop over it (which is the centre), greyed; a box where an outline is unknown."""
        side, height, width = value["side"], *rgb.shape[:2]
        grey = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY)
        grey = crop_map(grey, center_crop(height, width), side, nearest=False)
        image, factor = _draw.canvas(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB))
        shown = value["crops"][0] if value["crops"] else []
        for i, instance in enumerate(sorted(shown, key=_area, reverse=True)):
            ymin, xmin, ymax, xmax = instance["bbox"]
            if instance["polygon"]:
                mask = cv2.fillPoly(np.zeros((side, side), np.uint8), [np.array(instance["polygon"], np.int32)], 1)
                image = _draw.overlay(image, _draw.enlarged(mask, factor).astype(bool), _draw.distinct(i))
            else:
                x0, y0, x1, y1 = (factor * v for v in (xmin, ymin, xmax, ymax))
                image = _draw.rectangle(image, x0, y0, x1, y1, _draw.distinct(i))
        count, crops = len(shown), len(value["crops"])
        return Picture(image=image, text=f"{count} instance{'' if count == 1 else 's'} in the first of {crops} crops")


def _check_polygon(name: str, polygon: Any, side: int) -> None:
    if not isinstance(polygon, list):
        raise ValueError(f"{name} polygon: expected a list of corners, got {type(polygon).__name__}")
    for corner in polygon:
        whole = isinstance(corner, list) and len(corner) == 2 and all(type(v) is int for v in corner)
        if not whole or not all(0 <= v <= side for v in corner):
            raise ValueError(f"{name} polygon: expected whole [x, y] in 0..{side}, got {corner!r:.80}")


def _example(rng: np.random.Generator) -> dict[str, Any]:
    corners = rng.integers(0, SIDE, (3, 2))
    bbox = [*corners.min(axis=0)[::-1].tolist(), *corners.max(axis=0)[::-1].tolist()]
    return {"polygon": corners.tolist(), "bbox": bbox, "tokens": rng.integers(0, CODEBOOK, NUM_TOKENS).tolist()}


def _text(instance: dict[str, Any]) -> str:
    ymin, xmin, ymax, xmax = (int(v) for v in instance["bbox"])
    return " ".join([f"polygon v0={xmin} v1={ymin} v2={xmax} v3={ymax}", *spelled(instance["tokens"])])


def _instance(words: Sequence[str]) -> tuple[list[int], list[int]]:
    """Box in the order of `bbox` and tokens of the words after `polygon`; ValueError when these are no instance."""
    match = BOX.fullmatch(" ".join(words[:4]))
    if match is None:
        raise ValueError(f"expected v0= v1= v2= v3= after 'polygon', got {quoted(' '.join(words[:4]))}")
    xmin, ymin, xmax, ymax = (int(v) for v in match.groups())
    if not (xmin <= xmax <= SIDE and ymin <= ymax <= SIDE):
        raise ValueError(f"expected xmin <= xmax and ymin <= ymax up to {SIDE}, got {quoted(match[0])}")
    return [ymin, xmin, ymax, xmax], unspelled(words[4:], NUM_TOKENS)


def _area(instance: dict[str, Any]) -> float:
    ymin, xmin, ymax, xmax = instance["bbox"]
    return float((ymax - ymin) * (xmax - xmin))
