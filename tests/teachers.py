"""Two photographs, and how far what a labeler makes of them is from what its authors make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import skimage.data
import torch
from PIL import Image
from torch import Tensor

from dataengine.sample import Sample
from labelers import _images

PHOTOS = [skimage.data.astronaut(), skimage.data.chelsea()]  # 512 x 512 and 300 x 451 pixels
SAMPLES = [Sample(str(i), {"rgb": photo}) for i, photo in enumerate(PHOTOS)]
TOLERANCE = 1e-5
HALF = 2**-10
"""The rounding of float16, in which features are stored."""


def error(found: Any, expected: Any) -> float:
    """The largest difference by the largest value, and no less than the difference of lengths by the length."""
    found, expected = (torch.as_tensor(x).double() for x in (found, expected))
    assert found.shape == expected.shape
    difference = found - expected
    return max(
        float(difference.abs().max() / expected.abs().max()),
        float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected)),
    )


def batch(side: int, statistics: _images.Statistics, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor:
    return _images.normalised([_images.squeezed(photo, side, resample) for photo in PHOTOS], statistics, "cpu")


def run(forward: Callable[..., Any], *args: Any, **more: Any) -> Any:
    with torch.inference_mode():
        return forward(*args, **more)
