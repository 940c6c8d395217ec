"""The rows of pixels and embeddings that are inputs, cut out of their values: what is not an input is never copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataengine.stored_images import StoredImage
from model.budgets import Ints
from model.spec import ModalitySpec

Dense = dict[str, list[tuple[int, Any]]]
"""By modality, (row of the batch, value) of pixels and embeddings that have any input."""


def patches(spec: ModalitySpec, image: NDArray[Any] | StoredImage, positions: Ints) -> NDArray[Any]:
    """Patches (K, p*p*C) at `positions` (K,) of the raster, flattened as row, column, channel, as ml-4m does.

    image: uint8 (H, W, C), stored or not, or float32 (C, H, W).
    """
    if isinstance(image, StoredImage):
        return image.patches(spec.patch_size, positions)
    size, side, channels = spec.patch_size, spec.side, spec.channels
    rows, columns = np.divmod(positions, side)
    if image.dtype == np.uint8:
        # A line of a patch as one item: half the time of its pixels one by one.
        lines = image.reshape(side * size, -1).view(f"V{size * channels}")
        found = lines.reshape(side, size, side)[rows, :, columns].view(np.uint8)
    else:
        found = image.reshape(channels, side, size, side, size)[:, rows, :, columns].transpose(0, 2, 3, 1)
    return found.reshape(len(positions), -1)


def check_image(spec: ModalitySpec, image: Any) -> None:
    """ValueError unless it is an image that `patches` can cut."""
    side = spec.side * spec.patch_size
    wanted = (side, side, spec.channels) if image.dtype == np.uint8 else (spec.channels, side, side)
    if image.shape != wanted:
        raise ValueError(f"{spec.name}: pixels {image.shape} of {image.dtype}, expected {wanted}")


def gather(
    spec: ModalitySpec, values: Sequence[tuple[int, Any]], samples: Ints, positions: Ints, ids: Ints
) -> tuple[NDArray[Any], Ints]:
    """The rows that tokens of one modality hold, (K, width), and which of them is each token's, -1 for none.

    samples, positions, ids: (T,), in the order of samples; ids are rows of a sample's own embeddings, or -1.
    """
    ids = np.arange(len(samples)) if spec.kind == "pixels" else ids
    real = np.flatnonzero(ids >= 0)
    chosen = positions if spec.kind == "pixels" else ids
    held = samples[real]
    parts = []
    for b, value in values:
        first, last = np.searchsorted(held, (b, b + 1))
        if first < last:
            at = chosen[real[first:last]]
            parts.append(patches(spec, value, at) if spec.kind == "pixels" else value[at])
    if len({part.dtype for part in parts}) > 1 and spec.kind == "pixels":
        raise ValueError(f"{spec.name}: uint8 and float32 pixels in one batch, expected one of them")
    width = spec.channels * spec.patch_size**2 if spec.kind == "pixels" else spec.dim_in
    rows = np.full(len(samples), -1)
    rows[real] = np.arange(len(real))
    return np.concatenate(parts) if parts else np.zeros((0, width), np.float32), rows
