"""One metric for each kind of map: counts of each sample whose sums give the score, and the value that predicts best.

A score is a function of sums over samples, so that samples can be drawn again and again to see how sure it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from dataengine import coco
from model import domains
from model.domains import Domain
from pipelines import reconstruction

Counts = NDArray[np.float64]

_GRID = 16
"""Side of the small maps by which samples are compared."""
_CLASS_GRID = 6
_NUM_CLASSES = 256
_WIDTHS = (0.0, 0.5, 1.0, 2.0, 3.0)
"""Pixels by which lines are widened at most."""
_NO_ERROR = 1e-10
"""The least mean squared error of a PSNR: 100 dB."""


class Measure(ABC):
    """How predictions of one modality are scored."""

    metric: ClassVar[str]
    larger_is_better: ClassVar[bool] = True
    times: ClassVar[int] = 1
    """How many times as many draws it takes as of others to see what predicts them best."""

    def ready(self, value: Any) -> Any:
        """A label as it is compared."""
        return value

    def said(self, value: Any) -> Any:
        """A value that a model gave, as it is compared."""
        return self.ready(value)

    def fit(self, values: Sequence[Any]) -> None:
        """Take from training values what the metric is relative to; nothing by default."""
        del values

    @abstractmethod
    def counts(self, made: Sequence[Any], true: Sequence[Any]) -> Counts:
        """float64 (n, c): what each sample adds to the sums that `total` takes."""

    def total(self, counts: Counts) -> Counts:
        """Scores (...) of sums of counts (..., c): here the first over the second, a mean."""
        return np.asarray(counts[..., 0] / counts[..., 1])

    @abstractmethod
    def constant(self, values: Sequence[Any]) -> Any:
        """The one value that predicts all of these best, or nearly so."""

    def best(self, sets: Sequence[Sequence[Any]]) -> list[Any]:
        """For each set the one value that predicts it best, where all sets are scored together."""
        return [self.constant(values) for values in sets]

    @abstractmethod
    def vector(self, value: Any) -> NDArray[np.float32]:
        """A label as a vector, near to those of similar labels."""

    def score(self, made: Sequence[Any], true: Sequence[Any]) -> float:
        """The score of predictions."""
        return float(self.total(self.counts(made, true).sum(axis=0)))


def mean_counts(each: Sequence[float] | NDArray[Any]) -> Counts:
    """Counts of a metric that is a mean over samples."""
    values = np.asarray(each, np.float64)
    return np.stack([values, np.ones_like(values)], axis=1)


def f1(counts: Counts) -> Counts:
    """2 a / (b + c) of (..., 3): what is right, what was said, what is true; 1 where nothing was to be said or was."""
    right, both = 2 * counts[..., 0], counts[..., 1] + counts[..., 2]
    return np.asarray(np.divide(right, both, out=np.ones_like(right), where=both > 0))


class _Map(Measure):
    """A map, whose constant is the one that its tokenizer is held against."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain

    def ready(self, value: Any) -> Any:
        """The label."""
        return reconstruction.comparable(self.domain, [value])[0]

    def constant(self, values: Sequence[Any]) -> Any:
        """The value that predicts these best."""
        return reconstruction.constant(self.domain, values)

    def vector(self, value: Any) -> NDArray[np.float32]:
        """The label, small."""
        small: NDArray[np.float32] = cv2.resize(value.astype(np.float32), (_GRID, _GRID), interpolation=cv2.INTER_AREA)
        return small.ravel()


class Rgb(_Map):
    """PSNR, the mean over images."""

    metric = "PSNR, dB"

    def counts(self, made: Sequence[Any], true: Sequence[Any]) -> Counts:
        """What each sample adds."""
        error = [((a / 255.0 - b / 255.0) ** 2).mean() for a, b in zip(made, true, strict=True)]
        return mean_counts(-10 * np.log10(np.maximum(error, _NO_ERROR)))


class Depth(_Map):
    """Mean of |predicted - true| / true."""

    metric = "abs-rel"
    larger_is_better = False

    def counts(self, made: Sequence[Any], true: Sequence[Any]) -> Counts:
        """What each sample adds."""
        return mean_counts([(np.abs(a - b) / b).mean() for a, b in zip(made, true, strict=True)])


class Normal(_Map):
    """Mean angle."""

    metric = "mean angle, degrees"
    larger_is_better = False

    def counts(self, made: Sequence[Any], true: Sequence[Any]) -> Counts:
        """What each sample adds."""
        cosines = [np.clip((a * b).sum(axis=-1), -1, 1) for a, b in zip(made, true, strict=True)]
        return mean_counts([np.degrees(np.arccos(cosine)).mean() for cosine in cosines])


