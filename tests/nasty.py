"""Images as the world has them, each with the outcome that docs/ingest.md promises; `write(folder)` makes a folder."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dataengine import _containers

SIDE = (40, 56)  # height, width
LOSSY = 12.0  # mean absolute difference that a JPEG of the test picture may have


@dataclass(frozen=True)
class Case:
    """A file and what becomes of it: refused for `reason`, or `pixels` (within `tolerance` on average)."""

    name: str
    data: bytes
    reason: str | None = None
    pixels: np.ndarray | None = None
    tolerance: float = 0.0
    suffix: str = "png"
    conversions: tuple[str, ...] = ()
    verbatim: bool = False


def picture() -> np.ndarray:
    """A smooth uint8 (40, 56, 3) picture in which no flip or turn looks like another."""
    y, x = np.mgrid[: SIDE[0], : SIDE[1]]
    return np.stack([x * 4, y * 5, 255 - x - 2 * y], axis=2).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, format: str, **options: Any) -> bytes:
    """An image file of Pillow's making."""
    sink = io.BytesIO()
    source = image if isinstance(image, Image.Image) else Image.fromarray(image)
    source.save(sink, format, **options)
    return sink.getvalue()


def jpeg(image: np.ndarray | None = None, **options: Any) -> bytes:
    """The test picture, or another, as a JPEG of high quality."""
    return encode(picture() if image is None else image, "JPEG", quality=95, subsampling=0, **options)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(depth: int, colour: int, rows: np.ndarray, size: tuple[int, int] = SIDE, extra: bytes = b"") -> bytes:
    """A PNG written chunk by chunk: `rows` are uint8 (h, bytes a row), unfiltered; size is (height, width)."""
    header = struct.pack(">IIBBBBB", size[1], size[0], depth, colour, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")
    return _containers.PNG_SIGNATURE + chunks


def exif(orientation: int) -> bytes:
    """An EXIF block that says nothing but the orientation."""
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, 1, orientation) + b"\0\0\0\0"


BROKEN_EXIF = {
    "no-tiff": b"Exif\0\0garbage, no TIFF header",
    "far-directory": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "cut-directory": b"Exif\0\0II*\0\x08\0\0\0\x63\0\x12\x01\x03\0",
    "far-value": b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHII", 0x010F, 2, 4000, 0x7FFFFFFF) + b"\0\0\0\0",
    "orientation-9": exif(9),
}


def write(folder: Path) -> list[Case]:
    """Write every case below `folder` and return them."""
    found = cases()
    for case in found:
        path = folder / case.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.data)
    return found


def cases() -> list[Case]:
    """All of them; the names are paths relative to a folder."""
    return [*_good(), *_named(), *_turned(), *_converted(), *_deep(), *_moving(), *_refused()]


def _good() -> Iterator[Case]:
    image = picture()
    for name, options in {
        "plain.jpg": {},
        "progressive.jpg": {"progressive": True},
        "exif-1.jpg": {"exif": exif(1)},
    }.items():
        yield Case(name, jpeg(**options), None, image, LOSSY, "jpg", (), verbatim=True)
    yield Case("plain.png", encode(image, "PNG"), None, image, verbatim=True)
    yield Case("tagged.png", encode(image, "PNG", exif=exif(1)), None, image, verbatim=True)


def _named() -> Iterator[Case]:
    """Names: the content decides what a file is, the name never does."""
    image = picture()
    names = (
        "UPPER.JPG",
        "Mixed.JpEg",
        "two.dots.in.name.jpg",
        "ünïcödé 图片.jpg",
        "sub folder/deep/er.jfif",
        "twin.jpg",
    )
    for name in names:
        yield Case(name, jpeg(), None, image, LOSSY, "jpg", verbatim=True)
    yield Case("twin.png", encode(image, "PNG"), None, image, verbatim=True)
    yield Case("is-a-png.jpg", encode(image, "PNG"), None, image, verbatim=True)
    yield Case(f"{'long' * 50}.png", encode(image, "PNG"), None, image, verbatim=True)


