"""The members of a tar by its headers alone, for tars that anybody may have written.

tarfile walks a hostile tar for ever (a negative size), to the end of the stack (a thousand extended headers) or into
all memory (an extended header of gigabytes), so headers are parsed here (POSIX.1-2008, pax; GNU tar's long names).
Nothing is extracted, and no name is ever used as a path.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TypeAlias

MAX_EXTENDED = 1 << 20
"""Bytes of an extended header (a long name, PAX records); a name has 4 KiB on any file system."""

Buffer: TypeAlias = bytes | bytearray | memoryview

_BLOCK = tarfile.BLOCKSIZE
_KINDS = {
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE), "file"),
    tarfile.DIRTYPE: "folder",
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "named pipe",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, b"K")
# As for tarfile: what these say their size is, no content follows.
_WITHOUT_CONTENT = {"folder", "hard link", "symbolic link", "device", "named pipe"}


class DamagedTar(tarfile.ReadError, ValueError):
    """Bytes that are no tar, or no longer one."""


@dataclass(frozen=True)
class Header:
    """One member: its name as it stands there, its kind ("file", "folder", "device" …), and where its bytes are."""

    name: str
    kind: str
    offset: int
    size: int


def headers(read: Callable[[int, int], bytes], end: int) -> Iterator[Header]:
    """Every member of a tar of `end` bytes, in order, by what `read(position, size)` gives of it.

    DamagedTar after the last member that is whole. PAX records may give a member another name and size; those of
    global headers are ignored.
    """
    position = 0
    records: dict[bytes, bytes] = {}
    while True:
        block = read(position, _BLOCK)
        if len(block) < _BLOCK:
            raise DamagedTar("no end marker where the members end: cut short")
        if block == bytes(_BLOCK):
            return
        name, kind, size = _parsed(block)
        position += _BLOCK
        if kind in _EXTENDED:
            position, body = _extended(read, position, size, end)
            if kind == tarfile.GNUTYPE_LONGNAME:
                records[b"path"] = body.partition(b"\0")[0]
            elif kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                records |= _records(body)
            continue
        if kind == tarfile.GNUTYPE_SPARSE:
            position = _after_map(read, position, block)
        header = _header(name, kind, size, records, position)
        length = 0 if header.kind in _WITHOUT_CONTENT else header.size
        if length < 0 or position + length > end:
            raise DamagedTar(f"ends within {header.name}" if length > 0 else f"{header.name} has {length} bytes")
        yield header
        position += -(-length // _BLOCK) * _BLOCK
        records = {}


def in_memory(data: Buffer) -> Iterator[Header]:
    """The members of a whole tar."""
    view = memoryview(data)
    return headers(lambda position, size: bytes(view[position : position + size]), len(view))


def in_file(stream: IO[bytes]) -> Iterator[Header]:
    """The members of a seekable file; only their headers are read."""

    def read(position: int, size: int) -> bytes:
        stream.seek(position)
        return stream.read(size)

    return headers(read, stream.seek(0, io.SEEK_END))


def _extended(read: Callable[[int, int], bytes], position: int, size: int, end: int) -> tuple[int, bytes]:
    """(where the next header is, the content of an extended header)."""
    if not 0 <= size <= MAX_EXTENDED or position + size > end:
        raise DamagedTar(f"an extended header of {size} bytes, expected at most {MAX_EXTENDED}")
    return position + -(-size // _BLOCK) * _BLOCK, read(position, size)


def _records(body: bytes) -> dict[bytes, bytes]:
    """PAX records, each `LENGTH KEYWORD=VALUE` and a line feed, where the length counts all of it."""
    found, position = {}, 0
    while position < len(body) and body[position]:
        space = body.find(b" ", position, position + 20)
        digits = body[position : max(space, position)]
        stop = position + int(digits) if digits.isdigit() else 0
        keyword, equals, value = body[space + 1 : stop - 1].partition(b"=")
        if not space < stop <= len(body) or not equals or body[stop - 1 : stop] != b"\n":
            raise DamagedTar(f"a spoiled PAX record: {body[position : position + 20]!r}")
        found[keyword] = value
        position = stop
    return found


def _parsed(block: bytes) -> tuple[bytes, bytes, int]:
    """(name, type, size) of a header block whose checksum is right."""
    if _octal(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 0x20:
        raise DamagedTar("no end marker where the members end: cut short, or a header is spoiled")
    kind = block[156:157]
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    if kind == tarfile.AREGTYPE and name.endswith(b"/"):
        kind = tarfile.DIRTYPE
    # Sizes of 8 GiB and more are written in base 256, in two's complement.
    large = block[124] >= 0x80
    sign = -256 if block[124] == 0xFF else 0
    size = int.from_bytes(block[125:136], "big") + (sign << 80) if large else _octal(block[124:136])
    return name, kind, size


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise DamagedTar(f"no end marker where the members end: a header has the number {field!r}")
    return int(digits or b"0", 8)


def _header(name: bytes, kind: bytes, size: int, records: dict[bytes, bytes], position: int) -> Header:
    """The member that a header block and the records before it describe."""
    shown = records.get(b"path", name).decode("utf-8", "surrogateescape").rstrip("/")
    what = _KINDS.get(kind, f"member of type {kind!r}")
    if any(keyword.startswith(b"GNU.sparse.") for keyword in records):
        what = "sparse file"
    said = records.get(b"size")
    if said is not None and not (said.isdigit() and len(said) < 20):
        raise DamagedTar(f"{shown} has a size of {said[:20]!r} bytes")
    return Header(shown, what, position, size if said is None else int(said))


def _after_map(read: Callable[[int, int], bytes], position: int, block: bytes) -> int:
    """Where the content of an old GNU sparse file begins: after as many blocks of its map as there are."""
    more = block[482]
    while more:
        more = read(position, _BLOCK)[504:505] not in (b"", b"\0")
        position += _BLOCK
    return position
