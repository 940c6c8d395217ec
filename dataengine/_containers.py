"""What surrounds the pixels in a JPEG, PNG or WebP file: read without decoding, and removed without changing a pixel.

Decoders are given files without metadata: what a broken EXIF block, a compressed text chunk or an animation extension
does to a decoder then needs no thought.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# JPEG markers (ITU-T T.81, table B.1); the second byte, the first is 0xFF.
_START_OF_SCAN = 0xDA
_EXIF_OR_XMP = 0xE1
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# JFIF (0xE0) and Adobe (0xEE) say what the components are; the other application segments and comments do not.
_METADATA = {*range(0xE1, 0xF0), 0xFE} - {0xEE}

_PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}

# Bytes of one value, by EXIF field type (EXIF 2.32, 4.6.2).
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Jpeg:
    """The header of a JPEG: (width, height) in pixels, and `bare`, the same file without metadata."""

    size: tuple[int, int]
    precision: int
    components: int
    process: int
    """The frame marker: 0xC0 and 0xC1 are sequential, 0xC2 is progressive."""
    exif: bytes | None
    bare: bytes
    num_scans: int
    """How often the decoder goes over the whole image: once, or some ten times for a progressive one."""


@dataclass(frozen=True)
class Png:
    """A PNG taken apart: `bare` is the same file with nothing but its pixels."""

    depth: int
    """Bits a channel."""
    colour: int
    """0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    exif: bytes | None
    animated: bool
    transparent: bool
    bare: bytes


def read_jpeg(data: bytes) -> Jpeg:
    """Walk the segments up to the first scan; EOFError when the file ends before it, ValueError for nonsense."""
    frame: bytes | None = None
    process = 0
    exif = None
    kept = bytearray(data[:2])
    position = 2
    while True:
        # Like libjpeg: anything before the next marker is skipped, and a marker may be padded with 0xFF.
        position = data.find(b"\xff", position)
        while position >= 0 and data[position + 1 : position + 2] == b"\xff":
            position += 1
        if position < 0 or position + 4 > len(data):
            raise EOFError("ends within the JPEG header")
        marker = data[position + 1]
        if marker == 0 or marker in _WITHOUT_LENGTH:
            position += 2
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if end > len(data):
            raise EOFError("ends within the JPEG header")
        if end < position + 4:
            raise ValueError(f"JPEG segment 0x{marker:02x} declares an impossible length")
        body = data[position + 4 : end]
        if marker == _EXIF_OR_XMP and body.startswith(b"Exif\0") and exif is None:
            exif = body
        if marker in _FRAMES and frame is None:
            frame, process = body, marker
        if marker == _START_OF_SCAN:
            scans = position
            kept += data[position:]
            break
        if marker not in _METADATA:
            kept += data[position:end]
        position = end
    if frame is None or len(frame) < 6:
        raise ValueError("JPEG without a frame header")
    precision, height, width, components = struct.unpack_from(">BHHB", frame)
    # Within the data of a scan 0xFF is followed by zero or a restart, so that every other marker is one.
    return Jpeg((width, height), precision, components, process, exif, bytes(kept), data.count(b"\xff\xda", scans))


def png_size(data: bytes) -> tuple[int, int]:
    """(width, height) that a PNG declares; EOFError when the file is too short to say, ValueError when it does not."""
    if len(data) < 33:
        raise EOFError("ends within the PNG header")
    if data[12:16] != b"IHDR":
        raise ValueError("PNG without a header chunk")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def read_png(data: bytes) -> Png:
    """Take a PNG apart; EOFError when it ends before its end chunk.

    A 16-bit transparent colour is left out of `bare`: with the low bytes dropped it would also name other colours.
    """
    depth, colour = data[24], data[25]
    kept = bytearray(PNG_SIGNATURE)
    exif, found = None, set()
    for kind, start, end in _png_chunks(data):
        if kind == b"eXIf":
            exif = data[start + 8 : end - 4]
        if kind in (b"acTL", b"tRNS"):
            found.add(kind)
        if kind in _PIXEL_CHUNKS and not (kind == b"tRNS" and depth == 16):
            kept += data[start:end]
    return Png(depth, colour, exif, animated=b"acTL" in found, transparent=b"tRNS" in found, bare=bytes(kept))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, first byte, end) of each chunk up to and including the end chunk, never more than one in memory."""
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            break
        kind = data[position + 4 : position + 8]
        yield kind, position, end
        if kind == b"IEND":
            return
        position = end
    raise EOFError("ends before the PNG end chunk")


def webp_is_lossy(data: bytes) -> bool:
    """Whether the first image of a WebP file was coded with VP8, which is lossy, rather than VP8L."""
    position = 12
    while position + 8 <= len(data):
        kind = data[position : position + 4]
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8 "
        # A frame holds chunks of its own after 16 bytes of placement and timing.
        position += 24 if kind == b"ANMF" else 8 + length + length % 2
    return False


def exif_orientation(exif: bytes) -> tuple[int, bool]:
    """(orientation 1..8, sound): 1 where the block gives none; not sound when its first directory is broken."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1, False
    found, sound = 1, True
    try:
        magic, directory = struct.unpack_from(order + "HI", tiff, 2)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        sound = magic == 42
        for start in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, length, where = struct.unpack_from(order + "HHII", tiff, start)
            size = _TYPE_SIZES.get(kind, 0) * length
            sound = sound and (size <= 4 or where + size <= len(tiff))
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, start + 8)
                usable = kind in (3, 4) and length == 1 and 1 <= value <= 8
                found, sound = (value, sound) if usable else (found, False)
    except struct.error:
        sound = False
    return found, sound