def _turned() -> Iterator[Case]:
    image = picture()
    stored_as = {  # how Pillow turns the upright picture into what a camera of this orientation stores
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, turn in stored_as.items():
        stored = Image.fromarray(image).transpose(turn)
        done = ("exif-orientation",)
        data = encode(stored, "JPEG", quality=95, subsampling=0, exif=exif(orientation))
        yield Case(f"exif-{orientation}.jpg", data, None, image, LOSSY, "jpg", done)
        data = encode(stored, "PNG", exif=exif(orientation))
        yield Case(f"exif-{orientation}.png", data, None, image, conversions=done)
    stored = Image.fromarray(image).transpose(stored_as[6])
    data = encode(stored, "WEBP", lossless=True, exif=exif(6))
    yield Case("exif-6.webp", data, None, image, conversions=("exif-orientation", "webp"))
    data = encode(stored, "TIFF", tiffinfo={274: 6})
    yield Case("exif-6.tiff", data, None, image, conversions=("exif-orientation", "tiff"))
    for name, block in BROKEN_EXIF.items():
        data = jpeg(exif=block)
        yield Case(f"exif-{name}.jpg", data, None, image, LOSSY, "jpg", ("exif-broken",))
        data = png(8, 2, image.reshape(SIDE[0], -1), extra=png_chunk(b"eXIf", block.removeprefix(b"Exif\0\0")))
        yield Case(f"exif-{name}.png", data, None, image, conversions=("exif-broken",))


def _converted() -> Iterator[Case]:
    image = picture()
    grey = image[:, :, 0]
    grey3 = np.repeat(grey[:, :, None], 3, axis=2)
    yield Case("grey.jpg", jpeg(grey), None, grey3, LOSSY, "jpg", ("grey",))
    yield Case("grey.png", encode(grey, "PNG"), None, grey3, conversions=("grey",))
    bits = (grey > 100).astype(np.uint8)
    data = png(1, 0, np.packbits(bits, axis=1))
    yield Case("one-bit.png", data, None, np.repeat(bits[:, :, None] * 255, 3, axis=2), conversions=("grey",))
    # Ink is what light is not, and no black: then cyan, magenta, yellow are the inverted picture.
    cmyk = Image.merge("CMYK", [*ImageOps.invert(Image.fromarray(image)).split(), Image.new("L", SIDE[::-1], 0)])
    yield Case("cmyk.jpg", encode(cmyk, "JPEG", quality=95, subsampling=0), None, image, LOSSY, "jpg", ("cmyk",))
    yield Case("cmyk.tiff", encode(cmyk, "TIFF"), None, image, conversions=("cmyk", "tiff"))
    black = np.broadcast_to(np.arange(SIDE[1], dtype=np.uint8) * 4, SIDE)
    inked = Image.merge("CMYK", [*cmyk.split()[:3], Image.fromarray(black.copy())])
    darker = np.rint(image * (1 - black[:, :, None] / 255.0)).astype(np.uint8)
    yield Case("inked.tiff", encode(inked, "TIFF"), None, darker, 0.5, conversions=("cmyk", "tiff"))
    ycbcr = Image.fromarray(image).convert("YCbCr")
    yield Case("ycbcr.tiff", encode(ycbcr, "TIFF"), None, image, 1.5, conversions=("ycbcr", "tiff"))
    alpha = np.full(SIDE, 255, np.uint8)
    alpha[:, 30:], alpha[:, 40:] = 128, 0
    white = np.rint((image * (alpha[:, :, None] / 255.0)) + 255.0 * (1 - alpha[:, :, None] / 255.0))
    rgba = np.dstack([image, alpha])
    yield Case("rgba.png", encode(rgba, "PNG"), None, white.astype(np.uint8), conversions=("alpha",))
    data = encode(rgba, "WEBP", lossless=True, exact=True)
    yield Case("rgba.webp", data, None, white.astype(np.uint8), conversions=("alpha", "webp"))
    grey_white = np.rint(grey * (alpha / 255.0) + 255.0 * (1 - alpha / 255.0)).astype(np.uint8)
    data = encode(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), "PNG")
    yield Case("la.png", data, None, np.repeat(grey_white[:, :, None], 3, axis=2), conversions=("grey", "alpha"))
    yield from _palettes()
    yield Case("plain.bmp", encode(image, "BMP"), None, image, conversions=("bmp",))
    yield Case("plain.tif", encode(image, "TIFF", compression="tiff_lzw"), None, image, conversions=("tiff",))
    yield Case("plain.ppm", encode(image, "PPM"), None, image, conversions=("pnm",))
    yield Case("plain.webp", encode(image, "WEBP", quality=95), None, image, LOSSY, "jpg", ("webp",))
    yield Case("plain.jp2", encode(image, "JPEG2000"), None, image, conversions=("jpeg2000",))
    turned = Image.fromarray(image).transpose(Image.Transpose.ROTATE_90)
    data = encode(turned, "AVIF", quality=95, exif=exif(6))
    yield Case("exif-6.avif", data, None, image, LOSSY, "jpg", ("exif-orientation", "avif"))
    yield Case("plain.avif", encode(image, "AVIF", quality=95), None, image, LOSSY, "jpg", ("avif",))


