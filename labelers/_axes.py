"""Axes of surface normals: from what a network means by x, y and z to OpenCV's camera axes.

The modality has x right, y down, z forward, normals out of the surface (`dataengine/modalities/normal.py`): a wall that
faces the camera is (0, 0, -1), a floor (0, -1, 0), a wall on the left (1, 0, 0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Signs = tuple[int, int, int]
"""By what x, y and z of a network are multiplied."""

OPENCV: Signs = (1, 1, 1)
"""Omnidata: its published pictures (EPFL-VILAB/omnidata, assets/demo/test9_normal.png) show, as (n + 1) / 2 * 255 of
the raw output, the floor as (125, 0, 124), the wall in front as (139, 130, 4), the walls on the left and right as
(255, 125, 143) and (1, 132, 106): y is -1, z is -1, x is 1 and -1."""

OPENGL: Signs = (1, -1, -1)
"""Marigold: x right, y up, z to the observer (diffusers, MarigoldImageProcessor.visualize_normals)."""

OUTWARD: Signs = (-1, -1, -1)
"""DSINE: x right, y down, z forward, but vectors into the surface."""

FACING = (0.0, 0.0, -1.0)


def unit(normals: Tensor, signs: Signs) -> Tensor:
    """Vectors (3, h, w) of any length in a network's axes, as unit vectors (h, w, 3) in OpenCV's, float32.

    Where there is no direction (opposite normals may cancel out) it is that of a wall facing the camera. What is not a
    number stays so, for the modality to refuse.
    """
    import torch

    turned = normals.float() * torch.tensor(signs, device=normals.device).view(3, 1, 1)
    length = turned.norm(dim=0, keepdim=True)
    facing = torch.tensor(FACING, device=normals.device).view(3, 1, 1)
    return torch.where(length <= 1e-6, facing, turned / length.clamp_min(1e-6)).permute(1, 2, 0).contiguous()


def faces_camera(normals: np.ndarray) -> bool:
    """Whether unit normals (..., 3) of an upright frontal plane point to the camera: their median z is below 0.

    The check of a new normal network: give it a photograph of a wall from the front. False says that its axes or its
    sign are not what was taken for granted.
    """
    if normals.ndim < 2 or normals.shape[-1] != 3 or normals.size == 0:
        raise ValueError(f"expected normals (..., 3), got {normals.shape}")
    return bool(np.median(normals[..., 2]) < 0)
