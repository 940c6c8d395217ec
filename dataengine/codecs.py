"""Values to bytes and back: PNG, npy, JSON. Equal values give equal bytes; nothing is ever unpickled."""

from __future__ import annotations

import io
import json
from typing import Any

import cv2
import numpy as np

# zlib's level and OpenCV's row filter decide the bytes, so both are fixed here and not left to a default.
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 3]


def encode_png(image: np.ndarray) -> bytes:
    """uint8 or uint16 (h, w), or uint8 (h, w, 3) RGB, as PNG."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".png", image, _PNG)
    if not done:
        raise ValueError(f"cannot write a PNG of {image.dtype} {image.shape}")
    return data.tobytes()


def decode_png(data: bytes, dtype: type, channels: int) -> np.ndarray:
    """A PNG of the expected depth and number of channels (1 or 3, RGB); ValueError when it is another or none."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if image is None:
        raise ValueError(f"no image in {len(data)} bytes, expected a PNG")
    found = 1 if image.ndim == 2 else image.shape[2]
    if image.dtype != dtype or found != channels:
        raise ValueError(f"a PNG of {image.dtype} with {found} channels, expected {np.dtype(dtype)} with {channels}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if channels == 3 else image


def encode_npy(array: np.ndarray) -> bytes:
    """An array as .npy, in C order."""
    sink = io.BytesIO()
    np.save(sink, np.ascontiguousarray(array), allow_pickle=False)
    return sink.getvalue()


def decode_npy(data: bytes) -> np.ndarray:
    """The array of a .npy; ValueError when it is none, or a pickle."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"no plain .npy array in {len(data)} bytes: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive of arrays, expected one .npy array")
    return array


def encode_json(value: Any) -> bytes:
    """Compact JSON with sorted keys; ValueError for NaN and infinity, which are not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def decode_json(data: bytes) -> Any:
    """The value of some JSON; ValueError when it is none."""
    try:
        return json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"no JSON in {len(data)} bytes: {error}") from error