def _palettes() -> Iterator[Case]:
    indices = np.add.outer(np.arange(SIDE[0]), np.arange(SIDE[1])).astype(np.uint8) % 4
    colours = np.array([[200, 10, 20], [0, 100, 200], [30, 220, 40], [90, 90, 90]], np.uint8)
    palette = png_chunk(b"PLTE", colours.tobytes())
    yield Case("palette.png", png(8, 3, indices, extra=palette), None, colours[indices], conversions=("palette",))
    seen = colours.copy()
    seen[0], seen[1] = 255, np.rint(colours[1] * (51 / 255.0) + 204)
    data = png(8, 3, indices, extra=palette + png_chunk(b"tRNS", bytes([0, 51, 255])))
    yield Case("palette-alpha.png", data, None, seen[indices], conversions=("palette", "alpha"))


def _deep() -> Iterator[Case]:
    """16 bits a channel: the high byte is kept, the low one is noise here and must not matter."""
    image = picture()
    noise = np.random.default_rng(0).integers(0, 256, (*SIDE, 4), dtype=np.uint8)
    deep = np.stack([image, noise[:, :, :3]], axis=3).reshape(SIDE[0], -1)  # big endian: high byte first
    yield Case("rgb16.png", png(16, 2, deep), None, image, conversions=("16-bit",))
    data = png(16, 2, deep, extra=png_chunk(b"tRNS", bytes(6)))
    yield Case("rgb16-alpha.png", data, None, image, conversions=("16-bit", "transparency-ignored"))
    deep = np.stack([image[:, :, 0], noise[:, :, 0]], axis=2).reshape(SIDE[0], -1)
    grey3 = np.repeat(image[:, :, :1], 3, axis=2)
    yield Case("grey16.png", png(16, 0, deep), None, grey3, conversions=("16-bit", "grey"))
    data = b"P5 %d %d 65535\n" % SIDE[::-1] + deep.tobytes()
    yield Case("grey16.pgm", data, None, grey3, conversions=("16-bit", "grey", "pnm"))
    sixteen = Image.fromarray(image[:, :, 0].astype(np.uint16) * 256 + noise[:, :, 0])
    yield Case("grey16.tif", encode(sixteen, "TIFF"), None, grey3, conversions=("16-bit", "grey", "tiff"))
    yield Case("lab.tif", encode(Image.new("LAB", SIDE[::-1]), "TIFF"), "unsupported")
    data = jpeg()
    at = data.index(b"\xff\xc0") + 4
    yield Case("twelve-bit.jpg", data[:at] + b"\x0c" + data[at + 1 :], "unsupported")
    yield Case("phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0", "unsupported")
    yield Case("float.tif", encode(Image.fromarray(image[:, :, 0].astype(np.float32)), "TIFF"), "unsupported")


