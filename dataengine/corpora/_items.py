"""What an item of a corpus holds, as other tools write it: captions in many spellings, an image or its place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import tenacity

from dataengine import storage
from dataengine.corpora import RawSample

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".heic"),
)
CAPTION_NAMES = ("caption", "captions", "text", "txt", "TEXT", "alt_text", "sentences")
_ATTEMPTS = 4
WAIT = tenacity.wait_random_exponential(max=30)  # seconds between attempts


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
    return captions(json.loads(data.decode("utf-8-sig")))


def attempt(key: str, source: str, load: Callable[[], tuple[bytes, tuple[str, ...]]]) -> RawSample:
    """An item, or the same item with the error that kept it from being read: nothing stops the items after it."""
    try:
        image, texts = load()
    except (OSError, ValueError, EOFError) as error:
        return RawSample(key, source, error=f"{type(error).__name__}: {error}")
    return RawSample(key, source, image, texts)


def image_bytes(cell: Any, beside: str, fetch: bool) -> bytes:
    """The encoded image of a table's cell: bytes, a path relative to the folder `beside`, a URL, or {bytes, path}.

    http is asked only when `fetch`, some times over: a table of ten million links is not to start a download unawares.
    """
    if isinstance(cell, Mapping):
        found = cell.get("bytes")
        return image_bytes(cell.get("path") if found is None else found, beside, fetch)
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return bytes(cell)
    if not isinstance(cell, str) or not cell:
        raise ValueError(f"image: expected bytes, a path, a URL or an object of bytes and path, got {cell!r:.60}")
    if cell.startswith(("http://", "https://")):
        if not fetch:
            raise ValueError(f"{cell} is not fetched unless the corpus has the option ?fetch=yes")
        return _fetch(cell)
    absolute = "://" in cell or cell.startswith("/")
    return _whole(cell if absolute else f"{beside}/{cell}")


def _whole(url: str) -> bytes:
    fs, path = storage.split_url(url)
    data: bytes = fs.cat_file(path)
    return data


def _fetch(url: str) -> bytes:
    again = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=WAIT,
        retry=tenacity.retry_if_not_exception_type((FileNotFoundError, ValueError)),
        reraise=True,
    )
    try:
        return again(_whole, url)
    except Exception as error:  # whatever the network library raises, it says that this item is out of reach
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error
