"""What an item of a corpus holds, as other tools write it: captions in many spellings, an image or its place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from dataengine.corpora import RawSample, _reach
from dataengine.corpora._reach import Reach
from dataengine.storage import redacted

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".heic"),
)
CAPTION_NAMES = ("caption", "captions", "text", "txt", "TEXT", "alt_text", "sentences")


def captions(value: Any) -> tuple[str, ...]:
    """The non-empty captions in a text, a list, or a dict with one under a usual name; else ValueError."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, bytes):
        return captions(value.decode("utf-8", "replace"))
    if isinstance(value, str):
        text = value.strip().strip("\0\ufeff")
        return (text,) if text else ()
    if isinstance(value, Mapping):
        return captions(next((value[n] for n in CAPTION_NAMES if n in value), None))
    if isinstance(value, (list, tuple)):
        return tuple(text for entry in value for text in captions(entry))
    raise ValueError(f"caption: expected text, a list of texts or an object with one, got {value!r:.60}")


def json_captions(data: bytes) -> tuple[str, ...]:
    """The captions of a JSON file."""
    try:
        return captions(json.loads(data.decode("utf-8-sig")))
    except RecursionError as error:
        raise ValueError("JSON nested too deep") from error


def attempt(key: str, source: str, load: Callable[[], tuple[bytes, tuple[str, ...]]]) -> RawSample:
    """An item, or the same item with the error that kept it from being read: nothing stops the items after it."""
    try:
        image, texts = load()
    except (OSError, ValueError, EOFError) as error:
        return RawSample(key, source, error=redacted(f"{type(error).__name__}: {error}"))
    return RawSample(key, source, image, texts)


def image_bytes(cell: Any, reach: Reach) -> bytes:
    """The encoded image of a table's cell: bytes, a path or a URL that the corpus may reach, or {bytes, path}.

    The web is asked only when the user said so: a table of ten million links is not to start a download unawares.
    """
    if isinstance(cell, Mapping):
        found = cell.get("bytes")
        return image_bytes(cell.get("path") if found is None else found, reach)
    if isinstance(cell, (bytes, bytearray, memoryview)):
        _reach.hold_to_limit(len(cell))
        return bytes(cell)
    if not isinstance(cell, str) or not cell:
        raise ValueError(f"image: expected bytes, a path, a URL or an object of bytes and path, got {cell!r:.60}")
    return reach.read(cell)