def _moving() -> Iterator[Case]:
    """Animations: the first frame counts."""
    image = picture()
    flat = np.zeros_like(image)
    flat[:, :, 0] = 255
    frames = [Image.fromarray(a) for a in (flat, image, 255 - image)]
    moving = {"save_all": True, "append_images": frames[1:], "duration": 50}
    yield Case(
        "moving.gif", encode(frames[0], "GIF", **moving), None, flat, conversions=("palette", "first-frame", "gif")
    )
    cut = encode(frames[0], "GIF", **moving)[:-100]
    yield Case("moving-cut-late.gif", cut, None, flat, conversions=("palette", "first-frame", "gif"))
    yield Case("still.gif", encode(frames[0], "GIF"), None, flat, conversions=("palette", "gif"))
    data = encode(frames[0], "WEBP", lossless=True, **moving)
    yield Case("moving.webp", data, None, flat, conversions=("first-frame", "webp"))
    yield Case("moving.png", encode(frames[0], "PNG", **moving), None, flat, conversions=("first-frame",))
    pages = encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    yield Case("pages.tif", pages, None, flat, conversions=("first-frame", "tiff"))


def _refused() -> Iterator[Case]:
    image = picture()
    for name, data in {
        "jpg": jpeg(),
        "png": encode(image, "PNG"),
        "webp": encode(image, "WEBP", lossless=True),
    }.items():
        yield Case(f"truncated.{name}", data[: len(data) * 2 // 3], "truncated")
    yield Case("no-end-chunk.png", encode(image, "PNG")[:-12], "truncated")
    yield Case("truncated-late.jpg", jpeg()[:-20], "truncated")
    yield Case("truncated-early.jpg", jpeg()[:100], "truncated")
    yield Case("truncated-progressive.jpg", jpeg(progressive=True)[:-40], "truncated")
    yield Case("truncated.gif", encode(image, "GIF")[:-200], "truncated")
    yield Case("truncated.bmp", encode(image, "BMP")[:-200], "truncated")
    yield Case("zero.jpg", b"", "empty")
    yield Case("page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not-an-image")
    yield Case("text.png", b"this is a text about images\n", "not-an-image")
    yield Case("drawing.jpg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not-an-image")
    yield Case("header-only.png", _containers.PNG_SIGNATURE, "truncated")
    yield Case("start-only.jpg", b"\xff\xd8\xff\xd9", "truncated")
    bomb = png(8, 2, np.zeros((1, 90_000), np.uint8), (30_000, 30_000))
    yield Case("bomb.png", bomb, "too-many-pixels")
    huge = struct.pack("<HH", 65_535, 65_535)
    bomb = b"GIF89a" + huge + b"\x80\0\0" + bytes(6) + b",\0\0\0\0" + huge + b"\0\x02\x02\x4c\x01\0;"
    yield Case("bomb.gif", bomb, "too-many-pixels")
    frame = jpeg()
    at = frame.index(b"\xff\xc0") + 5
    yield Case("bomb.jpg", frame[:at] + struct.pack(">HH", 65_000, 65_000) + frame[at + 4 :], "too-many-pixels")
    yield Case("1x20000.png", encode(np.zeros((1, 20_000, 3), np.uint8), "PNG"), "too-small")
    yield Case("20x20000.png", encode(np.zeros((20, 20_000, 3), np.uint8), "PNG"), "too-elongated")
    yield Case("pixel.gif", encode(np.zeros((1, 1, 3), np.uint8), "GIF"), "too-small")
    yield Case("no-size.png", png(8, 2, np.zeros((1, 3), np.uint8), (0, 0)), "bad-header")
    whole = encode(image, "PNG")
    spoiled = whole.index(b"IDAT") + 30
    yield Case("spoiled.png", whole[:spoiled] + b"\xff\xff\xff" + whole[spoiled + 3 :], "undecodable")
