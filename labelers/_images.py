"""Images of any size as one normalised batch for a network with a fixed input size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of R, G and B in 0..1."""

IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

Normalisation = Literal["imagenet", "native"]


def squeezed(rgb: np.ndarray, side: int) -> np.ndarray:
    """The whole image at `side` x `side` (Pillow's bicubic), uint8 (side, side, 3).

    Squeezed and not cut, so that a grid of features covers the image from border to border: its cell (i, j) of (n, n)
    looks at the pixels around ((i + 0.5) h / n, (j + 0.5) w / n).
    """
    if rgb.shape[:2] == (side, side):
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((side, side), Image.Resampling.BICUBIC))


def normalised(images: Sequence[np.ndarray], statistics: Statistics, device: str) -> Tensor:
    """Images uint8 (h, w, 3) of one size as a normalised batch float32 (n, 3, h, w) on a device.

    They cross over once, as bytes and from pinned memory, and become floats there: a quarter of the traffic.
    """
    import torch

    pixels = torch.from_numpy(np.stack(images))
    if device.startswith("cuda"):
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in statistics)
    return ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).contiguous()


def grid(features: Tensor) -> np.ndarray:
    """Patch tokens (n, rows * cols, channels) of square images as float16 (n, rows, cols, channels)."""
    n, tokens, channels = features.shape
    side = round(tokens**0.5)
    out: np.ndarray = features.reshape(n, side, side, channels).half().cpu().numpy()
    return out
