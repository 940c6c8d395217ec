"""Named arrays as one .npz and back: equal arrays give equal bytes, and no bytes are believed or unpickled.

A .npz is a zip file, and a zip file states how much it swells to, lists as many members as it likes, and may have two
directories that disagree. So its directory is looked at before anything reads it, and its members before they are read.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from dataengine import codecs

_START = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip file can say
_END = struct.Struct("<4s4H2LH")
_SPACE = 256
"""Bytes of the directory that a member may take: 46 and its name."""


def encode(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Members `<name>.npy` in order of their names, stored as they are, dated 1980: what np.load reads."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            member = zipfile.ZipInfo(f"{name}.npy", _START)
            member.create_system = 3  # the same on every system
            archive.writestr(member, codecs.encode_npy(arrays[name]))
    return sink.getvalue()


def decode(data: bytes, names: Sequence[str], max_bytes: int) -> dict[str, np.ndarray]:
    """The arrays of these names; members of other names are not read.

    ValueError when the bytes are no .npz of at most a few members, are damaged or encrypted, lack a name, or when an
    array would take more than `max_bytes`, compressed or not.
    """
    try:
        _hold_to_limits(data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name: codecs.decode_npy(_member(archive, f"{name}.npy", max_bytes)) for name in names}
    except Exception as error:  # zipfile and zlib raise a dozen kinds for files that somebody has bent
        raise ValueError(f"no readable .npz: {error or type(error).__name__}") from error


def _hold_to_limits(data: bytes) -> None:
    """Of the record at the end, which has no comment here: a small directory, and no second record for large files."""
    end = data[-_END.size :]
    if len(end) < _END.size or not end.startswith(b"PK\x05\x06"):
        raise ValueError(f"expected a zip file without a comment, got {len(data)} bytes that begin {data[:8]!r}")
    num_members, size = _END.unpack(end)[4], _END.unpack(end)[5]
    if num_members > 16 or size > 16 * _SPACE:
        raise ValueError(f"a directory of {num_members} members in {size} bytes, expected at most 16")
    if data[-_END.size - 20 :].startswith(b"PK\x06\x07"):
        raise ValueError("a zip64 directory, expected a plain one")


def _member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed by method {info.compress_type}, expected none or deflate")
    if info.file_size > max_bytes:
        raise ValueError(f"{name} takes {info.file_size} bytes, at most {max_bytes} are read")
    with archive.open(info) as stream:
        # Never `read()`, which expands everything before it cuts it to the stated size. One byte more than that asks
        # for the end, where the checksum is looked at: a member that says less than it holds fails.
        return stream.read(info.file_size + 1)
