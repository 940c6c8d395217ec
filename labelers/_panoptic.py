"""From the masks and classes of queries to the class of every pixel, for the networks that segment by queries."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dataengine import coco
from labelers import _images, _networks

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]
"""Height and width in pixels."""

_AT_ONCE = 2**24
"""How many scores of queries and classes are in memory at a time: 64 MiB of float32."""


def order(names: Mapping[Any, str] | None, who: str) -> list[int]:
    """For each of COCO's 133 classes, in detectron2's order (`coco.NAMES`), its place among a network's classes.

    ValueError when a network's names (a config's `id2label`) are not COCO's: numbers alone do not say what they mean.
    """
    names = names or {}
    found = {name: int(place) for place, name in names.items()}
    unknown = [name for name in found if name not in coco.NAMES]
    missing = [name for name in coco.NAMES if name not in found]
    if unknown or missing or len(found) != len(names):
        raise ValueError(
            f"{who}: expected the {len(coco.NAMES)} classes of COCO panoptic by name in the config's id2label, found "
            f"{len(names)}; unknown: {_some(unknown)}; missing: {_some(missing)}"
        )
    return [found[name] for name in coco.NAMES]


def padded(
    images: Sequence[np.ndarray],
    size: Size,
    device: str,
    statistics: _images.Statistics,
    fill: Literal["mean", "black"],
) -> Tensor:
    """Images uint8 (h, w, 3) normalised in the top left corners of a batch float32 (n, 3, *size) on a device.

    `fill` is the colour of the rest: "mean" is 0 after normalisation, "black" is 0 before.
    """
    canvas = np.zeros((len(images), *size, 3), dtype=np.uint8)
    for place, image in zip(canvas, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    out = _images.normalised(canvas, statistics, device)  # type: ignore[arg-type]
    if fill == "mean":
        for one, image in zip(out, images, strict=True):
            one[:, image.shape[0] :] = 0
            one[:, :, image.shape[1] :] = 0
    return out


def semantic(
    masks: Tensor, classes: Tensor, places: Sequence[int], input_size: Size, inner: Size, size: Size
) -> Tensor:
    """The class of every pixel of one image, uint8 (*size), on the device of the logits.

    `masks` (queries, h, w) and `classes` (queries, classes + 1) are logits, the last class is "nothing"; `places` says
    which class each id stands for. The masks are resized bilinearly to the network's input, cut to the `inner` part
    that is no padding, and resized to the image; a pixel is of the class with the largest sum over queries of
    probability of class times probability of mask. There is always one: no pixel is left unlabelled.

    Both resizes are linear maps along each axis, so they are made one matrix an axis, and the classes are summed for a
    few rows at a time: neither the masks at full size nor the scores of all pixels are ever in memory.
    """
    import torch

    _networks.finite(masks, "semseg"), _networks.finite(classes, "semseg")  # the first class would be the largest
    rows = _resampling(masks.shape[1], input_size[0], inner[0], size[0])
    columns = _resampling(masks.shape[2], input_size[1], inner[1], size[1]).to(masks.device)
    shares = classes.float().softmax(-1)[:, list(places)].T.contiguous()
    wide = masks.float() @ columns.T
    out = torch.empty(size, dtype=torch.uint8, device=masks.device)
    step = max(_AT_ONCE // (size[1] * sum(shares.shape)), 1)
    for top in range(0, size[0], step):
        part = rows[top : top + step]
        near = part.any(0).nonzero()
        first, last = int(near[0]), int(near[-1]) + 1
        logits = part[:, first:last].to(masks.device) @ wide[:, first:last]
        scores = shares @ logits.sigmoid_().flatten(1)
        out[top : top + step] = scores.argmax(0).view(-1, size[1])
    return out


@functools.lru_cache(maxsize=128)
def _resampling(source: int, whole: int, inner: int, target: int) -> Tensor:
    """The matrix (target, source) of resizing `source` pixels to `whole`, keeping `inner`, resizing those to `target`.

    Made by the very functions that would resize, out of one pixel at a time.
    """
    import torch
    from torch.nn.functional import interpolate

    pixels = torch.eye(source)[None]
    once = interpolate(pixels, size=whole, mode="linear", align_corners=False)[..., :inner]
    return interpolate(once, size=target, mode="linear", align_corners=False)[0].T.contiguous()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"
