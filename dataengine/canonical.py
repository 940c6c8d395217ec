"""Encoded bytes to the canonical RGB image, by written rules (docs/ingest.md): the only place that judges an image."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dataengine import _containers

# Measured on photographs of 0.1 to 0.3 megapixels: JPEG at 95 without chroma subsampling takes 1.9 times the bytes of
# their JPEG at 85 and stays within 46 to 49 dB of it; PNG takes 6.8 times. PNG level 3 is 2.5 times as fast as level 6
# and 3 % larger.
JPEG_QUALITY = 95
PNG_LEVEL = 3

MAX_SCANS = 100
"""Scans of a JPEG: each goes over the whole image, encoders make about ten, and a file may have thousands."""

_TILE_SIDES = (322, 323)  # TIFF 6.0, TileWidth and TileLength, in pixels

# What each EXIF orientation asks for (EXIF 2.32, 4.6.4): how the stored rows and columns become upright.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@dataclass(frozen=True)
class Limits:
    """Which declared sizes are taken in, and down to which side in pixels an image is shrunk (None: never)."""

    max_pixels: int = 89_478_485
    """Width x height; Pillow's own bound, a quarter of a gigabyte of RGB."""
    min_side: int = 16
    """Pixels: a smaller image is a spacer or a tracking pixel, not a photograph."""
    max_aspect: float = 50.0
    """Longer side by shorter side."""
    max_side: int | None = None
    """Pixels: a longer image is shrunk to it by averaging areas."""


@dataclass(frozen=True)
class Canonical:
    """The image every labeler sees, uint8 (h, w, 3) RGB, and the bytes that are stored and decode to exactly it."""

    image: np.ndarray
    encoded: bytes
    suffix: str
    """"jpg" or "png"."""
    conversions: tuple[str, ...]
    """What was done to get here, as slugs; empty when `encoded` is the input itself."""


class Refused(ValueError):
    """An input that is no image to train on. `reason` is a stable slug, `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[Refused], tuple[str, str]]:
        return Refused, (self.reason, self.detail)


@dataclass
class _Opened:
    """A file whose header was read: nothing is decoded yet."""

    picture: ImageFile.ImageFile
    lossy: bool
    orientation: int = 1
    notes: list[str] = field(default_factory=list)
    keep: bytes | None = None
    """The bytes to store if the pixels need no change; None when the format is not one that is stored."""


def canonicalise(data: bytes, limits: Limits) -> Canonical:
    """The canonical image of an encoded one; `Refused` when it has none.

    The declared size is judged before a pixel is decoded, everything is decoded to its end, and bytes that already
    are canonical (8-bit RGB JPEG or PNG, upright, small enough) are kept as they came. No global state is set.
    """
    kind = _kind(data)
    opened = _open(kind, data, limits)
    _gate(opened.picture.size, limits)
    try:
        opened.picture.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders of hostile bytes raise anything; all of it means the same
        raise Refused(*_broken(kind, error)) from error
    image, notes = _to_rgb(opened.picture)
    notes = opened.notes + notes
    if kind not in ("jpeg", "png") and _has_frames(opened.picture):
        notes.append("first-frame")
    if opened.orientation != 1:
        image = _UPRIGHT[opened.orientation](image)
        notes.append("exif-orientation")
    changed = bool(notes) and not set(notes) <= _UNCHANGED_PIXELS
    if limits.max_side is not None and max(image.shape[:2]) > limits.max_side:
        image, changed = _shrink(image, limits.max_side), True
        notes.append("downscaled")
    image = np.require(image, requirements=["C", "W"])
    if opened.keep is not None and not changed:
        return Canonical(image, opened.keep, "jpg" if kind == "jpeg" else "png", tuple(notes))
    return _encode(image, (*notes, *(() if opened.keep is not None else (kind,))), opened.lossy)


def encode_exact(image: np.ndarray) -> Canonical:
    """The canonical form of an image that is already exact, such as a rendered one: stored losslessly."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"canonical image: expected uint8 (h, w, 3), got {image.dtype} {image.shape}")
    return _encode(np.ascontiguousarray(image), (), lossy=False)


# Notes on an input whose pixels stand: what was removed is metadata or later frames.
_UNCHANGED_PIXELS = frozenset({"exif-broken", "first-frame"})


