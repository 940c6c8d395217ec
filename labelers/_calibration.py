"""Making one detector's scores mean what another's do, so that one threshold serves both.

    knots = fit(own, reference, truth)      # det values of the same images, in the same order
    write("dfine.json", knots, "D-FINE-X on 5,000 images of COCO val2017, as ViTDet-H's")

and `dfine.calibration=dfine.json` from then on. Five thousand images give a threshold of 0.6 to about 0.01.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataengine import weights

Knots = tuple[tuple[float, float], ...]
"""Pairs of a score and what it stands for, both rising: between them the map is linear, beyond them constant."""

Det = Mapping[str, Any]
"""The value of one image in a `det` column: `{"instances": [...]}`."""

_OVERLAP = 0.5
"""An instance is right when it overlaps one of its class in the truth by this much (intersection over union)."""

_STEPS = 100


def fit(own: Sequence[Det], reference: Sequence[Det], truth: Sequence[Det] | None = None) -> Knots:
    """The map from a detector's own scores to a reference detector's, from what both say of the same images.

    With the truth, a score becomes the reference's score at which an instance is as likely to be right (isotonic
    regressions, one a detector). Without it, the score above which the reference finds as many instances an image.
    ValueError when the images do not pair up or there is nothing to fit.
    """
    if len(own) != len(reference) or (truth is not None and len(truth) != len(own)):
        counts = [len(values) for values in (own, reference, truth) if values is not None]
        raise ValueError(f"calibration: expected as many images from each, got {' and '.join(map(str, counts))}")
    if not _scores(own).size or not _scores(reference).size:
        raise ValueError("calibration: expected instances from both detectors, got none from one of them")
    levels = np.linspace(0, 1, _STEPS + 1)
    if truth is None:
        pairs = _by_count(_scores(own), _scores(reference), levels)
    else:
        pairs = _by_precision(_judged(own, truth), _judged(reference, truth), levels)
    return _valid([(round(float(a), 5), round(float(b), 5)) for a, b in pairs], "calibration")


def apply(knots: Knots, scores: np.ndarray) -> np.ndarray:
    """Scores (n,) in 0..1 as the knots map them; as they are when there are none."""
    if not knots:
        return scores
    own, reference = np.array(knots).T
    return np.interp(scores, own, reference)


def read(source: str | Sequence[Sequence[float]]) -> Knots:
    """The knots of a file that `write` wrote (a path or fsspec URL), or knots themselves, checked.

    ValueError when they are not pairs in 0..1 that rise.
    """
    if not isinstance(source, str):
        return _valid(source, "calibration") if source else ()
    if not source:
        return ()
    file = weights.resolve(source)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["knots"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"calibration {source}: expected a JSON object with knots, {error!r}") from error
    return _valid(found, f"calibration {source}")


def write(file: Path | str, knots: Knots, about: str) -> None:
    """Keep knots as JSON, with words on what they were fitted to."""
    text = json.dumps({"about": about, "knots": _valid(knots, "calibration")}, indent=1)
    Path(file).write_text(text + "\n", encoding="utf-8")


def _by_count(own: np.ndarray, reference: np.ndarray, levels: np.ndarray) -> Iterable[tuple[float, float]]:
    """For each level of the reference's scores the own score above which there are as many instances."""
    best = -np.sort(-own)
    more = np.array([(reference >= level).sum() for level in levels])
    # Between the last instance that is in and the first that is out; beyond the last there is nothing to tell.
    inside = best[np.clip(more - 1, 0, len(best) - 1)]
    outside = np.append(best, 0.0)[np.clip(more, 0, len(best))]
    at = np.where(more == 0, best[0], (inside + outside) / 2)
    known = (more > 0) & (more <= len(best)) & (levels > 0)
    return _anchored(at[known], levels[known])


def _by_precision(
    own: tuple[np.ndarray, np.ndarray], reference: tuple[np.ndarray, np.ndarray], levels: np.ndarray
) -> Iterable[tuple[float, float]]:
    """For each level of the own scores the reference's score at which as many of the instances are right."""
    from sklearn.isotonic import IsotonicRegression

    rates = []
    for scores, right in (own, reference):
        curve = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, right)
        rates.append(curve.predict(levels))
    # A rate that several levels share stands for their middle.
    shared, first = np.unique(rates[1], return_inverse=True)
    middle = np.bincount(first, levels) / np.bincount(first)
    seen = (levels >= own[0].min()) & (levels <= own[0].max())
    return _anchored(levels[seen], np.interp(rates[0][seen], shared, middle))


def _anchored(own: np.ndarray, reference: np.ndarray) -> Iterable[tuple[float, float]]:
    """Rising pairs from (0, 0) to (1, 1), each own score once."""
    own, reference = np.append(own, [0, 1]), np.append(reference, [0, 1])
    places, which = np.unique(np.round(own, 5), return_inverse=True)
    means = np.bincount(which, reference) / np.bincount(which)
    means[0], means[-1] = 0, 1
    return zip(places.tolist(), np.maximum.accumulate(means).tolist(), strict=True)


def _scores(images: Sequence[Det]) -> np.ndarray:
    return np.array([_raw(i) for image in images for i in image["instances"]], dtype=np.float64)


def _raw(instance: dict[str, Any]) -> float:
    """The score before any calibration: one is fitted to what the network itself says."""
    return float(instance.get("score_raw", instance["score"]))


def _judged(images: Sequence[Det], truth: Sequence[Det]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all instances and whether each is right: the best first, each true instance found once."""
    scores, right = [], []
    for image, true in zip(images, truth, strict=True):
        free = defaultdict(list)
        for instance in true["instances"]:
            free[instance["class_name"]].append(np.array(instance["boxes"]))
        for instance in sorted(image["instances"], key=lambda i: -_raw(i)):
            left = free[instance["class_name"]]
            overlaps = [_overlap(np.array(instance["boxes"]), box) for box in left]
            best = int(np.argmax(overlaps)) if overlaps else -1
            hit = best >= 0 and overlaps[best] >= _OVERLAP
            if hit:
                left.pop(best)
            scores.append(_raw(instance))
            right.append(float(hit))
    return np.array(scores), np.array(right)


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    common = float(np.prod(np.maximum(sides, 0)))
    return common / float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - common)


def _valid(knots: Any, who: str) -> Knots:
    try:
        found = np.array([[float(a), float(b)] for a, b in knots])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{who}: expected pairs of scores, got {knots!r:.80}") from error
    inside = bool(np.isfinite(found).all() and found.size >= 4 and found.min() >= 0 and found.max() <= 1)
    if not inside or (np.diff(found[:, 0]) <= 0).any() or (np.diff(found[:, 1]) < 0).any():
        raise ValueError(f"{who}: expected at least two pairs of scores in 0..1 that rise, got {knots!r:.80}")
    return tuple((float(a), float(b)) for a, b in found)
