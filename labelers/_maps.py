"""Networks that answer with a map as large as their input: images of any size in, maps of the images' sizes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor, nn

LONGEST = 4
"""How many times the shorter side the longer one may be in the network; what is longer yet is squeezed to that."""


@dataclass(frozen=True)
class Fitted:
    """An image at the size a network takes, and where its answer belongs."""

    rgb: np.ndarray  # uint8 (h, w, 3), sides multiples of the network's cell
    size: tuple[int, int]  # (height, width) of the image in pixels
    key: str


def shape_for(size: tuple[int, int], side: int, multiple: int) -> tuple[int, int]:
    """(height, width) for a network: the shorter side is `side`, the longer one the nearest multiple that keeps the
    aspect ratio, at most LONGEST times `side`."""
    short, long = min(size), max(size)
    other = max(round(side * min(long / short, LONGEST) / multiple), 1) * multiple
    return (side, other) if size[0] <= size[1] else (other, side)


def fitted(rgb: np.ndarray, shape: tuple[int, int], key: str, resample: Image.Resampling) -> Fitted:
    """The whole image, resized to (height, width) by Pillow: nothing is cut off."""
    size = rgb.shape[0], rgb.shape[1]
    if size != shape:
        rgb = np.asarray(Image.fromarray(rgb).resize((shape[1], shape[0]), resample))
    return Fitted(rgb, size, key)


def answered(
    images: Sequence[Fitted],
    network: Callable[[list[Fitted]], Tensor],
    finish: Callable[[Tensor], Tensor],
) -> list[np.ndarray]:
    """One array per image: the images of one shape go through the network together, and their maps (n, c, h, w) come
    back to the images' own sizes (bilinear, pixel centres kept), where `finish` turns (c, h, w) into what is stored.

    What an image gets does not depend on its neighbours: none is padded, and `finish` sees one image at a time. The
    results are fetched when all networks have been queued, so that the device does not wait for copies.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.rgb.shape, []).append(i)
    found: dict[int, Any] = {}
    for indices in groups.values():
        maps = network([images[i] for i in indices])
        for i, one in zip(indices, maps, strict=True):
            found[i] = finish(restored(one, images[i].size))
    return [found[i].cpu().numpy() for i in range(len(images))]


def restored(one: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (c, h, w) at (height, width), float32: bilinear between pixel centres, averaged where it gets smaller."""
    from torch.nn import functional as F

    one = one.float()
    if tuple(one.shape[-2:]) == size:
        return one
    resized: Tensor = F.interpolate(one[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    return resized


def in_float32(layer: nn.Module) -> None:
    """Let a layer compute in float32 whatever the rest of its network does.

    The last layer of a map: half precision has too few steps for one that is stored in 65536, or for an angle.
    """
    layer.float()
    layer.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
