"""Which points of a lattice polygons contain, exactly as OpenCV's pointPolygonTest says it, as run lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LARGEST = 255
"""The side of the largest lattice whose run lengths fit uint16: there are side * side points."""


def runs(polygons: Sequence[np.ndarray], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the points (x, y), 0 <= x, y < side, are inside of polygons int (n, 2) of corners x, y, or on their edges.

    Point y * side + x of polygon i is inside if an odd number of i's ends is not above it. `counts` int64 (polygons,)
    says how many ends (uint16, ascending, an even number) each polygon has in `ends`. A polygon may cross itself,
    leave the lattice, or have one or two corners, or none and then no point. The even-odd rule by crossing counts
    (Shimrat 1962), row by row and edge by edge; integers throughout.
    """
    if not 1 <= side <= LARGEST:
        raise ValueError(f"side {side}: expected 1..{LARGEST}, so that ends fit uint16")
    corners = np.array([len(polygon) for polygon in polygons], np.int64)
    if not corners.sum():
        return np.zeros(len(polygons), np.int64), np.zeros(0, np.uint16)
    end = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons]).astype(np.int64)
    owner = np.repeat(np.arange(len(polygons)), corners)
    before = np.arange(len(end)) - 1
    last = np.cumsum(corners) - 1
    before[(last - corners + 1)[corners > 0]] = last[corners > 0]
    (x0, y0), (x1, y1) = end[before].T, end.T

    stride = side * side + 1  # one more than there are points: runs of two polygons never touch
    base = owner * stride
    level = (y0 == y1) & (y1 >= 0) & (y1 < side)
    spans = (base + y1 * side)[level, None] + np.clip(
        np.stack([np.minimum(x0, x1), np.maximum(x0, x1) + 1], 1)[level], 0, side
    )

    low, high = np.maximum(np.minimum(y0, y1), 0), np.maximum(y0, y1)
    num_rows = np.where(y0 == y1, 0, np.maximum(np.minimum(high, side - 1) - low + 1, 0))
    edge = np.repeat(np.arange(len(end)), num_rows)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(num_rows) - num_rows - low, num_rows)
    rise, run = (y1 - y0)[edge], (x1 - x0)[edge]
    over = ((row - y0[edge]) * run + x0[edge] * rise) * np.sign(rise)  # the edge is at x = over / |rise|
    at = -(-over // np.abs(rise))
    start = base[edge] + row * side
    # An edge has the row of its lower y and not that of its higher one: each row is crossed an even number of times.
    crossings = np.sort((start + np.clip(at, 0, side))[row < high[edge]]).reshape(-1, 2)
    touched = (over % np.abs(rise) == 0) & (at >= 0) & (at < side)
    single = (start + at)[touched]
    return _joined(np.concatenate([spans, crossings, np.stack([single, single + 1], 1)]), stride, len(polygons))


def _joined(spans: np.ndarray, stride: int, num: int) -> tuple[np.ndarray, np.ndarray]:
    """The union of spans [a, b), all polygons in one line, `stride` each."""
    spans = spans[spans[:, 0] < spans[:, 1]]
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(spans[:, 1])
    new = np.ones(len(spans), bool)
    new[1:] = spans[1:, 0] > reach[:-1]
    closes = np.roll(new, -1) if len(spans) else new
    bounds = np.stack([spans[new, 0], reach[closes]], 1)
    owner = bounds[:, 0] // stride
    counts = 2 * np.bincount(owner, minlength=num)
    return counts, (bounds - (owner * stride)[:, None]).reshape(-1).astype(np.uint16)


def contains(points: np.ndarray, counts: np.ndarray, ends: np.ndarray, side: int) -> np.ndarray:
    """bool (points, polygons): which polygons of `runs` contain points int (n, 2) of x, y on the lattice."""
    base = np.arange(len(counts)) * (side * side)
    table = ends + np.repeat(base, counts)
    queries = (points[:, 1] * side + points[:, 0])[:, None] + base
    return (np.searchsorted(table, queries, side="right") & 1).astype(bool)
