"""Images of any size as one normalised batch for a network with a fixed input size, and its features back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from dataengine.labeler import Staged

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of R, G and B in 0..1."""

IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
INCEPTION: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

Normalisation = Literal["imagenet", "native", "inception"]
"""Whose statistics a network's input is normalised with: ImageNet's (ml-4m trained its tokenizers of features so), the
network's own, or -1 to 1 (ml-4m's script that saves tokens does so)."""


def known(who: str, normalisation: str) -> None:
    """ValueError when this is no `Normalisation`."""
    if normalisation not in get_args(Normalisation):
        names = ", ".join(get_args(Normalisation))
        raise ValueError(f"{who}: expected normalisation {names}, got {normalisation!r}")


def statistics(normalisation: Normalisation, native: Statistics) -> Statistics:
    """The statistics that a setting means for a network whose own are `native`."""
    return {"imagenet": IMAGENET, "inception": INCEPTION, "native": native}[normalisation]


def squeezed(rgb: np.ndarray, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """The whole image at `side` x `side` (Pillow's bicubic, or another filter), uint8 (side, side, 3).

    Squeezed and not cut, so that a grid of features covers the image from border to border: its cell (i, j) of (n, n)
    looks at the pixels around ((i + 0.5) h / n, (j + 0.5) w / n).
    """
    if rgb.shape[:2] == (side, side):
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((side, side), resample))


def normalised(
    images: Sequence[np.ndarray], statistics: Statistics, device: str, dtype: torch.dtype | None = None
) -> Tensor:
    """Images uint8 (h, w, 3) of one size as a normalised batch (n, 3, h, w) on a device, float32 or of a `dtype`.

    They cross over once, as bytes and from pinned memory, and become floats there: a quarter of the traffic.
    """
    import torch

    pixels = torch.from_numpy(np.stack(images))
    if device.startswith("cuda"):
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    mean, std = _constants(statistics, device)
    return ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(dtype or torch.float32).contiguous()


@functools.lru_cache(maxsize=32)
def _constants(statistics: Statistics, device: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation on a device, sent there once: to send them is to wait for all that the device is doing."""
    import torch

    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in statistics)
    return mean, std


def grid(features: Tensor) -> np.ndarray:
    """Patch tokens (n, rows * cols, channels) of square images as float16 (n, rows, cols, channels)."""
    n, tokens, channels = features.shape
    side = round(tokens**0.5)
    out: np.ndarray = features.reshape(n, side, side, channels).half().cpu().numpy()
    return out


def featured(
    features: Callable[[Tensor], Mapping[str, Tensor]],
    side: int,
    statistics: Statistics,
    device: str,
    dtype: torch.dtype,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Staged:
    """A labeler of squeezed images: `features` takes a normalised batch and returns what each modality is of it.

    Patch tokens (n, rows * cols, channels) become grids, vectors (n, channels) stay; both float16, as they are stored.
    """
    import torch

    def label(images: Sequence[Any]) -> list[dict[str, Any]]:
        with torch.inference_mode():
            found = features(normalised(images, statistics, device, dtype))
            stored = {m: grid(v) if v.ndim == 3 else v.half().cpu().numpy() for m, v in found.items()}
        return [dict(zip(stored, values, strict=True)) for values in zip(*stored.values(), strict=True)]

    return Staged(lambda sample: squeezed(sample.rgb, side, resample), label)
