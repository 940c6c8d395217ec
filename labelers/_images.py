"""Images of any size as one normalised batch for a network with a fixed input size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from dataengine.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of R, G and B in 0..1."""

IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

Normalisation = Literal["imagenet", "native"]


def square_batch(samples: Sequence[Sample], side: int, statistics: Statistics, device: str) -> Tensor:
    """The whole images, squeezed to `side` x `side` (Pillow's bicubic), normalised: float32 (n, 3, side, side).

    Squeezed and not cut, so that a grid of features covers the image from border to border: its cell (i, j) of (n, n)
    looks at the pixels around ((i + 0.5) h / n, (j + 0.5) w / n).
    """
    import torch

    pixels = np.stack([_squeezed(sample.rgb, side) for sample in samples])
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in statistics)
    batch = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
    return ((batch - mean) / std).contiguous()


def _squeezed(rgb: np.ndarray, side: int) -> np.ndarray:
    if rgb.shape[:2] == (side, side):
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((side, side), Image.Resampling.BICUBIC))


def grid(features: Tensor) -> np.ndarray:
    """Patch tokens (n, rows * cols, channels) of square images as float16 (n, rows, cols, channels)."""
    n, tokens, channels = features.shape
    side = round(tokens**0.5)
    out: np.ndarray = features.reshape(n, side, side, channels).half().cpu().numpy()
    return out
