"""One tar per modality and shard: USTAR, one member a key, the same members always the same bytes."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dataengine import _tars
from dataengine._tars import Buffer


@dataclass(frozen=True)
class Member:
    """One file of a tar: the key, the suffix without its dot, and the content."""

    key: str
    suffix: str
    data: bytes


def tar_parts(members: Iterable[Member]) -> list[bytes]:
    """A tar of the members in the order given, USTAR, owner root, mode 0444, time 0: pieces to be written one by one.

    Headers by Python's tarfile and not webdataset's writer: that one seals a partial file when the code around it
    raises, imports torch, and leaves the tar dialect to Python's default. In pieces, because a shard's labels are
    encoded already: to copy a hundred megabytes once more into new memory costs as much as to hash them.
    """
    parts, size = [], 0
    for member in members:
        info = tarfile.TarInfo(f"{member.key}.{member.suffix}")
        info.size, info.mode, info.mtime = len(member.data), 0o444, 0
        info.uname = info.gname = "root"
        padding = -info.size % tarfile.BLOCKSIZE
        parts += [info.tobuf(tarfile.USTAR_FORMAT), member.data, bytes(padding)]
        size += tarfile.BLOCKSIZE + info.size + padding
    end = 2 * tarfile.BLOCKSIZE
    return [*parts, bytes(end + -(size + end) % tarfile.RECORDSIZE)]


def build_tar(members: Iterable[Member]) -> bytes:
    """The same in one piece."""
    return b"".join(tar_parts(members))


def read_tar(data: Buffer) -> Iterator[Member]:
    """The members of a tar in their order; ValueError when it is cut or damaged, or one is no regular file.

    Folders are passed over. Nothing is written or followed by a member's name.
    """
    view = memoryview(data)
    for key, suffix, start, stop in list_tar(data):
        yield Member(key, suffix, bytes(view[start:stop]))


def list_tar(data: Buffer) -> Iterator[tuple[str, str, int, int]]:
    """(key, suffix, first byte, end) of each member that `read_tar` gives, without copying any; the same errors."""
    for header in _tars.in_memory(data):
        if header.kind == "folder":
            continue
        if header.kind != "file":
            raise _tars.DamagedTar(f"{header.name!r} is a {header.kind}, expected a regular file")
        key, _, suffix = header.name.partition(".")
        yield key, suffix, header.offset, header.offset + header.size


def sha256(data: Buffer | Sequence[Buffer]) -> str:
    """Hex digest of some bytes, whole or in pieces."""
    found = hashlib.sha256()
    for part in [data] if isinstance(data, bytes | bytearray | memoryview) else data:
        found.update(part)
    return found.hexdigest()


def keys_sha256(keys: Iterable[str]) -> str:
    """Hex digest of an ordered key list: equal digests, aligned tars."""
    return sha256("\n".join(keys).encode())


def shard_name(shard: int) -> str:
    """`shard-00042`, the name of a shard without its suffix."""
    return f"shard-{shard:05d}"