def _encode(image: np.ndarray, notes: tuple[str, ...], lossy: bool) -> Canonical:
    sink = io.BytesIO()
    picture = Image.fromarray(image)
    if not lossy:
        picture.save(sink, "PNG", compress_level=PNG_LEVEL)
        return Canonical(image, sink.getvalue(), "png", notes)
    picture.save(sink, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    encoded = sink.getvalue()
    return Canonical(np.array(JpegImageFile(io.BytesIO(encoded))), encoded, "jpg", notes)


def _kind(data: bytes) -> str:
    """The format by its first bytes, never by a file's name."""
    if not data:
        raise Refused("empty", "zero bytes")
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        raise Refused("unsupported", "HEIC image: convert it first")
    for kind, fits in _MAGIC.items():
        if fits(data):
            return kind
    raise Refused("not-an-image", f"starts with {data[:24]!r}")


_MAGIC: dict[str, Callable[[bytes], bool]] = {
    "jpeg": lambda d: d.startswith(b"\xff\xd8\xff"),
    "png": lambda d: d.startswith(_containers.PNG_SIGNATURE),
    "webp": lambda d: d.startswith(b"RIFF") and d[8:12] == b"WEBP",
    "gif": lambda d: d.startswith((b"GIF87a", b"GIF89a")),
    # "BM" also begins words: the size of the second header must be one of those that exist.
    "bmp": lambda d: d.startswith(b"BM") and int.from_bytes(d[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124),
    "tiff": lambda d: d.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    "pnm": lambda d: d[:2] in (b"P4", b"P5", b"P6") and d[2:3] in b" \t\r\n#",
    "jpeg2000": lambda d: d.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")),
    "avif": lambda d: d[4:12] in (b"ftypavif", b"ftypavis"),
}

# Opened by the class of the format, not by PIL.Image.open: that one guesses, and warns through process-wide state.
_CLASSES: dict[str, type[ImageFile.ImageFile]] = {
    "webp": WebPImageFile,
    "gif": GifImageFile,
    "bmp": BmpImageFile,
    "tiff": TiffImageFile,
    "pnm": PpmImageFile,
    "jpeg2000": Jpeg2KImageFile,
    "avif": AvifImageFile,
}


def _open(kind: str, data: bytes, limits: Limits) -> _Opened:
    """Read the header. JPEG and PNG are judged by their own declared size before a decoder sees them."""
    try:
        if kind == "jpeg":
            return _open_jpeg(data, limits)
        if kind == "png":
            return _open_png(data, limits)
        if kind == "webp" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
            raise EOFError(f"{len(data)} bytes, fewer than declared")
        picture = _CLASSES[kind](io.BytesIO(data))
    except (Refused, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused("too-many-pixels", str(error)) from error
    except EOFError as error:
        raise Refused("truncated", f"{kind}: {error}") from error
    except Exception as error:  # decoders of hostile bytes raise anything; all of it means the same
        raise Refused("bad-header", f"{kind}: {error or type(error).__name__}") from error
    lossy = kind == "avif" or (kind == "webp" and _containers.webp_is_lossy(data))
    opened = _Opened(picture, lossy)
    if isinstance(picture, TiffImageFile):
        _gate_tiles(picture, limits)
        _note_tiff(opened, picture)
    if kind in ("webp", "avif", "jpeg2000"):
        _note_orientation(opened, picture.info.get("exif"))
    return opened


def _open_jpeg(data: bytes, limits: Limits) -> _Opened:
    header = _containers.read_jpeg(data)
    _gate(header.size, limits)
    if header.num_scans > MAX_SCANS:
        raise Refused("too-many-scans", f"{header.num_scans} scans, at most {MAX_SCANS} are allowed")
    if header.precision != 8:
        raise Refused("unsupported", f"JPEG of {header.precision} bits a channel")
    opened = _Opened(JpegImageFile(io.BytesIO(header.bare)), lossy=True)
    _note_orientation(opened, header.exif)
    if header.process not in (0xC0, 0xC1, 0xC2):
        opened.notes.append("jpeg-process")
    opened.keep = header.bare if "exif-broken" in opened.notes else data
    return opened


def _open_png(data: bytes, limits: Limits) -> _Opened:
    _gate(_containers.png_size(data), limits)
    parts = _containers.read_png(data)
    opened = _Opened(PngImageFile(io.BytesIO(parts.bare)), lossy=False)
    if parts.depth == 16:
        opened.notes.append("16-bit")
        if parts.transparent:
            opened.notes.append("transparency-ignored")
    _note_orientation(opened, parts.exif)
    if parts.animated:
        opened.notes.append("first-frame")
    opened.keep = parts.bare if opened.notes else data
    return opened


def _note_orientation(opened: _Opened, exif: bytes | None) -> None:
    if exif is None:
        return
    opened.orientation, sound = _containers.exif_orientation(exif)
    if not sound:
        opened.notes.append("exif-broken")


def _gate_tiles(picture: TiffImageFile, limits: Limits) -> None:
    """A tile is decoded whole, however small the image that it covers."""
    sides = [picture.tag_v2.get(tag, 0) for tag in _TILE_SIDES]
    if not all(isinstance(side, int) for side in sides) or sides[0] * sides[1] > limits.max_pixels:
        raise Refused("too-many-pixels", f"tiles of {sides[0]} x {sides[1]} pixels, at most {limits.max_pixels}")


def _note_tiff(opened: _Opened, picture: TiffImageFile) -> None:
    """The decoder turns a TIFF upright itself and drops the low bytes itself: here it is only said."""
    if picture.tag_v2.get(ExifTags.Base.Orientation, 1) in range(2, 9):
        opened.notes.append("exif-orientation")
    if 16 in picture.tag_v2.get(ExifTags.Base.BitsPerSample, ()):
        opened.notes.append("16-bit")


def _gate(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    shown = f"{width} x {height} pixels"
    if width * height > limits.max_pixels:
        raise Refused("too-many-pixels", f"{shown}, at most {limits.max_pixels} are allowed")
    if width < 1 or height < 1:
        raise Refused("bad-header", shown)
    if min(size) < limits.min_side:
        raise Refused("too-small", f"{shown}, the shorter side must have {limits.min_side}")
    if max(size) > limits.max_aspect * min(size):
        raise Refused("too-elongated", f"{shown}, the longer side may be {limits.max_aspect:g} times the shorter")


def _broken(kind: str, error: Exception) -> tuple[str, str]:
    short = isinstance(error, EOFError) or any(w in str(error) for w in ("truncated", "end of file", "Not enough"))
    return "truncated" if short else "undecodable", f"{kind}: {error or type(error).__name__}"


def _to_rgb(picture: ImageFile.ImageFile) -> tuple[np.ndarray, list[str]]:
    """uint8 (h, w, 3) of a decoded picture, and what was done to it. The source of the formulas is docs/ingest.md."""
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and isinstance(picture, PpmImageFile)):
        grey = (np.asarray(picture).astype(np.int32) >> 8).astype(np.uint8)
        notes = ["16-bit", "grey"] if isinstance(picture, PpmImageFile) else ["grey"]
        return np.repeat(grey[:, :, None], 3, axis=2), notes
    notes = {"1": ["grey"], "L": ["grey"], "LA": ["grey"], "P": ["palette"], "PA": ["palette"]}.get(mode, [])
    if picture.has_transparency_data:
        return _over_white(np.asarray(picture.convert("RGBA"))), [*notes, "alpha"]
    if mode == "RGB":
        return np.asarray(picture), notes
    if mode in ("1", "L", "P"):
        return np.asarray(picture.convert("RGB")), notes
    if mode in ("CMYK", "YCbCr"):
        return np.asarray(picture.convert("RGB")), [mode.lower()]
    raise Refused("unsupported", f"pixels of mode {mode}, which have no agreed 8-bit RGB value")


def _over_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 4) of straight alpha over white: round((c a + 255 (255 - a)) / 255); 65025 + 127 fits 16 bits."""
    alpha = rgba[:, :, 3:].astype(np.uint16)
    mixed = rgba[:, :, :3] * alpha + np.uint16(255) * (np.uint16(255) - alpha)
    return ((mixed + np.uint16(127)) // np.uint16(255)).astype(np.uint8)


def _has_frames(picture: ImageFile.ImageFile) -> bool:
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception:  # a second frame begins there, and it is broken: the first one is whole
        return True


def _shrink(image: np.ndarray, max_side: int) -> np.ndarray:
    import cv2

    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA))
