"""Discrete tokens of another modality: every `tok_<modality>@<side>`."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Modality, Picture


class Tokens(Modality):
    """uint16 (n_crops, n_tokens), a row for each row of the crop settings, the grid row by row.

    Stored as ml-4m does, int16 npy: no vocabulary of its has more than 16,384 ids, none of ours more than 32,768.
    """

    kind = "tokens"
    suffix = "npy"

    def encode(self, value: np.ndarray) -> bytes:
        """A plain .npy of int16."""
        return codecs.encode_npy(value.astype(np.int16))

    def decode(self, data: bytes) -> np.ndarray:
        """uint16 (n_crops, n_tokens)."""
        stored = codecs.decode_npy(data)
        if stored.dtype != np.int16 or stored.ndim != 2 or stored.min(initial=0) < 0:
            raise ValueError(
                f"{self.name}: expected int16 (n_crops, n_tokens) from 0, got {stored.dtype} {stored.shape}"
            )
        return stored.astype(np.uint16)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """uint16 (n_crops, n_tokens) below 32768."""
        if not isinstance(value, np.ndarray) or value.dtype != np.uint16 or value.ndim != 2 or 0 in value.shape:
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"{self.name}: expected uint16 (n_crops, n_tokens), got {found}")
        if value.max() > np.iinfo(np.int16).max:
            raise ValueError(f"{self.name}: expected ids up to 32767, got {value.max()}")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """One crop of one token 0."""
        return np.zeros((1, 1), np.uint16)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Two crops of 8 x 8 tokens."""
        return rng.integers(0, 1024, (2, 64)).astype(np.uint16)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """Unchanged: there is a row for each crop already."""
        return value

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """The grid of the first crop, a colour for each id; the ids themselves where it is no square."""
        ids = value[0].astype(np.uint32)
        side = math.isqrt(len(ids))
        if side * side != len(ids):
            return Picture(text=" ".join(map(str, ids)))
        mixed = ids * np.uint32(2654435761)  # Knuth's multiplicative hash: near ids get far colours
        colours = np.stack([(mixed >> s) & 255 for s in (8, 16, 24)], axis=-1).astype(np.uint8)
        shown = cv2.resize(colours.reshape(side, side, 3), (128, 128), interpolation=cv2.INTER_NEAREST)
        return Picture(image=shown, text=f"{len(np.unique(ids))} different of {len(ids)}")
