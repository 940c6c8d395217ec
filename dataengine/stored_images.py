"""Stored JPEGs and PNGs as the pixels of a crop, decoded when they are read: what a column of kind `images` gives.

The pixels are those that a column of kind `pixels` holds of the same image and crop: of `codecs.decode_rgb` and
`geometry.crop_map`, to the last bit, at half the time. What is asked for in patches is resized in patches only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import cv2
import numpy as np

from dataengine import _containers, codecs
from dataengine.canonical import MAX_SCANS
from dataengine.codecs import MAX_PIXELS
from dataengine.geometry import Crop, crop_map

_AS_IT_LIES = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_FEW = 30
"""Patches up to which resizing them alone is quicker than resizing the crop; of 16 pixels, from 360 x 360 to 224."""
_OFTEN = 1 << 20
"""Pixels of an image up to which it is kept decoded for a while: 3 MB."""
_LONGEST = 1024
"""Pixels of a crop's side up to which its patches are resized alone: the weights are found in a square of them."""


@dataclass(frozen=True)
class StoredImage:
    """An image as it is stored, and a crop of it: an array uint8 (side, side, 3), RGB, once it is read."""

    data: bytes
    crop: Crop
    side: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(side, side, 3)."""
        return (self.side, self.side, 3)

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        """uint8."""
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return self.side

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self.pixels() if dtype is None else self.pixels().astype(dtype, copy=False)

    def pixels(self) -> np.ndarray:
        """uint8 (side, side, 3); ValueError when the image is damaged or too large, or lies outside of the crop."""
        return _resized(decoded(self.data), self.crop, self.side)

    def patches(self, size: int, positions: np.ndarray) -> np.ndarray:
        """uint8 (K, size*size*3): patches of `size` pixels at `positions` (K,) of the raster, as row, column, channel.

        Equal to those of `pixels`.
        """
        rgb, crop, count = decoded(self.data), self.crop, self.side // size
        if len(positions) <= _FEW and _shrinks_unevenly(rgb, crop, self.side):
            return _patches(rgb, crop, self.side, size, positions)
        tiles = _resized(rgb, crop, self.side).reshape(count, size, count, size, 3)
        rows, columns = np.divmod(positions, count)
        return tiles[rows, :, columns].reshape(-1, size * size * 3)


def bare(data: bytes) -> bytes:
    """A JPEG or a PNG without metadata; ValueError when it is neither, or declares more than is ever decoded."""
    try:
        if data.startswith(_containers.PNG_SIGNATURE):
            _hold_to_limit(_containers.png_size(data))
            return _containers.read_png(data).bare
        if not data.startswith(b"\xff\xd8\xff"):
            raise ValueError("expected a JPEG or a PNG")
        return _jpeg(data).bare
    except (EOFError, ValueError, IndexError) as error:
        raise ValueError(f"no readable image in {len(data)} bytes that begin {data[:8]!r}: {error}") from error


def decoded(data: bytes) -> np.ndarray:
    """RGB uint8 (h, w, 3), not to be written to, as `codecs.decode_rgb` has it.

    By OpenCV where both decoders are libjpeg-turbo and agree in every bit: JPEGs of 8 bits, one component or three.
    """
    if data.startswith(b"\xff\xd8\xff"):
        try:
            header = _jpeg(data)
        except (EOFError, ValueError) as error:
            raise ValueError(f"no readable image in {len(data)} bytes that begin {data[:8]!r}: {error}") from error
        if header.precision == 8 and header.components in (1, 3):
            # A sample is often read several times in a row, under other crops.
            often = header.size[0] * header.size[1] <= _OFTEN
            rgb = (_by_opencv if often else _by_opencv.__wrapped__)(header.bare)
            if rgb is not None and rgb.shape == (header.size[1], header.size[0], 3):
                return rgb
    # And what OpenCV cannot decode, Pillow can or says why not.
    return codecs.decode_rgb(data)


@functools.lru_cache(8)
def _by_opencv(data: bytes) -> np.ndarray | None:
    rgb = cv2.imdecode(np.frombuffer(data, np.uint8), _AS_IT_LIES)
    if rgb is not None:
        rgb.flags.writeable = False
    return rgb


def check(data: bytes, crops: np.ndarray) -> None:
    """ValueError when an image cannot be decoded, or one of its crops (n, 5) not be cut out of it."""
    height, width = decoded(data).shape[:2]
    for row in crops:
        crop = crop_of(row)
        if not (-crop.height < crop.top < height and -crop.width < crop.left < width):
            raise ValueError(f"{crop} lies outside of an image of {height} x {width} pixels")


def crop_of(row: np.ndarray) -> Crop:
    """A row (5,) of crop settings; ValueError when it is of no size, or larger than any image."""
    top, left, height, width, hflip = row.tolist()
    if height < 1 or width < 1 or height * width > MAX_PIXELS or hflip not in (0, 1):
        raise ValueError(f"crop {row.tolist()}, expected top, left, height, width of 1 to {MAX_PIXELS} pixels, 0 or 1")
    return Crop(top, left, height, width, bool(hflip))


def _jpeg(data: bytes) -> _containers.Jpeg:
    header = _containers.read_jpeg(data)
    _hold_to_limit(header.size)
    if header.num_scans > MAX_SCANS:
        raise ValueError(f"{header.num_scans} scans, at most {MAX_SCANS} are decoded")
    return header


def _hold_to_limit(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels, at most {MAX_PIXELS} are decoded")


def _resized(rgb: np.ndarray, crop: Crop, side: int) -> np.ndarray:
    out = crop_map(rgb, replace(crop, hflip=False), side, nearest=False)
    # A tenth of the time of an array read backwards.
    return cv2.flip(out, 1) if crop.hflip else out


def _shrinks_unevenly(rgb: np.ndarray, crop: Crop, side: int) -> bool:
    """Whether areas are averaged with weights: not when it grows, by whole factors, or beyond the image."""
    height, width = rgb.shape[:2]
    inside = 0 <= crop.top <= height - crop.height and 0 <= crop.left <= width - crop.width
    shrinks = side <= min(crop.height, crop.width) and max(crop.height, crop.width) <= _LONGEST
    return inside and shrinks and bool(crop.height % side or crop.width % side)


def _patches(rgb: np.ndarray, crop: Crop, side: int, size: int, positions: np.ndarray) -> np.ndarray:
    """The same sums as OpenCV's INTER_AREA, in its order and in float32: rows are averaged first, then columns."""
    rows, columns = np.divmod(positions, side // size)
    if crop.hflip:
        columns = side // size - 1 - columns
    down, down_weights = (table.reshape(-1, size, table.shape[1])[rows] for table in _taps(crop.height, side))
    across, across_weights = (table.reshape(-1, size, table.shape[1])[columns] for table in _taps(crop.width, side))
    top = down[:, 0, 0]
    # As many rows of the image as the largest of these patches needs, (K, height).
    height = int((down[:, -1, -1] - top).max(initial=0)) + 1
    lines = np.minimum(top[:, None] + np.arange(height), crop.height - 1)
    places = (lines + crop.top) * rgb.shape[1] + crop.left
    flat = rgb.reshape(-1, 3)
    narrow = np.zeros((len(positions), height, size, 3), np.float32)
    for i in range(across.shape[2]):
        taken = np.take(flat, places[:, :, None] + across[:, None, :, i], axis=0)
        narrow += taken * across_weights[:, None, :, i, None]
    down = down + (np.arange(len(positions)) * height - top)[:, None, None]
    averaged = narrow.reshape(-1, size * 3)
    out = np.zeros((len(positions), size, size * 3), np.float32)
    for i in range(down.shape[2]):
        out += np.take(averaged, down[:, :, i], axis=0) * down_weights[:, :, i, None]
    pixels = np.rint(out, out=out).astype(np.uint8).reshape(-1, size, size, 3)
    return np.ascontiguousarray(pixels[:, :, ::-1] if crop.hflip else pixels).reshape(-1, size * size * 3)


@functools.lru_cache(1024)
def _taps(length: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `length` pixels each of `side` averages, int64 (side, taps), and their weights float32, 0 at the end.

    OpenCV is asked for its weights: by what becomes of single pixels of 1.
    """
    weights = cv2.resize(np.eye(length, dtype=np.float32), (side, length), interpolation=cv2.INTER_AREA).T
    first = (weights > 0).argmax(1)
    count = (weights > 0).sum(1)
    taps = np.arange(count.max())
    places = np.minimum(first[:, None] + taps, length - 1)
    found = np.where(taps < count[:, None], np.take_along_axis(weights, places, 1), np.float32(0))
    return places, found
