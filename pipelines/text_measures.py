"""One metric for each modality that is text: captions, boxes, metadata and palettes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from dataengine import coco
from dataengine.modalities.metadata import KINDS
from pipelines.caption_facts import ALL, facts
from pipelines.measures import Counts, Measure, Pooled, f1, mean_counts

PALETTE = 5
"""Colours of the palette that is compared, and asked for."""

_FARTHEST = 255 * 3**0.5
_CELLS = 6
_CANDIDATES, _JUDGES = 64, 256


class Caption(Pooled):
    """F1 of the facts of a caption (`pipelines.caption_facts`), counted over all captions together."""

    metric = "F1 of facts"

    def ready(self, value: Sequence[str]) -> frozenset[str]:
        """The facts of the first caption."""
        return facts(value[0]) if value else frozenset()

    def counts(self, made: Sequence[Any], true: Sequence[Any]) -> Counts:
        """What each sample adds."""
        return np.array([[len(a & b), len(a), len(b)] for a, b in zip(made, true, strict=True)], np.float64)

    def often(self, values: Sequence[Any]) -> NDArray[np.float32]:
        """Of each fact."""
        return np.asarray(np.stack([self.vector(value) for value in values]).mean(axis=0), np.float32)

    def of(self, on: NDArray[np.bool_]) -> frozenset[str]:
        """The facts, be there a sentence that says them or not."""
        return frozenset(fact for fact, said in zip(ALL, on, strict=True) if said)

    def vector(self, value: Any) -> NDArray[np.float32]:
        """The label, small."""
        return np.array([fact in value for fact in ALL], np.float32)


class Boxes(NamedTuple):
    """Corners float (n, 4) in 0..1, and as many names of classes."""

    corners: NDArray[np.float64]
    names: tuple[str, ...]


class Det(Measure):
    """IoU of boxes of the same class, matched one to one so that it is largest, as an F1: 2 sum / (said + true)."""

    metric = "F1 of boxes by IoU"

    def ready(self, value: Mapping[str, Any]) -> Boxes:
        """The boxes that a text says."""
        sure = [i for i in value["instances"] if i["score"] >= 0.6]
        return Boxes(np.array([i["boxes"] for i in sure]).reshape(-1, 4), tuple(i["class_name"] for i in sure))

    def counts(self, made: Sequence[Any], true: Sequence[Any]) -> Counts:
        """What each sample adds."""
        rows = [(_overlap(a, b), len(a.names), len(b.names)) for a, b in zip(made, true, strict=True)]
        return np.array(rows, np.float64)

    def total(self, counts: Counts) -> Counts:
        """The score of sums."""
        return f1(counts)

    def constant(self, values: Sequence[Any]) -> Boxes:
        """Boxes of the first values, taken one by one as long as the score of the values grows."""
        judges, offered = _joined(values[:_JUDGES]), _joined(values[:_CANDIDATES])
        if not judges.names or not offered.names:
            return _joined([])
        iou = _iou(offered, judges)
        sizes = [len(value.names) for value in values[:_JUDGES]]
        if len(sizes) > 1:
            # Nobody is asked about boxes of his own.
            whose = np.repeat(np.arange(len(sizes)), sizes)
            iou[whose[: len(iou), None] == whose] = 0
        last = np.repeat(np.cumsum(sizes), sizes)  # of each judge's boxes, where the next judge's begin
        begins = np.unique(last - np.repeat(sizes, sizes))
        chosen: list[int] = []
        found, best = 0.0, 0.0
        while True:
            gains = np.maximum.reduceat(iou, begins, axis=1)
            one = int(gains.sum(axis=1).argmax())
            found += gains[one].sum()
            score = float(f1(np.array([found, (len(chosen) + 1) * len(sizes), len(judges.names)])))
            if score <= best:
                return Boxes(offered.corners[chosen], tuple(offered.names[i] for i in chosen))
            chosen.append(one)
            best = score
            # What a judge's box was matched with once, it is not matched with again.
            parts = [start + int(iou[one, start : last[start]].argmax()) for start in begins[gains[one] > 0]]
            iou[:, parts] = 0

    def vector(self, value: Any) -> NDArray[np.float32]:
        """Which part of each cell of a lattice the boxes of each class cover."""
        out = np.zeros((len(coco.THINGS), _CELLS, _CELLS), np.float32)
        edges = np.arange(_CELLS + 1) / _CELLS
        for (x0, y0, x1, y1), name in zip(value.corners, value.names, strict=True):
            across, down = (
                np.clip(np.minimum(edges[1:], b) - np.maximum(edges[:-1], a), 0, None) * _CELLS
                for a, b in ((x0, x1), (y0, y1))
            )
            out[coco.THINGS.index(name)] += down[:, None] * across
        return out.ravel()


def _joined(values: Sequence[Boxes]) -> Boxes:
    corners = np.concatenate([np.zeros((0, 4)), *(value.corners for value in values)])
    return Boxes(corners, tuple(name for value in values for name in value.names))


def _iou(made: Boxes, true: Boxes) -> NDArray[np.float64]:
    """(n, m): of boxes of one class; 0 between classes."""
    a, b = made.corners[:, None], true.corners[None]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    both = sides.prod(axis=-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (a, b)]
    same = np.array(made.names)[:, None] == np.array(true.names)
    iou: NDArray[np.float64] = np.where(same, both / np.maximum(areas[0] + areas[1] - both, 1e-12), 0)
    return iou


def _overlap(made: Boxes, true: Boxes) -> float:
    if not made.names or not true.names:
        return 0.0
    iou = _iou(made, true)
    if not iou.any():
        return 0.0
    return float(iou[linear_sum_assignment(-iou)].sum())


class Metadata(Measure):
    """Mean absolute error of each kind, over the mean distance of training values from their median.

    Kinds that never vary are left out. A kind that is not said costs what is farthest from the median in training.
    """

    metric = "error / spread"
    larger_is_better = False

    def __init__(self) -> None:
        self._spread = np.ones(len(KINDS))
        self._worst = np.ones(len(KINDS))
        self._used = np.ones(len(KINDS), bool)

    def ready(self, value: Mapping[str, float]) -> NDArray[np.float64]:
        """Each kind as its text would say it: the value of its bin; NaN where there is none."""
        return self.said({k.key: k.from_bin(k.to_bin(value[k.key])) for k in KINDS if k.key in value})

    def said(self, value: Mapping[str, float]) -> NDArray[np.float64]:
        """Each kind as it was read."""
        return np.array([value.get(k.key, np.nan) for k in KINDS], np.float64)

    def fit(self, values: Sequence[Any]) -> None:
        """Medians and spreads."""
        stack = np.stack(values)
        known = ~np.isnan(stack).any(axis=0)
        away = np.where(known, np.abs(stack - np.where(known, np.median(stack, axis=0), 0)), 0)
        self._used = away.mean(axis=0) > 0
        self._spread = np.where(self._used, away.mean(axis=0), 1)
        self._worst = away.max(axis=0)

    def counts(self, made: Sequence[Any], true: Sequence[Any]) -> Counts:
        """What each sample adds."""
        error = np.abs(np.stack(made) - np.stack(true))
        error = np.where(np.isnan(error), self._worst, error) / self._spread
        return mean_counts(error[:, self._used].mean(axis=1))

    def constant(self, values: Sequence[Any]) -> NDArray[np.float64]:
        """Medians, of those that say a kind."""
        stack = np.stack(values)
        known = ~np.isnan(stack)
        return np.array([np.median(v[k]) if k.any() else np.nan for v, k in zip(stack.T, known.T, strict=True)])

    def vector(self, value: Any) -> NDArray[np.float32]:
        """The label, small."""
        found: NDArray[np.float32] = (value[self._used] / self._spread[self._used]).astype(np.float32)
        return found


class Palette(Measure):
    """Mean distance in RGB (0..255) of the colours of two palettes of five, matched so that it is smallest.

    A colour that is missing is as far away as can be.
    """

    metric = "distance of colours"
    larger_is_better = False

    def ready(self, value: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """(5, 3) by brightness, NaN for those that are missing: the palette of five, or else the one there is."""
        found: list[list[float]] = value[0].get(str(PALETTE)) or next(iter(value[0].values()), [])
        colours = np.array(found, np.float64).reshape(-1, 3)[:PALETTE]
        colours = colours[np.argsort(colours.sum(axis=1), kind="stable")]
        return np.concatenate([colours, np.full((PALETTE - len(colours), 3), np.nan)])

    def counts(self, made: Sequence[Any], true: Sequence[Any]) -> Counts:
        """What each sample adds."""
        each = []
        for a, b in zip(made, true, strict=True):
            distance = np.nan_to_num(np.linalg.norm(a[:, None] - b[None], axis=-1), nan=_FARTHEST)
            each.append(distance[linear_sum_assignment(distance)].mean())
        return mean_counts(each)

    def constant(self, values: Sequence[Any]) -> NDArray[np.float64]:
        """The mean of the darkest, of the second, and so on."""
        stack = np.stack(values)
        counts = (~np.isnan(stack)).sum(axis=0)
        return np.divide(np.nansum(stack, axis=0), counts, out=np.full(stack.shape[1:], np.nan), where=counts > 0)

    def vector(self, value: Any) -> NDArray[np.float32]:
        """The label, small."""
        found: NDArray[np.float32] = value.astype(np.float32).ravel()
        return found


MEASURES: dict[str, type[Measure]] = {
    "caption": Caption,
    "det": Det,
    "metadata": Metadata,
    "color_palette": Palette,
}
"""By modality."""
