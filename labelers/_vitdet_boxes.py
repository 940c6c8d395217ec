"""Boxes (..., 4) as x0 y0 x1 y1 in pixels: anchors, what is predicted of them, and what is pooled under them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

STRIDES = (4, 8, 16, 32, 64)
"""Of the maps of the pyramid, in pixels."""

RATIOS = (0.5, 1.0, 2.0)
"""Height over width of the anchors of a cell; their area is (8 * stride)^2."""

LARGEST_GROWTH = math.log(1000 / 16)
"""No prediction makes a box wider or higher by more than this, as a logarithm."""

POOLED = 7
"""Cells across what is pooled under a box."""

USUAL_SIDE, USUAL_LEVEL = 224, 2
"""A box of this side looks at the map of this number (stride 16), one of twice the side at the next."""


def anchors(rows: int, cols: int, stride: int, device: torch.device) -> Tensor:
    """Anchors (rows * cols * 3, 4) of a map: around the upper left corner of each cell, row by row."""
    shapes = []
    for ratio in RATIOS:
        width = math.sqrt((8 * stride) ** 2 / ratio)
        height = ratio * width
        shapes.append([-width / 2, -height / 2, width / 2, height / 2])
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float32, device=device) * stride,
        torch.arange(cols, dtype=torch.float32, device=device) * stride,
        indexing="ij",
    )
    corners = torch.stack((x, y, x, y), dim=-1).view(-1, 1, 4)
    return (corners + torch.tensor(shapes, device=device)).view(-1, 4)


def moved(boxes: Tensor, deltas: Tensor, weights: tuple[float, float]) -> Tensor:
    """Boxes float32 (..., 4) shifted by deltas[0:2] / weights[0] of their size, and grown by exp(deltas[2:4] / ...)."""
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + 0.5 * size
    centre = centre + deltas[..., :2] / weights[0] * size
    half = 0.5 * torch.exp((deltas[..., 2:] / weights[1]).clamp(max=LARGEST_GROWTH)) * size
    return torch.cat((centre - half, centre + half), dim=-1)


def clipped(boxes: Tensor, limits: Tensor) -> Tensor:
    """Boxes within 0 and limits (..., 4): w h w h of their image."""
    return torch.minimum(boxes.clamp(min=0), limits)


def filled(boxes: Tensor) -> Tensor:
    """Which boxes have an area: bool (...)."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def pooled(maps: Sequence[Tensor], boxes: Tensor, owners: Tensor) -> Tensor:
    """What the pyramid has under each box: float32 (boxes, channels, 7, 7).

    `maps` are the four finest, float32 (n, channels, h, w); `owners` (boxes,) says which image a box is of. A box is
    looked up in the one map that suits its size.
    """
    side = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    level = torch.floor(USUAL_LEVEL + torch.log2(side / USUAL_SIDE + 1e-8)).clamp(0, len(maps) - 1).long()
    # Sorted by map, so that one transfer tells the host how many boxes each has.
    order = torch.argsort(level, stable=True)
    counts = torch.bincount(level, minlength=len(maps)).tolist()
    regions = torch.cat((owners[:, None].to(boxes.dtype), boxes), dim=1)[order].split(counts)
    found = [
        roi_align(values, rois, POOLED, 1 / stride, sampling_ratio=0, aligned=True)
        for values, rois, stride in zip(maps, regions, STRIDES, strict=False)
    ]
    out = torch.empty((len(boxes), maps[0].shape[1], POOLED, POOLED), dtype=maps[0].dtype, device=boxes.device)
    out[order] = torch.cat(found)
    return out
