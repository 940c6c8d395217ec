"""Arrays and JSON as bytes and back: the same value always gives the same bytes, and no bytes are ever unpickled."""

from __future__ import annotations

import io
import json
import math
import struct
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from dataengine import _containers

# Run-length matching: on depth, ids and edges it is as small as zlib's default search and two to five times as fast.
# Filters: trying all five on every row is 40 % of the time. Ids and edges do as well with the row above alone; depth
# and normals with the best of three grow by a few percent, under 1 % of all that an image's labels take.
_RLE = (cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE)
_PNG_MASK = (*_RLE, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP)
_PNG_SMOOTH = (*_RLE, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FAST_FILTERS)
_PIECE = 32768  # values
MAX_PIXELS = 2 * 89_478_485
"""Width x height of an image that is read back: twice what ingest takes unless told otherwise, as for Pillow."""

_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def encode_png(values: np.ndarray) -> bytes:
    """A PNG of uint8 (h, w), uint16 (h, w) or RGB uint8 (h, w, 3); lossless."""
    if values.ndim == 3:
        values = cv2.cvtColor(np.ascontiguousarray(values), cv2.COLOR_RGB2BGR)
    is_mask = values.ndim == 2 and values.dtype == np.uint8
    done, data = cv2.imencode(".png", values, _PNG_MASK if is_mask else _PNG_SMOOTH)
    if not done:
        raise ValueError(f"no PNG can hold {values.dtype} {values.shape}")
    return data.tobytes()


def decode_png(data: bytes, dtype: type[np.generic], channels: int | None = None) -> np.ndarray:
    """The values of a PNG: (h, w), or RGB (h, w, channels); ValueError when it is damaged or of another kind."""
    try:
        # Without metadata: whatever a text chunk or a colour profile would make a decoder do, it is not given any.
        bare = _png_pixels(data)
        values = cv2.imdecode(np.frombuffer(bare, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    except EOFError as error:
        raise ValueError(f"no readable PNG: {error}") from error
    except cv2.error as error:
        raise ValueError(f"no readable PNG: {error}") from error
    if values is None:
        raise ValueError(f"no readable PNG in {len(data)} bytes")
    found = None if values.ndim == 2 else values.shape[2]
    if values.dtype != dtype or found != channels:
        kind = f"{np.dtype(dtype)} PNG with {channels or 1} channels"
        raise ValueError(f"expected a {kind}, got {values.dtype} with {found or 1}")
    return values if channels is None else cv2.cvtColor(values, cv2.COLOR_BGR2RGB)


def rounded(values: np.ndarray, factor: float, dtype: type[np.unsignedinteger], offset: float = 0.0) -> np.ndarray:
    """(values + offset) * factor to the nearest integers (halves to even) that `dtype` can hold, in the same shape."""
    source = np.ascontiguousarray(values).reshape(-1)
    out = np.empty(source.size, dtype=dtype)
    # Piece by piece, so that the float64 between stays in the processor's cache: half the time of whole arrays.
    piece = np.empty(min(source.size, _PIECE))
    for start in range(0, source.size, _PIECE):
        part = source[start : start + _PIECE]
        exact = piece[: part.size]
        np.add(part, offset, out=exact, dtype=np.float64)
        np.multiply(exact, factor, out=exact)
        np.rint(exact, out=exact)
        out[start : start + part.size] = np.clip(exact, 0, np.iinfo(dtype).max, out=exact)
    return out.reshape(values.shape)


def encode_jpeg(rgb: np.ndarray) -> bytes:
    """A JPEG of RGB uint8 (h, w, 3), quality 95, without chroma subsampling."""
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "JPEG", quality=95, subsampling=0)
    return stream.getvalue()


def decode_rgb(data: bytes) -> np.ndarray:
    """RGB uint8 (h, w, 3) of a JPEG or PNG as its pixels lie there: an EXIF orientation is not applied.

    By Pillow, as ingest does: another JPEG decoder gives other pixels in the last bit. And without metadata, as
    ingest does: what it has taken in must decode, whatever is written beside the pixels.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            header = _containers.read_jpeg(data)
            _hold_to_limit(header.size)
            picture: ImageFile.ImageFile = JpegImageFile(io.BytesIO(header.bare))
        else:
            picture = PngImageFile(io.BytesIO(_png_pixels(data)))
        with picture:
            return np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, EOFError, ValueError, struct.error) as error:
        raise ValueError(f"no readable image in {len(data)} bytes that begin {data[:8]!r}: {error}") from error


def _png_pixels(data: bytes) -> bytes:
    """A PNG without metadata; ValueError when it is none or is too large, EOFError when it is cut."""
    if not data.startswith(_containers.PNG_SIGNATURE):
        raise ValueError(f"expected a PNG, got {data[:8]!r}")
    _hold_to_limit(_containers.png_size(data))
    return _containers.read_png(data).bare


def _hold_to_limit(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels, at most {MAX_PIXELS} are decoded")


def encode_npy(values: np.ndarray) -> bytes:
    """A NumPy file, version 1.0, in C order."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def decode_npy(data: bytes) -> np.ndarray:
    """The array of a NumPy file; ValueError when it is damaged, holds Python objects or is not as long as it says.

    Not by read_array, which allocates what the header says before it looks whether that is there.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _NPY_HEADERS:
            raise ValueError(f"version {version}, expected 1.0 or 2.0")
        shape, by_columns, dtype = _NPY_HEADERS[version](stream)
        length = len(data) - stream.tell()
        if dtype.hasobject:
            raise ValueError(f"Object arrays cannot be loaded: {dtype}")
        if not dtype.itemsize or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != length:
            raise ValueError(f"{dtype} {shape!r:.80} in {length} bytes")
        values = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if by_columns else "C")
    except Exception as error:  # numpy parses the header as Python: hostile ones raise anything, MemoryError too
        raise ValueError(f"no readable .npy: {error or type(error).__name__}") from error
    return values.copy(order="K")


def encode_json(value: Any) -> bytes:
    """Compact JSON in UTF-8 with sorted keys; ValueError for what JSON lacks (nan, numpy values, other objects)."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"not JSON: {error}") from error
    return text.encode()


def decode_json(data: bytes) -> Any:
    """The value of a JSON text; ValueError when it is none, or says nan."""
    try:
        return json.loads(data, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("JSON nested too deep") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON with {constant}, expected finite numbers")
