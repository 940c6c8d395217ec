"""What ViTPose sees of a person, and how its heatmaps become points (Huang et al. 2020, Zhang et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

PADDING = np.float32(1.25)
"""By how much a box is grown, once it has the shape of the input."""
SIGMA, RADIUS = 0.8, 5
"""Standard deviation and reach, in cells, of the filter that smooths a heatmap."""
LEAST, MOST = 0.001, 50.0
"""Between these a smoothed heatmap is cut before its logarithm is taken."""


@dataclass(frozen=True)
class Frame:
    """The rectangle of the image that fills the input: centre and extent (2,), x and y, in pixels, float32."""

    center: np.ndarray
    extent: np.ndarray


def frame_of(box: np.ndarray, size: tuple[int, int]) -> Frame:
    """The frame of a box (4,) x0 y0 x1 y1 in pixels, for an input of (h, w)."""
    x0, y0, x1, y1 = box.astype(np.float64)
    width, height, aspect = x1 - x0, y1 - y0, size[1] / size[0]
    grown = np.array([max(width, height * aspect), max(height, width / aspect)])
    center = np.array([x0 + width * 0.5, y0 + height * 0.5], dtype=np.float32)
    # In the units of the reference, which divides by 200 and multiplies again.
    return Frame(center, (grown / 200).astype(np.float32) * PADDING * np.float32(200))


def crop(rgb: np.ndarray, frame: Frame, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w, 3): a frame of an image at the input's size; corner pixels meet the frame's corners (unbiased data
    processing), bilinear, black wherever it is outside of the image."""
    axes = []
    for along, (cells, whole) in enumerate(zip(size[::-1], rgb.shape[1::-1], strict=True)):
        scale = (cells - 1.0) / float(frame.extent[along])
        shift = np.float32(scale * float(np.float32(0.5) * frame.extent[along] - frame.center[along]))
        at = (np.arange(cells) - float(shift)) / float(np.float32(scale))
        first = np.clip(np.floor(at).astype(np.int64), 0, max(whole - 2, 0))
        axes.append((first, np.minimum(first + 1, whole - 1), at - first, (at >= 0) & (at <= whole - 1)))
    (left, right, across, inside_x), (top, bottom, down, inside_y) = axes
    u, v = across[None, :, None], down[:, None, None]
    out = (1 - v) * (1 - u) * rgb[top[:, None], left] + (1 - v) * u * rgb[top[:, None], right]
    out += v * (1 - u) * rgb[bottom[:, None], left] + v * u * rgb[bottom[:, None], right]
    out *= (inside_y[:, None] & inside_x)[..., None]
    return np.floor(out + 0.5).astype(np.uint8)


def peaks(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """Points (n, k, 2) x y in cells and scores (n, k) of heatmaps (n, k, h, w), float64.

    The highest cell, and from there one step of Newton's method on the logarithm of the smoothed heatmap (distribution
    aware coordinates). A heatmap that is nowhere positive has its point at (-1, -1). Only the cells that count are
    smoothed: 3 x 3 around the highest.
    """
    import torch

    height, width = heatmaps.shape[-2:]
    cells = heatmaps.flatten(2).double()
    scores, index = cells.max(dim=-1)
    reach = torch.arange(-RADIUS, RADIUS + 1, device=heatmaps.device)
    kernel = torch.exp(-0.5 * (reach.double() / SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    near = torch.arange(-1, 2, device=heatmaps.device)

    def around(at: Tensor, whole: int) -> Tensor:
        # The derivatives repeat the border, the filter mirrors it.
        i = ((at[..., None] + near).clamp(0, whole - 1)[..., None] + reach).flatten(-2) % (2 * whole)
        return torch.where(i < whole, i, 2 * whole - 1 - i)

    x, y = index % width, index // width
    rows, cols = around(y, height), around(x, width)
    patch = cells.gather(-1, (rows[..., :, None] * width + cols[..., None, :]).flatten(-2))
    patch = patch.unflatten(-1, (3, len(reach), 3, len(reach)))
    log = torch.einsum("nkiujv,u,v->nkij", patch, kernel, kernel).clamp(LEAST, MOST).log()
    point = torch.stack((x, y), dim=-1).double() - _newton(log)
    return torch.where((scores > 0)[..., None], point, -torch.ones_like(point)), scores


def _newton(log: Tensor) -> Tensor:
    """The step (..., 2) x y that the derivatives at the middle of (..., 3, 3) cells ask for."""
    import torch

    (a, b, _), (c, d, e), (_, f, g) = ((row.unbind(-1)) for row in log.unbind(-2))
    dx, dy = 0.5 * (e - c), 0.5 * (f - b)
    # Where the heatmap is flat there is nothing to divide by.
    eps = torch.finfo(torch.float32).eps
    dxx, dyy = e - 2 * d + c + eps, f - 2 * d + b + eps
    dxy = 0.5 * (g - e - f + 2 * d - c - b + a)
    det = dxx * dyy - dxy * dxy
    return torch.stack((dyy * dx - dxy * dy, dxx * dy - dxy * dx), dim=-1) / det[..., None]


def in_image(points: np.ndarray, frame: Frame, grid: tuple[int, int]) -> np.ndarray:
    """Points (k, 2) in cells of a heatmap of (h, w) as pixels of the image."""
    last = np.array(grid[::-1], dtype=np.float64) - 1
    out: np.ndarray = points * frame.extent / last + frame.center - 0.5 * frame.extent
    return out
