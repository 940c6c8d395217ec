"""The captions of the image as a text encoder reads them: one vector a token."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from dataengine import _npz
from dataengine.geometry import Crop
from dataengine.modalities import Kind, Modality, Picture, _draw
from dataengine.modalities import _checks as expect

WIDTH = 4096
"""Channels of the published encoder, T5-v1.1-XXL."""

MAX_TOKENS = 77
"""Of a caption, as a model reads it."""

MAX_BYTES = 256 << 20
"""Of one sample's embeddings: 400 captions of 77 tokens."""

_SHAPE = ("captions", "tokens", "channels")
_SHOWN = 32  # tokens and captions, at most


class T5Caption(Modality):
    """`{"emb": float16 (captions, tokens, channels), "mask_valid": bool (captions, tokens)}`, stored as .npz.

    The captions in their order in `caption`, each padded with zeros to the longest; `mask_valid` is true for tokens
    (the end-of-sentence token is one) and false for padding. A sample without captions has one row without tokens,
    for ml-4m's reader takes at least one row. Rows are chosen as captions are, by crop: no crop changes them.
    `channels` is the width of the encoder; ml-4m embeds `emb[mask_valid]`, 77 tokens at most.
    """

    kind: ClassVar[Kind] = "text"
    suffix: ClassVar[str] = "npz"

    def encode(self, value: dict[str, np.ndarray]) -> bytes:
        """An uncompressed NumPy archive: float16 hardly shrinks."""
        return _npz.encode(value)

    def decode(self, data: bytes) -> dict[str, np.ndarray]:
        """The embeddings as float16 and the mask as bool, whatever floats and integers a file of ml-4m has them in."""
        value = _npz.decode(data, ("emb", "mask_valid"), MAX_BYTES)
        emb, mask = value["emb"], value["mask_valid"]
        if emb.dtype.kind != "f" or mask.dtype.kind not in "bui":
            raise ValueError(f"{self.name}: expected floats and a mask, got {emb.dtype} and {mask.dtype}")
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and `check` says so
            value = {"emb": emb.astype(np.float16, copy=False), "mask_valid": mask.astype(bool, copy=False)}
        self._check_shapes(value)
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """Both arrays of the same captions and tokens, finite."""
        expect.dictionary(self.name, value, ("emb", "mask_valid"))
        self._check_shapes(value)
        expect.finite(self.name, value["emb"])

    def _check_shapes(self, value: dict[str, Any]) -> None:
        expect.array(f"{self.name} emb", value["emb"], np.float16, _SHAPE)
        expect.array(f"{self.name} mask_valid", value["mask_valid"], np.bool_, value["emb"].shape[:2])

    def placeholder(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """One row without tokens."""
        return {"emb": np.zeros((1, 1, WIDTH), np.float16), "mask_valid": np.zeros((1, 1), np.bool_)}

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Three captions of one to five tokens, normal noise."""
        lengths = rng.permutation([1, 3, 5])
        mask = np.arange(5) < lengths[:, None]
        return {"emb": (rng.standard_normal((3, 5, 64)) * mask[..., None]).astype(np.float16), "mask_valid": mask}

    def crop(self, value: dict[str, np.ndarray], crop: Crop, size: tuple[int, int], side: int) -> dict[str, np.ndarray]:
        """Unchanged: it is of the words."""
        return value

    def rows(self, value: dict[str, np.ndarray]) -> list[np.ndarray]:
        """What a model reads of each caption: float16 (n, channels) of its tokens, 77 at most and perhaps none."""
        return [emb[valid][:MAX_TOKENS] for emb, valid in zip(value["emb"], value["mask_valid"], strict=True)]

    def picture(self, value: dict[str, np.ndarray], rgb: np.ndarray) -> Picture:
        """One row a caption, one square a token: its vector along the three principal axes as red, green and blue."""
        emb, mask = value["emb"], value["mask_valid"]
        lengths = ", ".join(str(n) for n in mask.sum(axis=1)[:_SHOWN])
        words = f"{len(emb)} captions of {lengths} tokens, {emb.shape[2]} channels, principal axes as colours"
        if not mask.any():
            return Picture(text="no caption")
        shown = mask[:_SHOWN, :_SHOWN]
        colours = np.full((*shown.shape, 3), 255, np.uint8)
        if shown.any():
            colours[shown] = _draw.principal(emb[:_SHOWN, :_SHOWN][shown][None])[0]
        return Picture(image=_draw.enlarged(colours, 12), text=words)
