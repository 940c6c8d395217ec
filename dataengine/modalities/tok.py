"""Token ids of another modality, crop by crop."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Kind, Modality, Picture, _draw
from dataengine.modalities import _checks as expect

_NAME = re.compile(r"tok_[A-Za-z0-9_-]+?(@(?P<side>[1-9]\d*)|_global)")
_LARGEST = np.iinfo(np.int16).max


class Tok(Modality):
    """Ids uint16 (n_crops, n_tokens) in 0..32767, the token grid row by row, one row of ids for a row of crop_settings.

    The name says what of and at which side of the crop in pixels: `tok_depth@224`, or `tok_dinov2_global` of a vector.
    Stored as an int16 .npy, as ml-4m reads it.
    """

    kind: ClassVar[Kind] = "tokens"
    suffix: ClassVar[str] = "npy"

    def __init__(self, name: str) -> None:
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"modality {name!r}: expected tok_<modality>@<side> or tok_<modality>_global")
        super().__init__(name)

    def encode(self, value: np.ndarray) -> bytes:
        """A NumPy file of int16."""
        expect.within(self.name, value, 0, _LARGEST)
        return codecs.encode_npy(value.astype(np.int16))

    def decode(self, data: bytes) -> np.ndarray:
        """uint16 (n_crops, n_tokens)."""
        value = codecs.decode_npy(data)
        expect.array(self.name, value, np.int16, ("n_crops", "n_tokens"))
        expect.within(self.name, value, 0, _LARGEST)
        return value.astype(np.uint16)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """uint16 (n_crops, n_tokens) in 0..32767."""
        expect.array(self.name, value, np.uint16, ("n_crops", "n_tokens"))
        expect.within(self.name, value, 0, _LARGEST)

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """One 0: how many crops and tokens there would have been, only the tokenizer knows."""
        return np.zeros((1, 1), dtype=np.uint16)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Two crops of 4 x 4 tokens."""
        return rng.integers(0, 8192, (2, 16)).astype(np.uint16)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """Unchanged: the crop is in the ids, choose a row instead."""
        return value

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """The ids of the first crop as colours on their grid where that is a square, and in words where it is not."""
        side = round(value.shape[1] ** 0.5)
        text = f"{value.shape[0]} crop{'' if len(value) == 1 else 's'} of {value.shape[1]} tokens"
        if side**2 != value.shape[1]:
            return Picture(text=f"{text}: {' '.join(map(str, value[0].tolist()))}")
        colours = np.array([_draw.distinct(int(i)) for i in value[0]], dtype=np.uint8).reshape(side, side, 3)
        return Picture(image=_draw.enlarged(colours, max(1, round(224 / side))), text=text)
