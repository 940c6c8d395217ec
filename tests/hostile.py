"""What somebody who means harm writes: tars, images, arrays, tables. Every byte is made here, none is downloaded."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib

import numpy as np
from PIL import Image

from tests.nasty import png_chunk

END = bytes(1024)
TEXTS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\" onmouseover=alert(1) x=\"",
    "' autofocus onfocus=alert(1) '",
    "</style></script><script>alert(1)</script>",
    "<svg/onload=alert(1)>",
    "javascript:alert(1)",
    "<a href=javascript:alert(1)>x</a>",
    "{{ 7 * 7 }}{% raw %}${7*7}",
    "<!--", "]]>", "&lt;b&gt;&#x3c;b",
)  # fmt: skip


def tar_header(
    name: bytes = b"a.jpg", size: int | bytes = 0, kind: bytes = b"0", link: bytes = b"", magic: bytes = b"ustar\x0000"
) -> bytes:
    """One header block with a right checksum, whatever it says; a size of bytes is put there as it is."""
    block = bytearray(512)
    for at, value in ((0, name[:100]), (100, b"0000644\0"), (108, b"0000000\0" * 2), (136, b"00000000000\0")):
        block[at : at + len(value)] = value
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157], block[157 : 157 + len(link)], block[257:265] = kind, link, magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def wide(size: int) -> bytes:
    """A size in base 256, which can be enormous or negative."""
    return (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)


def member(name: bytes, data: bytes = b"", kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A header and its content, padded."""
    return tar_header(name, len(data), kind, link) + data + bytes(-len(data) % 512)


def pax(**records: bytes) -> bytes:
    """An extended header; `__` in a keyword is a dot."""
    body = b""
    for name, value in records.items():
        text = b" %s=%s\n" % (name.replace("__", ".").encode(), value)
        length = len(text) + len(str(len(text)))
        body += str(length + (len(str(length)) > len(str(len(text))))).encode() + text
    return member(b"pax", body, b"x")


def encode(image: np.ndarray, kind: str, **settings: object) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, kind, **settings)
    return sink.getvalue()


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def png_with(*chunks: bytes) -> bytes:
    """A good PNG with more chunks behind its header."""
    plain = encode(image(), "PNG")
    return plain[:33] + b"".join(chunks) + plain[33:]


def png_bombs() -> dict[str, bytes]:
    """PNGs whose pixels are harmless and whose metadata is not."""
    huge = zlib.compress(bytes(80 << 20), 9)
    return {
        "text.png": png_with(png_chunk(b"zTXt", b"k\0\0" + huge)),
        "international.png": png_with(png_chunk(b"iTXt", b"k\0\1\0\0\0" + huge)),
        "profile.png": png_with(png_chunk(b"iCCP", b"k\0\0" + huge)),
        "chunks.png": png_with(png_chunk(b"aaAa", b"") * 300_000),
    }


def header_bombs() -> dict[str, bytes]:
    """Small files that declare enormous images."""
    small = encode(image(), "WEBP", lossless=True)[12:]
    frame = bytes(6) + (63).to_bytes(3, "little") + (47).to_bytes(3, "little") + bytes(4) + small
    side = (12_000).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + side + side + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame + bytes(len(frame) % 2)
    jpeg = encode(image(), "JPEG", progressive=True)
    scan = jpeg.index(b"\xff\xda")
    return {
        "canvas.webp": b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body,
        "tile.tif": tiff_tile(12_000),
        "page.tif": tiff_tile(16, (60_000, 60_000)),
        "scans.jpg": jpeg[:-2] + jpeg[scan:-2] * 300 + jpeg[-2:],
    }


def tiff_tile(side: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A TIFF of one compressed tile, of any size, for an image of any size."""
    data = zlib.compress(bytes(min(side, 12_000) ** 2 * 3), 9)
    tags = [(256, 4, size[0]), (257, 4, size[1]), (258, 3, None), (259, 3, 8), (262, 3, 2), (277, 3, 3), (284, 3, 1)]
    tags += [(322, 4, side), (323, 4, side), (324, 4, None), (325, 4, len(data))]
    start = 8 + 2 + 12 * len(tags) + 4
    out = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(tags))
    for tag, kind, value in tags:
        many = 3 if tag == 258 else 1
        found = {258: start, 324: start + 6}.get(tag, value)
        out += struct.pack("<HHI", tag, kind, many) + struct.pack("<HH" if kind == 3 and many == 1 else "<I", *(
            (found, 0) if kind == 3 and many == 1 else (found,)))  # fmt: skip
    return out + bytes(4) + struct.pack("<HHH", 8, 8, 8) + data


def npy(header: str, body: bytes = b"", version: bytes = b"\1\0") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + body


def npy_lies() -> dict[str, bytes]:
    """Arrays whose headers promise more than is there, or something else than numbers."""
    shape = "{{'descr':'{}','fortran_order':False,'shape':{}}}"
    return {
        "exabytes": npy(shape.format("<f4", "(2000000000000000000,)")),
        "gigabytes": npy(shape.format("<f4", f"({1 << 36},)"), bytes(64)),
        "negative": npy(shape.format("<f4", "(-1,)"), bytes(64)),
        "longer": npy(shape.format("<f4", "(2,)"), bytes(64)),
        "empty items": npy(shape.format("|V0", f"({1 << 40},)")),
        "empty text": npy(shape.format("|S0", f"({1 << 40},)")),
        "no rows": npy(shape.format("<f4", "(0, 1000000000000000000000)")),
        "nested": npy(shape.format("<f4", "(" + "-" * 9000 + "1,)")),
        "brackets": npy("(" * 9000),
        "objects": npy(shape.format("|O", "(1,)"), b"cos\nsystem\n"),
        "version": npy(shape.format("<f4", "(1,)"), bytes(4), b"\3\0"),
        "npz": b"PK\3\4" + bytes(60),
    }


class Payload:
    """A pickle that makes a folder when it is loaded: the proof that somebody loaded it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def payload(path: object) -> bytes:
    return pickle.dumps(Payload(str(path)))


def deadly(root: str, shard: int, columns: tuple[str, ...], sample: float) -> object:
    """Checks the cells of a shard, and ends its process at shard 1: what a decoder with a fault may do."""
    from dataengine import validate

    if shard == 1:
        os._exit(9)
    return validate._check(root, shard, columns, sample)