class Semseg(_Map):
    """Mean IoU over the classes that occur, pixels counted over all images together."""

    metric = "mIoU"

    def counts(self, made: Sequence[Any], true: Sequence[Any]) -> Counts:
        """What each sample adds."""
        rows = []
        for a, b in zip(made, true, strict=True):
            parts = (a[a == b], a, b)
            rows.append(np.concatenate([np.bincount(p.ravel(), minlength=_NUM_CLASSES) for p in parts]))
        return np.array(rows, np.float64)

    def total(self, counts: Counts) -> Counts:
        """The score of sums."""
        both, made, true = np.split(counts, 3, axis=-1)
        occurs = true > 0
        iou = np.divide(both, made + true - both, out=np.zeros_like(both), where=occurs)
        return np.asarray(iou.sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1))

    def constant(self, values: Sequence[Any]) -> Any:
        """The value that predicts these best."""
        stack = np.stack(values)
        classes = np.unique(stack)
        often = np.stack([(stack == c).sum(axis=0) for c in classes]).argmax(axis=0)
        return classes[often]

    def vector(self, value: Any) -> NDArray[np.float32]:
        """The label, small."""
        classes = np.arange(len(coco.NAMES), dtype=np.uint8)
        masks = (value[..., None] == classes).astype(np.float32)
        side = _CLASS_GRID
        # cv2 resizes four channels at a time.
        small = [cv2.resize(masks[..., i : i + 4], (side, side), interpolation=cv2.INTER_AREA) for i in classes[::4]]
        return np.concatenate([part.reshape(side * side, -1) for part in small], axis=1).ravel()


class Pooled(Measure):
    """F1 of what is on, counted over all samples together: what is frequent enough is said, in all sets alike."""

    @abstractmethod
    def often(self, values: Sequence[Any]) -> NDArray[np.float32]:
        """How often each thing is on in a set of values, 0..1."""

    @abstractmethod
    def of(self, on: NDArray[np.bool_]) -> Any:
        """The value in which these are on."""

    def total(self, counts: Counts) -> Counts:
        """The score of sums."""
        return f1(counts)

    def constant(self, values: Sequence[Any]) -> Any:
        """The value that predicts these best."""
        return self.best([values])[0]

    def best(self, sets: Sequence[Sequence[Any]]) -> list[Any]:
        """By the share, of 2, 4, ..., 50 %, that gives the best F1 if frequencies are true."""
        often = np.stack([self.often(values) for values in sets])
        tried = [often >= share for share in np.linspace(0.02, 0.5, 25)]
        scores = [f1(np.array([often[on].sum(), on.sum(), often.sum()], np.float64)) for on in tried]
        return [self.of(on) for on in tried[int(np.argmax(scores))]]


class Edges(Pooled, _Map):
    """F1 of pixels, counted over all images together; a pixel is on in few draws, of which there must be some."""

    metric = "F1"
    times = 4

    def counts(self, made: Sequence[Any], true: Sequence[Any]) -> Counts:
        """What each sample adds."""
        pairs = [(a > 0, b > 0) for a, b in zip(made, true, strict=True)]
        return np.array([[(a & b).sum(), a.sum(), b.sum()] for a, b in pairs], np.float64)

    def often(self, values: Sequence[Any]) -> NDArray[np.float32]:
        """Of lines that are widened by as many pixels as make one half of them predict the other best."""
        on = (np.stack(values) > 0).astype(np.float32)
        first, second = (half.mean(axis=0) for half in (on[::2], on[1::2] if len(on) > 1 else on))
        errors = [((_blurred(first, width) - second) ** 2).mean() for width in _WIDTHS]
        return _blurred(on.mean(axis=0), _WIDTHS[int(np.argmin(errors))])

    def of(self, on: NDArray[np.bool_]) -> Any:
        """uint8, 0 or 255."""
        return on.astype(np.uint8) * 255


class Features(_Map):
    """Mean cosine."""

    metric = "cosine"

    def counts(self, made: Sequence[Any], true: Sequence[Any]) -> Counts:
        """What each sample adds."""
        each = []
        for a, b in zip(made, true, strict=True):
            a, b = a.astype(np.float64), b.astype(np.float64)
            lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            each.append(((a * b).sum(axis=-1) / np.maximum(lengths, 1e-12)).mean())
        return mean_counts(each)

    def vector(self, value: Any) -> NDArray[np.float32]:
        """The label, small."""
        flat: NDArray[np.float32] = value.astype(np.float32).ravel()
        return flat


def _blurred(often: NDArray[np.float32], width: float) -> NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(often, (0, 0), width), np.float32) if width else often


_BY_DOMAIN: dict[type[Domain], type[_Map]] = {
    domains.Rgb: Rgb,
    domains.Depth: Depth,
    domains.Normal: Normal,
    domains.Semseg: Semseg,
    domains.Edges: Edges,
    domains.Features: Features,
    domains.Vector: Features,
}


def of_domain(domain: Domain) -> Measure:
    """How maps, features and vectors of a domain are scored; ValueError for others, and for depth without a scale."""
    if type(domain) not in _BY_DOMAIN or (isinstance(domain, domains.Depth) and domain.mapping == "standardised"):
        raise ValueError(f"{domain.name} has no measure, expected one of {', '.join(d.name for d in _BY_DOMAIN)}")
    return _BY_DOMAIN[type(domain)](domain)
